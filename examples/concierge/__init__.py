"""A tiny world with a hidden preference, and a tiny policy that lives in it."""
