"""First weights of an encoder: fresh ones, or the decoder's own where shapes allow."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sglang_pic.encoder.weights import EncoderModules

WRITES = ("o_proj", "down_proj")


@torch.no_grad()
def fresh(modules: EncoderModules, gate: float) -> None:
    """Draw all matrices; ``gate`` is the tanh gates' value before the tanh."""
    for name, weight in modules.named_parameters():
        if name.endswith("gate"):
            weight.fill_(gate)
        elif weight.dim() == 2:
            small = 0.3 if any(part in name for part in WRITES) else 1.0
            weight.normal_(std=0.7 * small / weight.shape[1] ** 0.5)
        elif weight.dim() == 3:
            bound = weight.shape[-1] ** -0.5
            weight.uniform_(-bound, bound)


@torch.no_grad()
def from_decoder(modules: EncoderModules, model: Any, gate: float) -> list[str]:
    """As ``fresh``, then attention from the decoder's full-attention layers and MLPs
    from the layers that the cross blocks stand in front of. Returns what was copied."""
    fresh(modules, gate)
    copied: list[str] = []
    layers = model.get_decoder().layers
    attentive = [i for i, layer in enumerate(layers) if hasattr(layer, "self_attn")]
    for i, at in enumerate(modules.config.cross_layers):
        nearest = layers[min((abs(j - at), j) for j in attentive)[1]].self_attn
        encoder, cross = modules.encoder.layers[i], modules.cross[i]
        for name in ("q", "k", "v", "o"):
            source = getattr(nearest, f"{name}_proj").weight
            places = {"q": (encoder.attention, cross), "o": (encoder.attention, cross)}
            for place in places.get(name, (encoder.attention, encoder)):
                copied += _copy(getattr(place, f"{name}_proj"), _ungated(source, nearest), name)
        if hasattr(layers[at], "mlp") and hasattr(layers[at].mlp, "gate_proj"):
            for mlp in (encoder.mlp, cross.mlp):
                for name in ("gate_proj", "up_proj", "down_proj"):
                    copied += _copy(
                        getattr(mlp, name), getattr(layers[at].mlp, name).weight, f"mlp.{name}"
                    )
    return copied


def _ungated(weight: Tensor, attention: Any) -> Tensor:
    """A query projection of Qwen3.5 also holds a gate, head by head: leave it out."""
    dim, hidden = attention.head_dim, weight.shape[1]
    width = attention.o_proj.weight.shape[1]
    if weight.shape[0] == 2 * width:
        return weight.view(-1, 2, dim, hidden)[:, 0].reshape(width, hidden)
    return weight


def _copy(linear: nn.Linear, weight: Tensor, name: str) -> list[str]:
    if linear.weight.shape != weight.shape:
        return []
    linear.weight.copy_(weight)
    return [name]
