"""Recompute policies: which tokens of a reused segment are computed anyway.

A segment of L tokens splits into *head* (computed), *core* (whole pages,
reused) and *tail* (what is left of its last page, computed together with the next
segment's head). A policy answers one question: where does the core lie?

Policies that look at activations to choose tokens (CacheBlend selects the 15 %
whose KV deviates most, by layer) do not fit this contract: it fixes the row's
layout before the forward pass starts, and a page whose tokens are partly
computed could no longer be shared. ``docs/limits.md`` says so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple, Protocol

MODES = ("share", "relocate")
# Of a request alone: a trained encoder reads its segments, which leave the prompt.
ENCODE = "encode"

# What a core does to a linear layer's state S (hybrid models):
# "compose", S <- A S + B; "last", S <- B, what stood before is forgotten.
STATE_POLICIES = ("compose", "last")
# Let ``server.calibrate`` choose; what reaches the scheduler is one of the above.
AUTO = "auto"

# Deliberately wrong links, to show what each part is for: S <- S + B; no
# history for the convolution behind a core; operators and end states rounded
# to float16.
ABLATIONS = ("identity_operator", "no_conv_tail", "float16_pairs")


def ceil_to(n: int, page: int) -> int:
    """Smallest multiple of ``page`` that is at least ``n``."""
    return -(-n // page) * page


def floor_to(n: int, page: int) -> int:
    """Largest multiple of ``page`` that is at most ``n``."""
    return n // page * page


class Outline(NamedTuple):
    """What a policy knows of a segment of a prompt.

    Attributes:
        length: its tokens.
        opening: it starts the prompt exactly as it was compiled, so nothing that
            precedes it was missing when it was.
        in_company: what is held of it was computed in company (``forest.companies``).
    """

    length: int
    opening: bool = False
    in_company: bool = False


Core = tuple[int, int]


class RecomputePolicy(Protocol):
    """Decides which tokens of each segment are reused."""

    def cores(self, outlines: Sequence[Outline], *, page: int) -> list[Core]:
        """The core of every segment of a prompt.

        Args:
            outlines: in the prompt's order.
            page: tokens per KV page; all bounds are multiples of it.

        Returns:
            Token ranges ``[start, end)``, each relative to its segment; empty where
            ``start >= end``.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Seam:
    """EPIC's LegoLink (arXiv 2410.15332), page-aligned as in MEPIC (2512.16822).

    The first w tokens of every segment but the opening one are computed, in
    whole pages. At page size 1 this is LegoLink with k = w; at page size P >= w
    it is MEPIC's first block.

    Attributes:
        width: w of a segment that was compiled alone.
        company_width: of one that was compiled in company: it has seen what stands
            before it.
    """

    width: int
    company_width: int = 0

    def core(self, outline: Outline, *, page: int) -> Core:
        width = self.company_width if outline.in_company else self.width
        head = 0 if outline.opening else ceil_to(width, page)
        return head, floor_to(outline.length, page)

    def cores(self, outlines: Sequence[Outline], *, page: int) -> list[Core]:
        return [self.core(outline, page=page) for outline in outlines]


@dataclasses.dataclass(frozen=True)
class Graded:
    """Seams, and what a budget has left spent from the question backwards: the last
    segments whole, since a token near the question counts for several far from it.

    Few widths, so that a hybrid's pairs are shared: a segment is computed whole, which
    needs no pair, or behind its seam.

    Attributes:
        seam: of all segments.
        share: of the segments' tokens that may be computed, seams included, 0 to 1.
    """

    seam: Seam
    share: float

    def cores(self, outlines: Sequence[Outline], *, page: int) -> list[Core]:
        cores = self.seam.cores(outlines, page=page)
        reused = [max(0, end - start) for start, end in cores]
        budget = int(self.share * sum(outline.length for outline in outlines))
        left = budget - sum(outline.length for outline in outlines) + sum(reused)
        for i in reversed(range(len(outlines))):
            left -= reused[i]
            if left < 0:
                break
            cores[i] = (0, 0)
        return cores


@dataclasses.dataclass(frozen=True)
class Naive:
    """Reuse everything, repair nothing: the lower bound of quality."""

    def cores(self, outlines: Sequence[Outline], *, page: int) -> list[Core]:
        return [(0, floor_to(outline.length, page)) for outline in outlines]


@dataclasses.dataclass(frozen=True)
class Full:
    """Reuse nothing: every token goes through the linked path. Must equal stock."""

    def cores(self, outlines: Sequence[Outline], *, page: int) -> list[Core]:
        return [(0, 0)] * len(outlines)


POLICIES = ("full", "graded", "none", "seam")
# Whose company a segment may have been computed in: of segments that all stand in the
# prompt, of any of its tenant, or nobody's; the most careful first.
COMPANIES = ("off", "subset", "tenant")


@dataclasses.dataclass(frozen=True)
class LinkOptions:
    """How one request wants to be linked.

    Attributes:
        policy: ``none``, ``seam``, ``graded`` or ``full``.
        seam: seam width w in tokens, used by ``seam`` and ``graded``.
        company: whose company a segment may have been computed in, one of ``COMPANIES``.
        company_seam: seam width of a segment computed in company.
        share: of the segments' tokens that ``graded`` may compute.
        mode: ``share`` or ``relocate``.
        require_exact: answer exactly as stock SGLang would; nothing is linked.
        link: ``False`` keeps ordinary prefix caching but runs the request on
            our attention, the honest baseline for speed.
        state: one of ``STATE_POLICIES``; models without linear layers ignore it.
        turns: reuse what earlier turns of the conversation computed, and keep what
            this one computes for the next.
        ablation: one of ``ABLATIONS``, for evaluation only, or ``None``.
    """

    policy: str = "seam"
    seam: int = 16
    company: str = "subset"
    company_seam: int = 0
    share: float = 0.15
    mode: str = "share"
    require_exact: bool = False
    link: bool = True
    state: str = "compose"
    turns: bool = True
    ablation: str | None = None

    @property
    def reuses_turns(self) -> bool:
        """Whether earlier turns may serve it: relocated pages are a row's own."""
        return self.turns and self.mode == "share" and self.ablation is None

    def recompute_policy(self) -> RecomputePolicy:
        seam = Seam(self.seam, self.company_seam)
        if self.policy == "seam":
            return seam
        if self.policy == "graded":
            return Graded(seam, self.share)
        return Naive() if self.policy == "none" else Full()
