"""What a linked request to Ring or Ling 2.5 must answer, without the code under test.

As ``hybrid``, whose walk over positions this uses. transformers has no such model, so
that all of it is written out here: Lightning attention as one recurrence token by token
in float64, in which a position inside a core contributes the key and value that its
isolated copy computed, turned to where it stands in the prompt; full layers as latent
attention with keys and values of every head, under the mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sglang_pic.eval.oracle.dense import Segment
from sglang_pic.eval.oracle.hybrid import Walk, over_rows, walk


class Bailing(NamedTuple):
    """A model: its published configuration, and float32 weights by their published names."""

    config: dict[str, Any]
    weights: dict[str, Tensor]


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def _turn(x: Tensor, position: Tensor, *, theta: float, dim: int, pairs: bool) -> Tensor:
    """Rotate the first ``dim`` channels of x [n, heads, d]: neighbours, or halves."""
    angle = position[:, None].double() / theta ** (torch.arange(0, dim, 2).double() / dim)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    turned = x[..., :dim].double()
    a, b = (turned[..., 0::2], turned[..., 1::2]) if pairs else turned.chunk(2, -1)
    parts = a * cos - b * sin, b * cos + a * sin
    made = torch.stack(parts, -1).flatten(-2) if pairs else torch.cat(parts, -1)
    return torch.cat([made.float(), x[..., dim:]], -1)


def slopes(heads: int, layer: int, layers: int) -> Tensor:
    """float64 [heads], what each head's logarithm of the state loses a token; of a power of
    two of heads."""
    of_heads = torch.tensor([2.0 ** (-8 * (i + 1) / heads) for i in range(heads)]).double()
    return of_heads * (1 - layer / (layers - 1) + 1e-5)


def _recur(
    q: Tensor, k: Tensor, v: Tensor, slope: Tensor, state: Tensor | None
) -> tuple[Tensor, list[Tensor]]:
    """[n, heads, d] each, float64, and the state behind each token."""
    q, k, v = (t.double() for t in (q, k, v))
    if state is None:
        state = k.new_zeros((k.shape[1], k.shape[2], v.shape[2]))
    outputs, states = [], []
    for t in range(len(k)):
        state = state * (-slope).exp()[:, None, None] + k[t][:, :, None] * v[t][:, None, :]
        outputs.append(torch.einsum("hk,hkv->hv", q[t], state))
        states.append(state)
    return torch.stack(outputs).float().flatten(1), states


def _linear(model: Bailing, layer: int, x: Tensor, walked: Walk) -> Tensor:
    config, eps = model.config, model.config["rms_norm_eps"]
    of = _names(model, layer)
    heads, dim = config["num_attention_heads"], config["head_dim"]
    q, k, v = (x @ of["query_key_value"].T).unflatten(-1, (3, heads, dim)).unbind(1)
    q, k = _norm(q, of["query_layernorm"], eps), _norm(k, of["key_layernorm"], eps)
    rotary = {"theta": config["rope_theta"], "dim": int(dim * config["partial_rotary_factor"])}
    q, k = (_turn(t, walked.rows.position, **rotary, pairs=False) for t in (q, k))
    slope = slopes(heads, layer, config["num_hidden_layers"])

    def recur(inputs: Tensor, at: Tensor, state: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        q, k, v = (t.unflatten(-1, (heads, dim)) for t in inputs.chunk(3, -1))
        return _recur(q, k, v, slope, state)

    inputs = torch.cat([(q * dim**-0.5).flatten(1), k.flatten(1), v.flatten(1)], -1)
    found, _ = over_rows(walked, inputs, lambda one: one, recur)
    groups = (config["group_norm_size"], -1)
    weight = of["g_norm"].unflatten(-1, groups)
    normed = _norm(found.unflatten(-1, groups), weight, eps).flatten(1)
    return normed * (x @ of["g_proj"].T).sigmoid() @ of["dense"].T


def _full(model: Bailing, layer: int, x: Tensor, walked: Walk) -> Tensor:
    config = model.config
    of = _names(model, layer)
    heads, latent = config["num_attention_heads"], config["kv_lora_rank"]
    plain, turned = config["qk_nope_head_dim"], config["qk_rope_head_dim"]
    rotary = {"theta": config["rope_theta"], "dim": turned, "pairs": True}
    q = (x @ of["q_proj"].T).unflatten(-1, (heads, plain + turned))
    compressed = x @ of["kv_a_proj_with_mqa"].T
    kv = _norm(compressed[:, :latent], of["kv_a_layernorm"], config["rms_norm_eps"])
    k, v = (kv @ of["kv_b_proj"].T).unflatten(-1, (heads, -1)).tensor_split([plain], -1)
    position = walked.rows.position
    q_turned = _turn(q[..., plain:], position, **rotary)
    k_turned = _turn(compressed[:, None, latent:], position, **rotary).expand(-1, heads, -1)
    q, k = torch.cat([q[..., :plain], q_turned], -1), torch.cat([k, k_turned], -1)
    scale = (plain + turned) ** -0.5
    scores = torch.einsum("nhd,mhd->hnm", q, k) * scale + walked.mask
    out = torch.einsum("hnm,mhd->nhd", scores.softmax(-1), v)
    if len(walked.sources) > 1:
        k, v, live = walked.mean(k), walked.mean(v), walked.live
        own = live[walked.sources[0]].nonzero().squeeze(1)
        scores = torch.einsum("nhd,mhd->hnm", q[live], k) * scale
        unseen = torch.arange(len(k))[None, :] > own[:, None]
        scores = scores.masked_fill(unseen, float("-inf"))
        out = out.index_put((live,), torch.einsum("hnm,mhd->nhd", scores.softmax(-1), v))
    return out.flatten(1) @ of["dense"].T


def _names(model: Bailing, layer: int) -> dict[str, Tensor]:
    """Weights of a layer's attention."""
    prefix = f"model.layers.{layer}.attention."
    return {
        name.removeprefix(prefix).removesuffix(".weight"): weight
        for name, weight in model.weights.items()
        if name.startswith(prefix)
    }


@torch.no_grad()
def linked_logprobs(
    model: Bailing,
    prompt_ids: Sequence[int],
    segments: Sequence[Segment],
    *,
    forced: Sequence[int],
    **layout: Any,
) -> Tensor:
    """Distributions along a forced continuation of a linked prompt.

    Args:
        forced: the continuation.
        layout: see ``hybrid.walk``.

    Returns:
        float32 [len(forced), vocab], log-probabilities.
    """
    walked = walk(prompt_ids, segments, forced=forced, **layout)
    config, weights = model.config, model.weights
    eps = config["rms_norm_eps"]
    x = weights["model.word_embeddings.weight"][walked.rows.tokens]
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        h = _norm(x, weights[prefix + "input_layernorm.weight"], eps)
        full = (layer + 1) % config["layer_group_size"] == 0
        x = x + (_full if full else _linear)(model, layer, h, walked)
        h = _norm(x, weights[prefix + "post_attention_layernorm.weight"], eps)
        gate, up, down = (
            weights[f"{prefix}mlp.{name}_proj.weight"] for name in ("gate", "up", "down")
        )
        x = x + (F.silu(h @ gate.T) * (h @ up.T)) @ down.T
    last = _norm(x[-len(forced) :], weights["model.norm.weight"], eps)
    return torch.log_softmax(last @ weights["lm_head.weight"].T, -1)
