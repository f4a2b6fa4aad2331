"""The planner: what was found, options and turns in; a row and a report out.

Pure: it looks nothing up but what it is given, and changes nothing.
"""

from __future__ import annotations

import bisect
import dataclasses
from array import array
from collections.abc import Callable, Sequence

import torch

from sglang_pic.forest.lookups import Lookup
from sglang_pic.forest.turns import Chain, Core
from sglang_pic.link.plan import LinkPlan, SegmentHit, make_plan, reuse_turns
from sglang_pic.link.policy import LinkOptions
from sglang_pic.link.report import Found
from sglang_pic.request.base import TokenSpan

# The earlier turns that a row with these cores goes on from.
ChainOf = Callable[[LinkPlan, Sequence[Core]], Chain | None]


@dataclasses.dataclass(frozen=True)
class Row:
    """A prompt that is to be laid out.

    Attributes:
        ids: its tokens, those generated before a retraction included.
        limit: no token at or behind this index may be reused.
        spans: the segments that it names.
        opens_at: where a segment would stand exactly as it was compiled, or -1.
        page: tokens per page.
    """

    ids: array
    limit: int
    spans: Sequence[TokenSpan]
    options: LinkOptions
    opens_at: int
    page: int


@dataclasses.dataclass(frozen=True)
class Arranged:
    """A row laid out.

    Attributes:
        seen: what the report says of each segment.
        prefix: tokens reused of an ordinary prefix.
        cores: what else is reused but earlier turns; empty if nothing is.
        chain: the earlier turns.
    """

    plan: LinkPlan
    seen: list[Found]
    prefix: int
    cores: tuple[Core, ...]
    chain: Chain | None

    @property
    def first(self) -> str | None:
        """The first segment of which something is reused."""
        return next((core.segment for core in self.cores if core.segment is not None), None)


def seen_of(row: Row, found: Sequence[Lookup | None]) -> list[Found]:
    """What a report says of each segment, looked up or too short to be."""
    return [
        Found(span.start, span.end)
        if lookup is None
        else Found(
            span.start,
            span.end,
            lookup.id,
            lookup.miss,
            span.start == row.opens_at,
            lookup.copy,
            lookup.company,
            lookup.guests,
        )
        for span, lookup in zip(row.spans, found, strict=True)
    ]


def arrange(
    row: Row,
    found: Sequence[Lookup | None],
    slots: Sequence[torch.Tensor | None],
    prefix: torch.Tensor,
    lengths: Sequence[int],
    chain_of: ChainOf,
) -> Arranged:
    """Lay a row out.

    Args:
        found: one lookup a segment, ``None`` for one that is not to be linked.
        slots: int64 [held] of each, ``None`` for the same.
        prefix: int64 [p], slots of the ordinary prefix, whole pages.
        lengths: of it to try, the longest first.
        chain_of: asked of every layout that reuses a core.
    """
    seen = seen_of(row, found)
    hits = []
    for span, lookup, held in zip(row.spans, found, slots, strict=True):
        if lookup is not None and held is not None:
            offset = span.start - lookup.before
            hits.append(SegmentHit(span.start, span.end, offset, held, lookup.core, lookup.state))
    best: Arranged | None = None
    for length in lengths:
        plan = make_plan(
            len(row.ids),
            limit=row.limit,
            prefix=prefix[:length],
            hits=hits,
            page=row.page,
        )
        cores = _cores(row.ids, plan, seen, length) if plan.reused > length else ()
        chain = chain_of(plan, cores) if cores else None
        if chain is not None:
            plan = reuse_turns(plan, chain.slots, chain.cores, chain.state)
        elif best is not None:
            # A shorter prefix is worth a turn only; in a hybrid SGLang has the
            # state of the longest one ready, which but a turn's replaces.
            continue
        if best is None or plan.reused > best.plan.reused:
            best = Arranged(plan, seen, length, cores, chain)
    assert best is not None
    return best


def _cores(ids: array, plan: LinkPlan, seen: Sequence[Found], prefix: int) -> tuple[Core, ...]:
    starts = [found.start for found in seen]
    cores = []
    for span in plan.spans:
        name = None
        if span.start >= prefix:
            name = seen[bisect.bisect_right(starts, span.start) - 1].copy
        cores.append(Core.of(ids, span.start, span.end, name))
    return tuple(cores)
