"""Rows of data -> token ids and labels -> micro-batches."""
