"""*Relocate*: a request that asks for it gets private copies of the pages it reuses, K
rotated to its true position (``attention.relocate``)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.mem_cache.base_prefix_cache import EvictParams

from sglang_pic.forest.containment import Containment
from sglang_pic.forest.links import Links
from sglang_pic.forest.state import FAULT, LOADING, NO_ROOM, LinkHandle, LinkState
from sglang_pic.forest.tier import Tier
from sglang_pic.link.plan import LinkPlan

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req


class Relocation:
    """Load-backs of linked requests.

    Args:
        cache: SGLang's tree cache, whose pages are locked, evicted and allocated.
        copy: copies a plan's pages into slots, K rotated.
    """

    def __init__(
        self,
        cache: Any,
        links: Links,
        contained: Containment,
        copy: Callable[[LinkPlan, torch.Tensor], None] | None,
        tier: Tier,
    ):
        self._cache = cache
        self._links = links
        self._contained = contained
        self._copy = copy
        self._tier = tier

    def load_back(self, req: Req, handle: LinkHandle) -> tuple[int, Any]:
        """Copy all of a plan's pages or, as SGLang demands, none.

        Returns:
            Tokens and node of the row's prefix: without room, or where it fails, the
            request is computed exactly.
        """
        reason = FAULT
        with self._contained("relocate", req):
            link = self._links.of(req)
            assert link is not None
            if self._tier.is_loading and not self._cache.is_root(handle.prefix):
                # SGLang starts the loads of a batch when it has chosen all its requests.
                return 0, self._links.answer_exactly(req, LOADING)
            made = self._relocated(req, link, handle)
            if made is not None:
                return made
            reason = NO_ROOM
        return 0, self._links.answer_exactly(req, reason)

    def _relocated(
        self, req: Req, link: LinkState, handle: LinkHandle
    ) -> tuple[int, LinkHandle] | None:
        """Copy a plan's pages; ``None`` where there is no room for them."""
        plan = handle.plan
        allocator = self._cache.token_to_kv_pool_allocator
        held = self._cache.lock(handle)
        try:
            short = plan.reused - allocator.available_size()
            if short > 0:
                self._cache.evict(EvictParams(num_tokens=short))
            private = allocator.alloc(plan.reused)
            if private is None:
                return None
            link.private = private = private.to(torch.int64)
            assert self._copy is not None
            self._copy(plan, private)
        finally:
            self._cache.unlock(held)
        spans = tuple(
            dataclasses.replace(
                span,
                offset=0,
                slots=private[span.row_start : span.row_start + span.n_tokens],
            )
            for span in plan.spans
        )
        link.plan = dataclasses.replace(plan, spans=spans)
        root = self._cache.root_node_handle(req.extra_key)
        return plan.reused, LinkHandle(root, (), link.plan, handle.segments)
