"""``SegmentForest``: the index of compiled segments.

A segment is a path of its own in SGLang's radix tree, under a namespace that
ordinary traffic cannot reach: the compile context first, then the segment's
tokens. The tree owns pages, compares tokens, counts references and evicts in
LRU order, for segments and ordinary prefixes alike; the forest names segments,
finds their pages and says why one is missing. Nothing outside this folder
knows how it stores.
"""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from cachetools import LRUCache

from sglang_pic.errors import PicIntegrityError
from sglang_pic.forest.keys import namespace, segment_id
from sglang_pic.link import report

if TYPE_CHECKING:
    from sglang_pic.linear.state import CoreState

MAX_RECORDS = 65536


class PageTree(Protocol):
    """What the forest needs from the cache that owns the pages."""

    page_size: int

    def find_path(
        self, tokens: array, extra_key: str | None, salt: str
    ) -> tuple[Any, torch.Tensor]:
        """Deepest node on the path of ``tokens`` and the slots held up to it
        (int64, whole pages, verified token by token). Marks the path as used."""
        ...

    def all_slots(self) -> torch.Tensor:
        """int64, every KV slot the tree owns."""
        ...


@dataclasses.dataclass
class SegmentRecord:
    """What the forest remembers of a compiled segment.

    ``path`` is compile context plus segment; ``compiled`` and ``last_use`` are
    ticks of the forest's logical clock, which advances with every link.
    """

    id: str
    path: array
    extra_key: str | None
    salt: str
    tokens: int
    compiled: int
    last_use: int
    hits: int = 0


@dataclasses.dataclass(frozen=True)
class Lookup:
    """Result of looking one segment up.

    Attributes:
        id: the segment's name.
        node: handle to lock the segment's path with.
        slots: int64 [held], slots of its first ``held`` tokens, whole pages.
        miss: why less than all whole pages are held, or ``None``.
        state: what the segment's core does to linear layers, in hybrids.
    """

    id: str
    node: Any
    slots: torch.Tensor
    miss: str | None
    state: CoreState | None = None


class SegmentForest:
    """Index over the compiled segments of every tenant.

    Args:
        tree: owner of the pages.
        context: compile context, a whole number of pages long.
    """

    def __init__(self, tree: PageTree, context: Sequence[int]):
        if len(context) % tree.page_size:
            raise PicIntegrityError("the compile context is not a whole number of pages")
        self.context = array("q", context)
        self._tree = tree
        self._records: LRUCache[str, SegmentRecord] = LRUCache(MAX_RECORDS)
        self._clock = 0

    def find(self, tokens: array, extra_key: str | None, tenant: str | None) -> Lookup:
        """Look a segment up by content.

        Args:
            tokens: the segment's token ids.
            extra_key: SGLang's adapter key of the request.
            tenant: cache salt of the request; decides what it can see.
        """
        salt = namespace(self.context, tenant)
        name = segment_id(salt, extra_key, tokens)
        node, slots = self._tree.find_path(self.context + tokens, extra_key, salt)
        slots = slots[len(self.context) :]
        page = self._tree.page_size
        miss = None
        if slots.numel() < len(tokens) // page * page:
            record = self._records.get(name)
            if record is None:
                miss = report.MISSING
            else:
                miss = report.PARTLY_EVICTED if slots.numel() else report.EVICTED
        return Lookup(name, node, slots, miss)

    def note_compiled(self, path: array, extra_key: str | None, salt: str) -> str:
        """Record that a segment was compiled; returns its id."""
        tokens = path[len(self.context) :]
        name = segment_id(salt, extra_key, tokens)
        self._clock += 1
        record = self._records.get(name)
        hits = record.hits if record is not None else 0
        self._records[name] = SegmentRecord(
            name, path, extra_key, salt, len(tokens), self._clock, self._clock, hits
        )
        return name

    def note_hits(self, names: Sequence[str]) -> None:
        """Advance the clock by one link that reused these segments."""
        self._clock += 1
        for name in names:
            record = self._records.get(name)
            if record is not None:
                record.hits += 1
                record.last_use = self._clock

    def forget(self) -> None:
        """Drop every record; the tree was flushed."""
        self._records.clear()

    def dump(self) -> dict[str, Any]:
        """Every compiled segment with its pages, and what the rest of the tree holds.

        Returns:
            ``{"clock", "page_size", "context_tokens", "segments": [{"id",
            "tokens", "held", "pages", "hits", "compiled", "last_use"}],
            "segment_tokens", "prefix_tokens"}``; the last two count tokens of
            distinct pages held for segments and for ordinary prefixes.
        """
        page = self._tree.page_size
        segments = []
        owned: list[torch.Tensor] = []
        for record in list(self._records.values()):
            slots = self._path_slots(record)
            owned.append(slots)
            segments.append(
                {
                    "id": record.id,
                    "tokens": record.tokens,
                    "held": int(slots.numel()),
                    "pages": (slots[::page] // page).tolist(),
                    "hits": record.hits,
                    "compiled": record.compiled,
                    "last_use": record.last_use,
                }
            )
        total = self._tree.all_slots().numel()
        distinct = torch.cat(owned).unique().numel() if owned else 0
        return {
            "clock": self._clock,
            "page_size": page,
            "context_tokens": len(self.context),
            "segments": segments,
            "segment_tokens": distinct,
            "prefix_tokens": int(total) - distinct,
        }

    def check(self) -> None:
        """Raise ``PicIntegrityError`` unless every page has one owner and every
        segment's pages are whole, contiguous within the page, and owned by the tree."""
        page = self._tree.page_size
        slots = self._tree.all_slots()
        owned = set(slots.tolist())
        if len(owned) != slots.numel():
            raise PicIntegrityError("a KV slot has two owners in the tree")
        for record in list(self._records.values()):
            held = self._path_slots(record)
            if held.numel() % page:
                raise PicIntegrityError(f"segment {record.id} holds a part of a page")
            starts = held[::page]
            expected = (starts[:, None] + torch.arange(page)).reshape(-1)
            if bool((starts % page).any()) or not torch.equal(held, expected):
                raise PicIntegrityError(f"segment {record.id} is not made of whole pages")
            if not owned.issuperset(held.tolist()):
                raise PicIntegrityError(f"segment {record.id} names pages the tree does not own")

    def _path_slots(self, record: SegmentRecord) -> torch.Tensor:
        _, slots = self._tree.find_path(record.path, record.extra_key, record.salt)
        return slots[len(self.context) :].cpu()
