"""One forward pass of linked rows as ragged arrays: who sees which keys.

Two forms over the same pages. A row with several new tokens (a link, a chunk)
is a *walk*: its keys in position order, each with the rotation that brings it
to its true position. Rows with one new token (decode) are *parts*: one for each
distinct span, with the queries that see it; queries are rotated, keys stay.

    part               0          1      2
    qo_indptr          0          3      5    6
    query              0  1  2    1  2   2          index into ``tokens``
    offset             s  s  s    t  t   0          rotate these by -offset
    kv_indptr          0          64     96   120
    slots              .......    ....   ...

Spans that several requests share are one part: their keys are read once for
the whole batch. A single new token precedes nothing, so parts need no mask.

In a layer whose queries see a window of positions alone all rows are walks
(``walks_within``), from the first key that a window leaves: a span may lie in the
windows of some queries in part, of some not at all, and there is little to share.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from sglang_pic.kernels.walk import Tile, draft_tile, make_tiles
from sglang_pic.link.plan import LinkPlan


@dataclasses.dataclass(frozen=True)
class StepRow:
    """One row of the batch.

    Attributes:
        plan: its plan, or ``None`` for an ordinary row.
        first_query: index of its first query among the batch's tokens.
        prefix: row entries that exist already, reused ones included.
        extend: tokens computed now, at least 1.
        row: int64, slots of the whole row, ``prefix + extend`` entries; read
            for rows with a plan only, by ``build_step``.
        tree: of drafts to verify, which sees which, bool [extend, extend]; ``None`` of
            tokens that follow each other.
    """

    plan: LinkPlan | None
    first_query: int
    prefix: int
    extend: int
    row: torch.Tensor | None = None
    tree: torch.Tensor | None = None


@dataclasses.dataclass(frozen=True)
class Walk:
    """A row with several new tokens, or any row in a layer with a window.

    Attributes:
        first_query, extend: its queries among the batch's tokens.
        slots: int64 [m], its keys in position order: all, or those of the window.
        offset: int64 [m], rotate each key by this; ``None`` if all are in place.
        tiles: which query sees which key; ``None`` if query i sees keys 0..i.
    """

    first_query: int
    extend: int
    slots: torch.Tensor
    offset: torch.Tensor | None
    tiles: list[Tile] | None


@dataclasses.dataclass(frozen=True)
class Parts:
    """Rows with one new token each.

    Attributes:
        tokens: int64 [t], their queries among the batch's tokens.
        query: int64 [n], for every gathered query its index into ``tokens``.
        offset: int64 [n], rotate every gathered query by the negative of this.
        qo_indptr: [parts + 1], on the host.
        slots: int64 [m], key slots of all parts.
        kv_indptr: [parts + 1], on the host.
        merge_indptr: int64 [t + 1], merge_index: int64 [n], the gathered queries that
            each query is.
    """

    tokens: torch.Tensor
    query: torch.Tensor
    offset: torch.Tensor
    qo_indptr: list[int]
    slots: torch.Tensor
    kv_indptr: list[int]
    merge_indptr: torch.Tensor
    merge_index: torch.Tensor


@dataclasses.dataclass(frozen=True)
class SpanStep:
    """Arrays of one forward pass, valid until the next one; ``linked`` are the linked
    rows, ``ordinary`` the indices of the batch's other rows."""

    walks: list[Walk]
    parts: Parts | None
    linked: list[StepRow]
    ordinary: list[int]


def build_step(rows: Sequence[StepRow], device: torch.device) -> SpanStep | None:
    """Arrange one batch.

    Args:
        rows: every row of the batch, in its order.
        device: where the arrays are needed.

    Returns:
        The arrays, or ``None`` if no row is linked.
    """
    linked = [row for row in rows if row.plan is not None]
    if not linked:
        return None
    return SpanStep(
        walks=[_walk(row, device) for row in linked if row.extend > 1],
        parts=_parts([row for row in linked if row.extend == 1], device),
        linked=linked,
        ordinary=[i for i, row in enumerate(rows) if row.plan is None],
    )


def walks_within(step: SpanStep, window: int, device: torch.device) -> list[Walk]:
    """All linked rows of a step in a layer whose queries at position p see those from
    ``p - window`` on."""
    return [_walk(row, device, window) for row in step.linked]


def _walk(row: StepRow, device: torch.device, window: int | None = None) -> Walk:
    plan = row.plan
    assert plan is not None and row.row is not None
    total = row.prefix + row.extend
    position = plan.positions(total)
    # Drafts stand behind all else, in the order of their tree.
    ascending = torch.argsort(position)
    offset = torch.zeros(total, dtype=torch.int64)
    for span in plan.spans:
        offset[span.row_start : span.row_start + span.n_tokens] = span.offset
    new, sorted_ = position[row.prefix :].contiguous(), position[ascending]
    visible = torch.searchsorted(sorted_, new, right=True)
    hidden = torch.zeros_like(visible)
    if window is not None:
        hidden = torch.searchsorted(sorted_, new - window)
    first = int(hidden[0])
    ascending = ascending[first : int(visible[-1])]
    tiles = None
    if row.tree is not None:
        tiles = [draft_tile(row.prefix, row.tree)]
    elif row.prefix or int(hidden[-1]):
        tiles = make_tiles((visible - first).to(device), (hidden - first).to(device))
    return Walk(
        first_query=row.first_query,
        extend=row.extend,
        slots=row.row[ascending.to(row.row.device)].to(torch.int64),
        offset=offset[ascending].to(device) if bool(offset[ascending].any()) else None,
        tiles=tiles,
    )


class _Part:
    """Keys of one part and, still as lists, the queries that see them."""

    def __init__(self, slots: torch.Tensor):
        self.slots = slots
        self.query: list[int] = []
        self.offset: list[int] = []


def _parts(rows: Sequence[StepRow], device: torch.device) -> Parts | None:
    if not rows:
        return None
    parts: list[_Part] = []
    shared: dict[tuple[int, int], _Part] = {}
    for i, row in enumerate(rows):
        plan = row.plan
        assert plan is not None and row.row is not None
        done = row.prefix - plan.reused
        for span in plan.spans:
            if done < span.first_seer:
                continue
            part = shared.get(span.place)
            if part is None:
                part = shared[span.place] = _Part(span.slots)
                parts.append(part)
            part.query.append(i)
            part.offset.append(span.offset)
        private = _Part(row.row[plan.reused : row.prefix + 1])
        private.query.append(i)
        private.offset.append(0)
        parts.append(private)
    query = torch.tensor([i for part in parts for i in part.query])
    seen = torch.bincount(query, minlength=len(rows)).cumsum(0)
    return Parts(
        tokens=torch.tensor([row.first_query for row in rows], device=device),
        query=query.to(device),
        offset=torch.tensor([i for part in parts for i in part.offset], device=device),
        qo_indptr=_indptr([len(part.query) for part in parts]),
        slots=torch.cat([part.slots for part in parts]).to(device, torch.int64),
        kv_indptr=_indptr([part.slots.numel() for part in parts]),
        merge_indptr=torch.cat([seen.new_zeros(1), seen]).to(device),
        merge_index=torch.argsort(query, stable=True).to(device),
    )


def _indptr(lengths: Sequence[int]) -> list[int]:
    bounds = [0]
    for length in lengths:
        bounds.append(bounds[-1] + length)
    return bounds
