"""Writes to a store in the background, from copies on the host."""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections import Counter
from collections.abc import Callable

import numpy as np
from cachetools import LRUCache

from sglang_pic.store.base import DROPPED, RAISED, Problem, SegmentStore
from sglang_pic.store.workers import Workers

logger = logging.getLogger(__name__)

# One: what is removed was written before.
WRITERS = 1
# Values and removals that may wait for a writer.
MOST_WAITING = 1024
# Bytes of copies that wait to be written.
MOST_BYTES = 512 << 20
# Of values that the store did not take it is remembered why.
MOST_REFUSED = 4096


@dataclasses.dataclass
class Written:
    """What a server has written since it started.

    Attributes:
        values, nbytes: that the store has taken.
        present: that it had already.
        dropped: for want of room among those that wait.
        failed: that it did not take, by reason.
    """

    values: int = 0
    nbytes: int = 0
    present: int = 0
    dropped: int = 0
    failed: Counter[str] = dataclasses.field(default_factory=Counter)


class Writer:
    """Values on their way to a store."""

    def __init__(self, store: SegmentStore, most_bytes: int = MOST_BYTES):
        self._store = store
        self._most = most_bytes
        self._workers = Workers("pic-store-write", WRITERS, MOST_WAITING)
        self._lock = threading.Lock()
        self._flying = 0
        # Names of values that wait, and why the last ones were not taken.
        self._waiting: Counter[str] = Counter()
        self._refused: LRUCache[str, Problem] = LRUCache(MOST_REFUSED)
        self.counts = Written()

    @property
    def flying(self) -> int:
        """Bytes of what waits, or is being written."""
        return self._flying

    def has_room(self, nbytes: int) -> bool:
        """Whether so much more may wait. What is larger than all of the room waits alone."""
        return self._flying == 0 or self._flying + nbytes <= self._most

    def write(
        self, name: str, encode: Callable[[], np.ndarray], nbytes: int, *, replace: bool = False
    ) -> bool:
        """Put a value; whether it may wait.

        Args:
            encode: makes it, on a thread of this.
            nbytes: about what it takes meanwhile.
            replace: what the store has by this name may be another.
        """

        def work() -> None:
            problem: Problem | None = Problem(RAISED)
            try:
                problem = self._write(name, encode, replace)
            finally:
                self._end(name, nbytes, problem)

        if not self.has_room(nbytes):
            self.counts.dropped += 1
            return False
        with self._lock:
            self._flying += nbytes
            self._waiting[name] += 1
        if self._workers.submit(work):
            return True
        self._end(name, nbytes, Problem(DROPPED))
        self.counts.dropped += 1
        return False

    def is_under_way(self, name: str) -> bool:
        """Whether a value waits, or is being written."""
        return name in self._waiting

    def refusal(self, name: str) -> Problem | None:
        """Why a value was not taken when it was last written."""
        with self._lock:
            return self._refused.get(name)

    def forgive(self, name: str) -> None:
        """It is to be written anew: why it was not taken counts no more."""
        with self._lock:
            self._refused.pop(name, None)

    def remove(self, name: str) -> None:
        """Have a value removed, as far as that can be."""
        self._workers.submit(lambda: self._note(self._store.remove(name)))

    def _end(self, name: str, nbytes: int, problem: Problem | None) -> None:
        """A value does not wait any more."""
        with self._lock:
            self._flying -= nbytes
            self._waiting[name] -= 1
            if not self._waiting[name]:
                del self._waiting[name]
            if problem is None:
                self._refused.pop(name, None)
            else:
                self._refused[name] = problem

    def _write(self, name: str, encode: Callable[[], np.ndarray], replace: bool) -> Problem | None:
        there = [False] if replace else self._store.exist([name])
        if isinstance(there, Problem):
            self._note(there)
            return there
        if there[0]:
            with self._lock:
                self.counts.present += 1
            return None
        value = encode()
        problem = self._store.put(name, value)
        if problem is not None:
            self._note(problem)
            return problem
        with self._lock:
            self.counts.values += 1
            self.counts.nbytes += len(value)
        return None

    def _note(self, problem: Problem | None) -> None:
        if problem is None:
            return
        logger.warning("sglang_pic: the store does not take a value: %s", problem)
        with self._lock:
            self.counts.failed[problem.reason] += 1
