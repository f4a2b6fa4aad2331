"""Copy pages within SGLang's pool, K turned to other positions.

*Relocate* (EPIC, HYPIC) gives a request private copies of the pages it reuses, K at its
true position: it costs memory for every request and leaves decode entirely stock; kept
as the fallback and as the baseline for memory. A company's segments are copied out of
its row the other way round, K turned back to positions of their own.
"""

from __future__ import annotations

from typing import Any

import torch

from sglang_pic.attention.kernels import kernels_for
from sglang_pic.attention.latent import stored
from sglang_pic.kernels.rotate import LayerRope, angles
from sglang_pic.link.plan import LinkPlan


class Relocator:
    """Copies a plan's pages within one KV pool.

    Args:
        pool: SGLang's KV pool (keys and values by layer).
        ropes: rotary table by layer id, ``None`` for a layer without positions.
    """

    def __init__(self, pool: Any, ropes: dict[int, LayerRope | None]):
        self._pool = pool
        self._ropes = ropes

    def __call__(self, plan: LinkPlan, private: torch.Tensor) -> None:
        """Fill ``private`` (int64 [plan.reused]) from ``plan.slots``."""
        offsets = [torch.full((span.n_tokens,), span.offset) for span in plan.spans]
        self.copy(plan.slots, private, torch.cat(offsets))

    def copy(self, source: torch.Tensor, target: torch.Tensor, offsets: torch.Tensor) -> None:
        """Fill ``target`` from ``source``, int64 [n] slots each, K turned by int64 [n]
        positions."""
        _wait(source)
        offsets = offsets.to(source.device)
        for layer_id, rope in self._ropes.items():
            keys, values = stored(self._pool, layer_id)
            turns = None if rope is None else angles(rope.cos_sin_cache, offsets)
            neox = rope is None or rope.neox
            kernels_for(keys).relocate(keys, values, source, target, turns, neox=neox)

    def average(self, target: torch.Tensor, other: torch.Tensor) -> None:
        """Leave in ``target`` the mean of its K and V and those of ``other``, int64 [n]
        slots each; arithmetic in float32."""
        _wait(target)
        for layer_id in self._ropes:
            for buffer in stored(self._pool, layer_id):
                mean = (buffer[target].float() + buffer[other].float()) / 2
                buffer[target] = mean.to(buffer.dtype)


def _wait(slots: torch.Tensor) -> None:
    """The scheduler's stream copies what a forward pass, on another, may still write."""
    if slots.is_cuda:
        torch.cuda.synchronize()
