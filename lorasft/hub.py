"""The hub, which may be out of reach: found out once and quickly, where its client would try for a minute."""

from __future__ import annotations

import functools
import os
import re
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lorasft.errors import CapacityError, DeviceError, LorasftError, ModelError, UnsafeError, out_of_memory

SECONDS = 10.0
_AWAY = {"LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectionError", "ConnectError", "ConnectTimeout"}
_SAFE = "take a base that transformers knows"


def hub_error() -> str | None:
    """Why the hub does not answer, or None when it does. Any answer will do."""
    address = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        urllib.request.urlopen(address, timeout=SECONDS).close()
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        # Somebody who refuses answers, and the client has certificates of its own.
        if not isinstance(error, urllib.error.HTTPError) and not isinstance(reason, ssl.SSLError):
            return f"{address} does not answer: {reason}"
    return None


@functools.cache
def find_hub() -> None:
    """Before the first request to the hub: when it does not answer, let its client use what it has, and ask nobody."""
    import huggingface_hub.constants

    if not huggingface_hub.constants.HF_HUB_OFFLINE and hub_error():
        os.environ["HF_HUB_OFFLINE"] = "1"  # for what is imported later
        huggingface_hub.constants.HF_HUB_OFFLINE = True


def is_hub_id(name: str) -> bool:
    """Whether `name` could be `OWNER/NAME` on the hub, and is not written as a path; what is in `runs/` is a run."""
    return bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name)) and not name.startswith("runs/")


def is_folder(name: str, *, hint: str = "name a model folder, or a hub id as OWNER/NAME") -> bool:
    """Whether `name` is a folder; else it is on the hub, which is found. Raises ModelError when it can be neither."""
    if Path(name).is_dir():
        return True
    if not is_hub_id(name):
        raise ModelError("there is no such folder", where=name, hint=hint)
    find_hub()
    return False


def find_local(base: str, name: str) -> Path:
    """Where the file `name` of a model is, in its folder or the hub's cache, if it is there; asks nobody."""
    from huggingface_hub import try_to_load_from_cache

    kept = None if Path(base).is_dir() or not is_hub_id(base) else try_to_load_from_cache(base, name)
    return Path(kept) if isinstance(kept, str) else Path(base, name)


@contextmanager
def loading(what: str, name: str, *, hint: str, safe: str = _SAFE, kind: Any = ModelError) -> Iterator[None]:
    """Say in plain words why a library cannot load `what` of the folder or hub id `name`; it may raise anything.

    Raises DeviceError for a hub out of reach, CapacityError, UnsafeError for code (`safe`: its hint), or else `kind`.
    """
    try:
        yield
    except LorasftError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # the one of tokenizers
            raise
        said = " ".join(str(error).split())[:200] or type(error).__name__
        if out_of_memory(error) or "Cannot allocate memory" in str(error):
            said, kind, hint = f"out of memory while loading {what}", CapacityError, "free memory, or a smaller base"
        elif "offloaded to the disk" in str(error):
            said, kind = "the base does not fit into memory, and is stored so that it cannot be streamed", CapacityError
            hint = "merge with --onto dequantized, or with --no-check"
        elif not Path(name).is_dir() and _is_away(error):
            said, kind = "there is no such folder, the hub cannot be reached, and this is not in its cache", DeviceError
            hint = "connect, or name a local folder; HF_HUB_OFFLINE, if it is set, forbids asking"
        elif re.search("custom code|trust_remote_code|Dataset scripts", str(error)):
            said, kind, hint = f"{what} needs code of its own, which lorasft does not run", UnsafeError, safe
        else:
            said = f"cannot load {what}: {said}"
        raise kind(said, where=name, hint=hint) from error


def _is_away(error: BaseException | None) -> bool:
    """Whether an error came of a hub that is out of reach."""
    while error is not None and type(error).__name__ not in _AWAY:
        error = error.__cause__ or error.__context__
    return error is not None
