"""Consensus: whether tensor-parallel ranks still keep the same things.

Each rank plans, keeps and evicts by itself. What it decides by depends on no value that
its heads compute, so that all decide alike; if they did not, prefixes would differ in
length, and the ranks would wait for each other for ever. So every rank counts what it
has kept and lost into a digest, and they are compared now and then.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import torch

T = TypeVar("T")
# Requests of ours between two comparisons, which take a round trip of a few bytes.
EVERY = 32


@dataclasses.dataclass(frozen=True)
class Group:
    """The tensor-parallel ranks of one scheduler, or one that is alone.

    Attributes:
        group: of ``torch.distributed``, on the host.
    """

    rank: int = 0
    size: int = 1
    group: Any = None

    def gather(self, value: T) -> list[T]:
        """Every rank's value, the first's first. Every rank must ask at the same point
        of the stream of requests."""
        if self.size == 1:
            return [value]
        told: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(told, value, group=self.group)
        return told


ALONE = Group()


class Consensus(Protocol):
    """Told what one rank decides."""

    def note(self, event: str, name: str) -> None:
        """Something was kept, or has gone."""
        ...

    def arrived(self) -> None:
        """A request of ours has come: at the same point of the stream on every rank."""
        ...


class OneRank:
    """Nobody to differ from."""

    def note(self, event: str, name: str) -> None:
        pass

    def arrived(self) -> None:
        pass


class AllRanks:
    """Compares digests every so many requests.

    Args:
        gather: as ``Group.gather``.
        differ: told once that they do not agree.
    """

    def __init__(self, gather: Callable[[int], Sequence[int]], differ: Callable[[str], None]):
        self._gather = gather
        self._differ = differ
        self._digest = 0
        self._events = self._arrived = 0

    def note(self, event: str, name: str) -> None:
        self._events += 1
        told = f"{self._digest} {event} {name}".encode()
        # One bit less than an int64 has.
        self._digest = int.from_bytes(hashlib.blake2b(told, digest_size=8).digest(), "big") >> 1

    def arrived(self) -> None:
        self._arrived += 1
        if self._arrived % EVERY == 0 and len(set(self._gather(self._digest))) > 1:
            self._differ(
                f"tensor-parallel ranks differ in what they keep, after {self._events} changes"
            )
