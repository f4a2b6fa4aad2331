"""SGLang's ``flashinfer`` backend with linked rows.

Ordinary rows take SGLang's own path untouched. Linked rows are one launch a layer, of
the same kernels, and a merge (``flashinfer_launch``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from sglang.srt.configs.hybrid_arch import mambaish_config
from sglang.srt.layers.attention.flashinfer_backend import FlashInferAttnBackend
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from sglang.srt.model_executor.runner_utils.capture_mode import get_capture_attention_variant

from sglang_pic.attention.base import SpanBackend
from sglang_pic.attention.flashinfer_graphs import GraphParts, Room
from sglang_pic.attention.flashinfer_launch import Launcher, Shape
from sglang_pic.attention.graphs import LINKED, ORDINARY
from sglang_pic.attention.step import StepRow
from sglang_pic.attention.table_runner import TableRunner
from sglang_pic.attention.triton import runner_of, shared_memory_refusal
from sglang_pic.errors import PicIntegrityError
from sglang_pic.kernels.rotate import LayerRope

HEAD_DIMS = (64, 128, 256)
DTYPES = (torch.float16, torch.bfloat16)
# Distinct spans of a decode batch, and spans that its rows see on average, in a graph.
GRAPH_SPANS, GRAPH_SEEN = 256, 16
# Bytes of one launch that SGLang, which sizes its pool at start, knows nothing of: queries
# gathered, and their partial results. What it leaves for activations has room for so many.
# Above, a long prompt behind many segments say, rows walk their spans instead.
MOST_TRANSIENT = 256 << 20


def gathered_queries(rows: Sequence[StepRow]) -> int:
    """Queries of a launch: each of a linked row as often as it sees a span, and once more."""
    count = 0
    for row in rows:
        if row.plan is not None:
            done = row.prefix - row.plan.reused
            count += row.extend
            count += sum(
                max(0, row.extend - max(0, span.first_seer - done)) for span in row.plan.spans
            )
    return count


def flashinfer_refusal(
    layers: Sequence[Any], dtype: torch.dtype, kv_dtype: torch.dtype
) -> str | None:
    """Why FlashInfer's launches cannot serve links of this model, or ``None``; beside what
    every backend refuses.

    Args:
        layers: SGLang's ``RadixAttention`` layers.
        dtype: of the model.
        kv_dtype: of its KV cache.
    """
    if dtype not in DTYPES:
        return f"FlashInfer attends in half precision only, not in {dtype}"
    if kv_dtype != dtype:
        return f"FlashInfer reads keys and values of the model's type only here, not {kv_dtype}"
    for layer in layers:
        if layer.qk_head_dim not in HEAD_DIMS:
            return f"layer {layer.layer_id}: FlashInfer has no head dimension {layer.qk_head_dim}"
        if layer.is_cross_attention:
            return f"layer {layer.layer_id}: cross-attention"
    if len({(x.tp_q_head_num, x.tp_k_head_num, x.qk_head_dim) for x in layers}) > 1:
        return "attention layers of different shapes: one plan serves all"
    return None


class PicFlashInferBackend(SpanBackend, FlashInferAttnBackend):
    """SGLang's ``flashinfer`` backend with linked rows."""

    def __init__(self, model_runner: Any):
        super().__init__(model_runner, init_new_workspace=model_runner.init_new_workspace)
        # SGLang checks this for its own class only.
        if model_runner.prefill_attention_backend_str == "flashinfer":
            self._check_kv_attention_access("prefill", self.prefill_kv_access)
        if model_runner.decode_attention_backend_str == "flashinfer":
            self._check_kv_attention_access("decode", self.decode_kv_access)
        layers = [m for m in model_runner.model.modules() if isinstance(m, RadixAttention)]
        hybrid = mambaish_config(model_runner.model_config) is not None
        self.refusal = (
            self.refusal
            or flashinfer_refusal(layers, model_runner.dtype, model_runner.kv_cache_dtype)
            or shared_memory_refusal(layers[0].qk_head_dim, hybrid)
        )
        self._launcher: Launcher | None = None
        self._graphs: GraphParts | None = None
        # What this pass runs on, where it has linked rows; whether it has others.
        self._running: Launcher | GraphParts | TableRunner | None = None
        self._ordinary = False
        # Of the batch whose graph was chosen.
        self._rows: list[StepRow] | None = None
        # SGLang's wrappers, which each of its graphs has baked in, by label and size.
        self._stock: dict[tuple[str, int], Any] = {}
        if self.refusal is None:
            layer = layers[0]
            shape = Shape(
                layer.tp_q_head_num,
                layer.tp_k_head_num,
                layer.qk_head_dim,
                self.page_size,
                model_runner.dtype,
            )
            self._launcher = Launcher(shape, self.workspace_buffer)
            self._tables = runner_of(
                model_runner, shape.heads, shape.kv_heads, self.workspace_buffer.device
            )

    # -- once a pass ------------------------------------------------------------

    def init_forward_metadata(self, forward_batch: Any) -> None:
        rows = self.planned_rows(forward_batch)
        self._rows, self._running = None, None
        if rows is None:
            super().init_forward_metadata(forward_batch)
            return
        self._ordinary = any(row.plan is None for row in rows)
        if self._ordinary:
            super().init_forward_metadata(self.without_linked(forward_batch))
        assert self._launcher is not None
        if gathered_queries(rows) * self._launcher.shape.query_nbytes > MOST_TRANSIENT:
            self._tables.plan(rows)
            self._running = self._tables
            return
        self._tables.step = None  # which holds plans, and they their segments' states
        self._launcher.plan(
            rows, self.req_to_token_pool.req_to_token, forward_batch.req_pool_indices
        )
        self._running = self._launcher

    # -- CUDA graphs of decode ----------------------------------------------------

    def init_cuda_graph_state(
        self, max_bs: int, max_num_tokens: int, *args: Any, **kwargs: Any
    ) -> None:
        super().init_cuda_graph_state(max_bs, max_num_tokens, *args, **kwargs)
        if self._launcher is None:
            return
        shape = self._launcher.shape
        slots = self.token_to_kv_pool.get_key_buffer(min(self.ropes)).shape[0]
        room = Room(max_bs, GRAPH_SEEN, GRAPH_SPANS, slots // shape.page + max_bs)
        self._graphs = GraphParts(shape, self.ropes.values(), self.workspace_buffer, room)

    def fits_graph(self, forward_batch: Any, batch_size: int) -> bool:
        """Whether the graph of ``batch_size`` rows can take this batch, which has linked
        ones; to be asked before that graph is chosen, or the batch run eagerly."""
        rows = self.planned_rows(forward_batch)
        fits = rows is not None and self._graphs is not None and self._graphs.fits(batch_size, rows)
        self._rows = rows if fits else None
        return fits

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        batch_size = forward_batch.batch_size
        rows, self._rows, self._running = self._rows, None, None
        if in_capture:
            super().init_forward_metadata_out_graph(forward_batch, in_capture)
            label = get_capture_attention_variant() or ORDINARY
            self._stock[label, batch_size] = self.decode_cuda_graph_metadata.get(batch_size)
            if label == LINKED and self._graphs:
                self._graphs.capture(batch_size)
                self._running = self._graphs
            return
        label = ORDINARY if rows is None else LINKED
        if (label, batch_size) in self._stock:
            self.decode_cuda_graph_metadata[batch_size] = self._stock[label, batch_size]
        if rows is None:
            super().init_forward_metadata_out_graph(forward_batch)
            return
        super().init_forward_metadata_out_graph(self.without_linked(forward_batch))
        table, pool_rows = self.req_to_token_pool.req_to_token, forward_batch.req_pool_indices
        if self._graphs is None or not self._graphs.refill(batch_size, rows, table, pool_rows):
            raise PicIntegrityError("linked rows do not fit the graph that was chosen for them")

    # -- per layer ------------------------------------------------------------------

    def forward_extend(
        self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, save_kv_cache: bool = True
    ) -> torch.Tensor:
        if self._running is None:
            return super().forward_extend(q, k, v, layer, forward_batch, save_kv_cache)
        stock = super().forward_extend if self._ordinary else None
        return self._forward(stock, q, k, v, layer, forward_batch, save_kv_cache)

    def forward_decode(
        self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, save_kv_cache: bool = True
    ) -> torch.Tensor:
        running = self._running
        if running is None:
            return super().forward_decode(q, k, v, layer, forward_batch, save_kv_cache)
        stock = super().forward_decode
        if not isinstance(running, GraphParts):
            return self._forward(
                stock if self._ordinary else None, q, k, v, layer, forward_batch, save_kv_cache
            )
        # One graph serves batches with and without ordinary rows.
        out = stock(q, k, v, layer, forward_batch, save_kv_cache)
        of_layer = self._of_layer(q, layer)
        return running.run(*of_layer, stock=out.view(of_layer[0].shape)).view(out.shape)

    def _forward(
        self, stock: Any, q: Any, k: Any, v: Any, layer: Any, batch: Any, save_kv_cache: bool
    ) -> torch.Tensor:
        """Eagerly: SGLang's result, if any, with that of the linked rows put over it."""
        if stock is not None:
            out = stock(q, k, v, layer, batch, save_kv_cache)
        else:
            out = torch.empty_like(q).view(-1, layer.tp_q_head_num * layer.v_head_dim)
            if save_kv_cache and k is not None:
                where = KVWriteLoc.for_batch(batch)
                scales = self._kv_write_scales(layer)
                self.token_to_kv_pool.set_kv_buffer(layer, where, k, v, *scales)
        query, *of_layer = self._of_layer(q, layer)
        if isinstance(self._running, TableRunner):
            rope, scale = self.ropes[layer.layer_id], layer.scaling
            self._tables.run(query, self.pool_of(layer, batch), rope, scale, out.view(query.shape))
            return out
        launcher = self._launcher
        assert launcher is not None
        merged = launcher.run(query, *of_layer)
        out.view(-1, *merged.shape[1:])[launcher.token] = merged.to(out.dtype)
        return out

    def _of_layer(
        self, q: torch.Tensor, layer: Any
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, LayerRope | None, float]:
        """What launches take: query, keys, values, rope, scale."""
        keys, values = self.token_to_kv_pool.get_kv_buffer(layer.layer_id)
        return (
            q.contiguous().view(-1, layer.tp_q_head_num, layer.qk_head_dim),
            keys,
            values,
            self.ropes[layer.layer_id],
            layer.scaling,
        )
