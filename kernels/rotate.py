"""Rotate queries or keys by a position offset (RoPE is relative).

A key cached at local position j of a segment that now starts at s is seen
correctly by rotating the query by -s instead of the key by +s:
``<R(p) q, R(j + s) k> = <R(p - s) q, R(j) k>``.
"""

from __future__ import annotations

import dataclasses

import torch


@dataclasses.dataclass(frozen=True)
class LayerRope:
    """Rotation of one layer: its table as in ``angles``, its layout, and the first of the
    channels that are turned, as in ``rotate``."""

    cos_sin_cache: torch.Tensor
    neox: bool
    first: int = 0


def angles(cos_sin_cache: torch.Tensor, offsets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit cosines and signed sines of rotations by ``offsets`` positions.

    Args:
        cos_sin_cache: float [max_position, rotary_dim], ``cos | sin`` of each
            position, as SGLang's rotary modules hold it.
        offsets: int64 [n], may be negative.

    Returns:
        cos, sin: float32 [n, rotary_dim / 2]. A scale that the table carries
        (YaRN's mscale) is divided out: it was applied to query and key already.
    """
    table = cos_sin_cache[offsets.abs()].float()
    cos, sin = table.chunk(2, dim=-1)
    norm = torch.sqrt(cos * cos + sin * sin)
    return cos / norm, sin / norm * torch.sign(offsets)[:, None]


def rotate(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, neox: bool, first: int = 0
) -> torch.Tensor:
    """Rotate ``rotary_dim`` channels of every head.

    Args:
        x: [n, heads, head_dim].
        cos, sin: float32 [n, rotary_dim / 2], from ``angles``.
        neox: halves layout (GPT-NeoX) if true, interleaved pairs (GPT-J) if not.
        first: of the channels.

    Returns:
        [n, heads, head_dim] in the dtype of ``x``; arithmetic in float32.
    """
    half = cos.shape[-1]
    last = first + 2 * half
    turned = x[..., first:last].float()
    # Written where it belongs: of a long prompt's keys every pass over memory counts.
    out = x.new_empty(x.shape)
    out[..., :first], out[..., last:] = x[..., :first], x[..., last:]
    direct = x.dtype == torch.float32
    there = out[..., first:last] if direct else torch.empty_like(turned)
    cos, sin = cos[:, None], sin[:, None]
    (a, b), (to_a, to_b) = _halves(turned, neox), _halves(there, neox)
    torch.mul(a, cos, out=to_a).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=to_b).addcmul_(a, sin)
    if not direct:
        out[..., first:last] = there
    return out


def _halves(x: torch.Tensor, neox: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The two channels of each pair, as views."""
    if neox:
        a, b = x.chunk(2, dim=-1)
        return a, b
    return x[..., 0::2], x[..., 1::2]


def gather_rotate(
    query: torch.Tensor, index: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *,
    neox: bool, first: int = 0,
) -> torch.Tensor:  # fmt: skip
    """Queries as often as they are needed, each rotated by its own angles.

    Args:
        query: [tokens, heads, head_dim].
        index: int [n], which query.
        cos, sin: float32 [n, rotary_dim / 2], from ``angles``.
        neox, first: as in ``rotate``.

    Returns:
        [n, heads, head_dim] in the dtype of ``query``.
    """
    return rotate(query[index.long()], cos, sin, neox=neox, first=first)
