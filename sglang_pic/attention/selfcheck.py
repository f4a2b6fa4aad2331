"""Does moving a cached key give the key that the model itself would have made there?

Once with the model's own rotary modules, over all of their table; once with keys
that a prefill has written, where nothing but token and position went into them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from sglang_pic.attention.latent import stored
from sglang_pic.attention.rope import attentions
from sglang_pic.checks import Check
from sglang_pic.kernels.rotate import LayerRope, angles, rotate

# Written twice, a key differs by rounding: so many units in the last place, and never
# less than what sums in another order do, nor as much as another position makes.
KEY_ULPS = 8
KEY_BOUND, MOST = 1e-3, 0.25


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference, in units of the norm expected."""
    found, expected = found.double(), expected.double()
    return float((found - expected).norm() / expected.norm().clamp_min(1e-30))


def rotary_check(model: Any, ropes: Mapping[int, LayerRope | None]) -> Check | None:
    """Rotate random keys from positions to others; ``None`` for a model without
    positions.

    The table itself is rounded: an angle is off by an ulp of float32 of the position.
    """
    worst = None
    for _, attn, rotary in attentions(model):
        if rotary is None:
            continue
        rope = ropes[attn.layer_id]
        assert rope is not None
        length, last = rope.cos_sin_cache.shape[0], rope.cos_sin_cache.shape[0] - 1
        device = rope.cos_sin_cache.device
        from_ = torch.tensor([0, 1, 0, last // 3, last, last], device=device)
        to = torch.tensor([1, 18, last, last // 2, last // 4, 0], device=device)
        generator = torch.Generator().manual_seed(0)
        dim = attn.qk_head_dim - rope.first
        keys = torch.randn(len(to), 1, dim, generator=generator).to(device)
        _, there = rotary.forward_native(from_, keys.clone(), keys.clone())
        _, expected = rotary.forward_native(to, keys.clone(), keys.clone())
        cos, sin = angles(rope.cos_sin_cache, to - from_)
        moved = rotate(there, cos, sin, neox=rope.neox)
        found = max(relative(one, wanted) for one, wanted in zip(moved, expected, strict=True))
        table = torch.finfo(rope.cos_sin_cache.dtype).eps
        check = Check(found, 4 * (table + torch.finfo(torch.float32).eps * length))
        if worst is None or not check.found <= worst.found:
            worst = check
    return worst


def first_layer_checks(
    pool: Any, ropes: Mapping[int, LayerRope | None], alone: torch.Tensor, behind: torch.Tensor
) -> dict[str, Check]:
    """Keys and values of the model's first layer, of the same tokens computed twice.

    Args:
        pool: SGLang's KV pool.
        ropes: as in ``layer_ropes``.
        alone: int64 [n], slots of a segment as it was compiled.
        behind: int64 [m], slots of a longer one that ends with the same tokens.

    Returns:
        Nothing where the first layer is linear: what enters the first full one then
        depends on what precedes.
    """
    if 0 not in ropes:
        return {}
    offset = behind.numel() - alone.numel()
    keys, values = stored(pool, 0)
    moved, rope = keys[alone].float(), ropes[0]
    if rope is not None:
        offsets = torch.full((alone.numel(),), offset, device=alone.device)
        moved = rotate(moved, *angles(rope.cos_sin_cache, offsets), neox=rope.neox)
    bound = min(MOST, max(KEY_BOUND, KEY_ULPS * torch.finfo(keys.dtype).eps))
    there = behind[offset:]
    return {
        "first_layer_keys": Check(relative(moved, keys[there]), bound),
        "first_layer_values": Check(relative(values[alone], values[there]), bound),
    }
