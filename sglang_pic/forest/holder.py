"""``Holder``: a compile has ended; does it fit, what makes room, who keeps it.

A segment is held whole: its pages, what it carries beside them, its record and its
place in the eviction order come and go together, and this is where.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

import torch

from sglang_pic.forest.carried import Carried, Path
from sglang_pic.forest.consensus import Consensus
from sglang_pic.forest.cost import PrefillCost
from sglang_pic.forest.eviction import LINKABLE, InOrder
from sglang_pic.forest.keys import owner_of, segment_id
from sglang_pic.forest.nodes import SEGMENT, NodeIndex
from sglang_pic.forest.pages import Pages
from sglang_pic.forest.segments import SegmentRecord, Segments
from sglang_pic.link.policy import Outline, Seam, floor_to
from sglang_pic.store.value import SavedSegment

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req


# Links that make a segment worth keeping beyond this server.
WORTH = 2


class Holder:
    """Keeps and removes compiled segments.

    Args:
        rows: SGLang's table of request rows.
        allocator: SGLang's, of the pool's slots.
        evict: SGLang's eviction, of so many tokens.

    Attributes:
        on_worth: told a held segment that has been used twice, or was asked for by name.
    """

    def __init__(
        self,
        segments: Segments,
        pages: Pages,
        carried: Carried,
        nodes: NodeIndex,
        eviction: InOrder,
        cost: PrefillCost,
        rows: torch.Tensor,
        allocator: Any,
        evict: Callable[[int], object],
        consensus: Consensus,
    ):
        self._segments = segments
        self._pages = pages
        self._carried = carried
        self._nodes = nodes
        self._eviction = eviction
        self._cost = cost
        self._rows = rows
        self._allocator = allocator
        self._evict = evict
        self._consensus = consensus
        self.refused: Counter[str] = Counter()
        self.on_worth: Callable[[SegmentRecord], None] = lambda record: None

    # -- compiles -----------------------------------------------------------------------

    def begin(self, req: Req, seams: Collection[int], limit: int) -> Path:
        """A compile is about to run.

        Args:
            seams: widths that its links will have.
            limit: its first tokens that need not be computed are at most so many.

        Returns:
            Those that are held already, and where.
        """
        tokens = req.origin_input_ids[: floor_to(limit, self._pages.page_size)]
        held, node = self._pages.find(tokens, req.extra_key, req.cache_salt)
        return self._carried.begin(req, sorted(seams), Path(node, held))

    def keep(self, req: Req, *, named: bool) -> None:
        """Keep what a complete compile has computed, all of it or nothing."""
        kept = self._keep(req, named=named)
        self._consensus.note("kept" if kept else "refused", req.rid)
        self.refused["budget"] += not kept

    def _keep(self, req: Req, *, named: bool) -> bool:
        ids, space, extra_key = req.origin_input_ids, req.cache_salt, req.extra_key
        context = len(self._segments.context)
        name = segment_id(space, extra_key, ids[context:])
        uses = self._segments.first_uses(name, named=named)
        owner = owner_of(space, extra_key)
        if not self._carried.keep(req, name, owner, uses=uses, offer=named):
            return False
        fits, node = self._keep_pages(req, context)
        if not fits:
            if not self._segments.is_held(name):
                self._carried.drop(name)
            return False
        self._note(name, ids, extra_key, space, node, named=named)
        return True

    def _keep_pages(self, req: Req, context: int) -> tuple[bool, int | None]:
        """Whether there is room for its pages, and the node that ends the segment's;
        ``None`` of one without a whole page."""
        tokens = req.origin_input_ids
        tokens = tokens[: floor_to(len(tokens), self._pages.page_size)]
        space, extra_key = req.cache_salt, req.extra_key
        held = self._pages.find(tokens, extra_key, space)[0]
        while True:
            if not self._eviction.make_room(len(tokens) - held):
                return False, None
            # What is held of it may have gone to make room.
            still = self._pages.find(tokens, extra_key, space)[0]
            if still == held:
                break
            held = still
        if not len(tokens):
            return True, None
        slots = self._rows[req.kv.req_pool_idx, : len(tokens)].to(torch.int64, copy=True)
        ours = req.kv.cache_protected_len
        node = self._pages.keep(tokens, extra_key, space, slots, ours=ours)
        # Pages it held already have been freed; the rest are the tree's.
        req.kv.cache_protected_len = len(tokens)
        return True, node if len(tokens) > context else None

    def _note(
        self,
        name: str,
        path: array,
        extra_key: str | None,
        space: str,
        node: int | None,
        *,
        named: bool,
        hits: int | None = None,
    ) -> None:
        uses = self._segments.first_uses(name, named=named, hits=hits)
        if node is not None:
            self._nodes.note(LINKABLE, node, SEGMENT, space, uses=uses, offer=named)
            self._nodes.end_segment(LINKABLE, node, name)
        record = self._segments.add(path, extra_key, space, node, named=named, hits=hits)
        self._look(record)

    def _look(self, record: SegmentRecord) -> None:
        if record.node is not None and (record.named or record.hits >= WORTH):
            self.on_worth(record)

    # -- a segment's life ---------------------------------------------------------------

    def use(self, names: Collection[str]) -> None:
        """A link runs that reuses these."""
        self._carried.use(names)
        for record in self._segments.use(names):
            assert record.node is not None
            self._nodes.use(LINKABLE, record.node, SEGMENT, record.salt)
            self._look(record)

    def expect(self, names: Collection[str]) -> None:
        """Hold segments back from eviction until a link that is on its way has come."""
        for record in self._segments.expect(names):
            assert record.node is not None
            self._carried.hold_back(record.id)
            self._nodes.hold_back(LINKABLE, record.node)

    def release(self, record: SegmentRecord) -> None:
        """It was held back for its link, and may go now."""
        if record.node is not None:
            self._nodes.release(LINKABLE, record.node)
        self._carried.release(record.id)

    def name(self, record: SegmentRecord) -> None:
        """A held segment was asked for by name."""
        where = (record.path, record.extra_key, record.salt, record.node)
        self._note(record.id, *where, named=True, hits=record.hits)

    def is_ready(self, record: SegmentRecord, seam: int) -> bool:
        """Whether a held segment has all that a link of this seam width needs."""
        core = Seam(seam).core(Outline(record.tokens), page=self._pages.page_size)
        if core[0] >= core[1]:
            return True
        return self._carried.of_core(record.id, record.owner, core, opening=False)[1] is None

    def is_in_use(self, record: SegmentRecord) -> bool:
        """Whether a running request, or a pin, holds the last of its pages."""
        return record.node is not None and self._nodes.is_held(LINKABLE, record.node)

    def value(self, record: SegmentRecord) -> float:
        """Where it stands in the eviction order: the lowest goes first."""
        return 0.0 if record.node is None else self._nodes.value(LINKABLE, record.node)

    def lock(self, record: SegmentRecord) -> Callable[[], None]:
        """Keep a held segment whatever happens.

        Returns:
            What lets it go again.
        """
        assert record.node is not None
        node = record.node
        locked = self._pages.lock([node])
        self._carried.pin(record.id)

        def release() -> None:
            self._pages.unlock(locked)
            self._nodes.unlocked(LINKABLE, node)
            self._carried.unpin(record.id)

        return release

    # -- its end ------------------------------------------------------------------------

    def evicted(self, name: str) -> None:
        """The last of its pages went for want of memory."""
        self._segments.evicted(name)
        self._carried.drop(name)

    def remove(self, name: str) -> int:
        """Free the pages of a segment that nothing else needs: no longer segment,
        no running request, no pin. It is remembered, and no longer held.

        Returns:
            Tokens freed.
        """
        record = self._segments.find_held(name)
        if record is None:
            return 0
        node = record.node
        assert node is not None
        self._segments.gone(name)
        self._nodes.unend_segment(LINKABLE, node, name)
        self._carried.drop(name)
        return self._nodes.remove_path(LINKABLE, node)

    def delete(self, name: str) -> int:
        """``remove``, and it is not remembered either."""
        freed = self.remove(name)
        self._segments.forget(name)
        return freed

    # -- stores -------------------------------------------------------------------------

    def slots(self, record: SegmentRecord) -> torch.Tensor:
        """int64, slots of a segment's path, compile context included."""
        held, node = self._pages.find(record.path, record.extra_key, record.salt)
        return self._pages.slots(node, held)

    def reserve(self, tokens: int, *, evict: bool) -> torch.Tensor | None:
        """Pages for a segment that is on its way.

        Args:
            tokens: of its path, whole pages.
            evict: others may go for it.

        Returns:
            int64 [tokens], slots that are to be filled before ``adopt``, or given back
            by ``unreserve``; ``None`` where there is no room.
        """
        if evict:
            if not self._eviction.make_room(tokens):
                return None
            short = tokens - self._allocator.available_size()
            if short > 0:
                self._evict(short)
        elif self._pages.tokens + tokens > self._eviction.limit:
            return None
        if not tokens:
            return torch.empty(0, dtype=torch.int64)
        fresh = self._allocator.alloc(tokens)
        if fresh is None:
            return None
        fresh = fresh.to(torch.int64)
        self._pages.reserve(fresh)
        return fresh

    def unreserve(self, slots: torch.Tensor) -> None:
        """Free what ``reserve`` gave."""
        if slots.numel():
            self._pages.unreserve(slots)
            self._allocator.free(slots)

    def adopt(self, saved: SavedSegment, slots: torch.Tensor, *, named: bool, evict: bool) -> bool:
        """Take a saved segment over, whose pages are filled: what ``reserve`` gave for it.
        Where it does not fit they are free again.

        Args:
            named: it was asked for by name, no link waits for it.
            evict: others may go for what it carries.

        Returns:
            Whether it is held.
        """
        context, held = len(self._segments.context), slots.numel()
        name = segment_id(saved.salt, saved.extra_key, saved.path[context:])
        uses = self._segments.first_uses(name, named=named, hits=saved.hits)
        cost = self._cost.flops(context, len(saved.path))
        kept = self._carried.adopt(name, saved, cost=cost, uses=uses, offer=named, evict=evict)
        self._consensus.note("adopted" if kept else "refused", name)
        if not kept:
            self.unreserve(slots)
            return False
        node = None
        if held:
            self._pages.unreserve(slots)
            node = self._pages.keep(saved.path[:held], saved.extra_key, saved.salt, slots)
        if held <= context:
            node = None
        where = (saved.path, saved.extra_key, saved.salt, node)
        self._note(name, *where, named=named, hits=saved.hits)
        return True
