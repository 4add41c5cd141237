"""The chat page: one self-contained file."""
