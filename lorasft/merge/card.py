"""The model card of a merged folder: what it stands on and what was measured; no row of the data."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorasft.artifact import Artifact

_ON_THIS_MACHINE = re.compile(r"(?<![\w.<])/(?:[^\s/'\"]+/)+([^\s/'\"]+)")  # a path, and the name at its end


def make_card(artifact: Artifact, record: dict[str, Any]) -> str:
    """Markdown, with the front matter that hubs read. `record`: what merge.json holds."""
    given = artifact.model.base
    name = Path(given).name if Path(given).is_dir() else given  # no path of this machine
    trained = artifact.provenance
    parts = [
        f"---\nbase_model: {name}\nlibrary_name: transformers\npipeline_tag: text-generation\n---",
        f"# {name}, fine-tuned\n\nA LoRA adapter merged into full weights by lorasft {record['lorasft']}.",
        f"Base: commit {(trained and trained.commit) or 'unknown'}, fingerprint `{record['base']['fingerprint']}`.",
        f"The update was added to the {record['onto']} weights: {record['why']}.",
    ]
    if record["table"]:
        rows = [
            f"| {name} | {x['kl']:.1e} | {x['same_choice']:.1%} | {x['nll']:.4f} |"
            for name, x in record["table"].items()
        ]
        head = "| model | KL to what was trained | same likeliest token | nats a token |\n|---|---|---|---|\n"
        parts.append(f"## Answers, measured on {record['rows']}\n\n{head}" + "\n".join(rows))
    if artifact.run and trained:
        parts.append(_training(artifact.run, trained.record))
    return "\n\n".join(parts) + "\n"


def _training(run: Path, provenance: Mapping[str, Any]) -> str:
    report = provenance["report"]
    text = (
        f"## Training\n\n{report['train_examples']:,} examples, {report['held_out_examples']:,} held out, "
        f"{report['supervised_tokens']:,} learned tokens; data `{provenance['data']}`."
    )
    evaluations = [line for line in _metrics(run / "metrics.jsonl") if "eval_loss" in line]
    if evaluations:
        last = evaluations[-1]
        text += f" Held-out loss {last['eval_loss']:.4f} nats a token after step {last['step']}."
    recipe = _ON_THIS_MACHINE.sub(r"\1", (run / "recipe.yaml").read_text(encoding="utf-8")).strip()
    return f"{text}\n\n```yaml\n{recipe}\n```"


def _metrics(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("}")]
