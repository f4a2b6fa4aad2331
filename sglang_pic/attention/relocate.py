"""*Relocate*: copy reused pages into private slots, K at its true position.

What EPIC and HYPIC do. It costs memory for every request and leaves decode
entirely stock; kept as the fallback and as the baseline for memory.
"""

from __future__ import annotations

from typing import Any

import torch

from sglang_pic.attention.kernels import kernels_for
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
        source = plan.slots
        if source.is_cuda:
            # The scheduler's stream copies what a forward pass, on another, may still write.
            torch.cuda.synchronize()
        offsets = torch.cat([torch.full((span.n_tokens,), span.offset) for span in plan.spans]).to(
            source.device
        )
        for layer_id, rope in self._ropes.items():
            keys = self._pool.get_key_buffer(layer_id)
            values = self._pool.get_value_buffer(layer_id)
            turns = None if rope is None else angles(rope.cos_sin_cache, offsets)
            neox = rope is None or rope.neox
            kernels_for(keys).relocate(keys, values, source, private, turns, neox=neox)
