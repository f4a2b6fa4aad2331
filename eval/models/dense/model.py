"""A dense decoder for the hybrid's task: its shape, first weights and forward."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from sglang_pic.eval.models.hybrid import task
from sglang_pic.eval.models.hybrid.train import Family

SHARP = 6.0  # of the biases of a head that looks back
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
    """First weights that can bind.

    A layer without a convolution takes thousands of steps to find that it could look at
    the tokens just before. Here three heads of the first layer do, one, two and three
    tokens back, by their biases; all else is drawn.
    """
    torch.manual_seed(seed)
    model = LlamaForCausalLM(configuration())
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2 and "embed_tokens" not in name:
                small = 0.3 if "o_proj" in name or "down_proj" in name else 1.0
                weight.normal_(std=0.7 * small / weight.shape[1] ** 0.5)
        first = model.model.layers[0].self_attn
        dim = first.head_dim
        speed = 10000.0 ** (-torch.arange(TURNING) * 2 / dim)
        first.k_proj.bias.view(-1, dim)[:, :TURNING] = SHARP
        for head in range(3):
            bias = first.q_proj.bias.view(-1, dim)[head]
            angle = (head + 1) * speed
            bias[:TURNING] = SHARP * angle.cos()
            bias[dim // 2 : dim // 2 + TURNING] = -SHARP * angle.sin()
    return model


def forward(model: LlamaForCausalLM, ids: Tensor, where: Tensor) -> Tensor:
    """Logits of ids [rows, tokens] at ``where``, a mask of that shape."""
    hidden = model.model(ids, use_cache=False).last_hidden_state
    return model.lm_head(hidden[where])


DENSE = Family(new_model, forward)
