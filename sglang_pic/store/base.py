"""``SegmentStore``: where values are kept, whoever keeps them.

A store has a budget and an order of eviction of its own. It may be gone, slow, full or
wrong: what it says is a value or a ``Problem``, and ``Guarded`` makes one of whatever its
client raises.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np

# Kinds of problems, for reports and metrics.
ABSENT = "not_in_store"
TOO_LARGE = "too_large"
REFUSED = "store_refused"
RAISED = "store_failed"
UNLISTED = "store_lists_nothing"
DROPPED = "too_much_waits"

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Problem:
    """Why a store did not do what it was asked for: of a kind, and in words."""

    reason: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


class SegmentStore(Protocol):
    """Values by name. Called from several threads at once, never the scheduler's."""

    def put(self, name: str, value: np.ndarray) -> Problem | None:
        """Keep a value, uint8 [n], in the place of what has that name."""
        ...

    def get(self, name: str, most: int) -> np.ndarray | Problem:
        """A value, uint8 [n] that is the caller's; none of more than ``most`` bytes."""
        ...

    def exist(self, names: Sequence[str]) -> list[bool] | Problem:
        """Which of these there are."""
        ...

    def size(self, name: str) -> int | Problem:
        """Bytes of a value."""
        ...

    def remove(self, name: str) -> Problem | None:
        """Forget a value; nothing where there is none."""
        ...

    def names(self, group: str) -> list[str] | Problem:
        """Names that begin so, where the store can list them."""
        ...


class Guarded:
    """A store that raises nothing.

    Args:
        store: whose exceptions become problems.
    """

    def __init__(self, store: SegmentStore):
        self._store = store

    def put(self, name: str, value: np.ndarray) -> Problem | None:
        return _guarded(lambda: self._store.put(name, value))

    def get(self, name: str, most: int) -> np.ndarray | Problem:
        return _guarded(lambda: self._store.get(name, most))

    def exist(self, names: Sequence[str]) -> list[bool] | Problem:
        return _guarded(lambda: self._store.exist(names))

    def size(self, name: str) -> int | Problem:
        return _guarded(lambda: self._store.size(name))

    def remove(self, name: str) -> Problem | None:
        return _guarded(lambda: self._store.remove(name))

    def names(self, group: str) -> list[str] | Problem:
        return _guarded(lambda: self._store.names(group))


def _guarded(call: Callable[[], T]) -> T | Problem:
    try:
        return call()
    except Exception as error:
        return Problem(RAISED, f"{error!r:.300}")


def too_large(size: int, most: int) -> Problem:
    """A value that is not read."""
    return Problem(TOO_LARGE, f"{size} bytes, at most {most} are read")


def buffer(nbytes: int) -> Any:
    """uint8 [nbytes], not initialised."""
    return np.empty(nbytes, dtype=np.uint8)
