"""Each layer's rotary table, and which position encodings may be linked."""

from __future__ import annotations

from typing import Any

from sglang.srt.layers.radix_attention import AttentionType, RadixAttention

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

# Latent attention, by exact class. Without a rotary embedding it has no positions.
LATENT = {"DeepseekV2AttentionMLA"}


def attention_of(module: Any) -> RadixAttention | None:
    """The attention layer that a module of SGLang's models owns, if it owns one."""
    name = "attn_mqa" if type(module).__name__ in LATENT else "attn"
    attn = getattr(module, name, None)
    return attn if isinstance(attn, RadixAttention) else None


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
    for module in model.modules():
        attn, rotary = attention_of(module), getattr(module, "rotary_emb", None)
        if attn is None:
            continue
        latent = type(module).__name__ in LATENT
        if latent and module.use_dsa:
            return {}, f"layer {attn.layer_id}: sparse attention"
        if rotary is not None:
            name = type(rotary).__name__
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
        if attn.sliding_window_size is not None and attn.sliding_window_size > -1:
            return {}, f"layer {attn.layer_id}: sliding-window attention"
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
