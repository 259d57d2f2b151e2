"""`python -m lorasft`."""

from lorasft.cli import entry

entry()
