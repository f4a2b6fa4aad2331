"""``Links``: a request that carries a link is planned when SGLang matches it.

SGLang asks again and again, for every request that waits: a plan is kept and handed
out until something that it stands on has changed. A linked row is permuted (see
``link.plan``), and it is never inserted as if it were a prefix.
"""

from __future__ import annotations

import dataclasses
import weakref
from array import array
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams, MatchResult
from sglang.srt.mem_cache.radix_cache import RadixKey

from sglang_pic.faults import faults
from sglang_pic.forest.asked import Asked
from sglang_pic.forest.carried import Carried
from sglang_pic.forest.containment import Containment
from sglang_pic.forest.conversations import Conversations
from sglang_pic.forest.holder import Holder
from sglang_pic.forest.lookups import Lookup, Lookups
from sglang_pic.forest.pages import Pages
from sglang_pic.forest.planner import Arranged, Row, arrange
from sglang_pic.forest.segments import Segments
from sglang_pic.forest.state import (
    FAULT,
    Basis,
    Kept,
    LinkHandle,
    LinkState,
    text_of,
    unlinkable,
)
from sglang_pic.link.plan import LinkPlan, grown_plan, unlinked_plan
from sglang_pic.link.policy import LinkOptions, floor_to
from sglang_pic.link.report import Found, make_report
from sglang_pic.request.base import OPENING

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

Match = Callable[[MatchPrefixParams], MatchResult]


@dataclasses.dataclass(frozen=True)
class Ordinary:
    """SGLang's tree of ordinary prefixes, as much as links need of it.

    Attributes:
        match: SGLang's own ``match_prefix``.
        slots: int64, slots of the first tokens on the path to a node.
        root: node of no tokens, for an adapter's key.
        free: give slots back that no tree owns.
        grid: a prefix is held in multiples of this many tokens.
    """

    match: Match
    slots: Callable[[Any, int], torch.Tensor]
    root: Callable[[str | None], Any]
    free: Callable[[torch.Tensor], None]
    grid: int

    def nothing(self, extra_key: str | None) -> MatchResult:
        """The match of no tokens."""
        root = self.root(extra_key)
        return MatchResult(0, root, root, root)

    def held(self, ids: array, req: Req) -> MatchResult:
        """What is held of these tokens, for no request: nothing is prepared."""
        key = RadixKey(ids, req.extra_key, cache_salt=req.cache_salt)
        return self.match(MatchPrefixParams(key=key))


class Links:
    """Plans of linked requests and compiles.

    Args:
        shortest: tokens of the shortest opening that is compiled.
    """

    def __init__(
        self,
        asked: Asked,
        ordinary: Ordinary,
        segments: Segments,
        pages: Pages,
        lookups: Lookups,
        carried: Carried,
        conversations: Conversations,
        holder: Holder,
        contained: Containment,
        shortest: int,
    ):
        self._asked = asked
        self._ordinary = ordinary
        self._segments = segments
        self._pages = pages
        self._lookups = lookups
        self._carried = carried
        self._conversations = conversations
        self._holder = holder
        self._contained = contained
        self._shortest = shortest
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
            if asked.compile is not None and self._contained.refusal is None:
                return self._match_compile(req, asked.compile.seams, params)
        except Exception:
            faults.note("match", [req.rid])
            return self._match_as_sglang(req, params)
        return self._ordinary.match(params)

    def _match_as_sglang(self, req: Req, params: MatchPrefixParams) -> MatchResult:
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
        found_at = (prefix.last_device_node, prefix.device_prefix_len)
        basis = Basis(link.request, len(ids), limit, found_at)
        kept = link.kept
        if kept is not None and kept.basis == basis and self._is_valid(link, kept):
            self._lay_out(req, link, kept)
            return kept.result
        self._drop_plan(req, link)
        refusal = self._refusal(req, link)
        if refusal is not None:
            return self._unlinked(req, link, prefix, refusal)
        if not link.request.options.link:
            self._unlinked(req, link, prefix, "link_off")
            link.plan = unlinked_plan(len(ids))
            return prefix
        return self._linked(req, link, ids, prefix, basis)

    def _is_valid(self, link: LinkState, kept: Kept) -> bool:
        """Whether the plan would be made again as it is."""
        return (
            link.private is None
            and self._contained.refusal is None
            and link.plan is kept.plan
            and all(self._segments.compiled(name) == tick for name, tick in kept.lacking)
            and self._conversations.version(*kept.turns[:2]) == kept.turns[2]
            and all(map(self._pages.holds, kept.nodes))
        )

    def _refusal(self, req: Req, link: LinkState) -> str | None:
        """Why nothing is linked for this request, or ``None``."""
        if link.request.options.require_exact:
            return "require_exact"
        return link.request.off or self._contained.refusal or unlinkable(req)

    def _linked(
        self, req: Req, link: LinkState, ids: array, prefix: MatchResult, basis: Basis
    ) -> MatchResult:
        options = link.request.options
        if options.policy == "full":
            prefix = self._ordinary.nothing(req.extra_key)
        made = self._arrange(req, link, ids, prefix, basis.limit)
        plan = made.plan
        link.kept = None
        if not made.cores and options.policy != "full":
            # No core is reused: an ordinary request, and cached as one.
            self._report(req, link, made.seen, prefix.device_prefix_len, None)
            self._keep(req, link, made, basis, (), None, prefix)
            return prefix
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
        kept = self._keep(req, link, made, basis, handle.nodes, order, result)
        self._lay_out(req, link, kept)
        return result

    def _handle(
        self, link: LinkState, made: Arranged, prefix: MatchResult, plan: LinkPlan
    ) -> LinkHandle:
        held = [lookup for lookup in link.found or () if lookup is not None and lookup.held]
        nodes = dict.fromkeys(lookup.node for lookup in held)
        if made.chain is not None:
            nodes.update(dict.fromkeys(made.chain.nodes))
        names = tuple(lookup.id for lookup in held)
        return LinkHandle(prefix.last_device_node, tuple(nodes), plan, names, made.chain)

    def _keep(
        self,
        req: Req,
        link: LinkState,
        made: Arranged,
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
        version = self._conversations.version(whose, made.first)
        turns = (whose, made.first, version)
        link.kept = Kept(basis, lacking, nodes, turns, link.plan, order, result)
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

    def _arrange(
        self, req: Req, link: LinkState, ids: array, prefix: MatchResult, limit: int
    ) -> Arranged:
        """Look up what a link names and lay its row out; changes nothing."""
        options = link.request.options
        row = Row(
            ids,
            limit,
            link.request.spans,
            options,
            self._opens_at(ids),
            len(self._segments.context),
            self._pages.page_size,
        )
        if options.policy == "full":
            link.found = [None] * len(row.spans)
        else:
            link.found = self._found(req, link)
        slots = [None if one is None else self._lookups.slots(one) for one in link.found]
        held = prefix.device_prefix_len
        prefix_slots = self._ordinary.slots(prefix.last_device_node, held)
        whose = self._conversations.whose(req, link)
        lengths = [held]
        if options.reuses_turns:
            first = next((lookup.id for lookup in link.found if lookup is not None), None)
            lengths = self._conversations.prefixes(whose, first, held)

        def chain_of(plan: LinkPlan, cores: Any) -> Any:
            if not options.reuses_turns:
                return None
            return self._conversations.chain(ids, req.extra_key, whose, plan, cores, limit)

        return arrange(row, link.found, slots, prefix_slots, lengths, chain_of)

    def _found(self, req: Req, link: LinkState) -> list[Lookup | None]:
        """One lookup a segment; those made before, while nothing has changed."""
        if link.found is not None and all(map(self._is_still, link.found)):
            return link.found
        return self._lookups.of(
            req.origin_input_ids,
            link.request.spans,
            req.extra_key,
            req.cache_salt,
            link.request.options.recompute_policy(),
            self._opens_at(req.origin_input_ids),
        )

    def _is_still(self, lookup: Lookup | None) -> bool:
        return lookup is None or (lookup.miss is None and self._pages.holds(lookup.node))

    def _opens_at(self, ids: array) -> int:
        """Where a segment would stand exactly as it was compiled, or -1."""
        context = self._segments.context
        return len(context) if ids[: len(context)] == context else -1

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

    # -- at arrival -------------------------------------------------------------------

    def missing(self, req: Req) -> list[int]:
        """Indices of the segments that would have to be compiled before linking;
        ``OPENING`` stands for the plain text before the first one."""
        link = self.of(req)
        if link is None or self._contained.refusal or unlinkable(req):
            return []
        options = link.request.options
        if not options.link or link.request.is_exact or options.policy == "full":
            return []
        link.found = self._found(req, link)
        missing = [i for i, lookup in enumerate(link.found) if lookup is not None and lookup.miss]
        opening = link.request.spans[0].start if link.request.spans else 0
        if opening >= self._shortest:
            held = self._ordinary.held(req.origin_input_ids[:opening], req).device_prefix_len
            if held < floor_to(opening, self._ordinary.grid):
                missing.append(OPENING)
        return [] if missing and self._is_prefix(req) else missing

    def _is_prefix(self, req: Req) -> bool:
        """Whether SGLang holds all of the prompt but its last tokens, computed as such."""
        ids = req.origin_input_ids[:-1]
        held = self._ordinary.held(ids, req).device_prefix_len
        return held > 0 and held >= floor_to(len(ids), self._pages.page_size)

    def send_back(self, req: Req) -> list[int]:
        """``missing``, of a link that will come again when those are compiled; what is
        there is held back from eviction until then."""
        missing = self.missing(req)
        if missing:
            link = self.of(req)
            assert link is not None
            found = link.found or ()
            self._holder.expect([one.id for one in found if one is not None and one.miss is None])
        return missing

    def explain(self, req: Req) -> dict[str, Any]:
        """What a link would do, without doing it: the report it would get now, and
        ``tokens_to_compile``, of segments that would be compiled first."""
        link = self.of(req)
        assert link is not None
        options: LinkOptions = link.request.options
        ids = req.origin_input_ids
        prefix = self._ordinary.held(ids[:-1], req)
        reason = self._refusal(req, link)
        seen = [Found(span.start, span.end) for span in link.request.spans]
        plan, prefix_tokens = None, prefix.device_prefix_len
        if reason is None and not options.link:
            plan = unlinked_plan(len(ids))
        elif reason is None:
            made = self._arrange(req, link, ids, prefix, len(ids) - 1)
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

    # -- rows that run ----------------------------------------------------------------

    def slots(self, req: Req) -> torch.Tensor:
        """int64, the first slots of a row that is about to run: those its plan reuses."""
        handle: LinkHandle = req.last_node
        with self._contained("use", req):
            self._holder.use(handle.segments)
            if handle.chain is not None:
                self._conversations.use(handle.chain, req.cache_salt or None)
        link = self._states.get(req)
        slots = handle.plan.slots
        if link is not None and link.private is not None:
            slots, link.private = link.private, None
        return slots[: req.prefix_len]

    def finished(self, req: Req) -> None:
        """A request has ended well: keep what it computed."""
        asked = self._asked.of(req)
        if asked.compile is not None and self._contained.refusal is None:
            with self._contained("keep", req):
                self._holder.keep(req, named=asked.compile.named)
        link = self._states.get(req)
        if link is not None:
            with self._contained("keep turn", req):
                self._conversations.keep(req, link)

    def released(self, req: Req) -> None:
        """Its row is gone, for good or until it is scheduled again."""
        link = self._states.get(req)
        if link is not None:
            link.plan = None

    def plans_of(self, reqs: Sequence[Req]) -> list[LinkPlan | None]:
        """Current plan of each request; ``None`` for ordinary ones."""
        if not self._states:
            return [None] * len(reqs)
        links = (self._states.get(req) for req in reqs)
        return [link.plan if link is not None else None for link in links]

    def hand_over(self, backend: Any, rids: Sequence[str], reqs: Sequence[Req]) -> None:
        """Give the attention backend the plans of the batch that runs next."""
        links = [self._states.get(req) for req in reqs]
        options = [link.request.options if link is not None else None for link in links]
        self._carried.hand_over(backend, rids, reqs, self.plans_of(reqs), options)

    def give_up(self, reqs: Sequence[Req]) -> list[Req]:
        """Link these requests no more, whatever their plans; those that were linked, and
        compiles whose result may stand behind rows that were taken for others."""
        linked = []
        for req in reqs:
            link = self._states.get(req)
            if link is not None and link.plan is not None:
                link.plan, link.cores = None, ()
                linked.append(req)
        return [*linked, *(req for req in reqs if self._carried.end(req))]

    @property
    def live(self) -> int:
        """Plans of requests that run or wait."""
        return sum(link.plan is not None for link in self._states.values())


def _in_order(params: MatchPrefixParams, ids: array) -> None:
    """Match the request's tokens in their own order."""
    if params.req.positional_embed_overrides is None:
        params.key.token_ids = ids
