"""Where requests leave the paths of ordinary prefixes, and what is to be expected of one.

In a tree the depths at which requests leave a path are its branch points, which SGLang's
tree has as nodes. Counted are, of each node, the requests that shared all up to its end,
and of each tenant the tails, the tokens that a request did not share. A path that nobody
has left yet is likely to be left by such a tail: a question behind a document.

Of the paper's one histogram over all documents (arXiv 2605.05219) this is the part that
is true of all of them, the distance from the end; the rest is counted where it belongs.
"""

from __future__ import annotations

import bisect
import dataclasses
from array import array
from collections import deque
from collections.abc import Collection, Sequence

import numpy as np
from cachetools import LRUCache

from sglang_pic.forest.placement import Expected

# Nodes and tenants remembered.
MAX_NODES = 65536
MAX_TENANTS = 1024
# Requests of a tenant after which one counts half.
HALF_LIFE = 256
# Of a tenant's last requests: what is expected of a path that nobody has left.
RECENT = 256
# Tokens of a prompt that are looked through for ends of messages, and ends kept: the last.
MAX_LOOKED_AT = 32768
MAX_MESSAGES = 64

Tenant = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class End:
    """Where a node of the tree ends: its id, and the tokens up to there."""

    node: int
    depth: int


@dataclasses.dataclass(frozen=True)
class Prompt:
    """How long a prompt is, and the depths behind its last messages, rising."""

    tokens: int
    ends: Sequence[int] = ()

    @classmethod
    def of(cls, ids: array[int], eos_token_ids: Collection[int]) -> Prompt:
        """Of token ids, in which messages end with any of these."""
        first = max(0, len(ids) - MAX_LOOKED_AT)
        is_end = np.isin(np.asarray(ids[first:]), list(eos_token_ids))
        behind = np.flatnonzero(is_end)[-MAX_MESSAGES:] + first + 1
        return cls(len(ids), behind.tolist())

    def messages_behind(self, depth: int, grid: int) -> int | None:
        """How many messages end behind a depth that is itself, but for less than ``grid``
        tokens, the end of one; else nothing."""
        in_front = bisect.bisect_right(self.ends, depth)
        if not in_front or depth - self.ends[in_front - 1] >= grid:
            return None
        return len(self.ends) - in_front


@dataclasses.dataclass(frozen=True)
class _Tail:
    """Of one request.

    Attributes:
        tokens: that it did not share.
        messages: of which so many ends, if it left a path at the end of another.
        begun: how far it began a path, from 0 where it left one as others do, to 1 where
            all others had left later.
        is_first: it left a path where nobody had before.
    """

    tokens: int
    messages: int | None
    begun: float
    is_first: bool

    def left_at(self, prompt: Prompt) -> int:
        """The depth at which a prompt is left by such a tail."""
        if self.messages is not None and self.messages < len(prompt.ends):
            return prompt.ends[-1 - self.messages]
        return prompt.tokens - self.tokens


class _Recent:
    """What is remembered of one tenant."""

    def __init__(self) -> None:
        self.clock = 0
        self.tails: deque[_Tail] = deque(maxlen=RECENT)

    def add(
        self, prompt: Prompt, shared: int, *, has_left: bool, is_first: bool, grid: int
    ) -> None:
        self.clock += 1
        tail = prompt.tokens - shared
        begun = 1.0
        if has_left and self.tails:
            later = sum(other.tokens <= tail - grid for other in self.tails)
            begun = later / len(self.tails)
        messages = prompt.messages_behind(shared, grid) if has_left else None
        self.tails.append(_Tail(tail, messages, begun, is_first))

    def ahead(self, prompt: Prompt, shared: int) -> list[Expected]:
        """What is expected of the part of a prompt that is not shared; the deepest first.
        It is left for the first time as often as what was begun of late has been, and once
        in one more (the rule of succession)."""
        left = [tail for tail in self.tails if tail.begun < 1]
        begun = sum(tail.begun for tail in self.tails)
        chance = (sum(tail.is_first for tail in left) + 1) / (begun + 1)
        shares = sum(1 - tail.begun for tail in left)
        depths = sorted(((tail.left_at(prompt), 1 - tail.begun) for tail in left), reverse=True)
        found, passes = [], 0.0
        for depth, share in depths:
            if depth < shared:
                break
            passes += chance * share / shares
            found.append(Expected(depth, passes))
        return found


class Overlaps:
    """Counts, by tenant. There is no clock but the requests themselves: the same requests
    are counted alike on every rank.

    Args:
        grid: states are kept in multiples of so many tokens; what differs by less is alike.
    """

    def __init__(self, grid: int):
        self._grid = grid
        self._passes: LRUCache[int, tuple[float, int]] = LRUCache(MAX_NODES)
        self._recent: LRUCache[Tenant, _Recent] = LRUCache(MAX_TENANTS)

    def note(self, tenant: Tenant, path: Sequence[End], prompt: Prompt, *, has_left: bool) -> None:
        """A prompt has shared a path up to its last end.

        Args:
            has_left: it left the path where no state is; else it goes on from its end.
        """
        recent = self._recent.get(tenant)
        if recent is None:
            recent = self._recent[tenant] = _Recent()
        shared = path[-1].depth if path else 0
        recent.add(
            prompt,
            shared,
            has_left=has_left,
            is_first=has_left and all(end.node not in self._passes for end in path[-1:]),
            grid=self._grid,
        )
        passes = 0.0
        for end in reversed(path):
            passes = max(passes, self._of(end.node, recent.clock))
            self._passes[end.node] = (passes + 1, recent.clock)

    def _of(self, node: int, clock: int) -> float:
        """Of a node that was split off one below it, nothing: it was passed as often."""
        count, when = self._passes.get(node, (0.0, clock))
        return float(count * 0.5 ** ((clock - when) / HALF_LIFE))

    def is_left(self, tenant: Tenant) -> bool:
        """Whether any of a tenant's last requests left a path where no state is."""
        recent = self._recent.get(tenant)
        return recent is not None and any(tail.begun < 1 for tail in recent.tails)

    def expected(self, tenant: Tenant, path: Sequence[End], prompt: Prompt) -> list[Expected]:
        """What is expected of a prompt that shares a path; the deepest first."""
        recent = self._recent.get(tenant)
        if recent is None:
            return []
        shared = path[-1].depth if path else 0
        found = recent.ahead(prompt, shared + self._grid)
        new = found[-1].passes if found else 0.0
        passes = 0.0
        for end in reversed(path):
            passes = max(passes, self._of(end.node, recent.clock))
            found.append(Expected(end.depth, new + passes))
        return found

    def forget(self) -> None:
        """The tree was emptied."""
        self._passes.clear()
        self._recent.clear()
