"""Runs that are killed on purpose, what they leave, and whether the same run continues from it bit for bit."""
