"""Adapters back into full weights."""
