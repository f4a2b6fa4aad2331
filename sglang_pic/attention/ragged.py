"""One forward pass of linked rows as FlashInfer's ragged requests.

A *request* is a stretch of pages with all queries of the batch that see it: one for
every distinct span, and one for every row's computed tokens.

    request        0              1        2
    qo_indptr      0              5        8     11
    query          0 1 2   3 4    1 2 4    0 1 2          tokens of the batch
    offset         s s s   t t    u u u    0 0 0          turn these back by
    sees           all            all      keys up to its own

Rows that compute many tokens and rows that decode take the same form. A span is seen by
the last of a row's new tokens, from the first that stands behind it, and without a
mask; only computed tokens are causal among themselves, and where a row has one, not even
they.

Requests are *segment-major*: one for a span, not one for every (run, span) pair. The
queries have to be gathered for each span they see either way, while a span's pages are
read once for each tile of its queries, whichever rows and runs these are of; and twenty
segments are 21 requests to plan, not 231 with a seam's few queries in each, which would
fill a fraction of a tile.

All arrays are made on the host, once a step; only page numbers are looked up on the
device, where SGLang's request-to-token table is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from sglang_pic.attention.ship import ship
from sglang_pic.attention.step import StepRow
from sglang_pic.link.plan import LinkPlan


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which queries see which entries. int32, on the host.

    Attributes:
        token: [queries], tokens of the batch that linked rows compute.
        query: [n], token of the batch that each gathered query is.
        offset: [n], positions by which it is turned back.
        sees: [n, 2], first and last key of its request that it sees in any case, or
            (-1, -1): those up to its own.
        causal: some query does not see all of its request.
        qo_indptr: [requests + 1], gathered queries of each request.
        batch_row: [requests], row of the batch that holds its entries.
        start, length: [requests], which of that row's entries.
        own: [linked rows], their requests of computed tokens.
        merge_indptr: [queries + 1], merge_index: [n], gathered queries of each of ``token``.
    """

    token: torch.Tensor
    query: torch.Tensor
    offset: torch.Tensor
    sees: torch.Tensor
    causal: bool
    qo_indptr: torch.Tensor
    batch_row: torch.Tensor
    start: torch.Tensor
    length: torch.Tensor
    own: torch.Tensor
    merge_indptr: torch.Tensor
    merge_index: torch.Tensor


@dataclasses.dataclass(frozen=True)
class Pages:
    """Page table of all requests as ragged arrays, int32.

    Attributes:
        indptr: [requests + 1], on the host.
        indices: [pages], on the device, page numbers in the pool.
        last: [requests], on the host, keys on each request's last page.
    """

    indptr: torch.Tensor
    indices: torch.Tensor
    last: torch.Tensor


class _Request:
    """Entries of one row, and the stretches of queries that see them."""

    def __init__(self, batch_row: int, start: int, length: int, causal: bool):
        self.batch_row, self.start, self.length, self.causal = batch_row, start, length, causal
        self.first: list[int] = []
        self.count: list[int] = []
        self.offset: list[int] = []

    def see(self, first: int, count: int, offset: int) -> None:
        """``count`` tokens of the batch from ``first`` on."""
        self.first.append(first)
        self.count.append(count)
        self.offset.append(offset)


def arrange(rows: Sequence[StepRow], chosen: Sequence[int]) -> Layout:
    """Lay out the chosen rows of a batch; loops over rows and spans, never over tokens.

    Args:
        rows: every row of the batch, in its order; ``row`` is not read.
        chosen: indices of the linked ones, at least one.
    """
    made: list[_Request] = []
    shared: dict[tuple[int, int], _Request] = {}
    own = []
    for index in chosen:
        row = rows[index]
        plan = row.plan
        assert plan is not None
        done = row.prefix - plan.reused
        for span in plan.spans:
            blind = max(0, span.first_seer - done)
            if blind >= row.extend:
                continue
            request = shared.get(span.place)
            if request is None:
                request = _Request(index, span.row_start, span.n_tokens, False)
                shared[span.place] = request
                made.append(request)
            request.see(row.first_query + blind, row.extend - blind, span.offset)
        own.append(len(made))
        made.append(_Request(index, plan.reused, done + row.extend, row.extend > 1))
        made[-1].see(row.first_query, row.extend, 0)

    count = _ints([n for request in made for n in request.count])
    of_request = _ints([sum(request.count) for request in made])
    query = _stretches(_ints([i for request in made for i in request.first]), count)
    offset = _ints([i for request in made for i in request.offset]).repeat_interleave(count)
    sees = _ints(
        [(-1, -1) if request.causal else (0, request.length - 1) for request in made]
    ).repeat_interleave(of_request, 0)
    token = _stretches(
        _ints([rows[i].first_query for i in chosen]), _ints([rows[i].extend for i in chosen])
    )
    # Rows stand in the batch one behind the other: by token is by query.
    seen = torch.bincount(query)[token.long()]
    return Layout(
        token=token,
        query=query,
        offset=offset,
        sees=sees,
        causal=any(request.causal for request in made),
        qo_indptr=_indptr(of_request),
        batch_row=_ints([request.batch_row for request in made]),
        start=_ints([request.start for request in made]),
        length=_ints([request.length for request in made]),
        own=_ints(own),
        merge_indptr=_indptr(seen),
        merge_index=torch.argsort(query, stable=True).to(torch.int32),
    )


class Layouts:
    """Makes layouts, and keeps the last one while the same rows decode: then only the
    number of their computed tokens grows."""

    def __init__(self) -> None:
        self._key: list[tuple[int, int, LinkPlan]] = []
        self._kept: Layout | None = None

    def of(self, rows: Sequence[StepRow]) -> tuple[Layout, torch.Tensor]:
        """The layout of a batch, and int32 [requests] the length of each request now.

        Args:
            rows: every row of the batch, in its order, one of them linked at least.

        Returns:
            The same object as before where nothing but lengths has changed.
        """
        chosen = [i for i, row in enumerate(rows) if row.plan is not None]
        key, lasting, lengths = [], True, []
        for i in chosen:
            row = rows[i]
            plan = row.plan
            assert plan is not None
            key.append((i, row.first_query, plan))
            # Behind the prompt every span is seen, and stays seen.
            lasting = lasting and row.extend == 1 and row.prefix >= plan.n_tokens
            lengths.append(row.prefix + row.extend - plan.reused)
        if self._kept is None or not lasting or not _same(key, self._key):
            made = arrange(rows, chosen)
            self._key, self._kept = key, made if lasting else None
            return made, made.length
        length = self._kept.length.clone()
        length[self._kept.own.long()] = _ints(lengths)
        return self._kept, length


def pages_of(
    layout: Layout,
    length: torch.Tensor,
    page: int,
    req_to_token: torch.Tensor,
    pool_rows: torch.Tensor,
) -> Pages:
    """Where the entries of every request lie; waits for nothing on the device.

    Args:
        layout: the batch.
        length: int32 [requests], on the host.
        page: tokens a page. Every request starts on a page of its own.
        req_to_token: int32 [pool, width], slots of every row's entries.
        pool_rows: int [batch], row of ``req_to_token`` of every row of the batch.
    """
    count = (length + page - 1) // page
    indptr = _indptr(count)
    total, device = int(indptr[-1]), req_to_token.device
    columns = {"row": layout.batch_row, "start": layout.start, "count": count, "first": indptr[:-1]}
    there = ship(columns, device)
    request = torch.repeat_interleave(there["count"], output_size=total)
    within = torch.arange(total, device=device) - there["first"][request]
    slot = req_to_token[
        pool_rows[there["row"][request].long()].long(), there["start"][request] + within * page
    ]
    return Pages(indptr, (slot // page).to(torch.int32), length - (count - 1) * page)


def _same(a: Sequence[tuple[int, int, LinkPlan]], b: Sequence[tuple[int, int, LinkPlan]]) -> bool:
    return len(a) == len(b) and all(
        x[:2] == y[:2] and x[2] is y[2] for x, y in zip(a, b, strict=True)
    )


def _ints(values: Sequence[object]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def _indptr(counts: torch.Tensor) -> torch.Tensor:
    """int32 [n + 1], bounds of n neighbours of these sizes."""
    bounds = torch.zeros(counts.numel() + 1, dtype=torch.int32)
    torch.cumsum(counts, 0, dtype=torch.int32, out=bounds[1:])
    return bounds


def _stretches(first: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """int32 [count.sum()]: ``first[i], first[i] + 1, ...``, ``count[i]`` of them, for each i."""
    start = first - _indptr(count)[:-1]
    total = int(count.sum())
    return start.repeat_interleave(count) + torch.arange(total, dtype=torch.int32)
