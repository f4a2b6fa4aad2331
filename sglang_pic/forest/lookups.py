"""What the forest holds of the segments that a request names."""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from sglang_pic.forest.carried import Carried
from sglang_pic.forest.keys import owner_of, segment_id
from sglang_pic.forest.pages import Pages
from sglang_pic.forest.segments import Segments
from sglang_pic.link import report
from sglang_pic.link.policy import RecomputePolicy
from sglang_pic.request.base import TokenSpan

if TYPE_CHECKING:
    from sglang_pic.linear.state import CoreState


@dataclasses.dataclass(frozen=True)
class Lookup:
    """Result of looking one segment up.

    Attributes:
        id: the segment's name.
        node: that its path is locked with.
        held: of its first tokens, whole pages, that can be reused.
        miss: why less than all whole pages can, or ``None``.
        state: what the segment's core does to linear layers, in hybrids.
    """

    id: str
    node: int
    held: int
    miss: str | None
    state: CoreState | None = None


class Lookups:
    """Looks segments up by content: names in ``segments``, tokens in ``pages``, what
    else a link needs in ``carried``.

    Args:
        shortest: tokens of the shortest segment that is compiled.
    """

    def __init__(self, segments: Segments, pages: Pages, carried: Carried, shortest: int):
        self._segments = segments
        self._pages = pages
        self._carried = carried
        self._shortest = shortest

    def find(self, tokens: array, extra_key: str | None, tenant: str | None) -> Lookup:
        """Look one segment up, whatever it carries.

        Args:
            tokens: the segment's token ids.
            extra_key: SGLang's adapter key of the request.
            tenant: cache salt of the request; decides what it can see.
        """
        context = self._segments.context
        space = self._segments.namespace(tenant)
        name = segment_id(space, extra_key, tokens)
        path = context + tokens if context else tokens
        held, node = self._pages.find(path, extra_key, space)
        held = max(0, held - len(context))
        page = self._pages.page_size
        miss = None
        if held < len(tokens) // page * page:
            if self._segments.find(name, owner_of(space, extra_key)) is None:
                miss = report.MISSING
            else:
                miss = report.PARTLY_EVICTED if held else report.EVICTED
        return Lookup(name, node, held, miss)

    def of(
        self,
        ids: array,
        spans: Sequence[TokenSpan],
        extra_key: str | None,
        tenant: str | None,
        policy: RecomputePolicy,
        opens_at: int,
    ) -> list[Lookup | None]:
        """One lookup a segment of a prompt; ``None`` for one too short to compile.

        Args:
            opens_at: where a segment would stand exactly as it was compiled, or -1.
        """
        owner = owner_of(self._segments.namespace(tenant), extra_key)
        page = self._pages.page_size
        found: list[Lookup | None] = []
        for span in spans:
            length = span.end - span.start
            if length < self._shortest:
                found.append(None)
                continue
            lookup = self.find(ids[span.start : span.end], extra_key, tenant)
            opening = span.start == opens_at
            core = policy.core(length, page=page, opening=opening)
            if core[0] < core[1]:
                lookup = self._with_carried(lookup, owner, core, opening)
            found.append(lookup)
        return found

    def _with_carried(
        self, lookup: Lookup, owner: tuple[str, str], core: tuple[int, int], opening: bool
    ) -> Lookup:
        state, miss = self._carried.of_core(lookup.id, owner, core, opening=opening)
        if miss is not None:
            # Without it a page is of no use.
            return dataclasses.replace(lookup, held=0, miss=lookup.miss or miss)
        return dataclasses.replace(lookup, state=state) if state is not None else lookup

    def slots(self, lookup: Lookup) -> torch.Tensor:
        """int64 [held], of the segment's first tokens."""
        context = len(self._segments.context)
        if not lookup.held:
            return torch.empty(0, dtype=torch.int64)
        return self._pages.slots(lookup.node, context + lookup.held)[context:]
