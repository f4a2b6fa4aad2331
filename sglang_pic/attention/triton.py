"""Span attention beside SGLang's ``triton`` backend.

Batches without a linked row run SGLang's code alone. In others its kernels compute the
ordinary rows, and ours the linked ones: one launch a layer for links, one or three for
rows that decode, whatever the number of requests and segments.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.attention.triton_backend import TritonAttnBackend
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from sglang.srt.utils.common import get_device_core_count

from sglang_pic.attention.base import SpanBackend
from sglang_pic.attention.kernels import triton_kernels
from sglang_pic.attention.tables import (
    Shape,
    SharedParts,
    TableStep,
    Walkers,
    build_tables,
    tile_of,
)
from sglang_pic.kernels.rotate import LayerRope, angles

# Programs that each multiprocessor can have ready at once.
PROGRAMS_A_CORE = 2


class PicTritonBackend(SpanBackend, TritonAttnBackend):
    """SGLang's ``triton`` backend with linked rows."""

    # Tables are made on the host.
    needs_cpu_seq_lens = True

    def __init__(self, model_runner: Any):
        super().__init__(model_runner)
        cores = max(1, get_device_core_count(model_runner.gpu_id))
        self._shape = Shape(
            tile=tile_of(self.num_head, self.num_kv_head),
            kv_heads=self.num_kv_head,
            programs=PROGRAMS_A_CORE * cores,
        )
        self._kernels = triton_kernels()
        self._step: TableStep | None = None
        self._turns: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}

    def init_forward_metadata(self, forward_batch: Any) -> None:
        last, self._step = self._step, None
        rows = self.planned_rows(forward_batch)
        if rows is not None:
            self._step = last.grown(rows, self._shape) if last is not None else None
            if self._step is None:
                self._turns.clear()
                self._step = build_tables(rows, self._shape, self.device)
            forward_batch = self.without_linked(forward_batch)
        super().init_forward_metadata(forward_batch)

    # -- per layer ------------------------------------------------------------

    def forward_extend(
        self,
        q: Any,
        k: Any,
        v: Any,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> torch.Tensor:
        stock = super().forward_extend
        if self._step is None:
            return stock(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)
        return self._forward(stock, q, k, v, layer, forward_batch, save_kv_cache)

    def forward_decode(
        self,
        q: Any,
        k: Any,
        v: Any,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> torch.Tensor:
        stock = super().forward_decode
        if self._step is None:
            return stock(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)
        return self._forward(stock, q, k, v, layer, forward_batch, save_kv_cache)

    def _forward(
        self, stock: Any, q: Any, k: Any, v: Any, layer: Any, batch: Any, save_kv_cache: bool
    ) -> torch.Tensor:
        step = self._step
        assert step is not None
        query = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        if step.ordinary:
            out = stock(q, k, v, layer, batch, save_kv_cache).view(query.shape)
        else:
            if save_kv_cache:
                self.token_to_kv_pool.set_kv_buffer(layer, KVWriteLoc.for_batch(batch), k, v)
            out = torch.empty_like(query)
        pool = (
            self.token_to_kv_pool.get_key_buffer(layer.layer_id),
            self.token_to_kv_pool.get_value_buffer(layer.layer_id),
            self.req_to_token,
            batch.req_pool_indices,
        )
        rope = self.ropes[layer.layer_id]
        for which, walkers in enumerate((step.links, step.decodes)):
            if walkers is not None:
                self._walk(query, pool, walkers, which, rope, layer.scaling, out)
        if step.parts is not None:
            self._decode_parts(query, pool, step.parts, rope, layer.scaling, out)
        return out.view(-1, layer.tp_q_head_num * layer.v_head_dim)

    def _walk(
        self,
        query: torch.Tensor,
        pool: tuple[torch.Tensor, ...],
        walkers: Walkers,
        which: int,
        rope: LayerRope | None,
        scale: float,
        out: torch.Tensor,
    ) -> None:
        turns = None if rope is None else self._turns_of(rope, which, walkers.offset)
        self._kernels.walk_rows(
            query, *pool, walkers.table, turns, out,
            scale=scale, neox=rope is None or rope.neox, splits=walkers.splits,
        )  # fmt: skip

    def _decode_parts(
        self,
        query: torch.Tensor,
        pool: tuple[torch.Tensor, ...],
        parts: SharedParts,
        rope: LayerRope | None,
        scale: float,
        out: torch.Tensor,
    ) -> None:
        table = parts.table
        if rope is None:
            gathered = query[table.query]
        else:
            cos, sin = self._turns_of(rope, 2, parts.offset)
            gathered = self._kernels.gather_rotate(query, table.query, cos, sin, neox=rope.neox)
        partial, lse = self._kernels.attend_parts(gathered, *pool, table, scale=scale)
        merged = self._kernels.merge(partial, lse, table.merge_indptr, table.merge_index)
        out[table.token] = merged.to(out.dtype)

    def _turns_of(
        self, rope: LayerRope, which: int, offset: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Angles back by one of the step's offsets, computed for the first layer that
        asks."""
        key = (id(rope.cos_sin_cache), which)
        if key not in self._turns:
            self._turns[key] = angles(rope.cos_sin_cache, -offset)
        return self._turns[key]
