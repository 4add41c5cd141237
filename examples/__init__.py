"""Policies to try Plaudit with, and the simulated people who rate them."""
