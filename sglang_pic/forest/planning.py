"""``PlanningTree``: a request that carries a link is planned in ``match_prefix``.

Ordinary requests take SGLang's paths unchanged. A linked row is permuted (see
``link.plan``), and it is never inserted as if it were a prefix.
"""

from __future__ import annotations

import dataclasses
import weakref
from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sglang.srt.mem_cache.base_prefix_cache import (
    MatchPrefixParams,
    MatchResult,
)
from sglang.srt.mem_cache.radix_cache import RadixKey

from sglang_pic.faults import faults
from sglang_pic.forest.conversing import ConversingTree
from sglang_pic.forest.forest import Lookup
from sglang_pic.forest.state import FAULT, LinkHandle, LinkState, unlinkable
from sglang_pic.forest.turns import Chain, Core
from sglang_pic.link.plan import LinkPlan, SegmentHit, make_plan, reuse_turns, unlinked_plan
from sglang_pic.link.policy import floor_to
from sglang_pic.link.report import Found, make_report
from sglang_pic.request.base import OPENING, LinkRequest

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req


@dataclasses.dataclass(frozen=True)
class Arranged:
    """A row laid out.

    Attributes:
        found: one lookup a segment, ``None`` for one too short.
        seen: what the report says of each.
        prefix: tokens reused of an ordinary prefix.
        cores: what else is reused but earlier turns; empty if nothing is.
        chain: the earlier turns.
    """

    plan: LinkPlan
    found: list[Lookup | None]
    seen: list[Found]
    prefix: int
    cores: tuple[Core, ...]
    chain: Chain | None


class PlanningTree(ConversingTree):
    """A tree cache that plans links."""

    def __init__(self, params: Any):
        super().__init__(params)
        self._links: weakref.WeakKeyDictionary[Req, LinkState] = weakref.WeakKeyDictionary()

    def match_prefix(self, params: MatchPrefixParams) -> MatchResult:
        try:
            return self._match(params)
        except Exception:
            faults.note("match", [params.req.rid] if params.req is not None else ())
            return self._match_as_sglang(params)

    def _match_as_sglang(self, params: MatchPrefixParams) -> MatchResult:
        """Behind a fault: answer exactly, and link this request no more."""
        req = params.req
        link = self._links.get(req) if req is not None else None
        if link is None:
            return super().match_prefix(params)
        link.request = dataclasses.replace(link.request, off=FAULT)
        with self.contained("drop plan", req):
            self._drop_plan(req, link)
        if req.positional_embed_overrides is None:
            params.key.token_ids = req.origin_input_ids + req.output_ids
        result = super().match_prefix(params)
        with self.contained("report", req):
            self._unlinked(req, link, result, FAULT)
        return result

    def _match(self, params: MatchPrefixParams) -> MatchResult:
        req = params.req
        link = self._link_of(req) if req is not None else None
        if link is None:
            if req is not None and self._is_compile(req):
                # Kept by ``_keep``, when it is complete.
                req.skip_radix_cache_insert = True
            return super().match_prefix(params)
        # SGLang matches what it last laid out, which a former plan permuted.
        self._drop_plan(req, link)
        if req.positional_embed_overrides is None:
            params.key.token_ids = req.origin_input_ids + req.output_ids
        result = super().match_prefix(params)
        refusal = self._refusal(req, link)
        if refusal is not None:
            return self._unlinked(req, link, result, refusal)
        if not link.request.options.link:
            self._unlinked(req, link, result, "link_off")
            link.plan = unlinked_plan(len(params.key.token_ids))
            return result
        return self._linked(req, link, params, result)

    def _refusal(self, req: Req, link: LinkState) -> str | None:
        """Why nothing is linked for this request, or ``None``."""
        if link.request.options.require_exact:
            return "require_exact"
        return link.request.off or self.refusal or unlinkable(req)

    def _opens_at(self, ids: array) -> int:
        """Where a segment would stand exactly as it was compiled, or -1."""
        context = self.forest.context
        return len(context) if ids[: len(context)] == context else -1

    def missing(self, req: Req) -> list[int]:
        """Indices of the segments that would have to be compiled before linking;
        ``OPENING`` stands for the plain text before the first one."""
        link = self._link_of(req)
        if link is None or self.refusal or unlinkable(req):
            return []
        options = link.request.options
        if not options.link or link.request.is_exact or options.policy == "full":
            return []
        found = self._find_segments(req, link.request)
        missing = [i for i, lookup in enumerate(found) if lookup is not None and lookup.miss]
        opening = link.request.spans[0].start if link.request.spans else 0
        if opening >= self.config.min_segment:
            key = RadixKey(req.origin_input_ids[:opening], req.extra_key, cache_salt=req.cache_salt)
            held = super().match_prefix(MatchPrefixParams(key=key)).device_prefix_len
            if held < floor_to(opening, self.prefix_grid):
                missing.append(OPENING)
        return [] if missing and self._is_prefix(req) else missing

    def _is_prefix(self, req: Req) -> bool:
        """Whether SGLang holds all of the prompt but its last tokens, computed as such."""
        ids = req.origin_input_ids[:-1]
        key = RadixKey(ids, req.extra_key, cache_salt=req.cache_salt)
        held = super().match_prefix(MatchPrefixParams(key=key)).device_prefix_len
        return held > 0 and held >= floor_to(len(ids), self.page_size)

    def send_back(self, req: Req) -> list[int]:
        """``missing``, of a link that will come again when those are compiled; what is
        there is held back from eviction until then."""
        missing = self.missing(req)
        if missing:
            link = self._link_of(req)
            assert link is not None
            found = self._find_segments(req, link.request)
            self.expect([one.id for one in found if one is not None and one.miss is None])
        return missing

    @property
    def prefix_grid(self) -> int:
        """An ordinary prefix is held in multiples of this many tokens."""
        return self.page_size

    def _is_compile(self, req: Req) -> bool:
        return self.refusal is None and self.asked.of(req).compile is not None

    def _link_of(self, req: Req) -> LinkState | None:
        link = self._links.get(req)
        if link is None:
            request = self.asked.of(req).link
            if request is None:
                return None
            link = self._links[req] = LinkState(request)
        return link

    def _find_segments(self, req: Req, request: LinkRequest) -> list[Lookup | None]:
        """One lookup a segment; ``None`` for one too short to compile."""
        ids = req.origin_input_ids
        found: list[Lookup | None] = []
        for span in request.spans:
            if span.end - span.start < self.config.min_segment:
                found.append(None)
                continue
            tokens = ids[span.start : span.end]
            found.append(self.forest.find(tokens, req.extra_key, req.cache_salt))
        return found

    def _unlinked(
        self, req: Req, link: LinkState, result: MatchResult, reason: str | None
    ) -> MatchResult:
        """Answer as stock would: ordinary prefix, ordinary row."""
        bare = [Found(span.start, span.end) for span in link.request.spans]
        self._report(req, link, bare, result.device_prefix_len, reason)
        return result

    def _linked(
        self, req: Req, link: LinkState, params: MatchPrefixParams, prefix: MatchResult
    ) -> MatchResult:
        options = link.request.options
        ids = req.origin_input_ids + req.output_ids
        if options.policy == "full":
            prefix = self._root_match(req.extra_key)
        made = self._arrange(req, link.request, prefix, limit=len(params.key))
        plan = made.plan
        if not made.cores and options.policy != "full":
            # No core is reused: an ordinary request, and cached as one.
            self._report(req, link, made.seen, prefix.device_prefix_len, None)
            return prefix
        link.cores, link.chain = made.cores, made.chain
        link.plan = plan = dataclasses.replace(plan, relocated=options.mode == "relocate")
        in_row_order = np.frombuffer(ids, dtype=np.int64)[plan.order.numpy()]
        req.full_untruncated_fill_ids = array("q", in_row_order.tobytes())
        req.skip_radix_cache_insert = link.permutes = True
        self._report(req, link, made.seen, made.prefix, None)
        if not plan.reused:
            return self._root_match(req.extra_key)
        held = [lookup for lookup in made.found if lookup is not None and lookup.slots.numel()]
        nodes = dict.fromkeys(lookup.node for lookup in held)
        if made.chain is not None:
            nodes.update(dict.fromkeys(made.chain.nodes))
        handle = LinkHandle(
            prefix.last_device_node,
            tuple(nodes),
            plan,
            tuple(lookup.id for lookup in held),
            made.chain,
        )
        if plan.relocated:
            return MatchResult(0, handle, handle, handle, host_hit_length=plan.reused)
        return MatchResult(plan.reused, handle, handle, handle)

    def _arrange(
        self, req: Req, request: LinkRequest, prefix: MatchResult, *, limit: int
    ) -> Arranged:
        """Look up what a link names and lay its row out; changes nothing."""
        ids = req.origin_input_ids + req.output_ids
        spans = request.spans
        if request.options.policy == "full":
            found: list[Lookup | None] = [None] * len(spans)
        else:
            found = self._find_segments(req, request)
        prefix_slots = self.path_device_indices(prefix.last_device_node)
        prefix_slots = prefix_slots[: prefix.device_prefix_len].to(torch.int64)
        opens_at = self._opens_at(ids)
        hits, seen = [], []
        for span, lookup in zip(spans, found, strict=True):
            opening = span.start == opens_at
            if lookup is None:
                seen.append(Found(span.start, span.end))
                continue
            offset = span.start - len(self.forest.context)
            slots, state = lookup.slots, lookup.state
            hits.append(SegmentHit(span.start, span.end, offset, slots, opening, state))
            seen.append(Found(span.start, span.end, lookup.id, lookup.miss, opening))
        best: Arranged | None = None
        for held in self._prefixes(req, request, seen, prefix_slots.numel()):
            plan = make_plan(
                len(ids),
                limit=limit,
                prefix=prefix_slots[:held],
                hits=hits,
                policy=request.options.recompute_policy(),
                page=self.page_size,
            )
            cores = self._cores(ids, plan, seen, held) if plan.reused > held else ()
            chain = self._chain(req, request, plan, cores, limit) if cores else None
            if chain is not None:
                plan = reuse_turns(plan, chain.slots, chain.cores, self._turn_state(chain))
            elif best is not None:
                # A shorter prefix is worth a turn only; in a hybrid SGLang has the
                # state of the longest one ready, which but a turn's replaces.
                continue
            if best is None or plan.reused > best.plan.reused:
                best = Arranged(plan, found, seen, held, cores, chain)
        assert best is not None
        return best

    def explain(self, req: Req) -> dict[str, Any]:
        """What a link would do, without doing it: the report it would get now, and
        ``tokens_to_compile``, of segments that would be compiled first."""
        link = self._link_of(req)
        assert link is not None
        options = link.request.options
        ids = req.origin_input_ids
        key = RadixKey(ids[:-1], req.extra_key, cache_salt=req.cache_salt)
        prefix = super().match_prefix(MatchPrefixParams(key=key))
        reason = self._refusal(req, link)
        seen = [Found(span.start, span.end) for span in link.request.spans]
        plan, prefix_tokens = None, prefix.device_prefix_len
        if reason is None and not options.link:
            plan = unlinked_plan(len(ids))
        elif reason is None:
            made = self._arrange(req, link.request, prefix, limit=len(key))
            seen = made.seen
            if made.cores:
                plan, prefix_tokens = made.plan, made.prefix
        report = make_report(
            len(ids),
            options,
            segments=seen,
            prefix_tokens=prefix_tokens,
            plan=plan,
            reason=reason,
        )
        spans = link.request.spans
        absent = [spans[i] for i in self.missing(req) if i != OPENING]
        return {
            **report.to_json(),
            "tokens_to_compile": sum(span.end - span.start for span in absent),
        }

    def _root_match(self, extra_key: str | None) -> MatchResult:
        root = self.root_node_handle(extra_key)
        return MatchResult(0, root, root, root)

    def _drop_plan(self, req: Req, link: LinkState) -> None:
        """Undo what a former plan did to the request."""
        link.plan, link.cores, link.chain = None, (), None
        if link.private is not None:
            self.token_to_kv_pool_allocator.free(link.private)
            link.private = None
        if link.permutes:
            req.skip_radix_cache_insert = link.permutes = False
            req.full_untruncated_fill_ids = req.origin_input_ids + req.output_ids

    def _report(
        self,
        req: Req,
        link: LinkState,
        segments: Sequence[Found],
        prefix_tokens: int,
        reason: str | None,
    ) -> None:
        if req.output_ids:
            return  # the report left with the first token
        made = make_report(
            len(req.origin_input_ids),
            link.request.options,
            segments=segments,
            prefix_tokens=prefix_tokens,
            plan=link.plan,
            reason=reason,
        )
        req.customized_info = {"pic": [made.to_json()]}

    def plans_of(self, reqs: Sequence[Req]) -> list[LinkPlan | None]:
        """Current plan of each request; ``None`` for ordinary ones."""
        if not self._links:
            return [None] * len(reqs)
        links = (self._links.get(req) for req in reqs)
        return [link.plan if link is not None else None for link in links]

    @property
    def has_linked(self) -> bool:
        """Whether a row of this cache may be linked: it was allowed to at start."""
        return self.nodes is not None

    def give_up(self, reqs: Sequence[Req]) -> list[Req]:
        """Link these requests no more, whatever their plans; those that were linked."""
        linked = []
        for req in reqs:
            link = self._links.get(req)
            if link is not None and link.plan is not None:
                link.plan, link.cores = None, ()
                linked.append(req)
        return linked

    def hand_over(self, backend: Any, rids: Sequence[str], reqs: Sequence[Req]) -> None:
        """Give the attention backend the plans of the batch that runs next."""
        backend.set_plans(rids, self.plans_of(reqs))

    def state(self) -> dict[str, Any]:
        """As in ``HoldingTree``, with ``live_plans``, of requests that run."""
        live = sum(link.plan is not None for link in self._links.values())
        return {**super().state(), "live_plans": live}
