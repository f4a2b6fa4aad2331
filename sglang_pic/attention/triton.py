"""Span attention beside SGLang's ``triton`` backend.

Batches without a linked row run SGLang's code alone. In others its kernels compute the
ordinary rows, and ours the linked ones, whatever the number of requests and segments.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.configs.hybrid_arch import mambaish_config
from sglang.srt.layers.attention.triton_backend import TritonAttnBackend
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from sglang.srt.utils.common import get_device_core_count

from sglang_pic.attention.base import SpanBackend
from sglang_pic.attention.kernels import latent_kernels, triton_kernels
from sglang_pic.attention.rope import has_windows, window_of
from sglang_pic.attention.table_runner import TableRunner
from sglang_pic.attention.tables import Shape, tile_of
from sglang_pic.kernels.triton.latent import head_tiles

# Programs that each multiprocessor can have ready at once.
PROGRAMS_A_CORE = 2
# Bytes of shared memory that a block of our kernels takes, by head dimension at most
# (``eval.gpu.aot``); those of linear layers take as much as the last.
SHARED_BYTES = ((128, 96 << 10), (256, 180 << 10))
# Of latent attention, by the width of the latent.
LATENT_BYTES = ((512, 148 << 10),)


def shared_memory_refusal(head_dim: int, hybrid: bool, latent: bool = False) -> str | None:
    """Why the device is too small for our kernels, or ``None``.

    Args:
        head_dim: width of a value, and of a key where that is not wider.
        hybrid: whether there are linear layers.
        latent: whether attention is latent.
    """
    if not torch.cuda.is_available():
        return None
    sizes = LATENT_BYTES if latent else SHARED_BYTES
    needed = [size for dim, size in sizes if head_dim <= dim]
    if not needed:
        return f"head dimension {head_dim} is not supported"
    needs = SHARED_BYTES[-1][1] if hybrid else needed[0]
    found = torch.cuda.get_device_properties().shared_memory_per_block_optin
    if found < needs:
        return f"a block needs {needs >> 10} KiB of shared memory, this GPU has {found >> 10}"
    return None


def runner_of(model_runner: Any, heads: int, kv_heads: int, device: Any) -> TableRunner:
    """A runner of Triton kernels for SGLang's model runner."""
    cores = max(1, get_device_core_count(model_runner.gpu_id))
    programs, windows = PROGRAMS_A_CORE * cores, has_windows(model_runner.model)
    if model_runner.use_mla_backend:
        shape = Shape(tile_of(heads, 1), head_tiles(heads), programs, windows)
        return TableRunner(latent_kernels(), shape, device)
    shape = Shape(tile_of(heads, kv_heads), kv_heads, programs, windows)
    return TableRunner(triton_kernels(), shape, device)


class PicTritonBackend(SpanBackend, TritonAttnBackend):
    """SGLang's ``triton`` backend with linked rows."""

    # Tables are made on the host.
    needs_cpu_seq_lens = True
    sees_windows = True

    def __init__(self, model_runner: Any):
        super().__init__(model_runner)
        self._tables = runner_of(model_runner, self.num_head, self.num_kv_head, self.device)
        hybrid = mambaish_config(model_runner.model_config) is not None
        latent = model_runner.use_mla_backend
        self.refusal = self.refusal or shared_memory_refusal(self.v_head_dim, hybrid, latent)

    def init_forward_metadata(self, forward_batch: Any) -> None:
        rows = self.planned_rows(forward_batch)
        if rows is None:
            self._tables.step = None
            super().init_forward_metadata(forward_batch)
            return
        self._tables.plan(rows)
        step = self._tables.step
        if step is not None and step.ordinary:
            super().init_forward_metadata(self.without_linked(forward_batch))

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        # No graph of this backend's knows of spans.
        self._tables.step = None
        super().init_forward_metadata_out_graph(forward_batch, in_capture)

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
        if self._tables.step is None:
            return stock(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)
        self.refuse_extras(kwargs)
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
        if self._tables.step is None:
            return stock(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)
        self.refuse_extras(kwargs)
        return self._forward(stock, q, k, v, layer, forward_batch, save_kv_cache)

    def _forward(
        self, stock: Any, q: Any, k: Any, v: Any, layer: Any, batch: Any, save_kv_cache: bool
    ) -> torch.Tensor:
        step = self._tables.step
        assert step is not None
        query = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        if step.ordinary:
            out = stock(q, k, v, layer, batch, save_kv_cache)
            out = out.view(*query.shape[:2], layer.v_head_dim)
        else:
            if save_kv_cache:
                self.token_to_kv_pool.set_kv_buffer(layer, KVWriteLoc.for_batch(batch), k, v)
            out = query.new_empty((*query.shape[:2], layer.v_head_dim))
        self._tables.run(
            query, self.pool_of(layer, batch), self.ropes[layer.layer_id], layer.scaling, out,
            window_of(layer),
        )  # fmt: skip
        return out.view(-1, layer.tp_q_head_num * layer.v_head_dim)
