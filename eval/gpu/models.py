"""Models of a size that people serve, without their weights: SGLang draws them
(``--load-format dummy``). What they answer means nothing; what it costs does."""

from __future__ import annotations

import json
import pathlib
import shutil
from typing import Any

from sglang_pic.eval.models.hybrid.weights import hybrid_path

_COMMON = {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": "bfloat16",
    "hidden_act": "silu",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "attention_bias": False,
    "use_cache": True,
}
# By what a result calls them.
CONFIGS: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        **_COMMON,
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "tie_word_embeddings": False,
        "vocab_size": 128256,
    },
    # Qwen3.5's family: three linear layers to one of full attention, 24 to 8.
    "hybrid-8b": {
        **_COMMON,
        "architectures": ["Qwen3_5ForCausalLM"],
        "model_type": "qwen3_5_text",
        "intermediate_size": 12288,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "full_attention_interval": 4,
        "layer_types": [*["linear_attention"] * 3, "full_attention"] * 8,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "max_position_embeddings": 131072,
        "partial_rotary_factor": 0.25,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            "partial_rotary_factor": 0.25,
            "rope_theta": 10000000.0,
            "rope_type": "default",
        },
        "tie_word_embeddings": False,
        "vocab_size": 151936,
    },
}


def write_model(name: str, directory: pathlib.Path) -> pathlib.Path:
    """A model's directory: its configuration, and the shipped hybrid's tokenizer, since
    requests are token ids.

    Args:
        name: one of ``CONFIGS``.
    """
    made = directory / name
    made.mkdir()
    (made / "config.json").write_text(json.dumps(CONFIGS[name], indent=1))
    for file in hybrid_path().glob("tokenizer*.json"):
        shutil.copy(file, made)
    return made
