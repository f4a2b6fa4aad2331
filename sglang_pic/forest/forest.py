"""``SegmentForest``: the index of compiled segments.

A segment is a path of its own in SGLang's radix tree, under a namespace that
ordinary traffic cannot reach: the compile context first, then the segment's
tokens. The tree owns pages, compares tokens and counts references; the forest
names segments, finds their pages and says why one is missing. Nothing outside
this folder knows how it stores.
"""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from cachetools import LRUCache

from sglang_pic.errors import PicIntegrityError
from sglang_pic.forest.keys import namespace, segment_id
from sglang_pic.forest.nodes import SEGMENT, NodeIndex
from sglang_pic.link import report

if TYPE_CHECKING:
    from sglang_pic.linear.state import CoreState

MAX_RECORDS = 65536
# Of the KV budget: segments of links still on their way.
FRESH_SHARE = 0.5
# Such a link that has not come after so many others will not come.
FRESH_TICKS = 256
# Compiled by name, a segment begins as if it had been used twice.
NAMED_USES = 2


class PageTree(Protocol):
    """What the forest needs from the cache that owns the pages."""

    page_size: int

    def find_path(
        self, tokens: array, extra_key: str | None, salt: str
    ) -> tuple[int, torch.Tensor]:
        """Deepest node on the path of ``tokens`` and the slots held up to it
        (int64, whole pages, verified token by token). Marks the path as used."""
        ...

    def all_slots(self) -> torch.Tensor:
        """int64, every KV slot the tree owns."""
        ...


@dataclasses.dataclass
class SegmentRecord:
    """What the forest remembers of a compiled segment, held or not.

    Attributes:
        path: compile context plus segment.
        tokens: length of the segment.
        compiled, last_use: ticks of the forest's logical clock, which advances
            with every compile and every link.
        node: node of the tree that ends its pages; ``None`` where they are gone.
        named: it was compiled by name, not for a link.
        hits: links that reused it.
    """

    id: str
    path: array
    extra_key: str | None
    salt: str
    tokens: int
    compiled: int
    last_use: int
    node: int | None
    named: bool = False
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
    node: int
    slots: torch.Tensor
    miss: str | None
    state: CoreState | None = None


class SegmentForest:
    """Index over the compiled segments of every tenant.

    Args:
        tree: owner of the pages.
        context: compile context, a whole number of pages long.
        nodes: every node in eviction order.
        tree_index: which of its trees holds the segments.
        fresh_tokens: most tokens kept for links still on their way.
        on_release: told a segment that need wait for its link no longer.
        on_removed: told a segment that is taken for held no longer.
    """

    def __init__(
        self,
        tree: PageTree,
        context: Sequence[int],
        nodes: NodeIndex,
        tree_index: int,
        fresh_tokens: int,
        on_release: Callable[[str], None],
        on_removed: Callable[[str], None],
    ):
        if len(context) % tree.page_size:
            raise PicIntegrityError("the compile context is not a whole number of pages")
        self.context = array("q", context)
        self._tree = tree
        self._nodes = nodes
        self._tree_index = tree_index
        self._records: LRUCache[str, SegmentRecord] = LRUCache(MAX_RECORDS)
        # Of a link that has not come yet: id -> tick. Not offered to eviction.
        self._fresh: dict[str, int] = {}
        self._fresh_tokens = fresh_tokens
        self._on_release = on_release
        self._on_removed = on_removed
        self._clock = 0
        # Went before anyone used them a second time.
        self.on_probation_evicted = 0

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
            if record is None or (record.salt, record.extra_key) != (salt, extra_key):
                miss = report.MISSING
            else:
                miss = report.PARTLY_EVICTED if slots.numel() else report.EVICTED
        return Lookup(name, node, slots, miss)

    # -- a segment's life ---------------------------------------------------------

    def first_uses(self, name: str, *, named: bool, hits: int | None = None) -> int:
        """Uses that a segment begins with when it is compiled: ``hits`` of its former
        life, by default those that are remembered."""
        former = self._hits(name) if hits is None else hits
        return former + (NAMED_USES if named else 0)

    def _hits(self, name: str) -> int:
        record = self._records.get(name)
        return record.hits if record is not None else 0

    def note_compiled(
        self,
        path: array,
        extra_key: str | None,
        salt: str,
        node: int | None,
        *,
        named: bool = False,
        hits: int | None = None,
    ) -> str:
        """Record that a segment was compiled; returns its id.

        Args:
            node: node of the tree that ends its pages; ``None`` if it has no whole one.
            named: compiled by name: it may go whenever it is worth least. Otherwise
                a link has asked for it and is on its way.
            hits: of its former life; by default what is remembered of it.
        """
        name = segment_id(salt, extra_key, path[len(self.context) :])
        self._clock += 1
        uses = self.first_uses(name, named=named, hits=hits)
        self._records[name] = SegmentRecord(
            name, path, extra_key, salt, len(path) - len(self.context), self._clock, self._clock,
            node, named, self._hits(name) if hits is None else hits,
        )  # fmt: skip
        if node is None:
            return name
        self._nodes.note(self._tree_index, node, SEGMENT, salt, uses=uses, offer=named)
        self._nodes.end_segment(self._tree_index, node, name)
        if not named:
            self._fresh[name] = self._clock
            self._release_old()
        return name

    def note_named(self, record: SegmentRecord) -> None:
        """A held segment was asked for by name."""
        self.note_compiled(
            record.path, record.extra_key, record.salt, record.node, named=True, hits=record.hits
        )

    def note_hits(self, names: Collection[str]) -> None:
        """Advance the clock by one link that reused these segments."""
        self._clock += 1
        for name in names:
            record = self._records.get(name)
            if record is None:
                continue
            record.hits += 1
            record.last_use = self._clock
            if record.node is not None:
                self._nodes.use(self._tree_index, record.node, SEGMENT, record.salt)
            self._release(name)
        self._release_old()

    def note_gone(self, names: Collection[str]) -> None:
        """The last page of these segments is gone."""
        for name in names:
            self._fresh.pop(name, None)
            record = self._records.get(name)
            if record is not None:
                record.node = None
                self.on_probation_evicted += record.hits <= 1 and not record.named

    def expect(self, names: Collection[str]) -> None:
        """A link that uses these segments waits for others to be compiled: hold those
        that are held back from eviction, as if they had been compiled for it."""
        for name in names:
            record = self._records.get(name)
            if record is not None and record.node is not None and name not in self._fresh:
                self._fresh[name] = self._clock
                self._nodes.hold_back(self._tree_index, record.node)
        self._release_old()

    def remove_pages(self, name: str) -> int:
        """Free the pages of a segment that nothing else needs: no longer segment,
        no running request, no pin. It is remembered, and no longer held.

        Returns:
            Tokens freed.
        """
        record = self._records.get(name)
        if record is None or record.node is None:
            return 0
        node, record.node = record.node, None
        self._fresh.pop(name, None)
        self._nodes.unend_segment(self._tree_index, node, name)
        self._on_removed(name)
        return self._nodes.remove_path(self._tree_index, node)

    def delete(self, name: str) -> int:
        """``remove_pages``, and it is not remembered either."""
        freed = self.remove_pages(name)
        self._records.pop(name, None)
        return freed

    def release_fresh(self) -> None:
        """Memory is needed: links on their way may find their segments gone."""
        for name in list(self._fresh):
            self._release(name)

    def _release(self, name: str) -> None:
        if self._fresh.pop(name, None) is None:
            return
        record = self._records.get(name)
        if record is not None and record.node is not None:
            self._nodes.release(self._tree_index, record.node)
        self._on_release(name)

    def _release_old(self) -> None:
        held = sum(self._tokens_of(name) for name in self._fresh)
        for name, tick in list(self._fresh.items()):
            if held <= self._fresh_tokens and self._clock - tick <= FRESH_TICKS:
                break
            held -= self._tokens_of(name)
            self._release(name)

    def _tokens_of(self, name: str) -> int:
        record = self._records.get(name)
        return record.tokens if record is not None else 0

    def forget(self) -> None:
        """Drop every record; the tree was flushed."""
        self._records.clear()
        self._fresh.clear()

    # -- looking at it ------------------------------------------------------------

    @property
    def clock(self) -> int:
        return self._clock

    def is_in_use(self, record: SegmentRecord) -> bool:
        """Whether a running request, or a pin, holds the last of its pages."""
        return record.node is not None and self._nodes.is_held(self._tree_index, record.node)

    def value(self, record: SegmentRecord) -> float:
        """Where it stands in the eviction order: the lowest goes first."""
        return 0.0 if record.node is None else self._nodes.value(self._tree_index, record.node)

    def record(self, name: str, tenant: str | None) -> SegmentRecord | None:
        """A held segment of this tenant, or ``None``: those of others do not exist."""
        record = self._records.get(name)
        if record is None or record.node is None:
            return None
        return record if record.salt == namespace(self.context, tenant) else None

    def records(self, tenant: str | None) -> list[SegmentRecord]:
        """All held segments of this tenant, the last used first. O(segments)."""
        salt = namespace(self.context, tenant)
        held = [r for r in list(self._records.values()) if r.salt == salt and r.node is not None]
        return sorted(held, key=lambda record: -record.last_use)

    @property
    def count(self) -> int:
        """Segments held, of all tenants. O(segments)."""
        return sum(record.node is not None for record in list(self._records.values()))

    def holds(self, name: str, tenant: str | None) -> bool:
        """Whether this tenant has compiled a segment and its whole pages are held."""
        record = self._records.get(name)
        if record is None or record.salt != self.namespace(tenant):
            return False
        return record.node is not None or record.tokens < self._tree.page_size

    def is_held(self, name: str) -> bool:
        """Whether a segment of any tenant is held."""
        record = self._records.get(name)
        return record is not None and record.node is not None

    def slots(self, record: SegmentRecord) -> torch.Tensor:
        """int64, slots of a segment's path, compile context included."""
        return self._tree.find_path(record.path, record.extra_key, record.salt)[1]

    def namespace(self, tenant: str | None) -> str:
        """Where a tenant's segments live."""
        return namespace(self.context, tenant)

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
        """Raise ``PicIntegrityError`` unless every page has one owner, every
        segment's pages are whole, contiguous within the page, and owned by the
        tree, and what is recorded as held is."""
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
            if record.node is not None and held.numel() < record.tokens // page * page:
                raise PicIntegrityError(f"segment {record.id} is taken for held and is not")

    def _path_slots(self, record: SegmentRecord) -> torch.Tensor:
        _, slots = self._tree.find_path(record.path, record.extra_key, record.salt)
        return slots[len(self.context) :].cpu()
