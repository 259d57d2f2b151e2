"""The base in 4 bit, with adapters."""
