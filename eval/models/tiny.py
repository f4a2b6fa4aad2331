"""Random models of a few hundred kilobytes, for what needs no language."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    GraniteMoeHybridConfig,
    GraniteMoeHybridForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

# Large enough that attention, not the residual stream, decides the output.
STD = {"q_proj": 0.25, "k_proj": 0.25, "v_proj": 0.3, "o_proj": 0.3, "embed_tokens": 1.0}
OTHER_STD = 0.12

# Of all hybrids. No token ends a sequence.
COMMON = {
    "vocab_size": 512,
    "hidden_size": 64,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "attn_implementation": "eager",
}
MAMBA2 = {
    **COMMON,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_chunk_size": 64,
    "rms_norm_eps": 1e-5,
}


def tiny_llama_model(
    seed: int = 0, *, layers: int = 2, vocab: int = 512, max_position: int = 4096
) -> LlamaForCausalLM:
    """Random Llama in float32 with eager attention.

    Hidden size 64, 4 query heads and 2 key-value heads of dimension 16. The
    same seed and sizes give the same weights. No token ends a sequence.
    """
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=max_position,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                std = next((std for part, std in STD.items() if part in name), OTHER_STD)
                weight.normal_(std=std, generator=generator)
    return model


def tiny_llama(folder: str | Path, seed: int = 0) -> Path:
    """Save a random Llama as a Hugging Face directory without a tokenizer.

    2 layers, vocabulary 512, 4096 positions, float32 safetensors. SGLang loads
    it with ``skip_tokenizer_init=True``.

    Returns:
        The directory, ``folder/tiny-llama-SEED``, written anew.
    """
    path = Path(folder) / f"tiny-llama-{seed}"
    tiny_llama_model(seed).save_pretrained(path)
    return path


def tiny_granite_model(seed: int = 0, *, d_state: int = 16) -> PreTrainedModel:
    """Random Granite 4: a Mamba-2 layer, a full one without positions, twice."""
    config = GraniteMoeHybridConfig(
        **{**MAMBA2, "mamba_d_state": d_state},
        num_local_experts=0,
        num_experts_per_tok=0,
        shared_intermediate_size=128,
        num_hidden_layers=4,
        layer_types=["linear_attention", "full_attention"] * 2,
        position_embedding_type=None,
        attention_multiplier=0.25,
        residual_multiplier=0.8,
        embedding_multiplier=1.5,
    )
    return randomize(GraniteMoeHybridForCausalLM(config), seed)


def tiny_granite(folder: str | Path, seed: int = 0) -> Path:
    """Save a random Granite 4, as ``tiny_llama`` does, with states as large as in one that
    is trained: 128 a channel."""
    path = Path(folder) / f"tiny-granite-{seed}"
    tiny_granite_model(seed, d_state=128).save_pretrained(path)
    return path


def randomize(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Float32, matrices and gates of a hybrid drawn anew. Gates remember for hundreds of
    tokens, so that a state lost or counted twice shows."""
    model = model.float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2 or "experts" in name:
                std = next((std for part, std in STD.items() if part in name), OTHER_STD)
                weight.normal_(std=std, generator=generator)
            else:
                _randomize_gates(name, weight, generator)
    return model


def _randomize_gates(name: str, weight: torch.Tensor, generator: torch.Generator) -> None:
    """What a linear layer has beside matrices."""
    if "conv1d" in name:
        weight.normal_(std=0.5, generator=generator)
    elif "A_log" in name:
        weight.uniform_(-5.0, -1.0, generator=generator)
    elif "dt_bias" in name:
        weight.uniform_(-3.0, 0.0, generator=generator)
