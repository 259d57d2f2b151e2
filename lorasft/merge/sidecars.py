"""What lies beside the merged weights: the base's files, with the tokenizer, chat template and stops of training."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorasft.artifact import GENERATION_CONFIG, MERGE_RECORD, Artifact, read_stops
from lorasft.data.chat_format import ChatFormat
from lorasft.data.store import Tokens
from lorasft.data.templates import set_default_system
from lorasft.data.tokenizer import TEMPLATE, TOKENIZER, list_sidecars, load_tokenizer, own_files, read_tokenizer
from lorasft.errors import LorasftError, ModelError
from lorasft.files import MANIFEST, make_folder, read_objects, replace_file, write_file
from lorasft.recipe import ChatSettings
from lorasft.tensors import INDEX, SINGLE

_PROBES = (["user"], ["system", "user"], ["user", "assistant", "user"])  # roles of conversations


def write_sidecars(folder: Path, artifact: Artifact, rewritten: Mapping[str, Any]) -> None:
    """Copy to `folder` what lies beside the base's weights, with the contents in `rewritten` where there are any.

    The tokenizer's files are the base's where the adapter's gives the same ids, else the adapter's; the template is
    that of training, and generation stops where it did in training.
    """
    own, chat = own_files(artifact), artifact.chat
    told = chat.system is not None or chat.template is not None or (artifact.recipe and not own)
    trained = read_tokenizer(artifact) if own or told else None
    same = not trained or _has_ids_of(trained, artifact.base)
    replaced = TEMPLATE if same else TOKENIZER
    # Records of an earlier merge, and an index that loading passes over.
    left_out = {MERGE_RECORD, MANIFEST} | ({INDEX} if (artifact.base / SINGLE).is_file() else set())
    files, ends = list_sidecars(artifact.base), artifact.require_adapter() / GENERATION_CONFIG
    for name, path in (files | ({GENERATION_CONFIG: ends} if ends.is_file() else {})).items():
        if name in left_out or (trained and replaced.fullmatch(name)):
            continue
        make_folder((folder / name).parent)
        if name in rewritten:
            write_file(folder / name, json.dumps(rewritten[name], indent=2))
        else:
            shutil.copyfile(path, folder / name)
    if not trained:
        return
    if told:
        set_default_system(trained, artifact.chat)
    if not same:
        trained.save_pretrained(folder)
    else:
        trained.save_chat_templates(folder, {}, None, True)
        config = folder / "tokenizer_config.json"
        if (content := json.loads(config.read_bytes())).get("chat_template"):  # stale, and all that some servers read
            content["chat_template"] = trained.get_chat_template()
            replace_file(config, json.dumps(content, indent=2, ensure_ascii=False))
    end, stops, path = trained.eos_token_id, read_stops(folder), folder / GENERATION_CONFIG
    if end is not None and end not in stops:
        kept = next(read_objects(path), {})
        replace_file(path, json.dumps({**kept, "eos_token_id": [end, *stops]}, indent=2))


def _has_ids_of(trained: Any, base: Path) -> bool:
    """Whether a tokenizer is that of the folder `base`, but for its template."""
    with contextlib.suppress(ModelError):  # there may be none
        other = load_tokenizer(str(base))
        same: bool = trained.special_tokens_map == other.special_tokens_map
        return same and str(trained.backend_tokenizer.to_str()) == other.backend_tokenizer.to_str()
    return False


def compare_prompts(artifact: Artifact, merged: Path, rows: Sequence[Tokens]) -> None:
    """Raise ModelError unless the tokenizer in `merged` gives the texts of `rows` the same ids, conversations the same
    prompts and answers the same ends as what was trained."""
    trained, found = read_tokenizer(artifact), load_tokenizer(str(merged))
    texts = [trained.decode(row.ids) for row in rows] + [f"a{token} b" for token in trained.get_added_vocab()]
    wanted, given = ([one.ids for one in each.backend_tokenizer.encode_batch(texts)] for each in (trained, found))
    same = {"ids": wanted == given, "prompts": True}
    for roles in _PROBES:
        prompt = _render(trained, artifact.chat, roles)
        same["prompts"] &= prompt is None or prompt == _render(found, ChatSettings(), roles)
    same["ends of answers"] = trained.eos_token_id in (None, found.eos_token_id, *read_stops(merged))
    if wrong := [what for what, holds in same.items() if not holds]:
        raise ModelError(f"the merged folder gives other {', '.join(wrong)} than the adapter's", where=merged)


def _render(tokenizer: Any, chat: ChatSettings, roles: Sequence[str]) -> list[int] | None:
    """The ids of the prompt of a conversation; None where the template refuses it."""
    messages = [{"role": role, "content": f" Word {at} "} for at, role in enumerate(roles)]
    with contextlib.suppress(LorasftError):
        return ChatFormat(tokenizer, chat).prompt_ids(messages)
    return None
