"""What a prompt over encoded documents must answer, without the code under test.

The decoder is transformers' own. The encoder and the cross blocks are written out
here from the files alone, in float64, one document and one row at a time.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor


class Files(NamedTuple):
    """An encoder's directory: its configuration, and its weights in float64."""

    config: dict[str, Any]
    weights: dict[str, Tensor]

    @staticmethod
    def read(directory: Path) -> Files:
        config = json.loads((directory / "encoder.json").read_text())
        weights = load_file(directory / "encoder.safetensors")
        return Files(config, {name: weight.double() for name, weight in weights.items()})

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.weights[f"{name}.weight"].T + self.weights.get(f"{name}.bias", 0.0)

    def norm(self, name: str, x: Tensor) -> Tensor:
        scale = (x.square().mean(-1, keepdim=True) + self.config["eps"]).rsqrt()
        return x * scale * self.weights[f"{name}.weight"]

    def heads(self, name: str, x: Tensor) -> Tensor:
        """Projected to [heads, tokens, head_dim]."""
        y = self.linear(name, x)
        return y.view(len(x), -1, self.config["decoder"]["head_dim"]).transpose(0, 1)

    def mlp(self, name: str, x: Tensor) -> Tensor:
        gate = self.linear(f"{name}.gate_proj", x)
        up = self.linear(f"{name}.up_proj", x)
        return self.linear(f"{name}.down_proj", gate * gate.sigmoid() * up)


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Unmasked softmax: q [heads, n, dim], k and v [kv heads, t, dim], to [n, heads * dim]."""
    group = len(q) // len(k)
    outputs = []
    for head in range(len(q)):
        scores = q[head] @ k[head // group].T / q.shape[-1] ** 0.5
        outputs.append(scores.softmax(-1) @ v[head // group])
    return torch.cat(outputs, -1)


def _rotated(x: Tensor, theta: float, width: int) -> Tensor:
    """[heads, tokens, dim] at positions 0.., as complex numbers."""
    half = width // 2
    frequency = theta ** (-torch.arange(half, dtype=torch.float64) * 2 / width)
    angle = torch.arange(x.shape[1], dtype=torch.float64)[:, None] * frequency
    pairs = torch.complex(x[..., :half], x[..., half:width])
    turned = pairs * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag, x[..., width:]], -1)


def encoded(files: Files, x: Tensor) -> list[tuple[Tensor, Tensor]]:
    """One document's embedding [tokens, hidden] to each layer's keys and values, [kv
    heads, tokens, head_dim]."""
    config, kept = files.config, []
    x = x.double()
    for i in range(len(config["cross_layers"])):
        at = f"encoder.layers.{i}"
        h = files.norm(f"{at}.attention_norm", x)
        if config["conv"]:
            taps, reach = files.weights[f"{at}.conv.weight"][:, 0], config["conv"] // 2
            mixed = h.clone()
            for t in range(len(h)):
                for s in range(max(0, t - reach), min(len(h), t + reach + 1)):
                    mixed[t] += taps[:, s - t + reach] * h[s]
            h = mixed
        q, k, v = (files.heads(f"{at}.attention.{name}_proj", h) for name in "qkv")
        if config["head_norm"]:
            q, k = (files.norm(f"{at}.attention.{n}_norm", t) for n, t in (("q", q), ("k", k)))
        if config["rotary_dim"]:
            q, k = (_rotated(t, config["rope_theta"], config["rotary_dim"]) for t in (q, k))
        x = x + files.linear(f"{at}.attention.o_proj", _attention(q, k, v))
        x = x + files.mlp(f"{at}.mlp", files.norm(f"{at}.mlp_norm", x))
        h = files.norm(f"{at}.kv_norm", x)
        keys = files.norm(f"{at}.k_norm", files.heads(f"{at}.k_proj", h))
        kept.append((keys, files.heads(f"{at}.v_proj", h)))
    return kept


def crossed(files: Files, i: int, x: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One row's residual stream [tokens, hidden] behind cross block ``i``."""
    at, x = f"cross.{i}", x.double()
    q = files.norm(
        f"{at}.q_norm", files.heads(f"{at}.q_proj", files.norm(f"{at}.attention_norm", x))
    )
    out = files.linear(f"{at}.o_proj", _attention(q, k, v))
    x = x + torch.tanh(files.weights[f"{at}.attention_gate"]) * out
    out = files.mlp(f"{at}.mlp", files.norm(f"{at}.mlp_norm", x))
    return x + torch.tanh(files.weights[f"{at}.mlp_gate"]) * out


@contextlib.contextmanager
def _looking(model: Any, files: Files, documents: Sequence[Sequence[int]]) -> Iterator[None]:
    embedding = model.get_input_embeddings().weight
    kept = [encoded(files, embedding[torch.tensor(list(document))]) for document in documents]
    handles = []
    for i, at in enumerate(files.config["cross_layers"]):
        k, v = (torch.cat([document[i][part] for document in kept], 1) for part in (0, 1))

        def before(
            layer: Any, args: Any, kwargs: Any, i: int = i, k: Tensor = k, v: Tensor = v
        ) -> Any:
            x = crossed(files, i, args[0][0], k, v).to(args[0].dtype)[None]
            return (x, *args[1:]), kwargs

        layer = model.get_decoder().layers[at]
        handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def encoded_logprobs(
    model: Any,
    directory: Path,
    prompt_ids: Sequence[int],
    documents: Sequence[Sequence[int]],
    *,
    forced: Sequence[int],
) -> Tensor:
    """Distributions along a forced continuation of a prompt over encoded documents.

    Args:
        model: a decoder of transformers, float32 or float64.
        directory: of the encoder's files.
        prompt_ids: the row: its text without the documents. All of it looks at them.
        documents: token ids of each; none is the plain model.
        forced: the continuation.

    Returns:
        float32 [len(forced), vocab], log-probabilities.
    """
    ids = torch.tensor([[*prompt_ids, *forced[:-1]]])
    looking = _looking(model, Files.read(directory), documents)
    with looking if documents else contextlib.nullcontext():
        logits = model(ids, use_cache=False).logits[0, -len(forced) :]
    return torch.log_softmax(logits.double(), -1).float()
