"""A file that another thread writes: while one block is computed, the one before it goes to the disk."""

from __future__ import annotations

import errno
import hashlib
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import BinaryIO

from torch import Tensor, uint8

_COPIED = 4 << 20  # bytes copied at once
_WAITING = 2  # blocks in memory that are not written yet
_FLUSH = 64 << 20  # bytes after which the system is told to begin with the disk, which it would do at the end


class Writer:
    """Writes blocks and copies stretches of other files, in the order given. The system's errors are raised here.

    `sha256`, of all that was written, is complete when the writer is left.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.sha256 = hashlib.sha256()
        self.unflushed = 0
        self.thread, self.disk = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self.waiting: deque[Future[None]] = deque()
        self.flushing: Future[None] | None = None

    def write(self, block: Tensor | bytes) -> None:
        """Append the bytes of `block`, which must not change any more."""
        content = block if isinstance(block, bytes) else block.contiguous().view(-1).view(uint8).numpy().data
        self._submit(self.thread.submit(self._write, content))

    def copy(self, source: BinaryIO, start: int, *, size: int) -> None:
        """Append `size` bytes of `source` from `start` on; the kernel copies, or shares the blocks where it can."""
        self._submit(self.thread.submit(self._copy, source, start, size))

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        try:
            while self.waiting and kind is None:
                self.waiting.popleft().result()
            if self.flushing and kind is None:
                self.flushing.result()
        finally:
            self.thread.shutdown(cancel_futures=True)
            self.disk.shutdown(cancel_futures=True)

    def _submit(self, future: Future[None]) -> None:
        self.waiting.append(future)
        while len(self.waiting) > _WAITING:
            self.waiting.popleft().result()

    def _write(self, content: bytes | memoryview) -> None:
        self.file.write(content)
        self.sha256.update(content)
        self._flush(len(content))

    def _copy(self, source: BinaryIO, start: int, size: int) -> None:
        self.file.flush()
        target, end = self.file.fileno(), start + size
        while start < end:
            content = os.pread(source.fileno(), min(_COPIED, end - start), start)
            self.sha256.update(content)
            try:
                done = os.copy_file_range(source.fileno(), target, len(content), offset_src=start)
            except OSError:  # not between these two file systems
                done = os.write(target, content)
            if done < len(content):
                raise OSError(errno.EIO, "the copy was cut short")
            start += done
            self._flush(done)

    def _flush(self, written: int) -> None:
        self.unflushed += written
        if self.unflushed >= _FLUSH and (self.flushing is None or self.flushing.done()):
            self.unflushed = 0
            self.file.flush()
            self.flushing = self.disk.submit(os.fdatasync, self.file.fileno())
