"""Layers of the models whose shapes the GPU script runs, with random weights."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Linear:
    """One gated-delta-net layer: heads of states [dk, dv]; the convolution's channels."""

    heads: int
    key_heads: int
    dk: int
    dv: int
    channels: int
    width: int = 4


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """One full-attention layer, and one linear layer if there are any.

    ``layers``, ``linear_layers``: how many of each the model has. ``parameters``: those
    that a token meets. ``latent``: of a key's numbers the first, which are its value too; 0
    where values are of their own.
    """

    name: str
    layers: int
    heads: int
    kv_heads: int
    dim: int
    rotary: int
    hidden: int
    parameters: float
    linear_layers: int = 0
    linear: Linear | None = None
    latent: int = 0


SHAPES = (
    ModelShape("Llama-3.1-8B", 32, 32, 8, 128, 128, 4096, 8.0e9),
    ModelShape(
        "Qwen3-Next-80B-A3B", 12, 16, 2, 256, 64, 2048, 3.9e9,
        36, Linear(32, 16, 128, 128, 8192),
    ),
    ModelShape(
        "Qwen3.5-35B-A3B", 10, 16, 2, 256, 64, 2048, 3.0e9,
        30, Linear(32, 16, 128, 128, 8192),
    ),
)  # fmt: skip

# Latent attention, its queries absorbed: of 16 heads, and of more than a tile takes.
LATENT_SHAPES = (
    ModelShape("DeepSeek-V2-Lite", 27, 16, 1, 576, 64, 2048, 2.4e9, latent=512),
    ModelShape("DeepSeek-V3", 61, 128, 1, 576, 64, 7168, 3.7e10, latent=512),
)

# What a smoke run on a CPU takes: every code path, no claim.
TINY = ModelShape(
    "tiny", 2, 4, 2, 16, 8, 64, 1e6, 2, Linear(heads=2, key_heads=2, dk=16, dv=16, channels=96)
)
TINY_LATENT = ModelShape("tiny latent", 2, 16, 1, 24, 8, 64, 1e6, latent=16)
