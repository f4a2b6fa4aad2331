"""What a linked request to a hybrid must answer, without the code under test.

Rows and visibility are the dense oracle's (``dense.arrange``): isolated copies
of the reused segments, then the prompt's live tokens. Full attention is the
model's own, under that mask. A linear layer knows no pairs here: an isolated
copy is a sequence of its own, and the prompt is one walk over its positions,
token by token in float64, in which a position inside a core contributes the
key, value and gates that its copy computed. That this equals the composition
of operators is what the server is tested for.

A segment that was computed in company has two copies, its company's rows in one
order and in the reverse. What it reuses is the mean of both: of their keys and
values, of the convolution's inputs, and of the states that the walk arrives at
through one copy's core and through the other's.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from sglang_pic.eval.oracle import dense
from sglang_pic.eval.oracle.company import first_order
from sglang_pic.eval.oracle.dense import LIVE, Rows, Segment

# Outputs [n, ...] of a sequence and the state behind each of its tokens, float64, given
# its convolved inputs, the rows [n] that they belong to, and the state in front of it.
Recur = Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, list[Tensor]]]


class Walk(NamedTuple):
    """Rows of a linked prompt and its continuation, as a linear layer sees them.

    ``sources`` [tokens] each: the rows whose computation stands at each prompt position;
    two where segments were computed in company. ``bounds``: positions in front of which a
    core begins, or behind which one has ended. ``resets``: positions in front of which the
    state is forgotten. ``mask`` [n, n]: 0 or -inf, for full attention.
    """

    rows: Rows
    sources: tuple[Tensor, ...]
    bounds: frozenset[int]
    resets: frozenset[int]
    mask: Tensor

    @property
    def live(self) -> Tensor:
        """bool [n], rows of no copy."""
        return self.rows.copy == LIVE

    def mean(self, of_rows: Tensor) -> Tensor:
        """What stands at each prompt position, [tokens, ...] of [n, ...]."""
        return torch.stack([of_rows[source] for source in self.sources]).mean(0)


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
    companies: Sequence[Sequence[int]] = (),
    forced: Sequence[int],
) -> Walk:
    """Lay out a linked prompt and its continuation ``forced``. ``state`` is
    ``compose`` or ``last``; ``companies``: indices of the segments of each, all of them in
    one; for the others see ``dense.layout``."""
    chosen = dense.layout(
        len(prompt_ids),
        segments,
        seam=seam,
        page=page,
        policy=policy,
        context=context,
        min_segment=min_segment,
        whole=True,
        prompt_ids=prompt_ids,
    )
    ids = [*prompt_ids, *forced[:-1]]
    sources: tuple[Tensor, ...]
    if companies:
        rows, sources = _in_company(ids, segments, chosen.cores, companies)
    else:
        rows = dense.arrange(ids, segments, chosen.cores, context=context)
        sources = (dense.sources(rows, chosen.cores),)
    cores = [core for core in chosen.cores if core]
    resets = frozenset(map(min, cores)) if state == "last" else frozenset()
    bounds = frozenset([*map(min, cores), *(max(core) + 1 for core in cores)])
    mask = torch.zeros(rows.visible.shape).masked_fill(~rows.visible, float("-inf"))
    return Walk(rows, sources, bounds, resets, mask)


def _in_company(
    ids: Sequence[int],
    segments: Sequence[Segment],
    cores: Sequence[frozenset[int]],
    companies: Sequence[Sequence[int]],
) -> tuple[Rows, tuple[Tensor, Tensor]]:
    """Rows and sources: of each segment its company's row in both orders, up to the core's
    end, positions moved so that it stands where it stands in the prompt."""
    opening = list(ids[: segments[0][0]])
    texts = [list(ids[start:end]) for start, end in segments]
    rows: list[tuple[int, int, int]] = []  # token, position, copy
    sources = [torch.empty(len(ids), dtype=torch.int64) for _ in range(2)]
    for company in companies:
        order = first_order([texts[i] for i in company])
        for i in company:
            if not cores[i]:
                continue
            for copy, members in enumerate((order, order[::-1])):
                at = members.index(texts[i])
                before = [*opening, *(token for one in members[:at] for token in one)]
                start = segments[i][0]
                isolated = [*before, *ids[start : max(cores[i]) + 1]]
                for j, token in enumerate(isolated):
                    position = start - len(before) + j
                    if position in cores[i] and j >= len(before):
                        sources[copy][position] = len(rows)
                    rows.append((token, position, 2 * i + copy))
    reused = frozenset().union(*cores)
    for position, token in enumerate(ids):
        if position not in reused:
            for source in sources:
                source[position] = len(rows)
            rows.append((token, position, LIVE))
    tokens, position, copy = (torch.tensor(column) for column in zip(*rows, strict=True))
    visible = (position[None, :] <= position[:, None]) & (copy[None, :] == copy[:, None])
    made = Rows(tokens, position - position.min().clamp(max=0), copy, visible)
    return made, (sources[0], sources[1])


def attended(walked: Walk, module: Any, h: Tensor, **where: Any) -> Tensor:
    """A full layer's attention over all rows, [n, hidden].

    Args:
        module: of transformers.
        h: [n, hidden].
        where: what it is given beside the mask, [1, n, ...] each.
    """
    cache = DynamicCache()
    mask = walked.mask[None, None]
    out = module(h[None], attention_mask=mask, past_key_values=cache, **where)[0][0]
    if len(walked.sources) == 1:
        return out
    held = cache.layers[module.layer_idx]
    live = walked.live
    at = (~live[walked.sources[0]]).nonzero().squeeze(1)
    cache = DynamicCache()
    means = [
        walked.mean(t[0].transpose(0, 1))[at].transpose(0, 1)[None]
        for t in (held.keys, held.values)
    ]
    cache.update(*means, module.layer_idx)
    own = live[walked.sources[0]].nonzero().squeeze(1)
    unseen = torch.cat([at, own])[None, :] > own[:, None]
    mask = torch.zeros(unseen.shape).masked_fill(unseen, float("-inf"))[None, None]
    part = {
        name: tuple(t[:, live] for t in value) if isinstance(value, tuple) else value[:, live]
        for name, value in where.items()
    }
    found = module(h[live][None], attention_mask=mask, past_key_values=cache, **part)[0][0]
    return out.index_put((live,), found)


def over_rows(
    walked: Walk, inputs: Tensor, convolve: Callable[[Tensor], Tensor], recur: Recur
) -> tuple[Tensor, list[Tensor]]:
    """A linear layer's recurrence over all rows: outputs, and the state behind each token of
    the prompt and its continuation.

    Args:
        inputs: [n, channels], the convolution's.
        convolve: one sequence of them, behind zeros.
    """
    rows = walked.rows
    outputs: dict[int, Tensor] = {}
    convolved = torch.empty_like(inputs)
    for copy in rows.copy.unique().tolist():
        if copy != LIVE:
            own = (rows.copy == copy).nonzero().squeeze(1)
            convolved[own] = convolve(inputs[own])
            found, _ = recur(convolved[own], own, None)
            outputs |= zip(own.tolist(), found, strict=True)
    live = walked.live[walked.sources[0]]
    mixed = convolve(walked.mean(inputs))
    ways = [
        (torch.where(live[:, None], mixed, convolved[source]), source) for source in walked.sources
    ]
    state: Tensor | None = None
    states: list[Tensor] = []
    edges = sorted({0, len(live), *walked.bounds, *walked.resets} & {*range(len(live) + 1)})
    for first, last in itertools.pairwise(edges):
        state = None if first in walked.resets else state
        each = [recur(y[first:last], at[first:last], state) for y, at in ways]
        states += [torch.stack(of).mean(0) for of in zip(*(of for _, of in each), strict=True)]
        state = states[-1]
        if live[first]:
            own = walked.sources[0][first:last].tolist()
            outputs |= zip(own, each[0][0], strict=True)
    return torch.stack([outputs[row] for row in range(len(inputs))]), states


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
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None
) -> tuple[Tensor, list[Tensor]]:
    """Gated delta rule, float64, with a decay ``g`` a head or a channel. Outputs [tokens,
    heads, dv] and the state [heads, dk, dv] behind each token."""
    q, k, v, g, beta = (t.double() for t in (q, k, v, g, beta))
    if state is None:
        state = k.new_zeros((k.shape[1], k.shape[2], v.shape[2]))
    outputs, states = [], []
    for t in range(len(k)):
        state = state * g[t].exp().reshape(g.shape[1], -1, 1)
        error = beta[t][:, None] * (v[t] - torch.einsum("hk,hkv->hv", k[t], state))
        state = state + k[t][:, :, None] * error[:, None, :]
        outputs.append(torch.einsum("hk,hkv->hv", q[t], state))
        states.append(state)
    return torch.stack(outputs).float(), states


def _kda(layer: Any, x: Tensor, walked: Walk) -> tuple[Tensor, list[Tensor]]:
    """As ``_linear``, of Kimi Linear."""
    mixed = torch.cat([layer.q_proj(x), layer.k_proj(x), layer.v_proj(x)], -1)
    g, beta, dim = layer.forget_gate(x[None])[0], layer.b_proj(x).sigmoid(), layer.head_dim

    def recur(y: Tensor, at: Tensor, state: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        q, k, v = y.chunk(3, -1)
        q, k = _normal(q, dim) * dim**-0.5, _normal(k, dim)
        return _recur(q, k, v.unflatten(-1, (-1, dim)), g[at], beta[at], state)

    core, states = over_rows(walked, mixed, lambda inputs: _convolve(layer, inputs), recur)
    gate = layer.g_b_proj(layer.g_a_proj(x)).unflatten(-1, (-1, dim))
    return layer.o_proj(layer.o_norm(core, gate).flatten(1)), states


def _linear(layer: Any, x: Tensor, walked: Walk) -> tuple[Tensor, list[Tensor]]:
    """A linear layer over all rows, and its state behind each token of the prompt."""
    mixed, z, g, beta = _project(layer, x)

    def recur(y: Tensor, at: Tensor, state: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        return _recur(*_split(layer, y), g[at], beta[at], state)

    core, states = over_rows(walked, mixed, lambda inputs: _convolve(layer, inputs), recur)
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
    where = {}
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
            states.append(torch.stack(own).float())
        else:
            x = x + attended(walked, layer.self_attn, h, **where)
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
