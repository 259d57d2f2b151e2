"""Rows of a recipe that is yet to be written: how many, of which format, how long. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from lorasft.data.examples import CANONICAL, read_blocks, shape_block
from lorasft.data.report import Report
from lorasft.errors import DataError
from lorasft.hub import find_local
from lorasft.recipe import DataSettings

CHARACTERS = 4.0  # of a token, where no tokenizer is at hand
FRAME = 6  # tokens that a template puts around a message, more or less
_ENCODED = 200  # examples that tell how many characters a token has


@dataclass
class Survey:
    """What was found in rows that can be trained on."""

    report: Report = field(default_factory=Report)
    kinds: dict[str, None] = field(default_factory=dict)  # formats, of each file its own
    roles: dict[str, None] = field(default_factory=dict)
    texts: list[str] = field(default_factory=list)  # of the first examples
    digests: set[int] = field(default_factory=set)  # of different contents
    sizes: list[tuple[int, int]] = field(default_factory=list)  # of each example: characters, messages

    def lengths(self, base: str) -> list[int]:
        """About how many tokens each example has, sorted: by the tokenizer of `base` where that is at hand."""
        counts: list[int] = []
        rate, file = CHARACTERS, find_local(base, "tokenizer.json")
        if file.is_file():
            from tokenizers import Tokenizer

            encoded = Tokenizer.from_file(str(file)).encode_batch(self.texts, add_special_tokens=False)
            counts = [*map(len, encoded)]
            rate = sum(map(len, self.texts)) / max(1, sum(counts))
        counts += [math.ceil(size / rate) for size, _ in self.sizes[len(counts) :]]
        return sorted(count + FRAME * messages for count, (_, messages) in zip(counts, self.sizes, strict=True))


def survey_rows(data: DataSettings) -> Survey:
    """Read all rows of `data.train`. Raises the errors of rows and files that a run would."""
    survey = Survey()
    for block in (block for source in data.train for block in read_blocks(source, data)):
        own = Report()
        for example in shape_block(block, data, report=own):
            said = [message["content"] for message in example.messages]
            text = example.text or "\n".join([*said, *map(CANONICAL.encode, example.tools or ())])
            survey.sizes.append((len(text), len(said)))
            survey.digests.add(example.digest)
            survey.texts += [text] if len(survey.texts) < _ENCODED else []
            survey.roles |= {message["role"]: None for message in example.messages}
        survey.report.join(own)
        survey.kinds[block.kind] = None
    survey.report.raise_errors()
    if not survey.sizes:
        where = ", ".join(source.path for source in data.train)
        raise DataError("no rows to train on", where=where, hint="are the files empty, or all their rows blank?")
    return survey
