"""Reads ahead of a link, on threads of its own: values come checked, or with a reason."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from array import array
from collections.abc import Callable, Sequence
from typing import Any, Generic, Protocol, TypeVar

from sglang_pic.store.base import ABSENT, Problem, SegmentStore
from sglang_pic.store.value import BadValue
from sglang_pic.store.workers import Workers

logger = logging.getLogger(__name__)

READERS = 4
# Batches and values that may wait for a reader.
MOST_WAITING = 1024
# Bytes of values that are read, or lie here until their pages are filled.
MOST_BYTES = 1 << 30
# Not read, since so much is in flight already.
BUSY = "store_busy"

Saved = TypeVar("Saved")
Decoded = TypeVar("Decoded", covariant=True)


class Decoder(Protocol[Decoded]):
    """Reads the values of one kind."""

    def decode(
        self, value: Any, name: str, *, salt: str, path: Sequence[int] | None = None
    ) -> Decoded:
        """What a value holds; raises ``BadValue``."""
        ...


@dataclasses.dataclass(frozen=True)
class Want:
    """A value that is wanted: its name, the namespace and token ids that it must be of,
    of a segment compile context first, and bytes that it has at most."""

    name: str
    salt: str
    path: array
    most: int


@dataclasses.dataclass(eq=False)
class Read(Generic[Saved]):
    """One value on its way.

    Attributes:
        saved: it, once it has come.
        problem: why it does not, if it does not.
        known: whether the store has it, once that is known.
        seconds, nbytes: that it took, looking included, and its size.
    """

    want: Want
    begun: float
    known: bool | None = None
    saved: Saved | None = None
    problem: Problem | None = None
    seconds: float = 0.0
    nbytes: int = 0
    done: bool = False
    dropped: bool = False


class Reader(Generic[Saved]):
    """Values on their way from a store. Asked from the scheduler's thread alone.

    Args:
        check: raises ``BadValue`` unless a value fits here.
    """

    def __init__(
        self,
        store: SegmentStore,
        codec: Decoder[Saved],
        check: Callable[[Saved], None],
        most_bytes: int = MOST_BYTES,
    ):
        self._store = store
        self._codec = codec
        self._check = check
        self._most = most_bytes
        self._workers = Workers("pic-store-read", READERS, MOST_WAITING)
        self._reads: dict[str, Read[Saved]] = {}
        self._lock = threading.Lock()
        self._flying = 0

    def begin(self, wants: Sequence[Want]) -> None:
        """Read these, unless they are on their way already."""
        begun, now = [], time.monotonic()
        for want in wants:
            if want.name in self._reads:
                continue
            read: Read[Saved] = Read(want, now)
            self._reads[want.name] = read
            with self._lock:
                fits = self._flying + want.most <= self._most
                self._flying += want.most
            if fits:
                begun.append(read)
            else:
                self._end(read, problem=Problem(BUSY))
        if begun and not self._workers.submit(lambda: self._look(begun)):
            for read in begun:
                self._end(read, problem=Problem(BUSY))

    def find(self, name: str) -> Read[Saved] | None:
        """What has become of one that was begun and not dropped."""
        return self._reads.get(name)

    def drop(self, name: str) -> None:
        """Nobody wants it any more, or it has been used."""
        read = self._reads.pop(name, None)
        if read is None:
            return
        with self._lock:
            read.dropped = True
            if read.done:
                self._flying -= read.want.most

    def clear(self) -> None:
        """Drop all."""
        for name in list(self._reads):
            self.drop(name)

    @property
    def flying(self) -> int:
        """Bytes counted for what is on its way, dropped or not."""
        return self._flying

    # -- on the readers' threads --------------------------------------------------------

    def _look(self, reads: Sequence[Read[Saved]]) -> None:
        """Which of these there are: the others need not be waited for."""
        there = self._store.exist([read.want.name for read in reads])
        for i, read in enumerate(reads):
            if isinstance(there, Problem) or not there[i]:
                self._end(read, problem=there if isinstance(there, Problem) else Problem(ABSENT))
                continue
            read.known = True
            if i == len(reads) - 1:
                self._get(read)
            elif not self._workers.submit(lambda read=read: self._get(read)):  # type: ignore[misc]
                self._end(read, problem=Problem(BUSY))

    def _get(self, read: Read[Saved]) -> None:
        want = read.want
        if read.dropped:
            self._end(read)
            return
        value = self._store.get(want.name, want.most)
        if isinstance(value, Problem):
            self._end(read, problem=value)
            return
        read.nbytes = len(value)
        try:
            saved = self._codec.decode(value, want.name, salt=want.salt, path=want.path)
            self._check(saved)
        except BadValue as error:
            logger.warning("sglang_pic: %s of the store is refused: %s", want.name, error)
            self._end(read, problem=Problem(error.reason, str(error)))
        except Exception as error:
            self._end(read, problem=Problem("unreadable", f"{error!r:.300}"))
        else:
            self._end(read, saved=saved)

    def _end(
        self, read: Read[Saved], *, saved: Saved | None = None, problem: Problem | None = None
    ) -> None:
        read.seconds = time.monotonic() - read.begun
        read.saved, read.problem = saved, problem
        with self._lock:
            # Last: who sees it done sees the rest.
            read.done = True
            if read.dropped:
                self._flying -= read.want.most
                read.saved = None
