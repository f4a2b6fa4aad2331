"""``PicCache``: the tree cache SGLang runs on, and who owns which page.

A linked row's pages are locked for as long as it runs, by a handle that stands
where SGLang expects the node that ends a prefix. Below it, one job a layer:
``ordered`` evicts, ``holding`` keeps compiles within budgets, ``conversing`` keeps
turns, ``planning`` plans links.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.managers.schedule_batch import FINISH_ABORT
from sglang.srt.mem_cache.base_prefix_cache import (
    EvictParams,
    IncLockRefResult,
    InitLoadBackParams,
    TreeLock,
)
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

from sglang_pic.forest.nodes import PREFIX, TURN
from sglang_pic.forest.planning import PlanningTree
from sglang_pic.forest.state import FAULT, NO_ROOM, LinkHandle

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req


class PicCache(PlanningTree):
    """Tree cache of models whose attention is full. Built by ``build_cache``."""

    def __init__(self, params: Any):
        super().__init__(params)
        self._load_back_is_private = False
        self.relocate: Any = None
        # Files of saved segments (``manage.store``), where the operator has named a place.
        self.store: Any = None

    # -- a row's life -----------------------------------------------------------

    def lock(self, node_id: Any, *args: Any, **kwargs: Any) -> TreeLock | None:
        if not isinstance(node_id, LinkHandle):
            return super().lock(node_id, *args, **kwargs)
        held = [(self, super().lock(node_id.prefix, *args, **kwargs))]
        tree = self.segment_tree
        held += [(tree, UnifiedRadixCache.lock(tree, node)) for node in node_id.nodes]
        return TreeLock(node_id, held)

    def unlock(self, lock: TreeLock | None) -> None:
        if lock is None or not isinstance(lock.node, LinkHandle):
            return super().unlock(lock)
        for tree, held in lock.receipt:
            UnifiedRadixCache.unlock(tree, held)
            if self.nodes is not None:
                with self.contained("unlock"):
                    self.nodes.unlocked(0 if tree is self else 1, held.node)
        return None

    def prefix_device_indices(self, req: Req) -> torch.Tensor:
        if not isinstance(req.last_node, LinkHandle):
            return super().prefix_device_indices(req)
        link = self._links.get(req)
        with self.contained("use", req):
            self.note_use(req, req.last_node)
        slots = req.last_node.plan.slots
        if link is not None and link.private is not None:
            slots, link.private = link.private, None
        return slots[: req.prefix_len]

    def note_use(self, req: Req, handle: LinkHandle) -> None:
        """A link runs that reuses these."""
        self.forest.note_hits(handle.segments)
        if self.nodes is not None:
            self.nodes.use(0, handle.prefix, PREFIX, req.cache_salt)
            for node in handle.chain.nodes if handle.chain else ():
                self.nodes.use(self.segment_index, node, TURN, req.cache_salt or None)

    def inc_host_lock_ref(self, node_id: Any) -> IncLockRefResult:
        if isinstance(node_id, LinkHandle):
            return IncLockRefResult()
        return super().inc_host_lock_ref(node_id)

    def dec_host_lock_ref(self, node_id: Any, params: Any) -> Any:
        if isinstance(node_id, LinkHandle):
            return None
        return super().dec_host_lock_ref(node_id, params)

    def init_load_back(self, params: InitLoadBackParams) -> tuple[int, Any] | None:
        """*Relocate*: copy the plan's pages into private slots, K rotated.

        All or nothing, as SGLang demands; without room, or where that fails, the
        request is computed exactly.
        """
        handle = params.best_match_node
        self._load_back_is_private = isinstance(handle, LinkHandle)
        if not self._load_back_is_private:
            return super().init_load_back(params)
        reason = FAULT
        with self.contained("relocate", params.req):
            made = self._relocated(params.req, handle)
            if made is not None:
                return made
            reason = NO_ROOM
        req = params.req
        link = self._links[req]
        with self.contained("drop plan", req):
            self._drop_plan(req, link)
            self._unlinked(req, link, self._root_match(req.extra_key), reason)
        return 0, self.root_node_handle(req.extra_key)

    def _relocated(self, req: Req, handle: LinkHandle) -> tuple[int, LinkHandle] | None:
        """Copy a plan's pages; ``None`` where there is no room for them."""
        plan, link = handle.plan, self._links[req]
        allocator = self.token_to_kv_pool_allocator
        held = self.lock(handle)
        try:
            short = plan.reused - allocator.available_size()
            if short > 0:
                self.evict(EvictParams(num_tokens=short))
            private = allocator.alloc(plan.reused)
            if private is None:
                return None
            link.private = private = private.to(torch.int64)
            self.relocate(plan, private)
        finally:
            self.unlock(held)
        spans = tuple(
            dataclasses.replace(
                span,
                offset=0,
                slots=private[span.row_start : span.row_start + span.n_tokens],
            )
            for span in plan.spans
        )
        link.plan = dataclasses.replace(plan, spans=spans)
        root = self.root_node_handle(req.extra_key)
        return plan.reused, LinkHandle(root, (), link.plan, handle.segments)

    def load_back_is_cache_owned(self) -> bool:
        return not self._load_back_is_private and super().load_back_is_cache_owned()

    def claim_kv_row(self, req: Req) -> bool:
        link = self._links.get(req) if self._links else None
        finished = req.finished() and not isinstance(req.finished_reason, FINISH_ABORT)
        if link is not None and finished:
            with self.contained("keep turn", req):
                self._keep_turn(req, link)
        return super().claim_kv_row(req)

    def on_release(self, req: Req, *, checkpointed: bool) -> None:
        link = self._links.get(req)
        if link is not None:
            link.plan = None
        super().on_release(req, checkpointed=checkpointed)

    # -- handles where SGLang expects nodes -----------------------------------

    def dfs_weight_order(self, node_handles: Sequence[Any]) -> list[int]:
        return super().dfs_weight_order(
            [handle.prefix if isinstance(handle, LinkHandle) else handle for handle in node_handles]
        )

    def is_root(self, node_id: Any) -> bool:
        return not isinstance(node_id, LinkHandle) and super().is_root(node_id)

    def is_backuped(self, node_id: Any) -> bool:
        return not isinstance(node_id, LinkHandle) and super().is_backuped(node_id)
