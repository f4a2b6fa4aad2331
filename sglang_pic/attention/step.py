"""One forward pass of linked rows as ragged arrays: who sees which keys.

A *part* is one set of keys (a span, or the private tokens of one row) with
the queries that see it. Queries are gathered (a query sees many parts), keys
are slots of the KV pool:

    part               0          1      2
    qo_indptr          0          3      5    6
    query              2  3  4    3  4   7          rows of q in this batch
    offset             s  s  s    t  t   0          rotate these by -offset
    kv_indptr          0          64     96   120
    slots              .......    ....   ...

Spans that several requests of the batch share are one part: their keys are
read once. Causality holds inside a part only where ``causal`` is set (a row's
own new tokens); everywhere else every listed query sees every key.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

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
            for rows with a plan only.
    """

    plan: LinkPlan | None
    first_query: int
    prefix: int
    extend: int
    row: torch.Tensor | None


@dataclasses.dataclass(frozen=True)
class SpanStep:
    """Ragged arrays of one forward pass, valid until the next one.

    Attributes:
        tokens: int64 [t], the batch's query rows that are linked.
        query: int64 [n], for every gathered query its index into ``tokens``.
        offset: int64 [n], rotation of every gathered query.
        qo_indptr: int64 [parts + 1], on the host.
        slots: int64 [m], key slots of all parts.
        kv_indptr: int64 [parts + 1], on the host.
        causal: per part.
        ordinary: indices of the batch's rows that are not linked.
    """

    tokens: torch.Tensor
    query: torch.Tensor
    offset: torch.Tensor
    qo_indptr: list[int]
    slots: torch.Tensor
    kv_indptr: list[int]
    causal: list[bool]
    ordinary: list[int]


class _Part:
    """Keys of one part and, still as Python lists, the queries that see them."""

    def __init__(self, slots: torch.Tensor, causal: bool):
        self.slots = slots
        self.causal = causal
        self.query: list[torch.Tensor] = []
        self.offset: list[torch.Tensor] = []

    def add(self, start: int, count: int, offset: int) -> None:
        self.query.append(torch.arange(start, start + count))
        self.offset.append(torch.full((count,), offset, dtype=torch.int64))


def build_step(rows: Sequence[StepRow], device: torch.device) -> SpanStep | None:
    """Arrange one batch.

    Args:
        rows: every row of the batch, in its order.
        device: where the arrays are needed.

    Returns:
        The arrays, or ``None`` if no row is linked.
    """
    parts: list[_Part] = []
    shared: dict[tuple[int, int], _Part] = {}
    tokens: list[torch.Tensor] = []
    count = 0
    for row in rows:
        plan = row.plan
        if plan is None:
            continue
        assert row.row is not None
        tokens.append(torch.arange(row.first_query, row.first_query + row.extend))
        # Ranks among the row's computed tokens: [done, done + extend) are new.
        done = row.prefix - plan.reused
        for span in plan.spans:
            first = max(done, span.first_seer)
            seers = done + row.extend - first
            if seers <= 0:
                continue
            # A slot lies on one path of the tree: same end, same length, same span.
            key = (int(span.slots[-1]), span.slots.numel())
            part = shared.get(key)
            if part is None:
                part = shared[key] = _Part(span.slots, causal=False)
                parts.append(part)
            part.add(count + first - done, seers, span.offset)
        # A single new token sees itself last: no mask is needed for it.
        past = row.prefix + 1 if row.extend == 1 else row.prefix
        if past > plan.reused:
            part = _Part(row.row[plan.reused : past], causal=False)
            part.add(count, row.extend, 0)
            parts.append(part)
        if row.extend > 1:
            part = _Part(row.row[row.prefix : row.prefix + row.extend], causal=True)
            part.add(count, row.extend, 0)
            parts.append(part)
        count += row.extend
    if not parts:
        return None
    query = [torch.cat(part.query) for part in parts]
    offset = [torch.cat(part.offset) for part in parts]
    return SpanStep(
        tokens=torch.cat(tokens).to(device),
        query=torch.cat(query).to(device),
        offset=torch.cat(offset).to(device),
        qo_indptr=_indptr(query),
        slots=torch.cat([part.slots for part in parts]).to(device, torch.int64),
        kv_indptr=_indptr([part.slots for part in parts]),
        causal=[part.causal for part in parts],
        ordinary=[i for i, row in enumerate(rows) if row.plan is None],
    )


def _indptr(pieces: Sequence[torch.Tensor]) -> list[int]:
    bounds = [0]
    for piece in pieces:
        bounds.append(bounds[-1] + piece.numel())
    return bounds
