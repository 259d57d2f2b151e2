"""The reasoning of an answer: a field of its own, or <think>...</think> before the content."""

from __future__ import annotations

import re
from typing import Any

FIELDS = ("reasoning_content", "thinking", "reasoning")  # the names that transformers reads, in its order
INLINE = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)


def reasoning_of(message: dict[str, Any]) -> str:
    """The reasoning of a message, without tags; empty when there is none."""
    field = next((str(message[name]) for name in FIELDS if message.get(name)), "")
    inline = INLINE.match(message["content"])
    return (field or (inline.group(1) if inline else "")).strip()


def without_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """The message as it would be had there been no reasoning."""
    kept = {name: value for name, value in message.items() if name not in FIELDS}
    inline = INLINE.match(message["content"])
    return {**kept, "content": message["content"][inline.end() :]} if inline else kept
