"""``HoldingTree``: what is kept of compiles, within budgets.

What a compile computed is kept when it is complete, if the budgets allow it: its
pages become a path of the segments' tree, and the forest names them.
"""

from __future__ import annotations

import logging
from array import array
from collections import Counter
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.managers.schedule_batch import FINISH_ABORT
from sglang.srt.mem_cache.base_prefix_cache import (
    InsertParams,
    MatchPrefixParams,
)
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

from sglang_pic.config import PicConfig
from sglang_pic.errors import PicIntegrityError
from sglang_pic.forest.asked import Asked
from sglang_pic.forest.budget import KV_SHARE, Budgets, Need
from sglang_pic.forest.containment import Containment
from sglang_pic.forest.cost import PrefillCost
from sglang_pic.forest.files import SavedSegment
from sglang_pic.forest.forest import FRESH_SHARE, SegmentForest, SegmentRecord
from sglang_pic.forest.nodes import LINKED, PREFIX, TURN
from sglang_pic.forest.ordered import OrderedTree
from sglang_pic.forest.pins import Pins
from sglang_pic.link.policy import floor_to

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

logger = logging.getLogger(__name__)


class HoldingTree(OrderedTree):
    """A tree cache that holds compiled segments."""

    def __init__(self, params: Any):
        super().__init__(params)
        # Compiled segments are paths of this tree, under namespaces of their own.
        self.segment_tree = self
        self.asked = Asked()

    def configure(self, config: PicConfig, refusal: str | None, cost: PrefillCost) -> None:
        """Set up linking.

        Args:
            config: the server's settings; its compile context is cut to whole pages.
            refusal: why this server must not link at all, or ``None``.
            cost: of the model.
        """
        self.config = config
        self.refusal = refusal
        self.contained = Containment(self.check, self._distrust)
        self.cost = cost
        pool = self.token_to_kv_pool_allocator.size * cost.kv_bytes
        kv = int(pool * KV_SHARE) if config.kv_mib is None else min(pool, config.kv_mib << 20)
        self.budgets = Budgets(Need(kv, self.state_budget), config.pin_share)
        self.pins = Pins(self.budgets)
        self.kv_limit = kv // cost.kv_bytes
        self.segment_index = 0 if self.segment_tree is self else 1
        self.refused: Counter[str] = Counter()
        context = config.compile_context
        self.order = self.order_nodes(cost, self._segments_gone)
        self.forest = SegmentForest(
            self,
            context[: floor_to(len(context), self.page_size)],
            self.order,
            tree_index=self.segment_index,
            fresh_tokens=int(self.kv_limit * FRESH_SHARE),
            on_release=self.segment_released,
            on_removed=self.segment_removed,
        )
        if refusal is not None:
            self.nodes = None

    @property
    def state_budget(self) -> int:
        """Bytes for the linear states of segments."""
        return 0

    def _segments_gone(self, names: Collection[str]) -> None:
        """Pages of these segments were evicted."""
        self.forest.note_gone(names)

    def expect(self, names: Collection[str]) -> None:
        """Hold segments back from eviction until a link that is on its way has come."""
        self.forest.expect(names)

    def segment_released(self, name: str) -> None:
        """A segment was held back for its link, and may go now."""

    def segment_removed(self, name: str) -> None:
        """A segment was deleted, or its state had to go."""

    def is_ready(self, record: SegmentRecord, seam: int) -> bool:
        """Whether a held segment has all that a link of this seam width needs."""
        return True

    # -- linear states, in hybrids --------------------------------------------------

    def state_bytes_of(self, segment: str) -> int:
        """Bytes of linear states held for a segment."""
        return 0

    def state_bytes(self, kind: str) -> int:
        """Bytes of linear states held for all segments, or all turns."""
        return 0

    @property
    def usual_state_bytes(self) -> int:
        """At most what one more segment takes, compiled for one seam width."""
        return 0

    @property
    def states_evicted(self) -> int:
        """States that went for want of memory."""
        return 0

    def total_tokens(self) -> int:
        """Tokens whose pages the trees hold."""
        return int(self.total_size()[0])

    def state_tensors(self, segment: str) -> dict[str, torch.Tensor]:
        """What the linear layers keep of a segment, by name; see ``StateStore``."""
        return {}

    def core_end(self, record: SegmentRecord) -> int | None:
        """Where a segment's cores end, if the linear layers keep anything of it."""
        return None

    def release_held_back(self) -> None:
        self.forest.release_fresh()

    # -- PageTree -----------------------------------------------------------

    def find_path(
        self, tokens: array, extra_key: str | None, salt: str
    ) -> tuple[int, torch.Tensor]:
        # Not our own match_prefix, where the segments' tree is this one.
        result = UnifiedRadixCache.match_prefix(
            self.segment_tree, MatchPrefixParams(key=RadixKey(tokens, extra_key, cache_salt=salt))
        )
        node = result.last_device_node
        slots = self.segment_tree.path_device_indices(node)[: result.device_prefix_len]
        return node, slots.to(torch.int64)

    def all_slots(self) -> torch.Tensor:
        return self.all_values_flatten().to(torch.int64)

    # -- for the operator -------------------------------------------------------

    def hold(self, record: SegmentRecord) -> Callable[[], None]:
        """Lock a segment's pages, its states too.

        Returns:
            What gives them back.
        """
        assert record.node is not None
        tree, node = self.segment_tree, record.node
        lock = UnifiedRadixCache.lock(tree, node)

        def release() -> None:
            UnifiedRadixCache.unlock(tree, lock)
            self.order.unlocked(self.segment_index, node)

        return release

    def free_rows(self, tenant: str | None) -> int:
        """Evict the ordinary prefixes and conversations of a tenant.

        Returns:
            Tokens freed.
        """
        return self.order.remove_all((tenant or None, tenant or ""), (PREFIX, TURN))

    def adopt(self, saved: SavedSegment, held: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Take a saved segment over: states, and a path of pages; evicts nothing.

        Args:
            held: tokens of its path, whole pages.

        Returns:
            int64 [n] each: which of its tokens need K and V, and their slots; the
            others share pages with what is held. ``None``, and nothing has changed,
            where it does not fit.
        """
        linked = sum(self.order.tokens[kind] for kind in LINKED)
        if linked + held > self.kv_limit:
            return None
        fresh = self.token_to_kv_pool_allocator.alloc(held)
        if fresh is None:
            return None
        key = RadixKey(saved.path[:held], saved.extra_key, cache_salt=saved.salt)
        node = self.segment_tree.insert(
            InsertParams(key=key, value=fresh.to(torch.int64), priority=0)
        ).last_device_node
        self.forest.note_compiled(
            saved.path, saved.extra_key, saved.salt, node, named=True, hits=saved.hits
        )
        slots = self.segment_tree.path_device_indices(node).to(torch.int64)[:held]
        empty = torch.nonzero(torch.isin(slots, fresh)).squeeze(1)
        return empty, slots[empty]

    # -- compiles ---------------------------------------------------------------

    def claim_kv_row(self, req: Req) -> bool:
        compiling = self.asked.of(req).compile
        if (
            compiling is not None
            and self.refusal is None
            and req.finished()
            and not isinstance(req.finished_reason, FINISH_ABORT)
        ):
            with self.contained("keep", req):
                kept = self._keep(req, named=compiling.named)
                self.refused["budget"] += not kept
        return super().claim_kv_row(req)

    def _keep(self, req: Req, *, named: bool) -> bool:
        """Hand a complete compile's pages to the segments' tree, if they fit."""
        ids = req.origin_input_ids
        key = RadixKey(ids, req.extra_key, cache_salt=req.cache_salt).page_aligned(self.page_size)
        match = self.segment_tree.tree_core.match_full_device_prefix
        matched, node, _ = match(key)
        while True:
            if not self.make_room(len(key) - matched, self.kv_limit):
                return False
            # What is held of it may have gone to make room.
            still, node, _ = match(key)
            if still == matched:
                break
            matched = still
        if len(key):
            row = self.req_to_token_pool.req_to_token[req.kv.req_pool_idx, : len(key)]
            node = self.segment_tree.insert(
                InsertParams(
                    key=key,
                    value=row.to(torch.int64, copy=True),
                    prev_prefix_len=req.kv.cache_protected_len,
                    priority=0,
                )
            ).last_device_node
            # Pages it held already have been freed; the rest are the tree's.
            req.kv.cache_protected_len = len(key)
        self.forest.note_compiled(
            ids,
            req.extra_key,
            req.cache_salt,
            node if len(key) > len(self.forest.context) else None,
            named=named,
        )
        return True

    # -- all of it ----------------------------------------------------------------

    def reset(self) -> None:
        if hasattr(self, "forest"):
            self.forest.forget()
            self.pins.forget()
        super().reset()

    def _distrust(self, why: str) -> None:
        """Link nothing from now on; what runs goes on, and every answer is exact."""
        if self.refusal is None:
            self.refusal = why
            logger.critical("sglang_pic links no more: %s", why)

    def state(self) -> dict[str, Any]:
        """The forest and what its pages cost, for the management API.

        ``bytes_per_token`` is of KV over all layers; ``integrity`` is ``"ok"``
        or what the check found.
        """
        try:
            self.check()
            integrity = "ok"
        except PicIntegrityError as error:
            integrity = str(error)
        return {
            **self.forest.dump(),
            "integrity": integrity,
            "refusal": self.refusal,
            "available_tokens": self.token_to_kv_pool_allocator.available_size(),
            "protected_tokens": self.protected_size(),
            "evictable_tokens": self.evictable_size(),
            "bytes_per_token": self.cost.kv_bytes,
        }

    def check(self) -> None:
        """Raise ``PicIntegrityError`` unless forest, order and budgets agree. O(n)."""
        self.forest.check()
        if self.nodes is not None:
            self.nodes.recount()
            self.nodes.check()
            held = sum(self.nodes.tokens[kind] for kind in LINKED) * self.cost.kv_bytes
            if held > self.budgets.limit.kv:
                raise PicIntegrityError(f"KV of {held} bytes exceeds {self.budgets.limit.kv}")
