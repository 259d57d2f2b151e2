"""The recipe: its schema, the strict YAML reader, overrides, the dump."""
