"""The text hybrid's shape, and a forward pass that is fast to train with."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

from sglang_pic.eval.models.hybrid import model as parts
from sglang_pic.eval.models.text_hybrid.corpus import END_ID, VOCABULARY
from sglang_pic.kernels.operators.chunks import CHUNK

LAYERS = 8


def configuration(layers: int = LAYERS) -> Qwen3_5TextConfig:
    """The shipped hybrid's pattern, with fewer heads and a vocabulary of text."""
    return parts.configuration(
        vocab_size=VOCABULARY,
        intermediate_size=384,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        pad_token_id=END_ID,
        bos_token_id=END_ID,
        eos_token_id=END_ID,
    )


def forward(model: Qwen3_5ForCausalLM, ids: Tensor) -> Tensor:
    """Logits of ids [rows, tokens], tokens a multiple of ``CHUNK``: what ``hybrid.model.forward``
    gives, several times faster with gradients and under autocast."""
    x = model.model.embed_tokens(ids)
    positions = torch.arange(ids.shape[1])
    for layer in model.model.layers:
        h = parts.norm(layer.input_layernorm, x)
        if parts.is_linear(layer):
            module = layer.linear_attn
            mixed = module.in_proj_qkv(h)
            q, writes = parts.reads_and_writes(module, h, parts.convolve(module, mixed))
            with torch.autocast("cpu", enabled=False):
                out = recur(q.float(), parts.Writes(*(x.float() for x in writes)))
            x = x + parts.linear_output(module, h, out)
        else:
            module = layer.self_attn
            q, k, v, gate = parts.queries_keys_values(module, h)
            q, k = parts.rotate(q, positions), parts.rotate(k, positions)
            out = parts.attend(q.to(v.dtype), k.to(v.dtype), v)
            x = x + parts.attention_output(module, out, gate)
        x = parts.feed_forward(layer, x)
    return parts.logits(model, x)


def recur(q: Tensor, writes: parts.Writes) -> Tensor:
    """Outputs [rows, tokens, heads, dv] of the gated delta rule from an empty state, in chunks
    (``kernels.operators.chunks``). Chunks are taken apart at once: the gradient of a slice
    would be as large as all of them."""
    q, k, v = (x.unflatten(1, (-1, CHUNK)).transpose(2, 3) for x in (q, writes.k, writes.v))
    g, beta = (x.unflatten(1, (-1, CHUNK)).transpose(2, 3)[..., None] for x in writes[2:])
    g = g.cumsum(-2)
    since_start = g.exp()
    future = torch.ones(CHUNK, CHUNK, dtype=torch.bool).triu(1)
    decay = (g - g.transpose(-1, -2)).masked_fill(future, -torch.inf).exp()
    scaled = k * beta
    keys = k.transpose(-1, -2)
    right = torch.cat([v * beta, scaled * since_start], -1)
    solved = torch.linalg.solve_triangular(
        scaled @ keys * decay, right, upper=False, unitriangular=True
    )
    u, erased = solved.split([v.shape[-1], k.shape[-1]], -1)
    reads, inner = q * since_start, q @ keys * decay
    through = since_start[..., -1:, :]
    k_out = (k * (g[..., -1:, :] - g).exp()).transpose(-1, -2)
    state = q.new_zeros((*u.shape[:1], u.shape[2], k.shape[-1], v.shape[-1]))
    outputs = []
    for one in zip(*(x.unbind(1) for x in (u, erased, reads, inner, through, k_out)), strict=True):
        u_c, erased_c, reads_c, inner_c, through_c, k_c = one
        written = u_c - erased_c @ state
        outputs.append(reads_c @ state + inner_c @ written)
        state = state * through_c + k_c @ written
    return torch.stack(outputs, 1).transpose(2, 3).flatten(1, 2)
