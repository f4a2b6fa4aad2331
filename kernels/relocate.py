"""Copy reused pages into private ones, K at its true position (EPIC, arXiv 2410.15332)."""

from __future__ import annotations

import torch

from sglang_pic.kernels.rotate import rotate


def relocate(
    keys: torch.Tensor,
    values: torch.Tensor,
    source: torch.Tensor,
    target: torch.Tensor,
    turns: tuple[torch.Tensor, torch.Tensor] | None,
    *,
    neox: bool = True,
) -> None:
    """Within the buffers of one layer.

    Args:
        keys, values: [slots, kv_heads, head_dim]; of latent attention the rotary slice and
            the latent, of unlike widths.
        source, target: int64 [n], slots; no target is a source.
        turns: cos, sin float32 [n, rotary_dim / 2] of each token's rotation
            (``kernels.rotate.angles``); ``None`` without positions.
        neox: as in ``kernels.rotate.rotate``.
    """
    moved = keys[source]
    keys[target] = moved if turns is None else rotate(moved, *turns, neox=neox)
    values[target] = values[source]
