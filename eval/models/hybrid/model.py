"""The hybrid's shape, its first weights, and a fast forward pass to train with.

``forward`` works on the parameters of transformers' own ``Qwen3_5ForCausalLM``
and equals its forward; the recurrence is our chunked gated delta rule. The
parts of a layer are functions of their own, because the linked forward
(``block``) calls them on some of the tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

from sglang_pic.eval.models.hybrid import task
from sglang_pic.kernels.operators import gated_delta

FULL_ATTENTION_INTERVAL = 4
ROTARY_FACTOR = 0.25


def configuration(**others: Any) -> Qwen3_5TextConfig:
    """Three linear layers, then one full attention; 1.1 million parameters.

    Args:
        others: fields that another model has otherwise.
    """
    fields = {
        "architectures": ["Qwen3_5ForCausalLM"],
        "vocab_size": 256,  # the words of ``task`` and some that stay unused
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
        "linear_conv_kernel_dim": 4,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": ROTARY_FACTOR,
        },
        "pad_token_id": task.PAD,
        "bos_token_id": task.BOS,
        "eos_token_id": task.END,
    }
    config = Qwen3_5TextConfig(**{**fields, **others})
    # Both are read by SGLang; transformers derives its own fields from them and drops them.
    config.full_attention_interval = FULL_ATTENTION_INTERVAL
    config.partial_rotary_factor = ROTARY_FACTOR
    return config


def new_model(seed: int = 0, config: Qwen3_5TextConfig | None = None) -> Qwen3_5ForCausalLM:
    """First weights that can remember, by default of the shipped shape.

    The library draws gates that forget within a few tokens, and a model that
    starts so never learns to bind. Here a token's decay is between e^-0.4 and
    e^-0.0001 and hardly depends on the token.
    """
    torch.manual_seed(seed)
    model = Qwen3_5ForCausalLM(config or configuration())
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("A_log"):
                weight.uniform_(math.log(1.0), math.log(8.0))
            elif name.endswith("dt_bias"):
                step = torch.empty_like(weight).uniform_(math.log(1e-4), math.log(5e-2)).exp()
                weight.copy_(step + torch.log(-torch.expm1(-step)))  # inverse of softplus
            elif "conv1d" in name:
                weight.uniform_(-0.5, 0.5)
            elif weight.dim() == 2 and "embed_tokens" not in name:
                writes = any(part in name for part in ("out_proj", "o_proj", "down_proj"))
                small = 0.3 if writes or "in_proj_a" in name else 1.0
                weight.normal_(std=0.7 * small / weight.shape[1] ** 0.5)
    return model


def is_linear(layer: nn.Module) -> bool:
    return hasattr(layer, "linear_attn")


def norm(module: nn.Module, x: Tensor) -> Tensor:
    """Qwen3.5's RMS norm, whose weight is an offset from 1."""
    return F.rms_norm(x, (x.shape[-1],), 1.0 + module.weight, module.eps)


class Writes(NamedTuple):
    """What tokens do to a linear layer's state: ``k`` and ``v`` [rows, tokens, heads, d],
    ``g`` and ``beta`` [rows, tokens, heads]."""

    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor

    def packed(self) -> Writes:
        """Rows one behind the other, as the operators want them."""
        return Writes(*(x.flatten(0, 1) for x in self))

    def at(self, tokens: slice) -> Writes:
        """Only these tokens of every row."""
        return Writes(*(x[:, tokens] for x in self))


class LinearMemory(NamedTuple):
    """State [rows, heads, dk, dv] and the convolution's last inputs [rows, 3, channels]."""

    state: Tensor
    tail: Tensor


class AttentionMemory(NamedTuple):
    """Rotated keys and values [rows, heads, tokens, head_dim]."""

    k: Tensor
    v: Tensor


Memory = LinearMemory | AttentionMemory


def convolve(module: nn.Module, mixed: Tensor, history: Tensor | None = None) -> Tensor:
    """The causal convolution over [rows, tokens, channels] behind the 3 inputs before it."""
    width = module.conv_kernel_size - 1
    padded = F.pad(mixed, (0, 0, width, 0)) if history is None else torch.cat([history, mixed], 1)
    weight = module.conv1d.weight
    return F.silu(F.conv1d(padded.transpose(1, 2), weight, groups=len(weight)).transpose(1, 2))


def reads_and_writes(module: nn.Module, h: Tensor, convolved: Tensor) -> tuple[Tensor, Writes]:
    """Scaled queries [rows, tokens, heads, dk] and what the tokens write."""

    def heads(x: Tensor, width: int) -> Tensor:
        return x.unflatten(-1, (-1, width))

    def unit(x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)

    q, k, v = convolved.split([module.key_dim, module.key_dim, module.value_dim], -1)
    beta = module.in_proj_b(h).sigmoid()
    g = -module.A_log.exp() * F.softplus(module.in_proj_a(h) + module.dt_bias)
    q = unit(heads(q, module.head_k_dim)) * module.head_k_dim**-0.5
    k = unit(heads(k, module.head_k_dim))
    return q, Writes(k, heads(v, module.head_v_dim), g, beta)


def recur(q: Tensor, writes: Writes, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Outputs [rows, tokens, heads, dv] and end states [rows, heads, dk, dv]."""
    rows, tokens, heads, dk = q.shape
    if state is None:
        state = q.new_zeros((rows, heads, dk, writes.v.shape[-1]))
    out, end, _ = gated_delta.chunk(q.flatten(0, 1), *writes.packed(), state, [tokens] * rows)
    return out.unflatten(0, (rows, tokens)), end


def linear_output(module: nn.Module, h: Tensor, out: Tensor) -> Tensor:
    gate = F.silu(module.in_proj_z(h)).unflatten(-1, (-1, module.head_v_dim))
    out = F.rms_norm(out, (module.head_v_dim,), module.norm.weight, 1e-6) * gate
    return module.out_proj(out.flatten(-2))


def queries_keys_values(module: nn.Module, h: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Unrotated q, k, v [rows, heads, tokens, head_dim] and the gate [rows, tokens, width]."""
    width = module.head_dim
    q, gate = module.q_proj(h).unflatten(-1, (-1, 2 * width)).chunk(2, -1)
    q = norm(module.q_norm, q).transpose(1, 2)
    k = norm(module.k_norm, module.k_proj(h).unflatten(-1, (-1, width))).transpose(1, 2)
    v = module.v_proj(h).unflatten(-1, (-1, width)).transpose(1, 2)
    return q, k, v, gate.flatten(-2)


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """RoPE on the first quarter of [rows, heads, tokens, head_dim]; positions [tokens]."""
    width = int(x.shape[-1] * ROTARY_FACTOR)
    frequency = 10000.0 ** (-torch.arange(0, width, 2, device=x.device) / width)
    angle = positions[:, None].float() * frequency
    cos, sin = angle.cos(), angle.sin()
    first, second, rest = x.split([width // 2, width // 2, x.shape[-1] - width], -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None = None) -> Tensor:
    """Attention, causal unless a mask [queries, keys] says who is visible."""
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=visible, is_causal=visible is None, enable_gqa=True
    )


def attention_output(module: nn.Module, out: Tensor, gate: Tensor) -> Tensor:
    return module.o_proj(out.transpose(1, 2).flatten(-2) * gate.sigmoid())


def feed_forward(layer: nn.Module, x: Tensor) -> Tensor:
    h, mlp = norm(layer.post_attention_layernorm, x), layer.mlp
    return x + mlp.down_proj(F.silu(mlp.gate_proj(h)) * mlp.up_proj(h))


def logits(model: Qwen3_5ForCausalLM, x: Tensor) -> Tensor:
    return model.lm_head(norm(model.model.norm, x))


def forward(
    model: Qwen3_5ForCausalLM,
    ids: Tensor,
    where: Tensor | None = None,
    keep: list[Memory] | None = None,
) -> Tensor:
    """Logits of ids [rows, tokens]; only at ``where`` (a mask of that shape) if given.

    What ``ask`` needs to go on behind these tokens is appended to ``keep``.
    """
    x = model.model.embed_tokens(ids)
    positions = torch.arange(ids.shape[1], device=ids.device)
    for layer in model.model.layers:
        h = norm(layer.input_layernorm, x)
        memory: Memory
        if is_linear(layer):
            module = layer.linear_attn
            mixed = module.in_proj_qkv(h)
            q, writes = reads_and_writes(module, h, convolve(module, mixed))
            out, state = recur(q, writes)
            memory = LinearMemory(state, mixed[:, -3:])
            x = x + linear_output(module, h, out)
        else:
            module = layer.self_attn
            q, k, v, gate = queries_keys_values(module, h)
            q, k = rotate(q, positions), rotate(k, positions)
            memory = AttentionMemory(k, v)
            x = x + attention_output(module, attend(q, k, v), gate)
        if keep is not None:
            keep.append(memory)
        x = feed_forward(layer, x)
    return logits(model, x if where is None else x[where])


def ask(
    model: Qwen3_5ForCausalLM,
    ids: Tensor,
    memories: Sequence[Memory],
    owner: Tensor,
    start: int,
) -> Tensor:
    """Logits [rows, tokens, vocabulary] of questions, each behind a context of its own.

    Args:
        ids: [rows, tokens].
        memories: of every layer, of contexts of ``start`` tokens.
        owner: int64 [rows], the context that a question belongs to.
    """
    x = model.model.embed_tokens(ids)
    tokens = ids.shape[1]
    positions = torch.arange(start, start + tokens)
    behind = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    visible = torch.cat([behind.new_ones(tokens, start), behind], 1)
    for layer, memory in zip(model.model.layers, memories, strict=True):
        h = norm(layer.input_layernorm, x)
        if isinstance(memory, LinearMemory):
            module = layer.linear_attn
            convolved = convolve(module, module.in_proj_qkv(h), memory.tail[owner])
            q, writes = reads_and_writes(module, h, convolved)
            x = x + linear_output(module, h, recur(q, writes, memory.state[owner])[0])
        else:
            module = layer.self_attn
            q, k, v, gate = queries_keys_values(module, h)
            k = torch.cat([memory.k[owner], rotate(k, positions)], 2)
            v = torch.cat([memory.v[owner], v], 2)
            out = attend(rotate(q, positions), k, v, visible)
            x = x + attention_output(module, out, gate)
        x = feed_forward(layer, x)
    return logits(model, x)
