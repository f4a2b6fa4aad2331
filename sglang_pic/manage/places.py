"""Segments from the store (``coming``): which are read, and the pages that they go into."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch

from sglang_pic.forest.forest import Forest
from sglang_pic.forest.keys import segment_id
from sglang_pic.link.policy import floor_to
from sglang_pic.manage.coming import SLACK
from sglang_pic.manage.kv import KvPages
from sglang_pic.store.reading import Want
from sglang_pic.store.value import Codec, SavedSegment


class _Pages:
    """Pages that a segment is filled into.

    Args:
        slots: int64, reserved, of its path.
    """

    def __init__(self, forest: Forest, kv: KvPages, saved: SavedSegment, slots: torch.Tensor):
        self._forest = forest
        self._kv = kv
        self._saved = saved
        self._slots = slots
        # Tokens.
        self._filled = 0

    @property
    def is_full(self) -> bool:
        return self._filled == len(self._slots)

    def fill(self, most: int) -> int:
        each = max(1, self._forest.cost.kv_bytes)
        first = self._filled
        self._filled = min(len(self._slots), first + max(1, most // each))
        self._kv.fill(self._saved, self._slots, first, self._filled)
        return (self._filled - first) * each

    def keep(self, *, named: bool) -> bool:
        return self._forest.holder.adopt(self._saved, self._slots, named=named, evict=True)

    def give_back(self) -> None:
        self._forest.holder.unreserve(self._slots)


class Places:
    """What is read of one scheduler's segments, and where it goes."""

    def __init__(self, forest: Forest, kv: KvPages, codec: Codec):
        self._forest = forest
        self._kv = kv
        self._codec = codec

    def _want(self, salt: str, path: array, seam: int) -> Want:
        """The value of a segment that a link of this seam width needs."""
        forest = self._forest
        heads = forest.carried.heads(len(path) - len(forest.segments.context), seam)
        return Want(self._codec.name(salt, path, heads), salt, path, self.most(len(path)))

    def most(self, tokens: int) -> int:
        """Bytes that the value of a path of so many tokens has at most."""
        each = self._forest.cost.kv_bytes + array("q").itemsize
        return tokens * each + 2 * self._forest.carried.usual_nbytes + SLACK

    def wants(self, salt: str, paths: Sequence[array], seam: int) -> list[tuple[str, Want]]:
        """What of these, compile context first, such a link lacks, by the names of segments."""
        forest, wants = self._forest, []
        for path in paths:
            name = segment_id(salt, None, path[len(forest.segments.context) :])
            record = forest.segments.find_held(name)
            if record is None or not forest.holder.is_ready(record, seam):
                wants.append((name, self._want(salt, path, seam)))
        return wants

    def place(self, saved: SavedSegment) -> _Pages | None:
        """Where a value goes; nowhere, if there is no room."""
        holder, page = self._forest.holder, self._forest.pages.page_size
        slots = holder.reserve(floor_to(len(saved.path), page), evict=True)
        return None if slots is None else _Pages(self._forest, self._kv, saved, slots)
