"""What a linked request to a Mamba-2 hybrid must answer, without the code under test.

As ``hybrid``, whose walk over positions this uses: no pairs, but one pass
token by token in float64, in which a position inside a core contributes the
input, key and step size that its isolated copy computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sglang_pic.eval.oracle.dense import Segment
from sglang_pic.eval.oracle.hybrid import Walk, attended, over_rows, walk


def _convolve(mixer: Any, x: Tensor) -> Tensor:
    """One sequence of inputs [n, channels] behind zeros."""
    weight = mixer.conv1d.weight.squeeze(1)
    padded = F.pad(x, (0, 0, weight.shape[1] - 1, 0))
    taps = [padded[j : j + len(x)] * weight[:, j] for j in range(weight.shape[1])]
    return F.silu(sum(taps) + mixer.conv1d.bias)


def _recur(mixer: Any, y: Tensor, dt: Tensor, state: Tensor | None) -> tuple[Tensor, list[Tensor]]:
    """State space, float64, [n, heads * head_dim], and the state behind each token."""
    groups = mixer.n_groups * mixer.ssm_state_size
    x, key, query = y.double().split([mixer.intermediate_size, groups, groups], -1)
    x = x.unflatten(-1, (mixer.num_heads, mixer.head_dim))
    share = mixer.num_heads // mixer.n_groups
    key, query = (
        t.unflatten(-1, (mixer.n_groups, -1)).repeat_interleave(share, 1) for t in (key, query)
    )
    step = F.softplus(dt.double() + mixer.dt_bias.double())
    decay = (-step * mixer.A_log.double().exp()).exp()
    if state is None:
        state = x.new_zeros((mixer.num_heads, mixer.head_dim, mixer.ssm_state_size))
    outputs, states = [], []
    for t in range(len(y)):
        written = (step[t][:, None] * x[t])[:, :, None] * key[t][:, None, :]
        state = state * decay[t][:, None, None] + written
        read = (state @ query[t][:, :, None]).squeeze(-1)
        outputs.append(read + mixer.D.double()[:, None] * x[t])
        states.append(state)
    return torch.stack(outputs).float().flatten(1), states


def _mix(mixer: Any, x: Tensor, walked: Walk) -> Tensor:
    """A Mamba-2 layer over all rows."""
    sizes = [mixer.intermediate_size, mixer.conv_dim, mixer.num_heads]
    projected = mixer.in_proj(x)
    if hasattr(mixer, "mup_vector"):
        projected = mixer.in_proj(x * mixer.ssm_in_multiplier) * mixer.mup_vector[0]
    gate, inputs, dt = projected.split(sizes, -1)

    def recur(y: Tensor, at: Tensor, state: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        return _recur(mixer, y, dt[at], state)

    core, _ = over_rows(walked, inputs, lambda part: _convolve(mixer, part), recur)
    if isinstance(mixer.norm, torch.nn.Identity):
        return mixer.out_proj(core * F.silu(gate))
    return mixer.out_proj(mixer.norm(core, gate))


def _granite(model: Any, walked: Walk, last: int) -> Tensor:
    """Logits of the last rows."""
    config = model.config
    x = model.model.embed_tokens(walked.rows.tokens) * config.embedding_multiplier
    for layer in model.model.layers:
        h = layer.input_layernorm(x)
        if layer.mamba is not None:
            out = _mix(layer.mamba, h, walked)
        else:
            out = attended(walked, layer.self_attn, h)
        x = x + out * config.residual_multiplier
        out = layer.shared_mlp(layer.post_attention_layernorm(x)[None])[0]
        x = x + out * config.residual_multiplier
    return model.lm_head(model.model.norm(x[-last:])) / config.logits_scaling


def _falcon(model: Any, walked: Walk, last: int) -> Tensor:
    """Logits of the last rows."""
    x = model.model.embed_tokens(walked.rows.tokens) * model.config.embedding_multiplier
    rotary = model.model.rotary_emb(x[None], walked.rows.position[None])
    for layer in model.model.layers:
        h = layer.input_layernorm(x)
        read = h * layer.attention_in_multiplier
        out = attended(walked, layer.self_attn, read, position_embeddings=rotary)
        mixed = _mix(layer.mamba, h, walked) * layer.ssm_out_multiplier
        x = x + mixed + out * layer.attn_out_multiplier
        x = x + layer.feed_forward(layer.pre_ff_layernorm(x)[None])[0]
    return model.lm_head(model.model.final_layernorm(x[-last:])) * model.model.lm_head_multiplier


def _nemotron(model: Any, walked: Walk, last: int) -> Tensor:
    """Logits of the last rows."""
    x = model.model.embeddings(walked.rows.tokens)
    for layer in model.model.layers:
        h = layer.norm(x)
        if layer.block_type == "linear_attention":
            x = x + _mix(layer.mixer, h, walked)
        elif layer.block_type == "full_attention":
            x = x + attended(walked, layer.mixer, h)
        else:
            x = x + layer.mixer(h[None])[0]
    return model.lm_head(model.model.norm_f(x[-last:]))


FORWARDS = {
    "FalconH1ForCausalLM": _falcon,
    "GraniteMoeHybridForCausalLM": _granite,
    "NemotronHForCausalLM": _nemotron,
}


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
        model: Falcon-H1, Nemotron-H or a dense Granite 4 of transformers, float32, eager attention.
        forced: the continuation.
        layout: see ``hybrid.walk``.

    Returns:
        float32 [len(forced), vocab], log-probabilities.
    """
    walked = walk(prompt_ids, segments, forced=forced, **layout)
    logits = FORWARDS[type(model).__name__](model, walked, len(forced))
    return torch.log_softmax(logits.float(), -1)
