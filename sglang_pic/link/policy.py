"""Recompute policies: which tokens of a reused segment are computed anyway.

A segment of L tokens splits into *head* (computed), *core* (whole pages,
reused) and *tail* (computed together with the next segment's head). A policy
answers one question: where does the core lie?

Policies that look at activations to choose tokens (CacheBlend selects the 15 %
whose KV deviates most, by layer) do not fit this contract: it fixes the row's
layout before the forward pass starts, and a page whose tokens are partly
computed could no longer be shared. ``docs/limits.md`` says so.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

MODES = ("share", "relocate")

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


class RecomputePolicy(Protocol):
    """Decides which tokens of a segment are reused."""

    def core(self, length: int, *, page: int, opening: bool) -> tuple[int, int]:
        """Token range ``[start, end)`` of the core, relative to the segment.

        Args:
            length: tokens in the segment, at least 1.
            page: tokens per KV page; both bounds are multiples of it.
            opening: the segment starts the prompt exactly as it was compiled,
                so nothing that precedes it was missing when it was.

        Returns:
            The range; empty when ``start >= end``.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Seam:
    """EPIC's LegoLink (arXiv 2410.15332), page-aligned as in MEPIC (2512.16822).

    The first w tokens of every segment but the opening one are computed, in
    whole pages; the last page is left to the tail, so that a prompt may end in
    a segment and still have a live last token. At page size 1 this is
    LegoLink with k = w; at page size P >= w it is MEPIC's first block.
    """

    width: int

    def core(self, length: int, *, page: int, opening: bool) -> tuple[int, int]:
        head = 0 if opening else ceil_to(self.width, page)
        return head, floor_to(length - 1, page)


@dataclasses.dataclass(frozen=True)
class Naive:
    """Reuse everything, repair nothing: the lower bound of quality."""

    def core(self, length: int, *, page: int, opening: bool) -> tuple[int, int]:
        return 0, floor_to(length - 1, page)


@dataclasses.dataclass(frozen=True)
class Full:
    """Reuse nothing: every token goes through the linked path. Must equal stock."""

    def core(self, length: int, *, page: int, opening: bool) -> tuple[int, int]:
        return 0, 0


POLICIES = {"none": Naive, "seam": Seam, "full": Full}


@dataclasses.dataclass(frozen=True)
class LinkOptions:
    """How one request wants to be linked.

    Attributes:
        policy: ``none``, ``seam`` or ``full``.
        seam: seam width w in tokens, used by ``seam``.
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
        if self.policy == "seam":
            return Seam(self.seam)
        return Naive() if self.policy == "none" else Full()
