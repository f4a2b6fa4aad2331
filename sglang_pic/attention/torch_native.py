"""Span attention on torch: the reference, and what a CPU serves with.

Ordinary rows call the very functions stock SGLang would call for them. Loops
over parts, tiles and rows stand where a GPU kernel has its grid; each turn is
one call over all its queries.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.mem_cache.memory_pool import KVWriteLoc

from sglang_pic.attention.base import SpanBackend
from sglang_pic.attention.drafts import attend_drafts
from sglang_pic.attention.rope import window_of
from sglang_pic.attention.step import Parts, SpanStep, Walk, build_step, walks_within
from sglang_pic.kernels.attend import attend
from sglang_pic.kernels.merge import merge
from sglang_pic.kernels.rotate import LayerRope, angles, rotate
from sglang_pic.kernels.walk import walk


class PicTorchNativeBackend(SpanBackend, TorchNativeAttnBackend):
    """SGLang's ``torch_native`` backend with linked rows."""

    sees_windows = True
    verifies = True

    def __init__(self, model_runner: Any):
        super().__init__(model_runner)
        self._step: SpanStep | None = None
        self._angles: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}
        self._within: dict[int, list[Walk]] = {}

    def init_forward_metadata(self, forward_batch: Any) -> None:
        super().init_forward_metadata(forward_batch)
        self._step = None
        self._angles.clear()
        self._within.clear()
        rows = self.planned_rows(forward_batch)
        if rows is not None:
            table, pool = self.req_to_token_pool.req_to_token, forward_batch.req_pool_indices
            held = [
                dataclasses.replace(row, row=table[slot, : row.prefix + row.extend])
                for row, slot in zip(rows, pool.tolist(), strict=True)
            ]
            self._step = build_step(held, self.device)

    # -- per layer ------------------------------------------------------------

    def forward_extend(
        self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, save_kv_cache: bool = True
    ) -> torch.Tensor:
        if self._step is None:
            return super().forward_extend(q, k, v, layer, forward_batch, save_kv_cache)
        return self._forward(q, k, v, layer, forward_batch, save_kv_cache)

    def forward_decode(
        self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, save_kv_cache: bool = True
    ) -> torch.Tensor:
        if self._step is None:
            return super().forward_decode(q, k, v, layer, forward_batch, save_kv_cache)
        return self._forward(q, k, v, layer, forward_batch, save_kv_cache)

    def _forward(
        self, q: Any, k: Any, v: Any, layer: Any, batch: Any, save_kv_cache: bool
    ) -> torch.Tensor:
        step = self._step
        assert step is not None
        if save_kv_cache and k is not None and v is not None:
            self.token_to_kv_pool.set_kv_buffer(
                layer, KVWriteLoc(batch.out_cache_loc, self.swa_out_cache_loc), k, v
            )
        query = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        out = query.new_empty((*query.shape[:2], layer.v_head_dim))
        keys = self.token_to_kv_pool.get_key_buffer(layer.layer_id)
        values = self.token_to_kv_pool.get_value_buffer(layer.layer_id)
        if layer.v_head_dim < layer.qk_head_dim:
            # Of MLA, which are the keys' first channels: kernels want both as wide.
            values = keys
        rope = self.ropes[layer.layer_id]
        if step.ordinary:
            self._forward_ordinary(query, out, layer, batch, step.ordinary)
        window = window_of(layer)
        walks = step.walks if window is None else self._walks_within(step, window)
        for row in walks:
            tokens = slice(row.first_query, row.first_query + row.extend)
            # Turned as it is computed with: what is stored may be narrower.
            key = keys[row.slots].to(query.dtype)
            if row.offset is not None and rope is not None:
                turns = self._angles_of(rope, row.offset)
                key = rotate(key, *turns, neox=rope.neox, first=rope.first)
            value = values[row.slots]
            found = walk(query[tokens], key, value, row.tiles, scale=layer.scaling)
            out[tokens] = found[..., : layer.v_head_dim]
        if step.parts is not None and window is None:
            self._forward_parts(query, out, keys, values, layer.scaling, rope, step.parts)
        return out.view(-1, layer.tp_q_head_num * layer.v_head_dim)

    def _walks_within(self, step: SpanStep, window: int) -> list[Walk]:
        """Made for the first layer with this window."""
        if window not in self._within:
            self._within[window] = walks_within(step, window, self.device)
        return self._within[window]

    def _angles_of(
        self, rope: LayerRope, offset: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Angles of one of the step's arrays, computed for the first layer that asks."""
        key = (id(rope.cos_sin_cache), id(offset))
        if key not in self._angles:
            self._angles[key] = angles(rope.cos_sin_cache, offset)
        return self._angles[key]

    def _forward_parts(
        self,
        query: torch.Tensor,
        out: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scale: float,
        rope: LayerRope | None,
        parts: Parts,
    ) -> None:
        """Decode: attend part by part, merge, into ``out``."""
        gathered = query[parts.tokens[parts.query]]
        if rope is not None:
            cos, sin = self._angles_of(rope, parts.offset)
            gathered = rotate(gathered, cos, -sin, neox=rope.neox, first=rope.first)
        key, value = keys[parts.slots], values[parts.slots]
        partial = torch.empty(gathered.shape, dtype=torch.float32, device=query.device)
        lse = partial.new_empty(partial.shape[:2])
        for part in range(len(parts.qo_indptr) - 1):
            of_q = slice(parts.qo_indptr[part], parts.qo_indptr[part + 1])
            of_k = slice(parts.kv_indptr[part], parts.kv_indptr[part + 1])
            partial[of_q], lse[of_q] = attend(gathered[of_q], key[of_k], value[of_k], scale=scale)
        merged = merge(partial, lse, parts.merge_indptr, parts.merge_index)
        out[parts.tokens] = merged[..., : out.shape[-1]].to(out.dtype)

    def _forward_ordinary(
        self, query: torch.Tensor, out: torch.Tensor, layer: Any, batch: Any, rows: list[int]
    ) -> None:
        """Stock attention for the batch's ordinary rows, into ``out``."""
        keys = self.token_to_kv_pool.get_key_buffer(layer.layer_id)
        values = self.token_to_kv_pool.get_value_buffer(layer.layer_id)
        table = self.req_to_token_pool.req_to_token
        if batch.forward_mode.is_target_verify():
            scale, window = layer.scaling, window_of(layer)
            attend_drafts(query, out, keys, values, table, batch, rows, scale, window)
            return
        index = torch.tensor(rows, device=query.device)
        decode = batch.forward_mode.is_decode()
        if decode:
            tokens = index
        else:
            ends = torch.cumsum(batch.extend_seq_lens, 0)
            tokens = torch.cat(
                [torch.arange(ends[i] - batch.extend_seq_lens[i], ends[i]) for i in rows]
            ).to(query.device)
        lengths = [] if decode else [batch.extend_prefix_lens[index], batch.extend_seq_lens[index]]
        run = self._run_sdpa_forward_decode if decode else self._run_sdpa_forward_extend
        part = query[tokens]
        out[tokens] = run(
            part,
            part.new_empty((*part.shape[:2], layer.v_head_dim)),
            keys,
            values,
            table,
            batch.req_pool_indices[index],
            batch.seq_lens[index],
            *lengths,
            scaling=layer.scaling,
            enable_gqa=layer.tp_q_head_num != layer.tp_k_head_num,
            causal=not decode,
            sliding_window_size=window_of(layer),
        )
