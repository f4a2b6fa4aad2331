"""Earlier turns of linked conversations.

What a linked request computes (seams, question, answer) saw cores that were
compiled elsewhere, so it is no prefix for anybody else. For the next turn of the
same conversation it is: the prompt begins with the same tokens and names the
same segments. What a turn computed is kept as a path of its own in the tree,
under a namespace that stands for everything in front of it and between:

    first = H(tenant, adapter, cores)        a core: positions, segment, tokens
    next  = H(first, tokens reused of it, further cores)

A turn that links no further segment grows its predecessor's path; one that does
begins a path of its own behind it. A namespace is a hash; what it stands for is
kept beside it and compared.
"""

from __future__ import annotations

import dataclasses
import hashlib
from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from cachetools import LRUCache

if TYPE_CHECKING:
    from sglang_pic.linear.state import CoreState

MAX_TURNS = 8192
_PREFIX = "pic\x1fturn\x1f"


@dataclasses.dataclass(frozen=True)
class Core:
    """Reused tokens in front of computed ones: their positions, the segment they
    belong to (``None`` for an ordinary prefix), and a digest of the tokens."""

    start: int
    end: int
    segment: str | None
    digest: bytes

    @classmethod
    def of(cls, ids: array, start: int, end: int, segment: str | None) -> Core:
        return cls(start, end, segment, hashlib.blake2b(ids[start:end].tobytes()).digest())


def _salts(
    whose: tuple[str, ...], cores: Sequence[Core], before: str | None, reused: int
) -> list[str]:
    """Namespaces behind the first core, the first two, and so on, in one pass."""
    digest = hashlib.blake2b(repr((whose, before, reused)).encode(), digest_size=16)
    salts = []
    for core in cores:
        digest.update(repr((core.start, core.end, core.segment, core.digest)).encode())
        salts.append(_PREFIX + digest.hexdigest())
    return salts


@dataclasses.dataclass(frozen=True)
class Turn:
    """What stands in front of a path of computed tokens.

    Attributes:
        whose: the tenant's namespace, adapter and state policy.
        cores: those that it adds to its predecessor's.
        before: namespace of the predecessor, ``None`` for the first turn.
        reused: tokens of the predecessor's path in front of this one.
    """

    whose: tuple[str, ...]
    cores: tuple[Core, ...]
    before: str | None = None
    reused: int = 0

    @property
    def salt(self) -> str:
        """Namespace of the path."""
        return _salts(self.whose, self.cores, self.before, self.reused)[-1]


@dataclasses.dataclass(frozen=True)
class Chain:
    """Earlier turns that a row reuses.

    Attributes:
        turn: the last of them.
        cores: cores in front of its end, those of all turns.
        slots: int64, slots reused of each turn, whole pages.
        nodes: nodes that end them.
        tokens: reused of the last turn's path.
        state: of the linear layers behind the last turn; ``None`` in models without.
    """

    turn: Turn
    cores: int
    slots: tuple[torch.Tensor, ...]
    nodes: tuple[int, ...]
    tokens: array
    state: CoreState | None = None

    @property
    def reused(self) -> int:
        """Tokens of all turns."""
        return sum(slots.numel() for slots in self.slots)


class Turns:
    """Which turns there are. The tree holds their tokens and pages."""

    def __init__(self) -> None:
        self._turns: LRUCache[str, Turn] = LRUCache(MAX_TURNS)
        # How long the ordinary prefix was, by what follows it.
        self._prefixes: LRUCache[tuple[tuple[str, ...], str], int] = LRUCache(MAX_TURNS)
        self._versions: LRUCache[tuple[tuple[str, ...], str | None], int] = LRUCache(MAX_TURNS)
        self._added = 0

    def __bool__(self) -> bool:
        return bool(self._turns)

    def add(self, turn: Turn, first: str | None) -> None:
        """Remember a turn whose path has been kept, of a conversation that began with
        this segment."""
        self._turns[turn.salt] = turn
        self._added += 1
        self._versions[turn.whose, first] = self._added
        if turn.before is None:
            cores = [core for core in turn.cores if core.segment is not None]
            prefix = sum(core.end for core in turn.cores if core.segment is None)
            if cores:
                assert cores[0].segment is not None
                self._prefixes[turn.whose, cores[0].segment] = prefix

    def remove(self, salt: str) -> None:
        """Nothing is held of a turn any more."""
        self._turns.pop(salt, None)

    def version(self, whose: tuple[str, ...], first: str | None) -> int:
        """Changes whenever a turn is added that began with this segment."""
        return self._versions.get((whose, first), 0)

    def prefix_of(self, whose: tuple[str, ...], segment: str) -> int | None:
        """Tokens of ordinary prefix in front of the first turn that began with this
        segment, or ``None``."""
        return self._prefixes.get((whose, segment))

    def longest(
        self, whose: tuple[str, ...], cores: Sequence[Core], before: str | None, reused: int
    ) -> Turn | None:
        """The turn behind ``before`` that has most of these cores, in their order;
        behind a turn at least one."""
        salts = _salts(whose, cores, before, reused)
        for n in range(len(cores), 0, -1):
            turn = self._turns.get(salts[n - 1])
            if turn is not None and turn == Turn(whose, tuple(cores[:n]), before, reused):
                return turn
        return None

    def forget(self) -> None:
        """The tree was emptied."""
        self._turns.clear()
        self._prefixes.clear()
        self._versions.clear()
