"""Segments on their way from the store (``coming``), into pages that are reserved for them."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import torch

from sglang_pic.forest.consensus import Group
from sglang_pic.forest.forest import Forest
from sglang_pic.forest.keys import segment_id
from sglang_pic.link.policy import floor_to
from sglang_pic.manage.coming import SLACK, Coming
from sglang_pic.manage.kv import KvPages
from sglang_pic.manage.outgoing import Outgoing
from sglang_pic.store.reading import Reader, Want
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


class Incoming:
    """Segments of one scheduler on their way from the store."""

    def __init__(
        self,
        forest: Forest,
        kv: KvPages,
        codec: Codec,
        reader: Reader[SavedSegment],
        outgoing: Outgoing,
        ranks: Group,
    ):
        self._forest = forest
        self._kv = kv
        self._codec = codec
        self._coming = Coming(reader, ranks, forest.segments.is_held, self._place, outgoing.know)

    def want(self, salt: str, path: array, seam: int) -> Want:
        """The value of a segment that a link of this seam width needs."""
        forest = self._forest
        heads = forest.carried.heads(len(path) - len(forest.segments.context), seam)
        return Want(self._codec.name(salt, path, heads), salt, path, self.most(len(path)))

    def most(self, tokens: int) -> int:
        """Bytes that the value of a path of so many tokens has at most."""
        each = self._forest.cost.kv_bytes + array("q").itemsize
        return tokens * each + 2 * self._forest.carried.usual_nbytes + SLACK

    @property
    def count(self) -> int:
        """Segments that are on their way."""
        return len(self._coming)

    def begin(self, salt: str, paths: Sequence[array], *, seam: int, named: bool) -> None:
        """Read these, compile context first, ahead of their link."""
        forest, wants = self._forest, []
        for path in paths:
            name = segment_id(salt, None, path[len(forest.segments.context) :])
            record = forest.segments.find_held(name)
            if record is None or not forest.holder.is_ready(record, seam):
                wants.append((name, self.want(salt, path, seam)))
        self._coming.begin(wants, named=named)

    def _place(self, saved: SavedSegment) -> _Pages | None:
        holder, page = self._forest.holder, self._forest.pages.page_size
        slots = holder.reserve(floor_to(len(saved.path), page), evict=True)
        return None if slots is None else _Pages(self._forest, self._kv, saved, slots)

    def look(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """As ``Coming.look``."""
        return self._coming.look(names)

    def drop(self, name: str) -> None:
        """Nobody waits for it any more: nothing of it is kept."""
        self._coming.drop(name)

    def drop_all(self) -> None:
        """``drop`` every one."""
        self._coming.drop_all()

    def clear(self) -> None:
        """Everything was flushed, reserved pages too."""
        self._coming.clear()
