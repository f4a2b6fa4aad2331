"""Each layer's rotary table, and which position encodings may be linked."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from sglang.srt.layers.radix_attention import AttentionType, RadixAttention

from sglang_pic.attention.gemma import GemmaRotary
from sglang_pic.kernels.rotate import LayerRope

# Angle = position times a fixed frequency: rotations add up. By exact class:
# a subclass may well depend on the sequence's length.
LINEAR_ROPE = {
    "RotaryEmbedding",
    "LinearScalingRotaryEmbedding",
    "Llama3RotaryEmbedding",
    "YaRNScalingRotaryEmbedding",
    "DeepseekScalingRotaryEmbedding",
    "MRotaryEmbedding",
}

# Attention without any position encoding where there is no rotary embedding, by
# exact class: elsewhere a missing one means that positions enter in another way.
NOPE = {"GraniteMoeHybridAttention", "NemotronHAttention"}

# Attention of which some layers see a window of positions, by exact class: others have
# sinks there, or hold rotary embeddings that their full layers do not apply.
WINDOWED = {"Gemma3Attention", "Olmo2Attention"}

# Latent attention, by exact class. Without a rotary embedding it has no positions.
LATENT = {"DeepseekV2AttentionMLA", "DsV3MLA"}

# Lightning attention, by exact class: linear layers whose attention SGLang describes as
# it does that of full ones.
LIGHTNING = {"BailingMoELinearAttention"}


def attention_of(module: Any) -> RadixAttention | None:
    """The attention layer that a module of SGLang's models owns, if it owns one."""
    name = "attn_mqa" if type(module).__name__ in LATENT else "attn"
    attn = getattr(module, name, None)
    return attn if isinstance(attn, RadixAttention) else None


def window_of(attn: RadixAttention) -> int | None:
    """How many positions before its own a query sees in this layer; ``None``: all."""
    size = attn.sliding_window_size
    return None if size is None or size < 0 else int(size)


def has_windows(model: Any) -> bool:
    """Whether any layer of SGLang's model sees a window of positions alone."""
    layers = (m for m in model.modules() if isinstance(m, RadixAttention))
    return any(window_of(layer) is not None for layer in layers)


def attentions(model: Any) -> Iterator[tuple[Any, RadixAttention, Any]]:
    """Of SGLang's loaded model: every module that owns an attention layer, the layer, and
    the rotary embedding that turns its queries and keys, or ``None``."""
    gemma: dict[int, GemmaRotary] = {}
    text = next((m for m in model.modules() if type(m).__name__ == "Gemma3TextModel"), None)
    for module in model.modules():
        attn, rotary = attention_of(module), getattr(module, "rotary_emb", None)
        if attn is None or type(module).__name__ in LIGHTNING:
            continue
        if type(module).__name__ == "Gemma3Attention" and text is not None:
            used = text.rotary_emb_local if module.is_sliding else text.rotary_emb
            rotary = gemma.setdefault(id(used), GemmaRotary(used, rotary))
        yield module, attn, rotary


def _lightning(model: Any) -> dict[int, Any]:
    """Modules of Lightning attention by layer id."""
    known = (m for m in model.modules() if type(m).__name__ in LIGHTNING)
    return {module.attn.layer_id: module for module in known}


def lightning_rope(model: Any, layers: Collection[int]) -> tuple[LayerRope | None, str | None]:
    """What turns the keys of Lightning attention, the same in all its layers.

    Args:
        layers: ids of all linear layers.

    Returns:
        The table, ``None`` where keys are not turned; and the reason why this model must
        not be linked, or ``None``.
    """
    found = _lightning(model)
    unknown = sorted(set(layers) - set(found))
    if unknown:
        return None, f"layer {unknown[0]}: Lightning attention of a class that is not known"
    turned = [module.rotary_emb for module in found.values() if module.linear_rope]
    if not turned:
        return None, None
    one = turned[0]
    if len(turned) < len(found) or any(other is not one for other in turned):
        return None, "linear layers turn their keys differently"
    if type(one).__name__ not in LINEAR_ROPE:
        return None, f"linear layers: {type(one).__name__} is not known to be linear in position"
    return LayerRope(one.cos_sin_cache, one.is_neox_style), None


def layer_ropes(model: Any) -> tuple[dict[int, LayerRope | None], str | None]:
    """Find the rotary table of every attention layer.

    Args:
        model: SGLang's loaded model.

    Returns:
        Table by layer id, ``None`` for a layer without positions; and the reason
        why this model must not be linked, or ``None``.
    """
    ropes: dict[int, LayerRope | None] = {}
    layers = {m.layer_id for m in model.modules() if isinstance(m, RadixAttention)}
    layers -= set(_lightning(model))
    for module, attn, rotary in attentions(model):
        latent = type(module).__name__ in LATENT
        if latent and module.use_dsa:
            return {}, f"layer {attn.layer_id}: sparse attention"
        if rotary is not None:
            name = rotary.kind if isinstance(rotary, GemmaRotary) else type(rotary).__name__
            if name not in LINEAR_ROPE:
                return {}, f"layer {attn.layer_id}: {name} is not known to be linear in position"
            first = attn.v_head_dim if latent else 0
            ropes[attn.layer_id] = LayerRope(rotary.cos_sin_cache, rotary.is_neox_style, first)
        elif latent or type(module).__name__ in NOPE:
            ropes[attn.layer_id] = None
        else:
            continue
        if attn.qk_head_dim != attn.v_head_dim and not latent:
            return {}, f"layer {attn.layer_id}: key and value dimensions differ"
        if window_of(attn) is not None and type(module).__name__ not in WINDOWED:
            name = type(module).__name__
            return {}, f"layer {attn.layer_id}: sliding-window attention of {name}"
        if attn.logit_cap:
            return {}, f"layer {attn.layer_id}: attention scores are capped"
        if {attn.k_scale_float, attn.v_scale_float} - {None, 1.0}:
            return {}, f"layer {attn.layer_id}: its KV cache has scales"
        if attn.xai_temperature_len > 0 or attn.attn_type != AttentionType.DECODER:
            return {}, f"layer {attn.layer_id}: not plain causal attention"
    if not layers:
        return {}, "the model has no attention layer SGLang could cache"
    unknown = sorted(layers - set(ropes))
    if unknown:
        return {}, f"layer {unknown[0]}: no rotary embedding found, position encoding unknown"
    return ropes, None
