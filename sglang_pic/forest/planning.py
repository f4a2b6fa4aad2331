"""What a link's plan is made of: looked up here, laid out by ``planner``."""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams, MatchResult
from sglang.srt.mem_cache.radix_cache import RadixKey

from sglang_pic.forest.companies import Companies
from sglang_pic.forest.conversations import Conversations
from sglang_pic.forest.keys import owner_of
from sglang_pic.forest.lookups import Lookup, Lookups
from sglang_pic.forest.pages import Pages
from sglang_pic.forest.planner import Arranged, Row, arrange
from sglang_pic.forest.segments import Segments
from sglang_pic.forest.state import LinkState
from sglang_pic.forest.turns import Chain, Core
from sglang_pic.link.plan import LinkPlan
from sglang_pic.link.policy import LinkOptions

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req


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

    match: Callable[[MatchPrefixParams], MatchResult]
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


class Planning:
    """Looks up what a link names, and has its row laid out; changes nothing but what a
    request remembers of its lookups."""

    def __init__(
        self,
        ordinary: Ordinary,
        segments: Segments,
        companies: Companies,
        pages: Pages,
        lookups: Lookups,
        conversations: Conversations,
    ):
        self._ordinary = ordinary
        self._segments = segments
        self._companies = companies
        self._pages = pages
        self._lookups = lookups
        self._conversations = conversations

    def found(self, req: Req, link: LinkState) -> list[Lookup | None]:
        """One lookup a segment; those made before, while nothing has changed."""
        if link.request.options.policy == "full":
            link.found = [None] * len(link.request.spans)
            return link.found
        version = self._companies.version(self.owner(req))
        is_still = link.version == version and all(map(self._is_still, link.found or ()))
        if link.found is None or not is_still:
            link.found = self._look_up(req, link, link.request.options)
            link.version = version
        return link.found

    def owner(self, req: Req) -> tuple[str, str]:
        """Whose segments a request can see."""
        return owner_of(self._segments.namespace(req.cache_salt), req.extra_key)

    def _look_up(self, req: Req, link: LinkState, options: LinkOptions) -> list[Lookup | None]:
        return self._lookups.of(
            req.origin_input_ids,
            link.request.spans,
            req.extra_key,
            req.cache_salt,
            options,
            self._opens_at(req.origin_input_ids),
        )

    def _is_still(self, lookup: Lookup | None) -> bool:
        return lookup is None or (lookup.miss is None and self._pages.holds(lookup.node))

    def _opens_at(self, ids: array) -> int:
        """Where a segment would stand exactly as it was compiled, or -1."""
        context = self._segments.context
        return len(context) if ids[: len(context)] == context else -1

    def arrange(
        self, req: Req, link: LinkState, ids: array, prefix: MatchResult, limit: int
    ) -> Arranged:
        """Lay a row out.

        Args:
            ids: the request's tokens in their own order.
            prefix: what SGLang holds of them.
            limit: no token at or behind this index may be reused.
        """
        options = link.request.options
        row = Row(
            ids,
            limit,
            link.request.spans,
            options,
            self._opens_at(ids),
            self._pages.page_size,
        )
        made = self._arranged(row, self.found(req, link), req, link, prefix)
        in_company = any(one is not None and one.company for one in link.found or ())
        if made.chain is None and in_company and options.reuses_turns:
            # A conversation goes on from what it has computed, in company or alone.
            alone = self._look_up(req, link, dataclasses.replace(options, company="off"))
            other = self._arranged(row, alone, req, link, prefix)
            if other.chain is not None:
                link.found = alone
                return other
        return made

    def _arranged(
        self,
        row: Row,
        found: Sequence[Lookup | None],
        req: Req,
        link: LinkState,
        prefix: MatchResult,
    ) -> Arranged:
        options = row.options
        slots = [None if one is None else self._lookups.slots(one) for one in found]
        held = prefix.device_prefix_len
        prefix_slots = self._ordinary.slots(prefix.last_device_node, held)
        whose = self._conversations.whose(req, link)
        lengths = [held]
        if options.reuses_turns:
            first = next((lookup.copy for lookup in found if lookup is not None), None)
            lengths = self._conversations.prefixes(whose, first, held)

        def chain_of(plan: LinkPlan, cores: Sequence[Core]) -> Chain | None:
            if not options.reuses_turns:
                return None
            return self._conversations.chain(row.ids, req.extra_key, whose, plan, cores, row.limit)

        return arrange(row, found, slots, prefix_slots, lengths, chain_of)
