"""A random Llama of a few hundred kilobytes, for what needs no language."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

# Large enough that attention, not the residual stream, decides the output.
STD = {"q_proj": 0.25, "k_proj": 0.25, "v_proj": 0.3, "o_proj": 0.3, "embed_tokens": 1.0}
OTHER_STD = 0.12


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
