"""Random encoders for random models, with open gates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from sglang_pic.encoder.config import EncoderConfig, decoder_shape, fingerprint
from sglang_pic.encoder.weights import EncoderModules, save
from sglang_pic.eval.encoder.initial import fresh

MAX_TOKENS = 300


def save_encoder(
    directory: Path,
    model: Path,
    config: Any,
    *,
    gate: float = 0.5,
    cross_layers: tuple[int, ...] = (0, 1),
    seed: int = 0,
) -> Path:
    """Make an encoder for a saved model.

    Args:
        config: the model's, of transformers.
        gate: before the tanh; 0 changes nothing.
    """
    shape = decoder_shape(config, fingerprint(model))
    made = EncoderConfig(
        shape,
        cross_layers,
        intermediate_size=96,
        rotary_dim=shape.head_dim,
        conv=3,
        max_tokens=MAX_TOKENS,
    )
    torch.manual_seed(seed)
    modules = EncoderModules(made)
    fresh(modules, gate=gate)
    save(modules, directory)
    return directory
