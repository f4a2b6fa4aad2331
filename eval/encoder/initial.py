"""Sizes and first weights of an encoder: fresh ones, or the decoder's own where shapes allow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sglang_pic.encoder.config import EncoderConfig
from sglang_pic.encoder.weights import EncoderModules
from sglang_pic.eval.encoder.decoder import shape_of

WRITES = ("o_proj", "down_proj")
GAIN = 2.0  # of normalised queries and keys: logits of up to GAIN^2 sqrt(head_dim)


def sizes_beside(model: Any, places: Sequence[int], conv: int = 0) -> EncoderConfig:
    """Of an encoder whose layers are like those of ``model``, which transformers has loaded.

    Args:
        places: decoder layers with a cross block in front.
        conv: width of the convolutions; 0 is none.
    """
    config, shape = model.config, shape_of(model)
    names = [name for name, _ in model.named_parameters()]
    return EncoderConfig(
        decoder=shape,
        cross_layers=tuple(places),
        intermediate_size=config.intermediate_size,
        rope_theta=config.rope_parameters["rope_theta"],
        rotary_dim=int(shape.head_dim * getattr(config, "partial_rotary_factor", 1.0)),
        head_norm=any("q_norm" in name for name in names),
        bias=any(name.endswith("q_proj.bias") for name in names),
        conv=conv,
    )


@torch.no_grad()
def fresh(modules: EncoderModules, gate: float) -> None:
    """Draw all matrices; ``gate`` is the tanh gates' value before the tanh."""
    for name, weight in modules.named_parameters():
        if name.endswith("gate"):
            weight.fill_(gate)
        elif weight.dim() == 2:
            small = 0.3 if any(part in name for part in WRITES) else 1.0
            weight.normal_(std=0.7 * small / weight.shape[1] ** 0.5)
        elif name.endswith("bias"):
            weight.zero_()
        elif weight.dim() == 3:
            bound = weight.shape[-1] ** -0.5
            weight.uniform_(-bound, bound)


@torch.no_grad()
def from_decoder(modules: EncoderModules, model: Any, gate: float) -> list[str]:
    """The decoder's own weights where it has them, else fresh ones.

    An encoder layer is the decoder layer in front of its cross block; what it is asked
    for, and how, are the keys, values, queries and output of the layer behind that block.
    Convolutions and the cross blocks' MLPs start as nothing. A layer without softmax
    attention takes that of the nearest layer that has it.

    Returns:
        Names of the modules that were copied.
    """
    fresh(modules, gate)
    layers = list(model.get_decoder().layers)
    copied: list[str] = []

    def copy(to: nn.Module, weight: Tensor, name: str) -> None:
        if to.weight.shape == weight.shape:
            to.weight.copy_(weight)
            copied.append(name)

    for i, at in enumerate(modules.config.cross_layers):
        encoder, cross = modules.encoder.layers[i], modules.cross[i]
        before, behind = layers[max(0, at - 1)], layers[at]
        own, asked = (_attention_near(layers, j) for j in (max(0, at - 1), at))
        for letter in "qkvo":
            proj = f"{letter}_proj"
            to = getattr(encoder.attention, proj)
            copy(to, _weight(own, proj), f"encoder.{i}.{proj}")
            if to.bias is not None:
                to.bias.copy_(getattr(own, proj).bias)
            place = cross if letter in "qo" else encoder
            copy(getattr(place, proj), _weight(asked, proj), f"cross.{i}.{proj}")
        for proj in ("gate_proj", "up_proj", "down_proj"):
            if hasattr(before.mlp, proj):
                copy(getattr(encoder.mlp, proj), getattr(before.mlp, proj).weight, f"mlp.{i}")
        for to, norm in (
            (encoder.attention_norm, before.input_layernorm),
            (encoder.mlp_norm, before.post_attention_layernorm),
            (encoder.kv_norm, behind.input_layernorm),
            (cross.attention_norm, behind.input_layernorm),
        ):
            copy(to, _scale(norm), f"norm.{i}")
        for norm in (encoder.k_norm, cross.q_norm):
            norm.weight.fill_(GAIN)
        cross.mlp.down_proj.weight.zero_()
        if encoder.has_conv:
            encoder.conv.weight.zero_()
    return copied


def _attention_near(layers: list[Any], at: int) -> Any:
    attentive = [i for i, layer in enumerate(layers) if hasattr(layer, "self_attn")]
    return layers[min((abs(i - at), i) for i in attentive)[1]].self_attn


def _weight(attention: Any, proj: str) -> Tensor:
    """A projection; of Qwen3.5's, which holds a gate head by head, the query alone."""
    weight: Tensor = getattr(attention, proj).weight
    width = attention.o_proj.weight.shape[1]
    if proj == "q_proj" and len(weight) == 2 * width:
        return weight.unflatten(0, (-1, 2, attention.head_dim))[:, 0].flatten(0, 1)
    return weight


def _scale(norm: nn.Module) -> Tensor:
    """Of an RMS norm; Qwen3.5's is an offset from 1."""
    offset = type(norm).__name__.startswith(("Qwen3_5", "Qwen3Next"))
    return 1 + norm.weight if offset else norm.weight
