"""``Links``: a request that carries a link is planned when SGLang matches it.

SGLang asks again and again, for every request that waits: a plan is kept and handed
out until something that it stands on has changed. A linked row is permuted (see
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
from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams, MatchResult

from sglang_pic.faults import faults
from sglang_pic.forest.asked import Asked
from sglang_pic.forest.assembly import Assembly
from sglang_pic.forest.carried import Carried
from sglang_pic.forest.checkpoints import Checkpoints
from sglang_pic.forest.companies import Companies
from sglang_pic.forest.containment import Containment
from sglang_pic.forest.conversations import Conversations
from sglang_pic.forest.holder import Holder
from sglang_pic.forest.pages import Pages
from sglang_pic.forest.planner import Arranged
from sglang_pic.forest.planning import Ordinary, Planning
from sglang_pic.forest.segments import Segments
from sglang_pic.forest.state import (
    FAULT,
    LINK_OFF,
    REQUIRE_EXACT,
    Basis,
    Kept,
    LinkHandle,
    LinkState,
    text_of,
    unlinkable,
)
from sglang_pic.link.plan import LinkPlan, grown_plan, unlinked_plan
from sglang_pic.link.report import Found, make_report

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req


class Links:
    """Plans of linked requests and compiles."""

    def __init__(
        self,
        asked: Asked,
        ordinary: Ordinary,
        planning: Planning,
        segments: Segments,
        companies: Companies,
        assembly: Assembly,
        pages: Pages,
        carried: Carried,
        conversations: Conversations,
        holder: Holder,
        checkpoints: Checkpoints,
        contained: Containment,
    ):
        self._asked = asked
        self._ordinary = ordinary
        self._planning = planning
        self._segments = segments
        self._companies = companies
        self._assembly = assembly
        self._pages = pages
        self._carried = carried
        self._conversations = conversations
        self._holder = holder
        self._checkpoints = checkpoints
        self._contained = contained
        self._states: weakref.WeakKeyDictionary[Req, LinkState] = weakref.WeakKeyDictionary()

    def of(self, req: Req) -> LinkState | None:
        """What is kept of a request that carries a link."""
        link = self._states.get(req)
        if link is None:
            request = self._asked.of(req).link
            if request is None:
                return None
            link = self._states[req] = LinkState(request)
        return link

    # -- matching -------------------------------------------------------------------

    def match(self, params: MatchPrefixParams) -> MatchResult:
        """In the place of SGLang's ``match_prefix``. Behind a fault of ours the request
        is answered exactly, and linked no more."""
        req = params.req
        if req is None:
            return self._ordinary.match(params)
        try:
            asked = self._asked.of(req)
            if asked.link is not None:
                return self._match_link(req, params)
            if asked.compile is not None and asked.compile.company:
                # An ordinary prefill, from nothing: of it copies are kept.
                members = asked.compile.company[asked.compile.guests :]
                where = [(span.start, span.end) for span in members]
                self._carried.begin_company(req, where, asked.compile.seams)
                req.skip_radix_cache_insert = True
                return self._ordinary.nothing(req.extra_key)
            if asked.compile is not None and self._contained.refusal is None:
                return self._match_compile(req, asked.compile.seams, params)
            return self._checkpoints.resume(req, self._ordinary.match(params))
        except Exception:
            faults.note("match", [req.rid])
            return self._match_as_sglang(req, params)

    def _match_as_sglang(self, req: Req, params: MatchPrefixParams) -> MatchResult:
        self._checkpoints.released(req)
        link = self._states.get(req)
        if link is None:
            return self._ordinary.match(params)
        link.request = dataclasses.replace(link.request, off=FAULT)
        with self._contained("drop plan", req):
            self._drop_plan(req, link)
        _in_order(params, text_of(req))
        result = self._ordinary.match(params)
        with self._contained("report", req):
            self._unlinked(req, link, result, FAULT)
        return result

    def _match_compile(
        self, req: Req, seams: Sequence[int], params: MatchPrefixParams
    ) -> MatchResult:
        """A compile goes on from what is held of its path; what it computes is kept when
        it is complete (``Holder.keep``)."""
        req.skip_radix_cache_insert = True
        root = self._ordinary.nothing(req.extra_key)
        limit = min(len(params.key), len(req.origin_input_ids) - 1)
        path = self._holder.begin(req, seams, limit)
        if not path.tokens:
            return root
        plan = grown_plan(len(req.origin_input_ids), self._pages.slots(path.node, path.tokens))
        handle = LinkHandle(root.last_device_node, (path.node,), plan, ())
        return MatchResult(plan.reused, handle, handle, handle)

    def _match_link(self, req: Req, params: MatchPrefixParams) -> MatchResult:
        link = self.of(req)
        assert link is not None
        ids = text_of(req)
        # SGLang matches what it last laid out, which a former plan permuted.
        _in_order(params, ids)
        prefix = self._ordinary.match(params)
        # A probe has no limit; every request has a token left to compute.
        limit = min(len(params.key), len(ids) - 1)
        found_at = (
            *(prefix.last_device_node, prefix.device_prefix_len),
            *(prefix.best_match_node, prefix.host_hit_length),
        )
        refusal = self.refusal(link) or unlinkable(req, link.request)
        basis = Basis(link.request, len(ids), limit, found_at, refusal)
        kept = link.kept
        if kept is not None and kept.basis == basis and self._is_valid(link, kept):
            self._lay_out(req, link, kept)
            return kept.result
        self._drop_plan(req, link)
        if refusal is None and link.request.options.link:
            return self._linked(req, link, ids, prefix, basis)
        self._unlinked(req, link, prefix, refusal or LINK_OFF)
        if refusal is None:
            link.plan = unlinked_plan(len(ids))
        return self._keep(req, link, None, basis, (), None, prefix).result

    def _is_valid(self, link: LinkState, kept: Kept) -> bool:
        """Whether the plan would be made again as it is."""
        return (
            link.private is None
            and link.plan is kept.plan
            and all(self._segments.compiled(name) == tick for name, tick in kept.lacking)
            and self._companies.version(kept.companies[0]) == kept.companies[1]
            and self._conversations.version(*kept.turns[:2]) == kept.turns[2]
            and all(map(self._pages.holds, kept.nodes))
        )

    def refusal(self, link: LinkState) -> str | None:
        """Why nothing is linked for a request, beside ``unlinkable``, or ``None``."""
        if link.request.options.require_exact:
            return REQUIRE_EXACT
        return link.request.off or self._contained.refusal

    def _linked(
        self, req: Req, link: LinkState, ids: array, prefix: MatchResult, basis: Basis
    ) -> MatchResult:
        options = link.request.options
        if options.policy == "full":
            prefix = self._ordinary.nothing(req.extra_key)
        made = self._planning.arrange(req, link, ids, prefix, basis.limit)
        plan = made.plan
        if not made.cores and options.policy != "full":
            # No core is reused: an ordinary request, and cached as one.
            self._report(req, link, made.seen, prefix.device_prefix_len, None)
            return self._keep(req, link, made.first, basis, (), None, prefix).result
        link.cores, link.chain = made.cores, made.chain
        link.plan = plan = dataclasses.replace(plan, relocated=options.mode == "relocate")
        in_row_order = np.frombuffer(ids, dtype=np.int64)[plan.order.numpy()]
        order = array("q", in_row_order.tobytes())
        self._report(req, link, made.seen, made.prefix, None)
        handle = self._handle(link, made, prefix, plan)
        if not plan.reused:
            result = self._ordinary.nothing(req.extra_key)
        elif plan.relocated:
            result = MatchResult(0, handle, handle, handle, host_hit_length=plan.reused)
        else:
            result = MatchResult(plan.reused, handle, handle, handle)
        kept = self._keep(req, link, made.first, basis, handle.nodes, order, result)
        self._lay_out(req, link, kept)
        return result

    def _handle(
        self, link: LinkState, made: Arranged, prefix: MatchResult, plan: LinkPlan
    ) -> LinkHandle:
        held = [lookup for lookup in link.found or () if lookup is not None and lookup.held]
        nodes = dict.fromkeys(lookup.node for lookup in held)
        if made.chain is not None:
            nodes.update(dict.fromkeys(made.chain.nodes))
        names = tuple(lookup.copy for lookup in held)
        return LinkHandle(prefix.last_device_node, tuple(nodes), plan, names, made.chain)

    def _keep(
        self,
        req: Req,
        link: LinkState,
        first: str | None,
        basis: Basis,
        nodes: tuple[int, ...],
        order: array | None,
        result: MatchResult,
    ) -> Kept:
        lacking = tuple(
            (lookup.id, self._segments.compiled(lookup.id))
            for lookup in link.found or ()
            if lookup is not None and lookup.miss is not None
        )
        whose = self._conversations.whose(req, link)
        turns = (whose, first, self._conversations.version(whose, first))
        owner = self._planning.owner(req)
        companies = (owner, self._companies.version(owner))
        link.kept = Kept(basis, lacking, nodes, companies, turns, link.plan, order, result)
        return link.kept

    def _lay_out(self, req: Req, link: LinkState, kept: Kept) -> None:
        """Put the request's tokens into the row's order."""
        if kept.order is None:
            return
        # A copy: SGLang appends what is generated.
        req.full_untruncated_fill_ids = kept.order[:]
        req.skip_radix_cache_insert = link.permutes = True
        assert kept.plan is not None
        if not (kept.plan.reused and kept.basis.prefix[1]):
            self._carried.begin_row(req)

    def _drop_plan(self, req: Req, link: LinkState) -> None:
        """Undo what a former plan did to the request."""
        link.plan, link.cores, link.chain, link.kept = None, (), None, None
        if link.private is not None:
            self._ordinary.free(link.private)
            link.private = None
        if link.permutes:
            req.skip_radix_cache_insert = link.permutes = False
            req.full_untruncated_fill_ids = req.origin_input_ids + req.output_ids

    def _unlinked(
        self, req: Req, link: LinkState, result: MatchResult, reason: str | None
    ) -> MatchResult:
        """Answer as stock would: ordinary prefix, ordinary row."""
        bare = [Found(span.start, span.end) for span in link.request.spans]
        self._report(req, link, bare, result.device_prefix_len, reason)
        return result

    def answer_exactly(self, req: Req, reason: str) -> Any:
        """Drop a request's plan, and answer as if nothing were held.

        Returns:
            The node of no tokens.
        """
        link = self._states[req]
        with self._contained("drop plan", req):
            self._drop_plan(req, link)
            self._unlinked(req, link, self._ordinary.nothing(req.extra_key), reason)
        return self._ordinary.root(req.extra_key)

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

    # -- rows that run ----------------------------------------------------------------

    def slots(self, req: Req) -> torch.Tensor:
        """int64, the first slots of a row that is about to run: those its plan reuses."""
        handle: LinkHandle = req.last_node
        with self._contained("use", req):
            self._holder.use(handle.segments)
            self._assembly.use(handle.segments)
            if handle.chain is not None:
                self._conversations.use(handle.chain, req.cache_salt or None)
        link = self._states.get(req)
        slots = handle.plan.slots
        if link is not None and link.private is not None:
            slots, link.private = link.private, None
        return slots[: req.prefix_len]

    def finished(self, req: Req) -> None:
        """A request has ended well: keep what it computed."""
        with self._contained("keep", req):
            compiled = self._asked.of(req).compile
            if compiled is not None and self._contained.refusal is None:
                if compiled.company:
                    self._assembly.keep(req, compiled)
                else:
                    self._holder.keep(req, named=compiled.named)
        link = self._states.get(req)
        if link is not None:
            with self._contained("keep turn", req):
                self._conversations.keep(req, link)

    def released(self, req: Req) -> None:
        """Its row is gone, for good or until it is scheduled again."""
        self._checkpoints.released(req)
        link = self._states.get(req)
        if link is not None:
            link.plan = link.kept = link.found = None

    def plans_of(self, reqs: Sequence[Req]) -> list[LinkPlan | None]:
        """Current plan of each request; ``None`` for ordinary ones."""
        if not self._states:
            return [None] * len(reqs)
        links = (self._states.get(req) for req in reqs)
        return [link.plan if link is not None else None for link in links]

    def hand_over(
        self, backend: Any, rids: Sequence[str], reqs: Sequence[Req], *, extends: bool
    ) -> None:
        """Give the attention backend the plans of the batch that runs next.

        Args:
            extends: prompts are computed in it, not only single tokens.
        """
        links = [self._states.get(req) for req in reqs]
        options = [link.request.options if link is not None else None for link in links]
        self._carried.hand_over(backend, rids, reqs, self.plans_of(reqs), options)
        if extends:
            self._checkpoints.hand_over(backend, reqs)

    def by_row(self, reqs: Sequence[Req]) -> bool:
        """Whether what is handed over is of single rows, which must be told apart: any of
        these is linked, or goes on from a checkpoint, or one is read off it."""
        plans = self.plans_of(reqs)
        return any(plan is not None for plan in plans) or self._checkpoints.concern(reqs)

    def give_up(self, reqs: Sequence[Req]) -> list[Req]:
        """Link these requests no more, whatever their plans; those that were linked or went
        on from a checkpoint, and compiles whose result may stand behind rows that were
        taken for others."""
        linked = []
        for req in reqs:
            link = self._states.get(req)
            if link is not None and link.plan is not None:
                link.plan, link.cores = None, ()
                linked.append(req)
        linked += self._checkpoints.give_up(reqs)
        return [*linked, *(req for req in reqs if self._carried.end(req))]

    @property
    def live(self) -> int:
        """Plans of requests that run or wait."""
        return sum(link.plan is not None for link in self._states.values())


def _in_order(params: MatchPrefixParams, ids: array) -> None:
    """Match the request's tokens in their own order."""
    if params.req.positional_embed_overrides is None:
        params.key.token_ids = ids
