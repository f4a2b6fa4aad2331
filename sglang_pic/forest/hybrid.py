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
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.mem_cache.base_prefix_cache import (
    EvictParams,
    EvictResult,
    MatchPrefixParams,
    MatchResult,
)
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.unified_cache.components import ComponentType
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache
from sglang.srt.runtime_context import mamba_checkpoint_grid

from sglang_pic.config import PicConfig
from sglang_pic.forest.cache import PicCache
from sglang_pic.forest.cost import PrefillCost
from sglang_pic.forest.files import SavedSegment
from sglang_pic.forest.forest import Lookup, SegmentRecord
from sglang_pic.forest.keys import owner_of, segment_id
from sglang_pic.forest.nodes import TURN
from sglang_pic.forest.state import LinkHandle, LinkState
from sglang_pic.forest.turns import Chain, Turn
from sglang_pic.linear.capture import Capture
from sglang_pic.linear.state import CoreState, LinearShape, SegmentState, StateStore
from sglang_pic.link.plan import grown_plan
from sglang_pic.link.policy import LinkOptions, Seam
from sglang_pic.link.report import NO_STATE
from sglang_pic.request.base import LinkRequest

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req


def _turn_end(turn: Turn, tokens: int) -> str:
    """Name of the state behind so many tokens of a turn's path."""
    return f"{turn.salt}:{tokens}"


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

    def configure(self, config: PicConfig, refusal: str | None, cost: PrefillCost) -> None:
        self.states = StateStore(config, self._state_gone, self.release_held_back)
        # Lengths of each turn's path behind which a state is held, and its node.
        self._turn_ends: dict[str, dict[int, int]] = {}
        super().configure(config, refusal, cost)

    @property
    def state_budget(self) -> int:
        return self.states.budget

    def state_bytes_of(self, segment: str) -> int:
        return self.states.nbytes_of(segment)

    def state_bytes(self, kind: str) -> int:
        return self.states.bytes_of_group(kind)

    @property
    def usual_state_bytes(self) -> int:
        return self.shape.state_nbytes(1, self.states.itemsize) if self.refusal is None else 0

    @property
    def states_evicted(self) -> int:
        return self.states.evicted

    def expect(self, names: Collection[str]) -> None:
        for name in filter(self.forest.is_held, names):
            self.states.hold_back(name)
        super().expect(names)

    def is_ready(self, record: SegmentRecord, seam: int) -> bool:
        first, last = Seam(seam).core(record.tokens, page=self.page_size, opening=False)
        held = self.states.find(record.id, owner_of(record.salt, record.extra_key))
        if first >= last:
            return True
        return held is not None and held.core(first, last, opening=False) is not None

    def segment_released(self, name: str) -> None:
        self.states.release(name)

    def segment_removed(self, name: str) -> None:
        self.states.drop(name)

    def note_use(self, req: Req, handle: LinkHandle) -> None:
        for name in handle.segments:
            self.states.use(name)
        if handle.chain is not None:
            self.states.use(_turn_end(handle.chain.turn, len(handle.chain.tokens)))
        super().note_use(req, handle)

    def state_tensors(self, segment: str) -> dict[str, torch.Tensor]:
        return self.states.tensors(segment)

    def core_end(self, record: SegmentRecord) -> int | None:
        held = self.states.find(record.id, owner_of(record.salt, record.extra_key))
        return held.core_end if held is not None else None

    def adopt(self, saved: SavedSegment, held: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        context = len(self.forest.context)
        name = segment_id(saved.salt, saved.extra_key, saved.path[context:])
        if saved.core_end is not None and not self.states.adopt(
            name,
            owner_of(saved.salt, saved.extra_key),
            saved.core_end,
            saved.tensors,
            device=self.device,
            cost=self.cost.flops(context, len(saved.path)),
        ):
            return None
        empty = super().adopt(saved, held)
        if empty is None:
            self.states.drop(name)
        return empty

    def hold(self, record: SegmentRecord) -> Callable[[], None]:
        release = super().hold(record)
        self.states.pin(record.id)

        def release_both() -> None:
            release()
            self.states.unpin(record.id)

        return release_both

    def _segments_gone(self, names: Collection[str]) -> None:
        """Without its pages a state is of no use."""
        super()._segments_gone(names)
        for name in names:
            self.states.drop(name)
            self._forget_turn_end(name)

    def _state_gone(self, name: str) -> None:
        """Nor are the pages without it, but those it shares."""
        self.forest.remove_pages(name)
        node = self._forget_turn_end(name)
        if node is not None:
            self.order.unend_segment(1, node, name)
            self.order.remove_path(1, node)

    @property
    def prefix_grid(self) -> int:
        if self.enable_mamba_extra_buffer:
            return mamba_checkpoint_grid(self.page_size)
        return self.page_size

    # -- compiling --------------------------------------------------------------

    def _match(self, params: MatchPrefixParams) -> MatchResult:
        req = params.req
        compiling = self.asked.of(req).compile if req is not None else None
        if compiling is None or self.refusal is not None:
            return super()._match(params)
        # From its first token, or from where a shorter segment's cores end: the
        # pairs must see all tokens. Pages and states are kept by ``_keep``.
        req.skip_radix_cache_insert = True
        capture = self._capture(req, compiling.seams)
        self._captures[req] = capture
        root = self._root_match(req.extra_key)
        shorter = self._shorter(req, capture)
        if shorter is None:
            return root
        node, slots, capture.grown_from = shorter
        plan = grown_plan(len(req.origin_input_ids), slots)
        handle = LinkHandle(root.last_device_node, (node,), plan, ())
        return MatchResult(plan.reused, handle, handle, handle)

    def _shorter(self, req: Req, capture: Capture) -> tuple[int, torch.Tensor, SegmentState] | None:
        """The longest segment that this one begins with and whose states fit: where
        its pages end, slots up to where its cores end, and its states."""
        key = RadixKey(req.origin_input_ids, req.extra_key, cache_salt=req.cache_salt)
        matched, deepest, _ = self.segment_tree.tree_core.match_full_device_prefix(
            key.page_aligned(self.page_size)
        )
        owner = owner_of(req.cache_salt or "", req.extra_key)
        for node, names in self.order.ends_on_path(1, deepest, matched):
            for name in sorted(names):
                held = self.states.find(name, owner)
                if (
                    held is not None
                    and held.core_end < capture.core_end
                    and set(capture.heads) <= set(held.pairs)
                ):
                    slots = self.segment_tree.path_device_indices(node)
                    return node, slots[: capture.start + held.core_end].to(torch.int64), held
        return None

    def _capture(self, req: Req, seams: Sequence[int]) -> Capture:
        start = len(self.forest.context)
        length = len(req.origin_input_ids) - start
        cores = [Seam(w).core(length, page=self.page_size, opening=False) for w in seams]
        core_end = max(0, (length - 1) // self.page_size * self.page_size)
        heads = sorted({first for first, last in cores if first < last})
        return Capture(self.shape, start=start, heads=heads, core_end=core_end)

    def claim_kv_row(self, req: Req) -> bool:
        claimed = super().claim_kv_row(req)
        if req.finished():
            self._captures.pop(req, None)
        return claimed

    def _keep(self, req: Req, *, named: bool) -> bool:
        """Pages and states, or neither."""
        capture = self._captures[req]
        ids = req.origin_input_ids
        name = segment_id(req.cache_salt, req.extra_key, ids[capture.start :])
        if capture.complete and not self.states.add(
            name,
            owner_of(req.cache_salt, req.extra_key),
            core_end=capture.core_end,
            conv_tail=capture.conv_tail,
            end=capture.end(),
            pairs=capture.pairs(),
            cost=self.cost.flops(capture.start, len(ids)),
            uses=self.forest.first_uses(name, named=named),
            offer=named,
        ):
            return False
        kept = super()._keep(req, named=named)
        if not kept and not self.forest.is_held(name):
            self.states.drop(name)
        return kept

    # -- earlier turns -------------------------------------------------------------

    @property
    def keeps_states(self) -> bool:
        return True

    def _keep_turn(self, req: Req, link: LinkState) -> None:
        # The request's state is that of its last token only where SGLang runs no
        # step ahead and pages cut nothing off.
        exact = self.page_size == 1 and not self.enable_mamba_extra_buffer
        if exact and req.owned_kv_len() == req.kv.kv_committed_len:
            super()._keep_turn(req, link)

    def _turn_kept(self, req: Req, turn: Turn, tokens: int, node: int) -> None:
        cache = self.req_to_token_pool.mamba_pool.mamba_cache
        index = req.kv.mamba_pool_idx.reshape(1)
        slot = int(self.req_to_token_pool.translate_mamba_indices(index)[0])
        name = _turn_end(turn, tokens)
        if self.states.add(
            name,
            turn.whose,
            core_end=tokens,
            conv_tail=cache.conv[0][:, slot].float(),
            end=cache.temporal[:, slot].float().transpose(-1, -2),
            pairs={},
            cost=self.cost.flops(0, req.kv.kv_committed_len),
            group=TURN,
        ):
            self._turn_ends.setdefault(turn.salt, {})[tokens] = node
            self.order.end_segment(1, node, name)

    def _usable(self, turn: Turn, held: int) -> int:
        return max((n for n in self._turn_ends.get(turn.salt, ()) if n <= held), default=0)

    def _turn_state(self, chain: Chain) -> CoreState | None:
        held = self.states.find(_turn_end(chain.turn, len(chain.tokens)), chain.turn.whose)
        assert held is not None
        return CoreState(None, held.end, held.conv_tail)

    def _forget_turn_end(self, name: str) -> int | None:
        """A turn's state is gone; the node where it stood."""
        salt, _, tokens = name.rpartition(":")
        ends = self._turn_ends.get(salt)
        if ends is None:
            return None
        node = ends.pop(int(tokens), None)
        if not ends:
            del self._turn_ends[salt]
        return node

    # -- linking ----------------------------------------------------------------

    def _find_segments(self, req: Req, request: LinkRequest) -> list[Lookup | None]:
        """Pages and states: a segment is a hit only with both."""
        found = super()._find_segments(req, request)
        policy = request.options.recompute_policy()
        opens_at = self._opens_at(req.origin_input_ids)
        owner = owner_of(self.forest.namespace(req.cache_salt), req.extra_key)
        with_states: list[Lookup | None] = []
        for span, lookup in zip(request.spans, found, strict=True):
            if lookup is None:
                with_states.append(None)
                continue
            opening = span.start == opens_at
            core = policy.core(span.end - span.start, page=self.page_size, opening=opening)
            with_states.append(self._with_state(lookup, owner, core, opening))
        return with_states

    def _with_state(
        self, lookup: Lookup, owner: tuple[str, str], core: tuple[int, int], opening: bool
    ) -> Lookup:
        first, last = core
        if first >= last:
            return lookup
        held = self.states.find(lookup.id, owner)
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

    def give_up(self, reqs: Sequence[Req]) -> list[Req]:
        # The states of a compile may stand behind rows that were taken for others.
        compiled = [req for req in reqs if self._captures.pop(req, None) is not None]
        return [*super().give_up(reqs), *compiled]

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

    def check(self) -> None:
        super().check()
        self.states.check()

    def sanity_check(self) -> None:
        super().sanity_check()
        self.segment_tree.sanity_check()

    def _evict_as_sglang(self, params: EvictParams, targets: Any, satisfied: Any) -> EvictResult:
        result = super()._evict_as_sglang(params, targets, satisfied)
        short = params.num_tokens - result.num_tokens_evicted
        if short <= 0 or satisfied is not None:
            return result
        own = None
        if targets is not None and ComponentType.FULL in targets:
            own = {ComponentType.FULL: targets[ComponentType.FULL]}
        more = self.segment_tree._evict(EvictParams(num_tokens=short), own).num_tokens_evicted
        if self.nodes is not None:
            self.nodes.note_unseen(more, 0)
        return dataclasses.replace(result, num_tokens_evicted=result.num_tokens_evicted + more)

    def reset(self) -> None:
        if hasattr(self, "states"):
            self.states.clear()
            self._turn_ends.clear()
            self.segment_tree.reset()
        super().reset()

    def state(self) -> dict[str, Any]:
        """As in ``PicCache``, with ``state_bytes`` of every segment and in all."""
        made = super().state()
        for segment in made["segments"]:
            segment["state_bytes"] = self.states.nbytes_of(segment["id"])
        return {
            **made,
            "prefix_tokens": int(UnifiedRadixCache.all_values_flatten(self).numel()),
            "state_bytes": self.states.nbytes,
            "state_budget": self.states.budget,
        }
