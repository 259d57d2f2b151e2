"""What would make a recipe fit that does not: change one thing, predict again; in the recipe's own keys."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from lorasft.artifact import read_adapter_config
