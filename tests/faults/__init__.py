"""Runs that are killed on purpose, what they leave, and whether the same run goes on from it bit for bit."""
