"""Figures to stand on, each with its negative control: `make bench-NAME`, `QUICK=1` for a minute's worth."""
