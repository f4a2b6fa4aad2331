"""Layers that erase before they write (gated delta nets, KDA), on SGLang's own kernels.

Rows that compose cores go through ``link``; compiles go through SGLang's code,
and ``capture`` reads off their pairs beside it. Per layer that is a fixed
number of kernel calls, whatever the number of requests, segments and tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch

from sglang_pic.kernels.operators.pair import Pair
from sglang_pic.linear.capture import CaptureStep
from sglang_pic.linear.packed import convolve
from sglang_pic.linear.rows import PicLinearBackend
from sglang_pic.linear.shape import LinearShape
from sglang_pic.linear.step import LinkStep


@dataclasses.dataclass(frozen=True)
class Rule:
    """What a family has of its own.

    Attributes:
        gates: (layer, a, b, tokens) to what ``walk`` takes as decay and write strength of
            these tokens, [1, tokens, heads, ...] and [1, tokens, heads].
        walk: (layer, q, k, v, g, beta, states, lengths) to outputs [1, tokens, heads, dv]
            of packed sequences; moves ``states`` [sequences, heads, dv, dk] on in place.
        advance: (layer, k, v, g, beta, running, lengths), the same for running states
            (``LinearShape``), without outputs.
    """

    gates: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    walk: Callable[..., torch.Tensor]
    advance: Callable[..., None]


class PicDeltaBackend(PicLinearBackend):
    """Beside one of SGLang's backends for such layers.

    Attributes:
        rule: the family's.
        gate_dim: which dimension of ``a`` and ``b`` counts tokens.
    """

    rule: ClassVar[Rule]
    gate_dim: ClassVar[int]

    def forward_extend(
        self,
        layer: Any,
        forward_batch: Any,
        mixed_qkv: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        **kwargs: Any,
    ) -> torch.Tensor:
        stock = super().forward_extend
        cache = self.req_to_token_pool.mamba2_layer_cache(layer.layer_id)
        pools = self.shape.histories(cache.conv[0]), cache.temporal
        index = self.req_to_token_pool.mamba_map[layer.layer_id]
        inputs = (layer, mixed_qkv, a, b)
        if self._capture_step is not None:
            capture(self.rule, self._capture_step, index, *inputs, *pools)
        step = self._link_step
        if step is None:
            exact: torch.Tensor = stock(layer, forward_batch, mixed_qkv, a, b, **kwargs)
            return exact
        shape = (1, mixed_qkv.shape[0], layer.num_v_heads, layer.head_v_dim)
        out = mixed_qkv.new_empty(shape)
        if self._others is not None:
            own = self._other_tokens
            gates = (gate.index_select(self.gate_dim, own) for gate in (a, b))
            out[:, own] = stock(layer, self._others, mixed_qkv[own], *gates)
        out[:, step.tokens] = link(self.rule, step, index, *inputs, *pools)
        return out


def link(
    rule: Rule,
    step: LinkStep,
    index: int,
    layer: Any,
    mixed_qkv: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    conv: torch.Tensor,
    states: torch.Tensor,
) -> torch.Tensor:
    """Outputs of linked rows, [1, tokens, heads, dv].

    Args:
        index: of the layer among the linear ones.
        layer: SGLang's.
        mixed_qkv, a, b: the whole batch's, as SGLang's backend gets them.
        conv: [slots, channels, width - 1], states: [slots, heads, dv, dk], of the pool.
    """
    tokens = step.tokens
    x = mixed_qkv[tokens]
    history = step.history(index, conv, x)
    q, k, v = split_convolved(layer, x, history, step.lengths)
    conv[step.slots] = history[step.last]
    g, beta = rule.gates(layer, a, b, tokens)
    inner = None
    if step.inner_lengths:
        inner = _pairs(
            rule,
            step.shape,
            layer,
            k[:, step.inner],
            v[:, step.inner],
            g[:, step.inner],
            beta[:, step.inner],
            step.inner_lengths,
        )
    slot_states = states[step.slots].float().transpose(-1, -2)
    incoming = step.incoming(index, slot_states, inner)
    running = incoming.transpose(-1, -2).contiguous()
    out = rule.walk(layer, q, k, v, g, beta, running, step.lengths)
    states[step.slots] = running[step.last].to(states.dtype)
    return out


def capture(
    rule: Rule,
    step: CaptureStep,
    index: int,
    layer: Any,
    mixed_qkv: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    conv: torch.Tensor,
    states: torch.Tensor,
) -> None:
    """Move a batch's captures on; arguments as in ``link``."""
    x = mixed_qkv[step.tokens]
    history = conv[step.slots].clone()
    step.keep_tails(index, history, x)
    _, k, v = split_convolved(layer, x, history, step.lengths)
    g, beta = rule.gates(layer, a, b, step.tokens[step.picked])
    running = step.running[:, index].contiguous()
    running[step.from_slot, :, : layer.head_v_dim] = states[step.slots[step.from_slot_row]].float()
    k, v = k[:, step.picked], v[:, step.picked]
    rule.advance(layer, k, v, g, beta, running, step.stretch_lengths)
    step.running[:, index] = running


def split_convolved(
    layer: Any, x: torch.Tensor, history: torch.Tensor, lengths: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v [1, tokens, heads, d] behind the convolution; ``history``
    [sequences, channels, width - 1] is read and moved on in place."""
    mixed = convolve(x, layer.conv_weights, layer.bias, layer.activation, history, lengths)
    q, k, v = mixed.split([layer.q_dim, layer.k_dim, layer.v_dim], -1)
    return (
        q.reshape(1, -1, layer.num_q_heads, layer.head_q_dim),
        k.reshape(1, -1, layer.num_k_heads, layer.head_k_dim),
        v.reshape(1, -1, layer.num_v_heads, layer.head_v_dim),
    )


def widened(v: torch.Tensor, dk: int) -> torch.Tensor:
    """Values [v | 0], under which a running state moves on as a whole."""
    return torch.cat([v, v.new_zeros((*v.shape[:-1], dk))], -1)


def _pairs(
    rule: Rule,
    shape: LinearShape,
    layer: Any,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    lengths: Sequence[int],
) -> Pair:
    """Pairs of packed runs: ``A`` [runs, heads, dk, dk], ``B`` [runs, heads, dk, dv]."""
    running = shape.begun(len(lengths), v.device)
    rule.advance(layer, k, v, g, beta, running, lengths)
    return shape.pair(running)
