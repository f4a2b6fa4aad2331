"""Segments on their way from the store: read ahead, then filled in piece by piece.

The front asks for them and comes again until they are here or will not come
(``server.fetching``). On the scheduler's thread nothing waits for the store; pages are
reserved and filled, so many bytes a time. Of several tensor-parallel ranks all take a
segment, or none does.
"""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Sequence
from typing import Any

import torch

from sglang_pic.forest.consensus import Group
from sglang_pic.forest.forest import Forest
from sglang_pic.forest.keys import segment_id
from sglang_pic.link.policy import floor_to
from sglang_pic.manage.kv import KvPages
from sglang_pic.manage.outgoing import Outgoing
from sglang_pic.store.reading import Read, Reader, Want
from sglang_pic.store.value import Codec

# Filled into pages at one command.
FILL_BYTES = 64 << 20
# A value's head, and what its states may take beyond what is usual.
SLACK = 1 << 20

# What has become of one.
LOOKING, COMING, HERE, GONE = "looking", "coming", "here", "gone"
# Another request brought it.
CAME_MEANWHILE = "came_meanwhile"
# Why it has not come.
NO_ROOM, UNKNOWN = "no_room", "not_asked_for"


@dataclasses.dataclass
class _Coming:
    """One that is wanted: ``filled`` tokens of its reserved pages are."""

    want: Want
    named: bool
    seam: int
    slots: torch.Tensor | None = None
    filled: int = 0


class Incoming:
    """Segments of one scheduler on their way from the store."""

    def __init__(
        self,
        forest: Forest,
        kv: KvPages,
        codec: Codec,
        reader: Reader,
        outgoing: Outgoing,
        ranks: Group,
    ):
        self._forest = forest
        self._kv = kv
        self._codec = codec
        self._reader = reader
        self._outgoing = outgoing
        self._ranks = ranks
        self._coming: dict[str, _Coming] = {}

    def want(self, salt: str, path: array, seam: int) -> Want:
        """The value of a segment that a link of this seam width needs."""
        forest = self._forest
        heads = forest.carried.heads(len(path) - len(forest.segments.context), seam)
        return Want(self._codec.name(salt, path, heads), salt, path, self.most(len(path)))

    def most(self, tokens: int) -> int:
        """Bytes that the value of a path of so many tokens has at most."""
        each = self._forest.cost.kv_bytes + array("q").itemsize
        return tokens * each + 2 * self._forest.carried.usual_nbytes + SLACK

    def begin(self, salt: str, paths: Sequence[array], *, seam: int, named: bool) -> None:
        """Read these, compile context first, ahead of their link."""
        forest, wants = self._forest, []
        for path in paths:
            name = segment_id(salt, None, path[len(forest.segments.context) :])
            record = forest.segments.find_held(name)
            if record is not None and forest.holder.is_ready(record, seam):
                continue
            coming = self._coming.get(name)
            if coming is not None and coming.seam == seam:
                coming.named |= named
                continue
            if coming is not None:
                self.drop(name)
            self._coming[name] = _Coming(self.want(salt, path, seam), named, seam)
            wants.append(self._coming[name].want)
        self._reader.begin(wants)

    def look(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """Go on with these; what has become of each, alike on all ranks.

        Returns:
            ``{"state", "reason", "seconds", "bytes"}`` each.
        """
        told = self._ranks.gather([self._told(name) for name in names])
        left, found = FILL_BYTES, []
        for i, name in enumerate(names):
            states = [one[i] for one in told]
            worst = next((one for one in states if one["state"] == GONE), None)
            if worst is not None:
                self.drop(name)
                found.append(worst)
                continue
            state = max(states, key=lambda one: (-_ORDER[one["state"]], one["seconds"]))
            if state["state"] == HERE and state["reason"] is None:
                state = {**state, "bytes": sum(one["bytes"] for one in states)}
                if left > 0:
                    state, spent = self._take(name, state, left)
                    left -= spent
                else:
                    state = {**state, "state": COMING}
            found.append(state)
        return found

    def _told(self, name: str) -> dict[str, Any]:
        """What this rank knows of one; ``HERE``: its value is."""
        coming = self._coming.get(name)
        read = self._reader.find(coming.want.name) if coming is not None else None
        if read is None and self._forest.segments.is_held(name):
            return {"state": HERE, "reason": CAME_MEANWHILE, "seconds": 0.0, "bytes": 0}
        if read is None:
            return {"state": GONE, "reason": UNKNOWN, "seconds": 0.0, "bytes": 0}
        state, reason = _state_of(read)
        return {"state": state, "reason": reason, "seconds": read.seconds, "bytes": read.nbytes}

    def _take(self, name: str, state: dict[str, Any], most: int) -> tuple[dict[str, Any], int]:
        """Fill some of a segment's pages; what has become of it then, and bytes filled."""
        coming, forest = self._coming[name], self._forest
        read = self._reader.find(coming.want.name)
        assert read is not None and read.saved is not None
        saved = read.saved
        if coming.slots is None:
            held = floor_to(len(saved.path), forest.pages.page_size)
            coming.slots = forest.holder.reserve(held, evict=True)
            if coming.slots is None:
                self.drop(name)
                return {**state, "state": GONE, "reason": NO_ROOM}, 0
        each = max(1, forest.cost.kv_bytes)
        first, count = coming.filled, len(coming.slots)
        coming.filled = min(count, first + max(1, most // each))
        self._kv.fill(saved, coming.slots, first, coming.filled)
        spent = (coming.filled - first) * each
        if coming.filled < count:
            return {**state, "state": COMING}, spent
        slots, coming.slots = coming.slots, None
        self._outgoing.know(coming.want.name)
        if not forest.holder.adopt(saved, slots, named=coming.named, evict=True):
            state = {**state, "state": GONE, "reason": NO_ROOM}
        self.drop(name)
        return state, spent

    def drop(self, name: str) -> None:
        """Nobody waits for it any more: nothing of it is kept."""
        coming = self._coming.pop(name, None)
        if coming is None:
            return
        self._reader.drop(coming.want.name)
        if coming.slots is not None:
            self._forest.holder.unreserve(coming.slots)

    def drop_all(self) -> None:
        """``drop`` every one."""
        for name in list(self._coming):
            self.drop(name)

    def clear(self) -> None:
        """Everything was flushed, reserved pages too."""
        self._coming.clear()
        self._reader.clear()


# Of several ranks the one that is behind tells.
_ORDER = {LOOKING: 0, COMING: 1, HERE: 2}


def _state_of(read: Read) -> tuple[str, str | None]:
    if not read.done:
        return (COMING if read.known else LOOKING), None
    if read.problem is not None:
        return GONE, read.problem.reason
    return HERE, None
