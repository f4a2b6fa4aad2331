"""Decode of linked rows inside CUDA graphs, by FlashInfer."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from sglang_pic.attention.flashinfer_launch import BACKEND, Shape, attend
from sglang_pic.attention.kernels import kernels_for
from sglang_pic.attention.ragged import Layout, Layouts, Pages, pages_of
from sglang_pic.attention.ship import ship
from sglang_pic.attention.step import StepRow
from sglang_pic.kernels.rotate import LayerRope, angles


@dataclasses.dataclass(frozen=True)
class Room:
    """What CUDA graphs of decode have room for.

    Attributes:
        batch: rows of the largest graph.
        seen: spans that a row sees, on average over the batch.
        spans: distinct spans of a batch.
        pages: pages of all requests together.
    """

    batch: int
    seen: int
    spans: int
    pages: int

    def requests(self, batch: int) -> int:
        """Requests of a graph of ``batch`` rows."""
        return batch + min(self.spans, batch * self.seen)

    def queries(self, batch: int) -> int:
        """Gathered queries of a graph of ``batch`` rows: one for each request at least,
        or FlashInfer's planner counts below zero."""
        return batch * (1 + self.seen)


class GraphParts:
    """Decode of linked rows inside CUDA graphs: buffers that stay where they are, one
    planned wrapper for each captured batch size.

    A graph holds a fixed number of requests; those a batch does not need have no
    queries and no pages. ``capture`` before a graph is captured, ``refill`` before each
    of its replays, both outside the graph; ``run`` inside.

    Args:
        shape: of the layers.
        ropes: of all layers.
        workspace: as for ``Launcher``.
        room: sizes of the buffers.
    """

    def __init__(
        self,
        shape: Shape,
        ropes: Iterable[LayerRope | None],
        workspace: torch.Tensor,
        room: Room,
    ):
        self.shape, self.room = shape, room
        self._workspace, device = workspace, workspace.device
        self._layouts = Layouts()
        requests, queries = room.requests(room.batch), room.queries(room.batch)

        def zeros(*size: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        self._qo_indptr, self._kv_indptr = zeros(requests + 1), zeros(requests + 1)
        self._last, self._indices = zeros(requests), zeros(max(requests, room.pages))
        self._query, self._merge_indptr = zeros(queries), zeros(room.batch + 1)
        self._merge_index = zeros(queries + room.batch)
        self._linked = zeros(room.batch, 1, 1, dtype=torch.bool)
        caches = {id(rope.cos_sin_cache): rope.cos_sin_cache for rope in ropes if rope is not None}
        self._caches = caches
        self._angles = {
            key: angles(cache, zeros(queries, dtype=torch.int64)) for key, cache in caches.items()
        }
        self._wrappers: dict[int, Any] = {}
        self._batch = self._merged = 0

    def capture(self, batch: int) -> None:
        """Make the wrapper of a graph of ``batch`` rows, planned as full as it can be."""
        import flashinfer

        requests, queries = self.room.requests(batch), self.room.queries(batch)
        self._wrappers[batch] = flashinfer.BatchPrefillWithPagedKVCacheWrapper(
            self._workspace,
            "NHD",
            use_cuda_graph=True,
            qo_indptr_buf=self._qo_indptr[: requests + 1],
            paged_kv_indptr_buf=self._kv_indptr[: requests + 1],
            paged_kv_indices_buf=self._indices,
            paged_kv_last_page_len_buf=self._last[:requests],
            backend=BACKEND,
        )
        # Its first plan sets how many queries later ones may have.
        qo_indptr = torch.arange(requests + 1, dtype=torch.int32)
        qo_indptr[-1] = queries
        indptr = torch.arange(requests + 1, dtype=torch.int32)
        indices = torch.zeros(requests, dtype=torch.int32, device=self._indices.device)
        pages = Pages(indptr, indices, torch.ones(requests, dtype=torch.int32))
        nothing = torch.zeros(0, dtype=torch.int32)
        self._fill(batch, nothing, nothing, torch.zeros(batch, dtype=torch.int32), nothing)
        self.shape.plan(self._wrappers[batch], qo_indptr, pages)
        self._batch = batch

    def fits(self, batch: int, rows: Sequence[StepRow]) -> bool:
        """Whether a graph of ``batch`` rows can take these: else they run eagerly."""
        return self._fits(batch, rows, *self._layouts.of(rows))

    def _fits(
        self, batch: int, rows: Sequence[StepRow], layout: Layout, length: torch.Tensor
    ) -> bool:
        return (
            batch in self._wrappers
            and len(rows) <= batch
            and not layout.causal
            and layout.length.numel() <= self.room.requests(batch)
            and layout.query.numel() <= self.room.queries(batch)
            and int(((length + self.shape.page - 1) // self.shape.page).sum()) <= self.room.pages
        )

    def refill(
        self,
        batch: int,
        rows: Sequence[StepRow],
        req_to_token: torch.Tensor,
        pool_rows: torch.Tensor,
    ) -> bool:
        """Prepare a replay.

        Args:
            batch: rows of the graph.
            rows: those of the batch, at most ``batch``; row i's token is token i.
            req_to_token, pool_rows: as in ``ragged.pages_of``.

        Returns:
            False if they do not fit; then nothing was changed.
        """
        layout, length = self._layouts.of(rows)
        if not self._fits(batch, rows, layout, length):
            return False
        pages = pages_of(layout, length, self.shape.page, req_to_token, pool_rows)
        idle = self.room.requests(batch) - length.numel()
        count = torch.zeros(batch, dtype=torch.int32)
        count[layout.token.long()] = layout.merge_indptr.diff()
        self._fill(batch, layout.query, layout.offset, count, layout.merge_index)
        padded = Pages(
            _repeat_last(pages.indptr, idle), pages.indices, _repeat_last(pages.last, idle)
        )
        self.shape.plan(self._wrappers[batch], _repeat_last(layout.qo_indptr, idle), padded)
        self._batch = batch
        return True

    def _fill(
        self,
        batch: int,
        query: torch.Tensor,
        offset: torch.Tensor,
        count: torch.Tensor,
        index: torch.Tensor,
    ) -> None:
        """Refill what this class owns: ``query`` and ``offset`` of the gathered queries,
        int32 [batch] ``count`` of the partial results of every token, and ``index``, which.

        A token without any takes the first there is, which nobody reads, so that no row
        of a graph is ever not a number.
        """
        linked = count > 0
        indptr = torch.zeros(batch + 1, dtype=torch.int32)
        indptr[1:] = count.clamp(min=1).cumsum(0)
        merged = torch.zeros(int(indptr[-1]), dtype=torch.int32)
        merged[linked.repeat_interleave(count.clamp(min=1))] = index
        n = self.room.queries(batch)
        columns = {
            "query": _padded(query, n),
            "indptr": indptr,
            "index": merged,
            "linked": linked,
            "offset": _padded(offset, n),
        }
        there = ship(columns, self._query.device)
        self._query[:n] = there["query"]
        self._merge_indptr[: batch + 1] = there["indptr"]
        self._merged = merged.numel()
        self._merge_index[: self._merged] = there["index"]
        self._linked[:batch] = there["linked"].view(-1, 1, 1) > 0
        for key, cache in self._caches.items():
            for held, new in zip(
                self._angles[key], angles(cache, -there["offset"].long()), strict=True
            ):
                held[: new.shape[0]] = new

    def run(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        rope: LayerRope | None,
        scale: float,
        stock: torch.Tensor,
    ) -> torch.Tensor:
        """One layer, of fixed shape.

        Args:
            query: [batch, heads, head_dim], the graph's.
            keys, values, rope, scale: as in ``Launcher.run``.
            stock: [batch, heads, head_dim], what SGLang computes; kept where a row is
                not linked.

        Returns:
            [batch, heads, head_dim] in the dtype of ``stock``.
        """
        batch, kernels = self._batch, kernels_for(query)
        n = self.room.queries(batch)
        if rope is None:
            gathered = query[self._query[:n]]
        else:
            cos, sin = (x[:n] for x in self._angles[id(rope.cos_sin_cache)])
            gathered = kernels.gather_rotate(query, self._query[:n], cos, sin, neox=rope.neox)
        wrapper = self._wrappers[batch]
        partial, lse = attend(wrapper, self.shape, gathered, keys, values, scale)
        # A kernel goes by the bounds; only the torch form looks at the length.
        merged = kernels.merge(
            partial, lse, self._merge_indptr[: batch + 1], self._merge_index[: self._merged]
        )
        return torch.where(self._linked[:batch], merged.to(stock.dtype), stock)


def _padded(tensor: torch.Tensor, size: int) -> torch.Tensor:
    """With zeros behind."""
    return torch.cat([tensor, tensor.new_zeros(size - tensor.numel())])


def _repeat_last(tensor: torch.Tensor, times: int) -> torch.Tensor:
    return torch.cat([tensor, tensor[-1:].expand(times)])
