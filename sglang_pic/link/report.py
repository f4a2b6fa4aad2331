"""The exactness report: what a request reused, and why it did not reuse more."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from sglang_pic.link.plan import LinkPlan, Span
from sglang_pic.link.policy import LinkOptions

EXACT = "exact"
COMPOSED = "composed"
# By documents that a trained encoder has read (``link.encoded_report``); of a segment too.
ENCODED = "encoded"

# Why a segment was, or was not, reused.
HIT = "hit"
PREFIX = "prefix"
SEAM = "no_whole_page_behind_the_seam"
SHORT = "shorter_than_min_segment"
MISSING = "not_compiled"
EVICTED = "evicted"
PARTLY_EVICTED = "partly_evicted"
NO_STATE = "state_not_held"
POLICY_FULL = "policy_full"
NOT_LINKED = "request_not_linked"
EMPTY = "empty"


@dataclasses.dataclass(frozen=True)
class SegmentReport:
    """One named segment: token range, id (``None`` if it was not looked up),
    and what became of it.

    ``company``: segments of the company that what it reuses was computed in
    (``forest.companies``); 0 if that was compiled alone, or nothing is reused.
    ``guests``: those of them that were there for it alone.

    ``found``: how it came to be one; it was ``marked``, unless the front, which alone
    knows, says otherwise.

    ``hit`` is true when at least one token was reused; ``reason`` is one of the
    constants of this module.
    """

    start: int
    end: int
    id: str | None
    hit: bool
    reason: str
    tokens_reused: int
    tokens_computed: int
    company: int = 0
    guests: int = 0
    found: str = "marked"


@dataclasses.dataclass(frozen=True)
class LinkReport:
    """What one request did.

    Attributes:
        exactness: ``exact`` when every reused token was computed behind the
            very tokens that precede it here, else ``composed``.
        reason: why linking was off for the whole request, or ``None``.
        tokens_reused, tokens_computed: of the prompt.
        prefix_tokens: those of ``tokens_reused`` that come from SGLang's
            ordinary prefix cache.
        turn_tokens: those that an earlier turn of this conversation computed.
    """

    exactness: str
    reason: str | None
    policy: str
    seam: int
    mode: str
    tokens_reused: int
    tokens_computed: int
    prefix_tokens: int
    turn_tokens: int
    segments: tuple[SegmentReport, ...]

    def to_json(self) -> dict[str, Any]:
        """All fields by name."""
        return {**vars(self), "segments": tuple(dict(vars(one)) for one in self.segments)}


class Found(NamedTuple):
    """What the planner knew of one named segment.

    ``id``, ``miss``, ``copy``, ``company`` and ``guests`` as in ``forest.Lookup``, the
    first three ``None`` where no lookup was made; ``opening`` as in ``policy.Outline``.
    """

    start: int
    end: int
    id: str | None = None
    miss: str | None = None
    opening: bool = False
    copy: str | None = None
    company: int = 0
    guests: int = 0


def _why(found: Found, options: LinkOptions, reason: str | None, linked: int, total: int) -> str:
    if found.start == found.end:
        return EMPTY
    if reason is not None:
        return PREFIX if total else NOT_LINKED
    if found.id is None:
        return POLICY_FULL if options.policy == "full" else SHORT
    if found.miss is not None:
        return found.miss
    if linked:
        return HIT
    return PREFIX if total else SEAM


def _linked(segments: Sequence[Found], spans: Sequence[Span]) -> list[int]:
    """Tokens of each segment that are in one of the spans."""
    starts = np.array([found.start for found in segments], dtype=np.int64)
    ends = np.array([found.end for found in segments], dtype=np.int64)
    whole = np.array([(s.start, s.end) for s in spans if s.among is None], dtype=np.int64)
    # A core lies within one segment.
    counts = np.zeros(len(segments), dtype=np.int64)
    if whole.size and starts.size:
        at = np.searchsorted(starts, whole[:, 0], side="right") - 1
        np.add.at(counts, at, whole[:, 1] - whole[:, 0])
    for span in spans:
        if span.among is not None:
            among = span.among.numpy()
            counts += np.searchsorted(among, ends) - np.searchsorted(among, starts)
    return counts.tolist()


def _is_exact(plan: LinkPlan, segments: Sequence[Found], prefix_tokens: int) -> bool:
    """Whether all that a row reuses beyond the ordinary prefix was computed behind the
    very tokens that precede it here. Of cores only the opening one was; an earlier turn
    saw no cores but those that this row reuses as well."""
    cores = [span for span in plan.spans if span.among is None and span.end > prefix_tokens]
    openings = [found for found in segments if found.opening]
    return all(any(one.start <= core.start < one.end for one in openings) for core in cores)


def make_report(
    n_tokens: int,
    options: LinkOptions,
    *,
    segments: Sequence[Found],
    prefix_tokens: int,
    plan: LinkPlan | None,
    reason: str | None,
) -> LinkReport:
    """Report one request.

    Args:
        n_tokens: tokens of the prompt.
        segments: what was found of each named segment, in prompt order.
        prefix_tokens: tokens reused from the ordinary prefix cache.
        plan: the link plan, or ``None`` if nothing is linked.
        reason: why linking is off for the whole request, or ``None``.
    """
    spans = [] if plan is None else [span for span in plan.spans if span.end > prefix_tokens]
    linked = _linked(segments, spans)
    turn_tokens = 0 if plan is None else sum(s.n_tokens for s in plan.spans if s.among is not None)
    made = []
    for found, hits in zip(segments, linked, strict=True):
        total = hits + max(0, min(found.end, prefix_tokens) - found.start)
        made.append(
            SegmentReport(
                start=found.start,
                end=found.end,
                id=found.id,
                hit=total > 0,
                reason=_why(found, options, reason, hits, total),
                tokens_reused=total,
                tokens_computed=found.end - found.start - total,
                company=found.company if hits else 0,
                guests=found.guests if hits else 0,
            )
        )
    reused = prefix_tokens + sum(span.n_tokens for span in spans)
    return LinkReport(
        exactness=EXACT if plan is None or _is_exact(plan, segments, prefix_tokens) else COMPOSED,
        reason=reason,
        policy=options.policy,
        seam=options.seam,
        mode=options.mode,
        tokens_reused=reused,
        tokens_computed=n_tokens - reused,
        prefix_tokens=prefix_tokens,
        turn_tokens=turn_tokens,
        segments=tuple(made),
    )
