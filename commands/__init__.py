"""The command line's groups, one file each, and what they share. `plaudit.py` puts them together; logic lives in the rooms."""
