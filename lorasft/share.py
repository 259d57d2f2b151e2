"""An adapter or a merge on the hub: its model card, which files go along, and how they are sent.

A file goes along if its name is on a list, and none on it holds a row of the data. Records are written anew: without
the places of this machine, and without secrets.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

from lorasft import __version__
from lorasft.adapter_files import CONFIG, WEIGHTS, read_adapter_weights
from lorasft.artifact import MERGE_RECORD, Artifact, find_artifact
from lorasft.errors import DeviceError, LorasftError, ModelError, RecipeError, UnsafeError, first_line
from lorasft.files import MANIFEST, verify_folder
from lorasft.hub import hub_error, is_hub_id
from lorasft.recipe.yaml_reader import dump_yaml
from lorasft.report import History
from lorasft.tensors import INDEX, find_weights
from lorasft.terminal import harmless, redact, say

REPO = "OWNER/NAME"  # in the card of a merge, until it has a place on the hub
_AS_IT_IS = re.compile(
    r"((generation|tokenizer|processor|preprocessor|video_preprocessor)_config|tokenizer|vocab|added_tokens"
    r"|special_tokens_map|model\.safetensors\.index|chat_template)\.json|(vocab|merges|LICENSE|NOTICE)\.txt"
    r"|[\w.-]+\.(model|tiktoken)|chat_template\.jinja|additional_chat_templates/[\w.-]+\.jinja"
)
_TEMPLATED = (".jinja", "tokenizer_config.json", "chat_template.json")  # where chat.system stands
_PLACES = {"base", "start", "template", "path", "output", "name", "rows", "base_model_name_or_path", "_name_or_path"}
_ROWS = re.compile(r"\.(\w*json\w*|[ct]sv|parquet|arrow)$")


def portable(value: Any, key: str = "") -> Any:
    """A record, or what is under its `key`, without secrets; of paths the last part, of the hub's cache the id."""
    if isinstance(value, dict):
        return {name: portable(one, name) for name, one in value.items()}
    if isinstance(value, list):
        return [portable(one, key) for one in value]
    if isinstance(value, str) and key in _PLACES:
        value = re.sub(r".*/models--([^/]+)--([^/]+)/snapshots/.*", r"\1/\2", value)
        on_hub = is_hub_id(value) and not Path(value).exists() and not _ROWS.search(value)
        value = value if on_hub else Path(value).name
    return redact(value) if isinstance(value, str) else value


def render_card(artifact: Artifact, repo: str, *, base: str, merge: Mapping[str, Any] | None = None) -> str:
    """The card of an adapter, or of its `merge` by that record, in Markdown. `base`: its name for others."""
    home = artifact.run or artifact.require_adapter()
    run = History(home) if (home / "recipe.yaml").is_file() else None
    changed = portable(run.recipe.model_dump(mode="json", exclude_defaults=True)) if run else {}
    recipe = dump_yaml({**changed, "model": {**changed.get("model", {}), "base": base}})
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), trim_blocks=True, lstrip_blocks=True)
    environment.finalize = lambda value: redact(harmless(str(value)))
    facts = {"found": artifact, "repo": repo, "base": base, "hub": is_hub_id(base), "merge": merge, "run": run}
    card = environment.get_template("card.md.jinja")
    return card.render(facts, recipe=recipe, portable=portable, version=__version__)


def gather(saved: str, repo: str, *, base: str | None, dry_run: bool) -> dict[str, Path | bytes]:
    """What of a run, an adapter or a merged folder is sent to `repo`, by its name there: a file as it is, or what is
    written anew; after all checks that need no hub. `base`: what the hub calls the base of an adapter.

    Raises ModelError for files that were changed or are not finite, UnsafeError for a secret in a template, RecipeError
    for an adapter whose base has no name on the hub, which a `dry_run` says only.
    """
    found = find_artifact(saved)
    folder = found.adapter or Path(saved)
    if not found.adapter and not (folder / MERGE_RECORD).is_file():
        what = "this is neither an adapter nor what merge wrote" if folder.exists() else "there is no such folder"
        raise ModelError(what, where=saved, hint="name a run, or a merge")
    if not found.adapter or (folder / MANIFEST).is_file():  # by train, which writes nothing that is not finite
        verify_folder(folder)
    else:
        read_adapter_weights(folder)
    files: dict[str, Path | bytes] = {}
    records = {CONFIG} if found.adapter else {MERGE_RECORD, "config.json"}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            raise UnsafeError("this is a link: it may lead to anything", where=path, hint="cp -rL makes a copy without")
        if name in records:
            changed = {"base_model_name_or_path": base} if base and name == CONFIG else {}
            files[name] = json.dumps(portable(json.loads(path.read_bytes())) | changed, indent=2).encode()
        elif _AS_IT_IS.fullmatch(name):
            files[name] = path
            if name.endswith(_TEMPLATED) and redact(text := path.read_text("utf-8", "replace")) != text:
                raise UnsafeError("a token or a password is in it", where=path, hint="train without it")
    if not found.adapter:
        card = (folder / "README.md").read_text("utf-8").replace(REPO, repo)
        return {"README.md": card.encode(), **files, **{path.name: path for path in find_weights(folder)}}
    base = str(base or portable(found.model.base, "base"))
    if not is_hub_id(base):
        what, hint = f"its base, {base}, has no name on the hub: others cannot find it", "--base OWNER/NAME"
        if not dry_run:
            raise RecipeError(what, where=found.model.base, hint=hint)
        say(f"{what}; a push is refused without {hint}")
    if found.recipe:
        recipe = portable(found.recipe.model_dump(mode="json"))
        files["recipe.yaml"] = dump_yaml({**recipe, "model": {**recipe["model"], "base": base}}).encode()
    return {"README.md": render_card(found, repo, base=base).encode(), **files, WEIGHTS: folder / WEIGHTS}


def push_files(files: dict[str, Path | bytes], repo: str, *, private: bool) -> str:
    """Make the repo if it is not there, and send all in one commit, which removes other weights. Returns its address.
    Raises DeviceError without hub or token, RecipeError for another kind of repo, or one that others (do not) see."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token

    if why := "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else hub_error():
        raise DeviceError(f"the hub is out of reach: {why}", where=repo, hint="connect; --dry-run needs no hub")
    try:
        if not get_token():
            raise DeviceError("there is no token for the hub", where=repo, hint="hf auth login, or set HF_TOKEN")
        api = HfApi()
        api.create_repo(repo, private=private, exist_ok=True)
        there = api.model_info(repo)
        names = {file.rfilename for file in there.siblings or ()}
        if names & ({"config.json"} if CONFIG in files else {CONFIG}):
            what = "this repo holds the other kind: an adapter, or full weights"
            raise RecipeError(what, where=repo, hint="another NAME")
        if there.private != private:
            what, hint = ("private", "no --public") if there.private else ("public", "--public")
            raise RecipeError(f"this repo is {what} already", where=repo, hint=f"{hint}, or another NAME")
        stale = [name for name in names - files.keys() if name.endswith((".safetensors", INDEX))]
        changes: list[Any] = [CommitOperationAdd(name, one) for name, one in files.items()]
        changes += map(CommitOperationDelete, stale)
        message = f"From lorasft {__version__}"
        return str(api.create_commit(repo, changes, commit_message=message, parent_commit=there.sha))
    except LorasftError:
        raise
    except Exception as error:  # the client raises a dozen kinds
        status = getattr(getattr(error, "response", None), "status_code", 0)
        known = {401: "the hub does not know this token", 403: "the token may not write there"}
        known |= {412: "the repo was changed by somebody else meanwhile"}
        what = known.get(status, f"the hub did not take it: {first_line(error.__cause__ or error)[:200]}")
        hint = "hf auth login, with a token that may; or another OWNER" if status in (401, 403) else "push again"
        raise DeviceError(what, where=repo, hint=hint) from None
