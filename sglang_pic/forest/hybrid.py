"""``PicHybridCache``: the tree cache of hybrid models.

Ordinary requests keep SGLang's tree, whose nodes end where SGLang holds a
linear state: at a request's end, or on a grid of 64 tokens. Segments need
neither, since their states are ours (``linear.state``), so they live in a
second tree over the same pool of pages that knows KV alone. That is what lets
segments of any length be shared at any page size, without taking a state slot
from the requests that run.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.managers.schedule_batch import FINISH_ABORT
from sglang.srt.mem_cache.base_prefix_cache import (
    EvictParams,
    EvictResult,
    InsertParams,
    MatchPrefixParams,
    MatchResult,
)
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.unified_cache.components import ComponentType
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache
from sglang.srt.runtime_context import mamba_checkpoint_grid

from sglang_pic.config import PicConfig
from sglang_pic.forest.cache import PicCache
from sglang_pic.forest.forest import Lookup
from sglang_pic.forest.keys import segment_id
from sglang_pic.linear.capture import Capture
from sglang_pic.linear.state import LinearShape, StateStore
from sglang_pic.link.policy import LinkOptions, Seam
from sglang_pic.link.report import NO_STATE
from sglang_pic.request.base import LinkRequest
from sglang_pic.request.hints import COMPILE, find_action

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req


class PicHybridCache(PicCache):
    """Tree cache of a model with linear layers. Built by ``build_cache``.

    Attributes:
        shape: of the linear layers; set where this server links.
    """

    shape: LinearShape

    def __init__(self, params: Any):
        super().__init__(params)
        self._captures: weakref.WeakKeyDictionary[Req, Capture] = weakref.WeakKeyDictionary()
        self.segment_tree = UnifiedRadixCache(
            dataclasses.replace(params, tree_components=(ComponentType.FULL,), enable_metrics=False)
        )

    def configure(self, config: PicConfig, refusal: str | None) -> None:
        super().configure(config, refusal)
        self.states = StateStore(config)

    @property
    def prefix_grid(self) -> int:
        if self.enable_mamba_extra_buffer:
            return mamba_checkpoint_grid(self.page_size)
        return self.page_size

    # -- compiling --------------------------------------------------------------

    def match_prefix(self, params: MatchPrefixParams) -> MatchResult:
        req = params.req
        compiling = find_action(req.kv_hints, COMPILE) if req is not None else None
        if compiling is None or self.refusal is not None:
            return super().match_prefix(params)
        # From its first token, whatever the tree holds: the pair must see them
        # all. The path goes into the segments' tree when it is complete.
        req.skip_radix_cache_insert = True
        if req not in self._captures:
            self._captures[req] = self._capture(req, compiling["seams"])
        return self._root_match(req.extra_key)

    def _capture(self, req: Req, seams: Sequence[int]) -> Capture:
        start = len(self.forest.context)
        length = len(req.origin_input_ids) - start
        cores = [Seam(w).core(length, page=self.page_size, opening=False) for w in seams]
        core_end = max(0, (length - 1) // self.page_size * self.page_size)
        heads = sorted({first for first, last in cores if first < last})
        return Capture(self.shape, start=start, heads=heads, core_end=core_end)

    def claim_kv_row(self, req: Req) -> bool:
        capture = self._captures.get(req)
        if capture is not None and req.finished():
            del self._captures[req]
            if not isinstance(req.finished_reason, FINISH_ABORT):
                self._keep(req, capture)
        return super().claim_kv_row(req)

    def _keep(self, req: Req, capture: Capture) -> None:
        """Hand a complete compile's pages to the segments' tree, and its states
        to the store."""
        ids = req.origin_input_ids
        key = RadixKey(ids, req.extra_key, cache_salt=req.cache_salt).page_aligned(self.page_size)
        row = self.req_to_token_pool.req_to_token[req.kv.req_pool_idx, : len(key)]
        if len(key):
            self.segment_tree.insert(
                InsertParams(key=key, value=row.to(torch.int64, copy=True), priority=0)
            )
            # Pages it held already have been freed; the rest are the tree's.
            req.kv.cache_protected_len = len(key)
        if capture.complete:
            self.states.add(
                segment_id(req.cache_salt, req.extra_key, ids[capture.start :]),
                core_end=capture.core_end,
                conv_tail=capture.conv_tail,
                end=capture.end(),
                pairs=capture.pairs(),
            )

    # -- linking ----------------------------------------------------------------

    def _find_segments(self, req: Req, request: LinkRequest) -> list[Lookup | None]:
        """Pages and states: a segment is a hit only with both."""
        found = super()._find_segments(req, request)
        policy = request.options.recompute_policy()
        opens_at = self._opens_at(req.origin_input_ids)
        with_states: list[Lookup | None] = []
        for span, lookup in zip(request.spans, found, strict=True):
            if lookup is None:
                with_states.append(None)
                continue
            opening = span.start == opens_at
            core = policy.core(span.end - span.start, page=self.page_size, opening=opening)
            with_states.append(self._with_state(lookup, core, opening))
        return with_states

    def _with_state(self, lookup: Lookup, core: tuple[int, int], opening: bool) -> Lookup:
        first, last = core
        if lookup.miss is not None:
            self.states.drop(lookup.id)
        if first >= last:
            return lookup
        held = self.states.find(lookup.id)
        state = held.core(first, last, opening=opening) if held is not None else None
        miss = lookup.miss or (NO_STATE if state is None else None)
        if state is None:
            # Without its state a page is of no use here.
            return dataclasses.replace(lookup, slots=lookup.slots[:0], miss=miss)
        return dataclasses.replace(lookup, state=state, miss=miss)

    def _linked(
        self, req: Req, link: Any, params: MatchPrefixParams, prefix: MatchResult
    ) -> MatchResult:
        result = super()._linked(req, link, params, prefix)
        if link.plan is not None and not link.plan.slots[: prefix.device_prefix_len].numel():
            self._forget_prefix_state(req)
        return result

    def _forget_prefix_state(self, req: Req) -> None:
        """The prefix that was matched is not used: begin from zero."""
        if req.kv.mamba_cow_src_index is not None:
            req.kv.mamba_cow_src_index = None
            req.kv.mamba_needs_clear = True

    def hand_over(self, backend: Any, rids: Sequence[str], reqs: Sequence[Req]) -> None:
        links = [self._links.get(req) for req in reqs]
        options: list[LinkOptions | None] = [
            link.request.options if link is not None else None for link in links
        ]
        captures = [self._captures.get(req) for req in reqs]
        backend.set_rows(rids, self.plans_of(reqs), options, captures)

    # -- two trees, one pool ------------------------------------------------------

    def all_slots(self) -> torch.Tensor:
        return self.segment_tree.all_values_flatten().to(torch.int64)

    def all_values_flatten(self) -> torch.Tensor:
        return torch.cat([super().all_values_flatten(), self.segment_tree.all_values_flatten()])

    def evictable_size(self) -> int:
        return super().evictable_size() + self.segment_tree.evictable_size()

    def full_evictable_size(self) -> int:
        return super().full_evictable_size() + self.segment_tree.full_evictable_size()

    def protected_size(self) -> int:
        return super().protected_size() + self.segment_tree.protected_size()

    def full_protected_size(self) -> int:
        return super().full_protected_size() + self.segment_tree.full_protected_size()

    def total_size(self) -> Any:
        total, *rest = super().total_size()
        return total + self.segment_tree.total_size()[0], *rest

    def sanity_check(self) -> None:
        super().sanity_check()
        self.segment_tree.sanity_check()

    def _evict(
        self, params: EvictParams, available_size_targets: Any = None, **options: Any
    ) -> EvictResult:
        """Evict pages from the tree that holds more of them, then from the other."""
        wanted = params.num_tokens
        segments_first = self.segment_tree.full_evictable_size() > super().full_evictable_size()
        freed = 0
        if segments_first:
            freed = self._evict_segments(wanted, available_size_targets)
            params = dataclasses.replace(params, num_tokens=max(0, wanted - freed))
        result = super()._evict(params, available_size_targets, **options)
        short = wanted - freed - result.num_tokens_evicted
        if not segments_first and short > 0:
            freed += self._evict_segments(short, available_size_targets)
        return dataclasses.replace(result, num_tokens_evicted=result.num_tokens_evicted + freed)

    def _evict_segments(self, wanted: int, targets: Any) -> int:
        if wanted <= 0:
            return 0
        own = None
        if targets is not None and ComponentType.FULL in targets:
            own = {ComponentType.FULL: targets[ComponentType.FULL]}
        return self.segment_tree._evict(EvictParams(num_tokens=wanted), own).num_tokens_evicted

    def reset(self) -> None:
        if hasattr(self, "states"):
            self.states.clear()
            self.segment_tree.reset()
        super().reset()

    def state(self) -> dict[str, Any]:
        """As in ``PicCache``, with ``state_bytes`` of every segment and in all."""
        made = super().state()
        held = self.states.bytes_by_segment()
        for segment in made["segments"]:
            segment["state_bytes"] = held.get(segment["id"], 0)
        return {
            **made,
            "prefix_tokens": int(UnifiedRadixCache.all_values_flatten(self).numel()),
            "state_bytes": self.states.nbytes,
            "state_budget": self.states.budget,
        }
