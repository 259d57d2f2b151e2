"""The verbs and their options. A command is imported only when it runs, so that `--help` answers at once."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from lorasft import __version__
from lorasft.errors import LorasftError


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = argparse.ArgumentParser(prog="lorasft", description=__doc__)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    return 0
