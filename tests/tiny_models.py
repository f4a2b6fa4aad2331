"""Random hybrids of a few hundred kilobytes, beside ``eval.models.tiny``'s Llama."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import (
    FalconH1Config,
    FalconH1ForCausalLM,
    GraniteMoeHybridConfig,
    GraniteMoeHybridForCausalLM,
    NemotronHConfig,
    NemotronHForCausalLM,
    PreTrainedModel,
    Qwen3_5ForCausalLM,
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from sglang_pic.eval.models.tiny import OTHER_STD, STD

_COMMON = {
    "vocab_size": 512,
    "hidden_size": 64,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "attn_implementation": "eager",
}

_HYBRID = {
    **_COMMON,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.25,
    },
}


def tiny_hybrid_model(kind: str, seed: int = 0) -> PreTrainedModel:
    """Random hybrid, float32: a linear layer, a full one, twice.

    ``kind`` is ``qwen3_5``, ``qwen3_5_moe`` or ``qwen3_next``. Gates remember for
    hundreds of tokens, so that a state lost or counted twice shows.
    """
    experts = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 64,
    }
    if kind == "qwen3_5":
        model = Qwen3_5ForCausalLM(Qwen3_5TextConfig(**_HYBRID))
    elif kind == "qwen3_5_moe":
        model = Qwen3_5MoeForCausalLM(Qwen3_5MoeTextConfig(**_HYBRID, **experts))
    else:
        model = Qwen3NextForCausalLM(Qwen3NextConfig(**_HYBRID, **experts))
    return _randomize(model, seed)


def _randomize(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Float32, matrices and gates drawn anew."""
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


def tiny_hybrid(tmp_dir: str | Path, kind: str, seed: int = 0) -> Path:
    """Save a random hybrid. SGLang derives the layers' kinds
    from ``full_attention_interval``."""
    path = Path(tmp_dir) / f"tiny-{kind}-{seed}"
    model = tiny_hybrid_model(kind, seed)
    model.config.full_attention_interval = 2
    model.save_pretrained(path)
    return path


_MAMBA2 = {
    **_COMMON,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_chunk_size": 64,
    "rms_norm_eps": 1e-5,
}


_NEMOTRON = {
    **_COMMON,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "layers_block_type": ["linear_attention", "mlp", "full_attention", "mlp"] * 2,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "ssm_state_size": 16,
    "n_groups": 2,
    "chunk_size": 64,
}


def tiny_mamba2_model(kind: str, seed: int = 0) -> PreTrainedModel:
    """Random Mamba-2 hybrid, float32, with gates as in ``tiny_hybrid_model``.

    ``kind`` is ``granite`` (a Mamba layer, a full one without positions, twice),
    ``nemotron_h`` (the same with a plain MLP layer behind each, two groups of keys)
    or ``falcon_h1`` (two layers of both side by side, RoPE, two groups of keys).
    """
    if kind == "nemotron_h":
        return _randomize(NemotronHForCausalLM(NemotronHConfig(**_NEMOTRON)), seed)
    if kind == "granite":
        dense = {"num_local_experts": 0, "num_experts_per_tok": 0, "shared_intermediate_size": 128}
        config = GraniteMoeHybridConfig(
            **_MAMBA2,
            **dense,
            num_hidden_layers=4,
            layer_types=["linear_attention", "full_attention"] * 2,
            position_embedding_type=None,
            attention_multiplier=0.25,
            residual_multiplier=0.8,
            embedding_multiplier=1.5,
        )
        model = GraniteMoeHybridForCausalLM(config)
    else:
        config = FalconH1Config(
            **_MAMBA2,
            num_hidden_layers=2,
            intermediate_size=128,
            mamba_d_ssm=128,
            mamba_n_groups=2,
            ssm_multipliers=[0.9, 1.1, 0.8, 1.2, 0.7],
            ssm_in_multiplier=0.9,
            key_multiplier=1.1,
        )
        model = FalconH1ForCausalLM(config)
    return _randomize(model, seed)


# What SGLang calls otherwise than transformers does.
_SGLANG = {"linear_attention": "mamba", "full_attention": "attention"}


def tiny_mamba2(tmp_dir: str | Path, kind: str, seed: int = 0) -> Path:
    """Save a random Mamba-2 hybrid."""
    path = Path(tmp_dir) / f"tiny-{kind}-{seed}"
    model = tiny_mamba2_model(kind, seed)
    model.save_pretrained(path)
    if kind == "nemotron_h":
        config = json.loads((path / "config.json").read_text())
        kinds = [_SGLANG.get(one, one) for one in config["layers_block_type"]]
        ours = {"layers_block_type": kinds, "mamba_n_groups": config["n_groups"]}
        (path / "config.json").write_text(json.dumps(config | ours))
    return path
