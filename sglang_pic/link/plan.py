"""The link plan: what is reused, what is computed, in which order, where.

SGLang believes that a request's KV row is ``[cached prefix | tokens to
extend]``. A link satisfies it by order, not by position: the row holds all
reused tokens first, then all computed tokens in logical order, and every token
carries its own position. This module is pure: it knows neither SGLang nor the
forest.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from sglang_pic.errors import PicIntegrityError
from sglang_pic.link.policy import Core, ceil_to, floor_to

if TYPE_CHECKING:
    from sglang_pic.linear.state import CoreState


class SegmentHit(NamedTuple):
    """A segment of the prompt as the forest holds it.

    Attributes:
        start, end: token range in the prompt.
        offset: position of the segment's first token in this prompt less its
            position when compiled.
        slots: int64 [held], KV slots of the segment's first ``held`` tokens,
            whole pages. ``held`` may be less than the segment (partly evicted).
        core: token range of it that is to be reused, whole pages.
        state: what its core does to the linear layers of a hybrid; a state
            stands for the core as a whole, which is then reused whole or not at
            all. ``None`` in models without linear layers.
    """

    start: int
    end: int
    offset: int
    slots: torch.Tensor
    core: Core
    state: CoreState | None = None


@dataclasses.dataclass(frozen=True)
class Span:
    """Reused tokens that share one rotation and are seen by the same queries.

    Attributes:
        start, end: token range in the prompt; also positions.
        offset: queries that see this span are rotated by ``-offset``.
        row_start: index of the span's first token in the KV row.
        slots: int64 [n], KV slots, whole pages.
        first_seer: rank, among computed tokens, of the first one behind the span.
        state: as in ``SegmentHit``; ``None`` for an ordinary prefix, whose state
            SGLang itself has put into the request's slot.
        among: int64 [n], positions of the tokens where they are not the whole
            range: what an earlier turn computed between its cores.
        moved: by how many positions it stands behind where ``state`` was made; relocating
            moves its keys, not that.
    """

    start: int
    end: int
    offset: int
    row_start: int
    slots: torch.Tensor
    first_seer: int
    state: CoreState | None = None
    among: torch.Tensor | None = None
    moved: int = 0

    @property
    def n_tokens(self) -> int:
        return self.slots.numel()

    @functools.cached_property
    def place(self) -> tuple[int, int]:
        """The same for spans of the same pages: a slot lies on one path of the tree,
        so same end and same length are the same span."""
        return int(self.slots[-1]), self.n_tokens

    @property
    def positions(self) -> torch.Tensor:
        """int64 [n_tokens]."""
        return torch.arange(self.start, self.end) if self.among is None else self.among


@dataclasses.dataclass(frozen=True)
class LinkPlan:
    """Layout of one linked request.

    Attributes:
        n_tokens: tokens of prompt plus those generated before a retraction.
        reused: number of reused tokens; the row's first ``reused`` entries.
        spans: the reused tokens, in row order: by position, then earlier turns.
        order: int64 [n_tokens], ``order[i]`` is the logical index, hence the
            position, of row entry ``i``.
        natural: the row is in logical order and may be cached as a prefix.
        relocated: the request owns private copies of the reused pages, with K
            at its true position.
    """

    n_tokens: int
    reused: int
    spans: tuple[Span, ...]
    order: torch.Tensor
    natural: bool = False
    relocated: bool = False

    @property
    def slots(self) -> torch.Tensor:
        """int64 [reused], KV slots of the reused tokens in row order."""
        if not self.spans:
            return torch.empty(0, dtype=torch.int64)
        return torch.cat([span.slots for span in self.spans])

    def positions(self, count: int) -> torch.Tensor:
        """int64 [count], of the row's first entries: tokens generated since the plan
        was made stand at their row index."""
        behind = torch.arange(self.n_tokens, max(count, self.n_tokens))
        return torch.cat([self.order, behind])[:count]

    def check(self, page: int) -> None:
        """Raise ``PicIntegrityError`` unless the layout is a permutation of
        whole pages followed by computed tokens in logical order."""
        logical = torch.sort(self.order).values
        if not torch.equal(logical, torch.arange(self.n_tokens)):
            raise PicIntegrityError("row order is not a permutation of the prompt")
        if self.reused % page or any(s.n_tokens % page for s in self.spans):
            raise PicIntegrityError("reused tokens are not whole pages")
        live = self.order[self.reused :]
        if live.numel() == 0 or bool((live[1:] <= live[:-1]).any()):
            raise PicIntegrityError("computed tokens are not in logical order")
        for span in self.spans:
            if span.first_seer != int((live < span.end).sum()):
                raise PicIntegrityError(f"span at {span.start} is seen by the wrong tokens")


def positions_of(spans: Sequence[Span]) -> np.ndarray:
    """int64, positions of the tokens of these spans, one span after the other."""
    parts = [np.arange(s.start, s.end) if s.among is None else s.among.numpy() for s in spans]
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)


def unlinked_plan(n_tokens: int) -> LinkPlan:
    """A row in logical order, on our attention, nothing linked."""
    return LinkPlan(n_tokens, 0, (), torch.arange(n_tokens), natural=True)


def grown_plan(n_tokens: int, slots: torch.Tensor) -> LinkPlan:
    """A compile whose first tokens, int64 ``slots``, are those of a shorter segment."""
    span = Span(0, slots.numel(), 0, 0, slots, 0)
    return LinkPlan(n_tokens, slots.numel(), (span,), torch.arange(n_tokens), natural=True)


def make_plan(
    n_tokens: int,
    *,
    limit: int,
    prefix: torch.Tensor,
    hits: Sequence[SegmentHit],
    page: int,
) -> LinkPlan:
    """Lay out one request.

    Args:
        n_tokens: tokens to lay out, at least 1.
        limit: no token at or behind this index may be reused (SGLang leaves
            every request at least one token to compute).
        prefix: int64 [p], slots of an exactly cached prefix, whole pages.
        hits: segments found, in prompt order, disjoint.
        page: tokens per KV page.

    Returns:
        The plan. Segments, or parts of them, that cannot be reused are simply
        part of the computed tokens.
    """
    pieces: list[tuple[int, int, int, torch.Tensor, CoreState | None]] = []
    covered = prefix.numel()
    if covered:
        pieces.append((0, covered, 0, prefix, None))
    for hit in hits:
        core = hit.core
        first = max(core[0], ceil_to(max(0, covered - hit.start), page))
        last = min(core[1], hit.slots.numel(), floor_to(max(0, limit - hit.start), page))
        if first < last and (hit.state is None or (first, last) == core):
            start, end = hit.start + first, hit.start + last
            pieces.append((start, end, hit.offset, hit.slots[first:last], hit.state))
            covered = end

    spans = []
    live = np.ones(n_tokens, dtype=bool)
    reused = 0
    for start, end, offset, slots, state in pieces:
        live[start:end] = False
        first_seer = start - reused
        spans.append(Span(start, end, offset, reused, slots, first_seer, state, moved=offset))
        reused += end - start
    order = np.concatenate([positions_of(spans), np.nonzero(live)[0]])
    return LinkPlan(n_tokens, reused, tuple(spans), torch.from_numpy(order))


def reuse_turns(
    plan: LinkPlan, turns: Sequence[torch.Tensor], forgotten: int, state: CoreState | None
) -> LinkPlan:
    """Take the first computed tokens of a plan from earlier turns.

    Args:
        plan: without them.
        turns: int64, slots of its first computed tokens, turn by turn, whole pages.
        forgotten: how many of its spans the last turn had, whose linear states
            are within its own.
        state: of the linear layers behind the last turn; ``None`` in models without.
    """
    computed = plan.order[plan.reused :]
    done = sum(slots.numel() for slots in turns)
    spans = []
    for i, span in enumerate(plan.spans):
        seen = max(0, span.first_seer - done)
        held = None if i < forgotten else span.state
        spans.append(dataclasses.replace(span, first_seer=seen, state=held))
    at = 0
    for i, slots in enumerate(turns):
        among = computed[at : at + slots.numel()]
        spans.append(
            Span(
                int(among[0]),
                int(among[-1]) + 1,
                0,
                plan.reused + at,
                slots,
                0,
                state if i == len(turns) - 1 else None,
                among,
            )
        )
        at += slots.numel()
    return dataclasses.replace(plan, reused=plan.reused + done, spans=tuple(spans))
