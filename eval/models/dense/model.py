"""A dense decoder for the hybrid's task: its shape, first weights and forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from sglang_pic.eval.models.hybrid import task
from sglang_pic.eval.models.hybrid.train import Family

SHARP = 6.0  # of the biases of a head that looks back
APART = 0.15  # deviation of an embedding's numbers
SLOT = 32  # features of a word that are bound
WRITTEN = 0.5
COMPARED = 1.2  # of comparisons, whose logits are some 5 times its square
TURNING = 4  # of the fastest rotated pairs, which such a head uses


def configuration() -> LlamaConfig:
    """Four layers of full attention; 0.8 million parameters."""
    return LlamaConfig(
        vocab_size=256,  # the words of ``task`` and some that stay unused
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        attention_bias=True,
        max_position_embeddings=4096,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        pad_token_id=task.PAD,
        bos_token_id=task.BOS,
        eos_token_id=task.END,
    )


def new_model(seed: int = 0) -> LlamaForCausalLM:
    """First weights that hold a circuit which training alone did not find in time.

    Three heads of the first layer look one, two and three tokens back, by their biases,
    and write what they see to three parts of the residual stream. In the second layer
    two heads compare the word before with what stands two before other places, two the
    word two before with what stands three before: what followed a word is found by that
    word. Words are drawn far apart. All else is drawn as usual, and all of it is trained.
    """
    torch.manual_seed(seed)
    model = LlamaForCausalLM(configuration())
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "embed_tokens" in name:
                weight.normal_(std=APART)
            elif weight.dim() == 2:
                small = 0.3 if "o_proj" in name or "down_proj" in name else 1.0
                weight.normal_(std=0.7 * small / weight.shape[1] ** 0.5)
        first, second = (layer.self_attn for layer in model.model.layers[:2])
        _look_back(first)
        slots = _write_apart(first)
        _compare(second, asked=(slots[0], slots[1]), kept=(slots[1], slots[2]))
    return model


def _look_back(attention: Any) -> None:
    """Heads 0, 1, 2 attend 1, 2, 3 tokens back, whatever stands there."""
    dim = attention.head_dim
    speed = 10000.0 ** (-torch.arange(TURNING) * 2 / dim)
    attention.k_proj.bias.view(-1, dim)[:, :TURNING] = SHARP
    for head in range(3):
        bias = attention.q_proj.bias.view(-1, dim)[head]
        angle = (head + 1) * speed
        bias[:TURNING] = SHARP * angle.cos()
        bias[dim // 2 : dim // 2 + TURNING] = -SHARP * angle.sin()


def _write_apart(attention: Any) -> tuple[Tensor, ...]:
    """Heads 0, 1, 2 read the same ``SLOT`` features of a word and write them to parts of
    the residual stream of their own: [hidden, SLOT] each, orthonormal."""
    dim, hidden = attention.head_dim, attention.o_proj.weight.shape[0]
    slots = torch.linalg.qr(torch.randn(hidden, 3 * SLOT))[0].split(SLOT, 1)
    features = torch.linalg.qr(torch.randn(hidden, SLOT))[0].T
    for kv in range(2):
        attention.v_proj.weight[kv * dim : kv * dim + SLOT] = features
    for head in range(3):
        attention.o_proj.weight[:, head * dim : head * dim + SLOT] = WRITTEN * slots[head]
    return slots


def _compare(attention: Any, asked: tuple[Tensor, ...], kept: tuple[Tensor, ...]) -> None:
    """Two heads a pair of slots: queries from ``asked``, keys from ``kept``, in the channels
    that hardly turn."""
    half = attention.head_dim // 2
    slow = [*range(half - SLOT // 2, half), *range(2 * half - SLOT // 2, 2 * half)]
    for pair, (q, k) in enumerate(zip(asked, kept, strict=True)):
        keys = attention.k_proj.weight.view(2, 2 * half, -1)[pair]
        keys[slow] = k.T * COMPARED
        for head in (2 * pair, 2 * pair + 1):
            queries = attention.q_proj.weight.view(4, 2 * half, -1)[head]
            queries[slow] = q.T * COMPARED


def forward(model: LlamaForCausalLM, ids: Tensor, where: Tensor) -> Tensor:
    """Logits of ids [rows, tokens] at ``where``, a mask of that shape."""
    hidden = model.model(ids, use_cache=False).last_hidden_state
    return model.lm_head(hidden[where])


DENSE = Family(new_model, forward)
