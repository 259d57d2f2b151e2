"""`lorasft plan`: how a recipe fits a memory, how it will be run, and how long that takes."""

from __future__ import annotations

import shutil
from argparse import ArgumentParser
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lorasft.commands.arguments import add_json, add_recipe, fill_in, parse_bytes, read_recipe, show, whole_number
from lorasft.errors import CapacityError
from lorasft.terminal import say, size_text


def add_arguments(parser: ArgumentParser) -> None:
    add_recipe(parser)
    parser.add_argument("--memory", type=parse_bytes, metavar="SIZE", help="8GiB, 24GB, ... (default: what is free)")
    parser.add_argument("--cards", type=whole_number, default=1, metavar="N", help="each with that memory (default: 1)")
    add_json(parser, "the plan")


def run(recipe: str, overrides: Sequence[str], memory: int | None, cards: int, as_json: bool) -> None:
    """Print the plan of `recipe` under `memory` bytes. Raises CapacityError when it does not fit."""
    settings = read_recipe(recipe, overrides)
    from lorasft.training.plan import plan_run

    plan = plan_run(settings, memory=memory, cards=cards)
    for notice in plan["notices"]:
        say(notice)
    width = min(shutil.get_terminal_size().columns, 100)
    words = fill_in("plan.txt.jinja", plan).splitlines()
    show(plan, [*picture(plan, width=width), "", *words], as_json=as_json)
    if not plan["holds"]:
        activations = plan["bytes"]["activations"] + plan["bytes"]["transient"]  # take 90 % of what is left
        needed, own = size_text(plan["peak"] + activations / 9), size_text(plan["libraries"])
        what = f"does not fit into {size_text(plan['memory'])}: it takes {needed}, {own} of it for driver and libraries"
        hint = "; or ".join(plan["suggestions"]) or "no single change suffices: a smaller model.base, or more memory"
        raise CapacityError(what, hint=hint)


def picture(plan: Mapping[str, Any], *, width: int) -> Iterator[str]:
    """Bytes by kind as bars, each of which begins where the one before ends, and their sum against the memory."""
    total, memory = plan["peak"], plan["memory"]
    columns = max(8, width - 27)  # beside names and sizes
    scale = columns / max(total, memory)
    full, thin, empty, beyond = "█▏░▓"
    before = 0
    for name, size in {**plan["bytes"], "libraries": plan["libraries"]}.items():
        if size:
            start, end = round(before * scale), round((before + size) * scale)
            yield f"{name:<14} {size_text(size):>9}  {' ' * min(start, columns - 1)}{full * (end - start) or thin}"
            before += size
    bar = (full * round(min(total, memory) * scale) or thin).ljust(columns, beyond if total > memory else empty)
    yield f"{'peak':<14} {size_text(total):>9}  {bar}"
    yield f"{'given' if plan['given'] else 'free here':<14} {size_text(memory):>9}"
