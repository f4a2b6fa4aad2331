"""Random hybrids of a few hundred kilobytes, beside ``eval.models.tiny``'s Llama."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    FalconH1Config,
    FalconH1ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    KimiLinearConfig,
    KimiLinearForCausalLM,
    NemotronHConfig,
    NemotronHForCausalLM,
    Olmo3Config,
    Olmo3ForCausalLM,
    PreTrainedModel,
    Qwen3_5ForCausalLM,
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from sglang_pic.eval.models.tiny import COMMON, MAMBA2, randomize, tiny_granite_model
from sglang_pic.eval.oracle import lightning

_HYBRID = {
    **COMMON,
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
    return randomize(model, seed)


def tiny_hybrid(tmp_dir: str | Path, kind: str, seed: int = 0) -> Path:
    """Save a random hybrid. SGLang derives the layers' kinds
    from ``full_attention_interval``."""
    path = Path(tmp_dir) / f"tiny-{kind}-{seed}"
    model = tiny_hybrid_model(kind, seed)
    model.config.full_attention_interval = 2
    model.save_pretrained(path)
    return path


WINDOW = 24
_WINDOWED = {
    **COMMON,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": WINDOW,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
}


def tiny_windowed_model(kind: str, seed: int = 0) -> PreTrainedModel:
    """Random model, float32: a layer that sees ``WINDOW`` tokens, a full one, twice.

    ``kind`` is ``gemma3``, whose full layers turn by another base, and four times slower,
    or ``olmo3``.
    """
    if kind == "olmo3":
        return randomize(Olmo3ForCausalLM(Olmo3Config(**_WINDOWED)), seed)
    config = Gemma3TextConfig(
        **{**_WINDOWED, "tie_word_embeddings": True},
        head_dim=16,
        query_pre_attn_scalar=16,
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0},
            "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 100000.0},
        },
    )
    model = randomize(Gemma3ForCausalLM(config), seed)
    with torch.no_grad():  # which are the head's weights too
        model.model.embed_tokens.weight.mul_(0.25)
    return model


def tiny_windowed(tmp_dir: str | Path, kind: str, seed: int = 0) -> Path:
    """Save a random model with windows, its configuration as published ones are."""
    path = Path(tmp_dir) / f"tiny-{kind}-{seed}"
    tiny_windowed_model(kind, seed).save_pretrained(path)
    if kind == "olmo3":
        config = json.loads((path / "config.json").read_text())
        rope = config.pop("rope_parameters")["sliding_attention"]
        (path / "config.json").write_text(json.dumps(config | {"rope_theta": rope["rope_theta"]}))
    return path


_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 1024,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.707,
    "mscale_all_dim": 0.9,
}


def tiny_mla_model(kind: str, seed: int = 0) -> PreTrainedModel:
    """Random model with latent attention, float32, two layers.

    ``kind`` is ``deepseek_v2``, whose second layer has experts, or ``deepseek_v2_yarn``:
    queries by a low rank too, positions stretched, so that scores are scaled by more than
    the dimension. ``deepseek_v2_wide`` has keys of 256 + 32 numbers: SGLang's ``triton``
    decode takes these, and of 512 + 64, and few others.
    """
    config = {
        **COMMON,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "q_lora_rank": None,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 24,
        "first_k_dense_replace": 1,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "n_group": 1,
        "topk_group": 1,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        # SGLang reads what only the published configurations have.
        "moe_layer_freq": 1,
        "scoring_func": "softmax",
    }
    if kind == "deepseek_v2_yarn":
        config["first_k_dense_replace"] = 2
        config["q_lora_rank"] = 48
        config["rope_parameters"] = _YARN
    if kind == "deepseek_v2_wide":
        config |= {"kv_lora_rank": 256, "qk_rope_head_dim": 32}
    return randomize(DeepseekV2ForCausalLM(DeepseekV2Config(**config)), seed)


def tiny_mla(tmp_dir: str | Path, kind: str, seed: int = 0) -> Path:
    """Save a random model with latent attention."""
    path = Path(tmp_dir) / f"tiny-{kind}-{seed}"
    tiny_mla_model(kind, seed).save_pretrained(path)
    return path


_KIMI = {
    **COMMON,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "mlp_layer_types": ["dense"] * 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 24,
    "rms_norm_eps": 1e-5,
    "linear_head_dim": 16,
    "linear_num_heads": 4,
    "linear_conv_kernel_dim": 4,
}


def tiny_kimi_model(seed: int = 0) -> PreTrainedModel:
    """Random Kimi Linear, float32: a KDA layer, latent attention without positions,
    twice; gates as in ``tiny_hybrid_model``."""
    model = randomize(KimiLinearForCausalLM(KimiLinearConfig(**_KIMI)), seed)
    for layer in model.model.layers[1::2]:
        # SGLang takes the configured one here, transformers 1e-6.
        layer.self_attn.kv_a_layernorm.variance_epsilon = 1e-5
    return model


def tiny_kimi(tmp_dir: str | Path, seed: int = 0) -> Path:
    """Save a random Kimi Linear, its configuration as published ones are."""
    path = Path(tmp_dir) / f"tiny-kimi-{seed}"
    tiny_kimi_model(seed).save_pretrained(path)
    weights = load_file(path / "model.safetensors")
    # Transformers names dense layers as if they had experts.
    named = {name.replace("block_sparse_moe", "mlp"): weight for name, weight in weights.items()}
    save_file(named, path / "model.safetensors")
    config = json.loads((path / "config.json").read_text())
    config["linear_attn_config"] = {
        "kda_layers": [1, 3],
        "full_attn_layers": [2, 4],
        "head_dim": config["linear_head_dim"],
        "num_heads": config["linear_num_heads"],
        "short_conv_kernel_size": config["linear_conv_kernel_dim"],
    }
    config |= {"num_experts": None, "mla_use_nope": True}
    (path / "config.json").write_text(json.dumps(config))
    return path


_NEMOTRON = {
    **COMMON,
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
        return randomize(NemotronHForCausalLM(NemotronHConfig(**_NEMOTRON)), seed)
    if kind == "granite":
        return tiny_granite_model(seed)
    config = FalconH1Config(
        **MAMBA2,
        num_hidden_layers=2,
        intermediate_size=128,
        mamba_d_ssm=128,
        mamba_n_groups=2,
        ssm_multipliers=[0.9, 1.1, 0.8, 1.2, 0.7],
        ssm_in_multiplier=0.9,
        key_multiplier=1.1,
    )
    return randomize(FalconH1ForCausalLM(config), seed)


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


_BAILING = {
    **COMMON,
    "model_type": "bailing_hybrid",
    "architectures": ["BailingMoeV2_5ForCausalLM"],
    "torch_dtype": "float32",
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "layer_group_size": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "kv_lora_rank": 32,
    "q_lora_rank": None,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 24,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
    "use_qk_norm": True,
    "group_norm_size": 2,
    # No layer has experts.
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 4,
}


def tiny_bailing_model(seed: int = 0) -> lightning.Bailing:
    """Random Ring 2.5, float32: a Lightning layer that turns its keys, latent attention,
    twice. A head of each Lightning layer remembers for hundreds of tokens."""
    hidden, heads, dim = _BAILING["hidden_size"], _BAILING["num_attention_heads"], 32
    wide, vocab = _BAILING["intermediate_size"], _BAILING["vocab_size"]
    sizes = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    latent, plain, turned, value = (_BAILING[name] for name in sizes)
    shapes: dict[str, tuple[int, ...]] = {
        "model.word_embeddings": (vocab, hidden),
        "model.norm": (hidden,),
        "lm_head": (vocab, hidden),
    }
    for layer in range(4):
        of = {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
        of |= {"mlp.gate_proj": (wide, hidden), "mlp.up_proj": (wide, hidden)}
        of |= {"mlp.down_proj": (hidden, wide)}
        if layer % 2 == 0:
            attention: dict[str, tuple[int, ...]] = {
                "query_key_value": (3 * heads * dim, hidden),
                "query_layernorm": (dim,),
                "key_layernorm": (dim,),
                "g_proj": (heads * dim, hidden),
                "g_norm": (heads * dim,),
                "dense": (hidden, heads * dim),
            }
        else:
            attention = {
                "q_proj": (heads * (plain + turned), hidden),
                "kv_a_proj_with_mqa": (latent + turned, hidden),
                "kv_a_layernorm": (latent,),
                "kv_b_proj": (heads * (plain + value), latent),
                "dense": (hidden, heads * value),
            }
        of |= {f"attention.{name}": shape for name, shape in attention.items()}
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in of.items()}
    generator = torch.Generator().manual_seed(seed)
    stds = {"word_embeddings": 1.0, "query_key_value": 0.2, "dense": 0.3, "q_proj": 0.25}
    weights = {}
    for name, shape in shapes.items():
        std = next((std for part, std in stds.items() if part in name), 0.12)
        drawn = torch.randn(shape, generator=generator) * std
        weights[f"{name}.weight"] = drawn + 1 if len(shape) == 1 else drawn
    return lightning.Bailing(_BAILING, weights)


def tiny_bailing(tmp_dir: str | Path, seed: int = 0) -> Path:
    """Save a random Ring 2.5."""
    path = Path(tmp_dir) / f"tiny-bailing-{seed}"
    path.mkdir(parents=True, exist_ok=True)
    made = tiny_bailing_model(seed)
    save_file(made.weights, path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text(json.dumps(made.config))
    return path
