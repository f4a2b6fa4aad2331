"""A directory as a store: one file a value, on a disk or a shared file system.

A file is complete or not there: it is written under a name of its writer's own, flushed
and renamed. Several servers may share the directory. With a budget the files that were
used longest ago go first, by the time of their last change, which a read sets anew.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import tempfile
import threading
import time
from collections.abc import Sequence

import numpy as np

from sglang_pic.store.base import ABSENT, Problem, buffer, too_large

SUFFIX = ".segment"
_PART = ".part"
_NAME = re.compile(r"[0-9a-f]{16}-[0-9a-f]{32}")
# A part that nobody has touched for so long is of a writer that is gone.
STALE_S = 3600.0
# Bytes written between two looks at what all servers have written, as a share of the budget.
LOOK_SHARE = 0.02


class Directory:
    """Values as files.

    Args:
        path: made if it is not there.
        budget: bytes that all values in it may take; ``None`` for no limit.
    """

    def __init__(self, path: pathlib.Path, budget: int | None = None):
        self._path = path
        self._budget = budget
        self._lock = threading.Lock()
        # Bytes it may be written before the next look; the first write looks.
        self._left = 0.0

    def _file(self, name: str) -> pathlib.Path:
        return self._path / (name + SUFFIX)

    def put(self, name: str, value: np.ndarray) -> Problem | None:
        if self._budget is not None and len(value) > self._budget:
            return too_large(len(value), self._budget)
        self._path.mkdir(parents=True, exist_ok=True)
        handle, part = tempfile.mkstemp(_PART, name + ".", self._path)
        try:
            with open(handle, "wb", buffering=0) as file:
                left = value.data
                while left:
                    left = left[file.write(left) :]
                os.fsync(handle)
            os.replace(part, self._file(name))
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(part)
        self._flush()
        self._keep_budget(len(value))
        return None

    def get(self, name: str, most: int) -> np.ndarray | Problem:
        try:
            with open(self._file(name), "rb", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                if size > most:
                    return too_large(size, most)
                value = buffer(size)
                left = value.data
                while left:
                    count = file.readinto(left)
                    if not count:
                        break
                    left = left[count:]
        except FileNotFoundError:
            return Problem(ABSENT)
        if self._budget is not None:
            with contextlib.suppress(OSError):
                os.utime(self._file(name))
        # What was cut short meanwhile is refused by its checksum.
        return value[: size - len(left)]

    def exist(self, names: Sequence[str]) -> list[bool]:
        return [self._file(name).exists() for name in names]

    def size(self, name: str) -> int | Problem:
        try:
            return self._file(name).stat().st_size
        except FileNotFoundError:
            return Problem(ABSENT)

    def remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._file(name).unlink()

    def names(self, group: str) -> list[str]:
        found = (file.stem for file in self._path.glob(f"{group}*{SUFFIX}"))
        return sorted(name for name in found if _NAME.fullmatch(name))

    def _flush(self) -> None:
        handle = os.open(self._path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def _keep_budget(self, written: int) -> None:
        if self._budget is None:
            return
        with self._lock:
            self._left -= written
            if self._left > 0:
                return
            self._evict(self._budget)
            self._left = LOOK_SHARE * self._budget

    def _evict(self, budget: int) -> None:
        """Remove what was used longest ago until so much, and a little more, is free."""
        files, total = [], 0
        for entry in os.scandir(self._path):
            with contextlib.suppress(FileNotFoundError):
                known = entry.stat()
                if entry.name.endswith(_PART) and time.time() - known.st_mtime > STALE_S:
                    os.unlink(entry.path)
                elif entry.name.endswith(SUFFIX):
                    files.append((known.st_mtime, known.st_size, entry.path))
                    total += known.st_size
        goal = (1 - LOOK_SHARE) * budget
        for _, size, path in sorted(files):
            if total <= goal:
                break
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            total -= size
