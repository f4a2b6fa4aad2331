"""What a linked request to a hybrid must answer, without the code under test.

Rows and visibility are the dense oracle's (``dense.arrange``): isolated copies
of the reused segments, then the prompt's live tokens. Full attention is the
model's own, under that mask. A linear layer knows no pairs here: an isolated
copy is a sequence of its own, and the prompt is one walk over its positions,
token by token in float64, in which a position inside a core contributes the
key, value and gates that its copy computed. That this equals the composition
of operators is what the server is tested for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sglang_pic.eval.oracle import dense
from sglang_pic.eval.oracle.dense import LIVE, Segment


class Walk(NamedTuple):
    """Rows of a linked prompt and its continuation, as a linear layer sees them.

    ``source`` [tokens]: the row whose computation stands at each prompt position.
    ``resets``: positions in front of which the state is forgotten. ``mask``
    [n, n]: 0 or -inf, for full attention.
    """

    rows: dense.Rows
    source: Tensor
    resets: frozenset[int]
    mask: Tensor


def walk(
    prompt_ids: Sequence[int],
    segments: Sequence[Segment],
    *,
    seam: int,
    page: int,
    policy: str = "seam",
    state: str = "compose",
    context: Sequence[int] = (),
    min_segment: int = 1,
    forced: Sequence[int],
) -> Walk:
    """Lay out a linked prompt and its continuation ``forced``. ``state`` is
    ``compose`` or ``last``; for the others see ``dense.layout``."""
    chosen = dense.layout(
        len(prompt_ids),
        segments,
        seam=seam,
        page=page,
        policy=policy,
        context=context,
        min_segment=min_segment,
        prompt_ids=prompt_ids,
    )
    ids = [*prompt_ids, *forced[:-1]]
    rows = dense.arrange(ids, segments, chosen.cores, context=context)
    source = dense.sources(rows, chosen.cores)
    resets = frozenset(min(core) for core in chosen.cores if core) if state == "last" else ()
    mask = torch.zeros(rows.visible.shape).masked_fill(~rows.visible, float("-inf"))
    return Walk(rows, source, frozenset(resets), mask)


def over_rows(
    walked: Walk,
    inputs: Tensor,
    convolve: Callable[[Tensor], Tensor],
    recur: Callable[[Tensor, Tensor, frozenset[int]], Tensor],
) -> Tensor:
    """A linear layer's recurrence over all rows.

    Args:
        inputs: [n, channels], the convolution's.
        convolve: one sequence of them, behind zeros.
        recur: outputs of one sequence, given its convolved inputs, the rows
            [tokens] that they belong to, and its resets.
    """
    rows, source = walked.rows, walked.source
    outputs: dict[int, Tensor] = {}
    convolved = torch.empty_like(inputs)
    for copy in rows.copy.unique().tolist():
        if copy != LIVE:
            own = (rows.copy == copy).nonzero().squeeze(1)
            convolved[own] = convolve(inputs[own])
            outputs |= zip(own.tolist(), recur(convolved[own], own, frozenset()), strict=True)
    live = rows.copy[source] == LIVE
    mixed = torch.where(live[:, None], convolve(inputs[source]), convolved[source])
    own = recur(mixed, source, walked.resets)[live]
    outputs |= zip(source[live].tolist(), own, strict=True)
    return torch.stack([outputs[row] for row in range(len(inputs))])


def _project(layer: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows [n, hidden] to convolution inputs [n, channels], z, log decay, strength."""
    if hasattr(layer, "in_proj_qkv"):
        mixed, z = layer.in_proj_qkv(x), layer.in_proj_z(x)
        a, b = layer.in_proj_a(x), layer.in_proj_b(x)
    else:
        qkvz, ba = layer.in_proj_qkvz(x)[None], layer.in_proj_ba(x)[None]
        q, k, v, z, b, a = layer.fix_query_key_value_ordering(qkvz, ba)
        mixed = torch.cat([part[0].flatten(1) for part in (q, k, v)], -1)
        z, a, b = z[0], a[0], b[0]
    g = -layer.A_log.exp() * F.softplus(a + layer.dt_bias)
    return mixed, z.reshape(x.shape[0], -1), g, b.sigmoid()


def _convolve(layer: Any, x: Tensor) -> Tensor:
    """One sequence of inputs [n, channels] behind zeros."""
    weight = layer.conv1d.weight.squeeze(1)
    padded = F.pad(x, (0, 0, weight.shape[1] - 1, 0))
    taps = [padded[j : j + len(x)] * weight[:, j] for j in range(weight.shape[1])]
    return F.silu(sum(taps))


def _normal(t: Tensor, dim: int) -> Tensor:
    t = t.unflatten(-1, (-1, dim))
    return t / (t.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def _split(layer: Any, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Convolved rows to q, k [n, value heads, dk] and v [n, value heads, dv]."""
    q, k, v = y.split([layer.key_dim, layer.key_dim, layer.value_dim], -1)
    group, dk = layer.num_v_heads // layer.num_k_heads, layer.head_k_dim
    q, k = (_normal(t, dk).repeat_interleave(group, 1) for t in (q, k))
    return q * dk**-0.5, k, v.unflatten(-1, (-1, layer.head_v_dim))


def _recur(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, resets: frozenset[int]
) -> tuple[Tensor, list[Tensor]]:
    """Gated delta rule, float64, with a decay ``g`` a head or a channel; the state is
    forgotten in front of ``resets``. Outputs [tokens, heads, dv] and the state [heads, dk,
    dv] behind each token."""
    q, k, v, g, beta = (t.double() for t in (q, k, v, g, beta))
    state = k.new_zeros((k.shape[1], k.shape[2], v.shape[2]))
    outputs, states = [], []
    for t in range(len(k)):
        if t in resets:
            state = torch.zeros_like(state)
        state = state * g[t].exp().reshape(g.shape[1], -1, 1)
        error = beta[t][:, None] * (v[t] - torch.einsum("hk,hkv->hv", k[t], state))
        state = state + k[t][:, :, None] * error[:, None, :]
        outputs.append(torch.einsum("hk,hkv->hv", q[t], state))
        states.append(state.float())
    return torch.stack(outputs).float(), states


def _kda(layer: Any, x: Tensor, walked: Walk) -> tuple[Tensor, list[Tensor]]:
    """As ``_linear``, of Kimi Linear."""
    mixed = torch.cat([layer.q_proj(x), layer.k_proj(x), layer.v_proj(x)], -1)
    g, beta, dim = layer.forget_gate(x[None])[0], layer.b_proj(x).sigmoid(), layer.head_dim
    states: list[Tensor] = []

    def recur(y: Tensor, at: Tensor, resets: frozenset[int]) -> Tensor:
        q, k, v = y.chunk(3, -1)
        q, k = _normal(q, dim) * dim**-0.5, _normal(k, dim)
        outputs, states[:] = _recur(q, k, v.unflatten(-1, (-1, dim)), g[at], beta[at], resets)
        return outputs

    core = over_rows(walked, mixed, lambda inputs: _convolve(layer, inputs), recur)
    gate = layer.g_b_proj(layer.g_a_proj(x)).unflatten(-1, (-1, dim))
    return layer.o_proj(layer.o_norm(core, gate).flatten(1)), states


def _linear(layer: Any, x: Tensor, walked: Walk) -> tuple[Tensor, list[Tensor]]:
    """A linear layer over all rows, and its state behind each token of the prompt."""
    mixed, z, g, beta = _project(layer, x)
    states: list[Tensor] = []

    def recur(y: Tensor, at: Tensor, resets: frozenset[int]) -> Tensor:
        outputs, states[:] = _recur(*_split(layer, y), g[at], beta[at], resets)
        return outputs  # the walk over the prompt comes last, and its states stay

    core = over_rows(walked, mixed, lambda inputs: _convolve(layer, inputs), recur)
    gated = layer.norm(core.flatten(0, 1), z.reshape(-1, layer.head_v_dim))
    return layer.out_proj(gated.reshape(len(x), -1)), states


def _forward(model: Any, walked: Walk) -> tuple[Tensor, list[Tensor]]:
    """Hidden rows behind the last layer, and each linear layer's state behind each
    token of the prompt."""
    rows = walked.rows
    states = []
    x = model.model.embed_tokens(rows.tokens)
    positions = rows.position[None]
    if type(model).__name__.startswith("Qwen3_5"):
        positions = positions[None].expand(3, 1, -1)
    where = {"attention_mask": walked.mask[None, None]}
    if hasattr(model.model, "rotary_emb"):
        where["position_embeddings"] = model.model.rotary_emb(x[None], positions)
    for layer in model.model.layers:
        h = layer.input_layernorm(x)
        linear, run = getattr(layer, "linear_attn", None), _linear
        if linear is None and hasattr(layer.self_attn, "forget_gate"):
            linear, run = layer.self_attn, _kda
        if linear is not None:
            mixed, own = run(linear, h, walked)
            x = x + mixed
            states.append(torch.stack(own))
        else:
            out, _ = layer.self_attn(h[None], **where)
            x = x + out[0]
        out = layer.mlp(layer.post_attention_layernorm(x)[None])
        x = x + (out[0] if isinstance(out, tuple) else out)[0]
    return x, states


@torch.no_grad()
def linked_logprobs(
    model: Any,
    prompt_ids: Sequence[int],
    segments: Sequence[Segment],
    *,
    forced: Sequence[int],
    **layout: Any,
) -> Tensor:
    """Distributions along a forced continuation of a linked prompt.

    Args:
        model: Qwen3.5, Qwen3-Next or Kimi Linear of transformers, float32, eager attention.
        forced: the continuation.
        layout: see ``walk``.

    Returns:
        float32 [len(forced), vocab], log-probabilities.
    """
    x, _ = _forward(model, walk(prompt_ids, segments, forced=forced, **layout))
    logits = model.lm_head(model.model.norm(x[-len(forced) :]))
    return torch.log_softmax(logits.float(), -1)


@torch.no_grad()
def linked_states(
    model: Any, prompt_ids: Sequence[int], segments: Sequence[Segment], **layout: Any
) -> Tensor:
    """The state of each linear layer behind each token of a linked prompt; policy
    ``full`` is full recompute.

    Arguments as in ``linked_logprobs``, without a continuation.

    Returns:
        float32 [linear layers, tokens, heads, dk, dv].
    """
    return torch.stack(_forward(model, walk(prompt_ids, segments, forced=[0], **layout))[1])
