"""Bases in 4 bit, kept for the next start: a base is quantized once on a machine.

What is kept is bitsandbytes' own kind of checkpoint, which transformers reads, in a folder that nobody else may write.
It is named after all that decides its bits, never changed once it is there, and hashed whenever it is used.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import BitsAndBytesConfig

from lorasft.errors import LorasftError, ModelError
from lorasft.files import MANIFEST, make_folder, need_space, remove_folder, staged_folder, verify_folder
from lorasft.tensors import fingerprint
from lorasft.terminal import say, size_text

Keep = Literal["auto"] | bool

_LEAST = 64 << 20  # bytes of weights below which quantizing takes no time that anyone would see
_UNUSED_DAYS = 30  # after which a kept base goes when another comes


def find_place(base: Path, commit: str | None, scheme: BitsAndBytesConfig, device: torch.device) -> Path:
    """Where the base in the folder `base` is kept in 4 bit, or would be.

    `commit`: of the hub, where it comes from there. Elsewhere a change anywhere in the weights shows in the time of
    their files, if not in `fingerprint`.
    """
    own, shared = os.environ.get("LORASFT_CACHE"), os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    root = Path(own or f"{shared}/lorasft") / "bases"
    files = sorted(base.glob("*.safetensors"))
    facts = {
        "base": commit or [fingerprint(base), *((path.name, path.stat().st_mtime_ns) for path in files)],
        "scheme": scheme.to_dict(),
        "device": device.type,
        "versions": {name: importlib.metadata.version(name) for name in ("transformers", "bitsandbytes")},
    }
    return root / hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def read_kept(place: Path, read: Callable[[str], Any]) -> Any | None:
    """What `read` makes of the kept base, or None where none is kept or what is there is damaged. Hashes are computed
    while it is read: both wait for the same bytes."""
    if not (_is_private(place.parent) and (place / MANIFEST).is_file()) or place.is_symlink():
        return None
    with ThreadPoolExecutor(1) as pool:
        check = pool.submit(verify_folder, place)
        try:
            model = read(str(place))
            check.result()
        except Exception as error:  # from bytes that are damaged, anything
            reason = check.exception() or error
            if not isinstance(reason, (ModelError, OSError)):
                raise
            say(f"the kept 4-bit base in {place} is damaged ({getattr(reason, 'what', reason)}): it is made again")
            with suppress(LorasftError, OSError):
                remove_folder(place)
            return None
    with suppress(OSError):
        os.utime(place)  # the day of its last use
    say(f"the 4-bit base that was kept is used: {place} (machine.cache_base=false: never)")
    return model


def keep_base(model: Any, place: Path, *, wanted: Keep) -> None:
    """Save a base that was just quantized to `place`, and say so; or say what is in the way, which is no error.
    The first process of a machine does it. Of two at once, the first one to end has done it."""
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    if (wanted == "auto" and size < _LEAST) or int(os.environ.get("LOCAL_RANK", "0")):
        return
    try:
        if not place.parent.exists():
            make_folder(place.parent)
            place.parent.chmod(0o700)
        if not _is_private(place.parent):
            raise ModelError(f"it must be yours alone: chmod 700 {place.parent}")
        need_space(place.parent, 2 * size)
        with staged_folder(place) as stage:
            model.save_pretrained(stage, max_shard_size="500MB", save_original_format=False)
        for path in place.parent.iterdir():  # kept bases, and what killed processes left of theirs
            ours = re.fullmatch(r"(\.(stage|trash)-)?[0-9a-f]{32}(-.*)?", path.name) and not path.is_symlink()
            if ours and time.time() - path.stat().st_mtime > _UNUSED_DAYS * 86400:
                remove_folder(path)
    except (LorasftError, OSError) as error:
        if not (_is_private(place.parent) and place.exists()):
            say(f"the 4-bit base is not kept in {place.parent}: {getattr(error, 'what', error)}")
        return
    say(f"the 4-bit base is kept for the next start: {size_text(size)} in {place} (machine.cache_base=false: never)")


def _is_private(folder: Path) -> bool:
    """Whether `folder` is there, ours, and open to nobody else."""
    with suppress(OSError):
        found = folder.stat()
        return folder.is_dir() and found.st_uid == os.geteuid() and not found.st_mode & 0o077
    return False
