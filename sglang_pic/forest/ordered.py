"""``OrderedTree``: SGLang's tree cache, evicting in our order.

Ordinary requests take SGLang's paths unchanged; what is new is that every node
they insert, use or give back is known to a ``NodeIndex``, and that a shortage of
pages is met from it. Where the index cannot help (host tiers, joint pools) and
where it runs out, SGLang's own eviction follows.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.mem_cache.base_prefix_cache import (
    EvictParams,
    EvictResult,
    InsertParams,
    InsertResult,
    TreeLock,
)
from sglang.srt.mem_cache.unified_cache.component_type import ComponentType
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

from sglang_pic.forest.containment import Containment
from sglang_pic.forest.cost import PrefillCost
from sglang_pic.forest.keys import is_reserved
from sglang_pic.forest.nodes import LINKED, PREFIX, SEGMENT, NodeIndex

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req


class OrderedTree(UnifiedRadixCache):
    """A tree cache with one eviction order over all its nodes.

    Attributes:
        segment_tree: the tree that holds compiled segments: this one, or one of
            their own over the same pages.
        nodes: the order; ``None`` until ``order_nodes``, and on a server that must
            not link, whose eviction is SGLang's.
        contained: around what of ours could fail.
    """

    nodes: NodeIndex | None = None
    contained: Containment
    segment_tree: UnifiedRadixCache

    def order_nodes(
        self, cost: PrefillCost, on_evict: Callable[[Collection[str]], None]
    ) -> NodeIndex:
        """Begin to keep the order."""
        trees = (self,) if self.segment_tree is self else (self, self.segment_tree)
        self.nodes = NodeIndex(trees, cost, on_evict)
        return self.nodes

    def release_held_back(self) -> None:
        """Memory is needed: offer to eviction what was held back from it."""

    # -- what becomes known ---------------------------------------------------------

    def insert(self, params: InsertParams) -> InsertResult:
        result = super().insert(params)
        if self.nodes is not None and result.last_device_node is not None:
            salt = params.key.cache_salt
            if not is_reserved(salt):
                with self.contained("insert"):
                    self.nodes.note(0, result.last_device_node, PREFIX, salt)
        return result

    def unlock(self, lock: TreeLock | None) -> None:
        super().unlock(lock)
        if self.nodes is not None and lock is not None:
            with self.contained("unlock"):
                self.nodes.unlocked(0, lock.node)

    def prefix_device_indices(self, req: Req) -> torch.Tensor:
        if self.nodes is not None:
            # A compile stands on what is held of its path.
            kind = SEGMENT if is_reserved(req.cache_salt) else PREFIX
            with self.contained("use", req):
                self.nodes.use(0, req.last_node, kind, req.cache_salt)
        return super().prefix_device_indices(req)

    def reset(self) -> None:
        if self.nodes is not None:
            self.nodes.clear()
        super().reset()

    # -- eviction ---------------------------------------------------------------------

    def _evict(
        self,
        params: EvictParams,
        available_size_targets: Any = None,
        *,
        allocation_reclaim_satisfied: Any = None,
    ) -> EvictResult:
        target = (available_size_targets or {}).get(ComponentType.FULL)
        ours = (
            self.nodes is not None
            and params.num_tokens > 0
            and allocation_reclaim_satisfied is None
            and self.cache_controller is None
            and (target is None or target[0] is ComponentType.FULL)
        )
        if not ours:
            return self._evict_as_sglang(
                params, available_size_targets, allocation_reclaim_satisfied
            )
        started = time.perf_counter()
        wanted = params.num_tokens

        def is_enough(freed: int) -> bool:
            if target is not None:
                return self._component_available_size(ComponentType.FULL) >= target[1]
            return freed >= wanted

        freed: dict[ComponentType, int] = {ComponentType.FULL: 0}
        enough = False
        with self.contained("evict"):
            freed, enough = self._evict_in_order(is_enough, None)
        self.update_eviction_metrics(freed[ComponentType.FULL], started)
        mamba = freed.get(ComponentType.MAMBA, 0)
        rest = dataclasses.replace(
            params,
            num_tokens=0 if enough else max(1, wanted - freed[ComponentType.FULL]),
            mamba_num=max(0, params.mamba_num - mamba),
        )
        result = self._evict_as_sglang(rest, available_size_targets, None)
        return dataclasses.replace(
            result,
            num_tokens_evicted=result.num_tokens_evicted + freed[ComponentType.FULL],
            mamba_num_evicted=result.mamba_num_evicted + mamba,
        )

    def _evict_in_order(
        self, is_enough: Callable[[int], bool], kinds: Collection[str] | None
    ) -> tuple[dict[ComponentType, int], bool]:
        assert self.nodes is not None
        freed = self.nodes.evict(is_enough, kinds)
        if not is_enough(freed[ComponentType.FULL]):
            self.release_held_back()
            before = freed[ComponentType.FULL]
            freed.update(self.nodes.evict(lambda more: is_enough(before + more), kinds))
        return freed, is_enough(freed[ComponentType.FULL])

    def _evict_as_sglang(self, params: EvictParams, targets: Any, satisfied: Any) -> EvictResult:
        result = super()._evict(params, targets, allocation_reclaim_satisfied=satisfied)
        if self.nodes is not None:
            self.nodes.note_unseen(result.num_tokens_evicted, result.mamba_num_evicted)
        return result

    def make_room(self, tokens: int, limit: int) -> bool:
        """Bring what segments and conversations hold down, until so many tokens
        more are within the limit.

        Returns:
            Whether they are; nothing in use or pinned is evicted for it.
        """
        nodes = self.nodes
        assert nodes is not None

        def fits(_: int = 0) -> bool:
            return sum(nodes.tokens[kind] for kind in LINKED) + tokens <= limit

        if tokens > limit:
            return False
        if not fits() and nodes.may_be_too_high:
            nodes.recount()
        return fits() or self._evict_in_order(fits, LINKED)[1]
