"""A dense decoder for the hybrid's task: its shape, first weights and forward."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from sglang_pic.eval.models.hybrid import task
from sglang_pic.eval.models.hybrid.train import Family


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
        max_position_embeddings=4096,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        pad_token_id=task.PAD,
        bos_token_id=task.BOS,
        eos_token_id=task.END,
    )


def new_model(seed: int = 0) -> LlamaForCausalLM:
    """First weights that learn soon under Muon: small where the residual stream is written."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(configuration())
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2 and "embed_tokens" not in name:
                small = 0.3 if "o_proj" in name or "down_proj" in name else 1.0
                weight.normal_(std=0.7 * small / weight.shape[1] ** 0.5)
    return model


def forward(model: LlamaForCausalLM, ids: Tensor, where: Tensor) -> Tensor:
    """Logits of ids [rows, tokens] at ``where``, a mask of that shape."""
    hidden = model.model(ids, use_cache=False).last_hidden_state
    return model.lm_head(hidden[where])


DENSE = Family(new_model, forward)
