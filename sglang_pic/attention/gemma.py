"""Gemma 3's rotary embeddings, as those of other models look.

Its model turns queries and keys by two embeddings of its own, one for all layers with a
window and one for the full ones. What each of its layers holds beside that knows no
scaling, and is not applied.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from sglang.srt.layers.rotary_embedding import apply_rotary_pos_emb


class GemmaRotary:
    """In the manner of SGLang's ``RotaryEmbedding``.

    Args:
        applied: the ``Gemma3RotaryEmbedding`` that the model applies.
        held: what the layer holds.
    """

    is_neox_style = True

    def __init__(self, applied: Any, held: Any):
        self._applied, self._held = applied, held
        linear = {"default": "RotaryEmbedding", "linear": "LinearScalingRotaryEmbedding"}
        # The class that turns as this one does, or a name that is none.
        self.kind = linear.get(applied.rope_type, f"Gemma3RotaryEmbedding ({applied.rope_type})")

    @functools.cached_property
    def cos_sin_cache(self) -> torch.Tensor:
        """Float32 [positions, head_dim]: the layer's, where it is what the model applies."""
        held = self._held.cos_sin_cache
        if self._applied.rope_type == "default":
            return held
        cos, sin = self._angles(torch.arange(len(held), device=held.device), torch.float32)
        half = cos.shape[-1] // 2
        return torch.cat([cos[:, :half], sin[:, :half]], -1)

    def forward_native(
        self, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As the model turns them, [n, heads, head_dim] each."""
        cos, sin = self._angles(positions, query.dtype)
        return apply_rotary_pos_emb(query, key, cos, sin)

    def _angles(
        self, positions: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        like = torch.empty(0, dtype=dtype, device=positions.device)
        cos, sin = self._applied(like, positions[None])
        return cos[0], sin[0]
