"""What the forest holds of the segments that a request names."""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from sglang_pic.forest.carried import Carried
from sglang_pic.forest.companies import Companies, Variant
from sglang_pic.forest.keys import owner_of, segment_id
from sglang_pic.forest.pages import Pages
from sglang_pic.forest.segments import Segments
from sglang_pic.link import report
from sglang_pic.link.policy import Core, LinkOptions, Outline
from sglang_pic.request.base import TokenSpan

if TYPE_CHECKING:
    from sglang_pic.linear.state import CoreState


@dataclasses.dataclass(frozen=True)
class Lookup:
    """Result of looking one segment up.

    Attributes:
        id: the segment's name.
        copy: name of what would be reused: the same, or a company's variant of it.
        node: that its path is locked with.
        held: of its first tokens, whole pages, that can be reused.
        miss: why less than all whole pages can, or ``None``.
        before: tokens in front of the segment on that path, and when it was computed.
        core: what the request's policy reuses of it.
        company: segments of the company that it was computed in; 0 alone.
        guests: those of them that are guests.
        state: what the segment's core does to linear layers, in hybrids.
    """

    id: str
    copy: str
    node: int
    held: int
    miss: str | None
    before: int
    core: Core = (0, 0)
    company: int = 0
    guests: int = 0
    state: CoreState | None = None


class Lookups:
    """Looks segments up by content: names in ``segments``, tokens in ``pages``, what
    else a link needs in ``carried``.

    Args:
        shortest: tokens of the shortest segment that is compiled.
    """

    def __init__(
        self,
        segments: Segments,
        companies: Companies,
        pages: Pages,
        carried: Carried,
        shortest: int,
    ):
        self._segments = segments
        self._companies = companies
        self._pages = pages
        self._carried = carried
        self._shortest = shortest

    def find(self, tokens: array, extra_key: str | None, tenant: str | None) -> Lookup:
        """Look one segment up as compiled alone, whatever it carries.

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
        return Lookup(name, name, node, held, miss, len(context))

    def of(
        self,
        ids: array,
        spans: Sequence[TokenSpan],
        extra_key: str | None,
        tenant: str | None,
        options: LinkOptions,
        opens_at: int,
    ) -> list[Lookup | None]:
        """One lookup a segment of a prompt; ``None`` for one too short to compile.

        Args:
            opens_at: where a segment would stand exactly as it was compiled, or -1.
        """
        owner = owner_of(self._segments.namespace(tenant), extra_key)
        texts = [ids[span.start : span.end] for span in spans]
        chosen = self._in_company(texts, owner, ids[: spans[0].start] if spans else ids, options)
        found = self._each(spans, texts, owner, tenant, options, opens_at, chosen)
        # In company, but without what this width of seam needs: as compiled alone.
        lacking = {
            text.tobytes()
            for text, one in zip(texts, found, strict=True)
            if one is not None and one.company and one.miss is not None
        }
        if not lacking:
            return found
        left = {text: variant for text, variant in chosen.items() if text not in lacking}
        return self._each(spans, texts, owner, tenant, options, opens_at, left)

    def _each(
        self,
        spans: Sequence[TokenSpan],
        texts: Sequence[array],
        owner: tuple[str, str],
        tenant: str | None,
        options: LinkOptions,
        opens_at: int,
        chosen: Mapping[bytes, Variant],
    ) -> list[Lookup | None]:
        """Look each up, some as a company's variant."""
        extra_key = owner[1] or None
        width = max(options.company_seam, self._carried.history)
        policy = dataclasses.replace(options, company_seam=width).recompute_policy()
        found: list[Lookup | None] = []
        outlines = []
        for span, text in zip(spans, texts, strict=True):
            opening = span.start == opens_at
            lookup = None
            if len(text) >= self._shortest:
                # What opens a prompt as it was compiled has seen all there is.
                variant = None if opening else chosen.get(text.tobytes())
                lookup = self._variant(variant, text, extra_key) if variant else None
                lookup = lookup or self.find(text, extra_key, tenant)
            found.append(lookup)
            # Guests are strangers: they make up for no seam.
            in_company = lookup is not None and lookup.company > 0 and not lookup.guests
            outlines.append(Outline(max(1, len(text)), opening, in_company))
        cores = policy.cores(outlines, page=self._pages.page_size)
        return [
            self._with_core(lookup, owner, core, outline.opening) if lookup is not None else None
            for lookup, core, outline in zip(found, cores, outlines, strict=True)
        ]

    def _in_company(
        self, texts: Sequence[array], owner: tuple[str, str], opening: array, options: LinkOptions
    ) -> dict[bytes, Variant]:
        """Variants by the tokens of their segments."""
        if options.company == "off" or not self._companies.count:
            return {}
        named = {
            segment_id(*owner, text): text.tobytes()
            for text in texts
            if len(text) >= self._shortest
        }
        found = self._companies.cover(list(named), owner, opening, options.company)
        return {named[name]: variant for name, variant in found.items()}

    def _variant(self, variant: Variant, text: array, extra_key: str | None) -> Lookup | None:
        """A company's variant, its tokens compared one by one."""
        held, node = self._pages.find(text, extra_key, variant.space)
        if held < variant.tokens:
            return None
        return Lookup(
            variant.segment,
            variant.name,
            node,
            variant.tokens,
            None,
            0,
            company=variant.size,
            guests=variant.guests,
        )

    def _with_core(
        self, lookup: Lookup, owner: tuple[str, str], core: Core, opening: bool
    ) -> Lookup:
        lookup = dataclasses.replace(lookup, core=core)
        if core[0] >= core[1]:
            return lookup
        state, miss = self._carried.of_core(lookup.copy, owner, core, opening=opening)
        if miss is not None:
            # Without it a page is of no use.
            return dataclasses.replace(lookup, held=0, miss=lookup.miss or miss)
        return dataclasses.replace(lookup, state=state) if state is not None else lookup

    def slots(self, lookup: Lookup) -> torch.Tensor:
        """int64 [held], of the segment's first tokens."""
        before = lookup.before
        if not lookup.held:
            return torch.empty(0, dtype=torch.int64)
        return self._pages.slots(lookup.node, before + lookup.held)[before:]
