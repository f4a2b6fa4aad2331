"""``Pair``: what a stretch of tokens does to a linear layer's state.

Per head a linear layer runs ``S_t = T_t S_{t-1} + u_t`` over a state S of
shape [dk, dv]. Over a stretch of tokens that is ``S -> A S + B`` with
``A = T_n ... T_1`` (later factors on the left) and ``B`` the end state from
zero: HYPIC's segment-composable states. The operator A has the shape that the
family's transitions have:

    scalar   [..., heads]           RetNet, Lightning, Mamba-2
    vector   [..., heads, dk]       GLA: diag(A)
    matrix   [..., heads, dk, dk]   gated delta rule, KDA

Every function broadcasts over leading dimensions and tells the kind by the
number of dimensions that A has less than B.
"""

from __future__ import annotations

import dataclasses

import torch


@dataclasses.dataclass(frozen=True)
class Pair:
    """Operator and end state of a stretch of tokens.

    Attributes:
        A: operator, [..., heads], [..., heads, dk] or [..., heads, dk, dk].
        B: end state from zero, [..., heads, dk, dv].
    """

    A: torch.Tensor
    B: torch.Tensor


def act(operator: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    """``A S``: an operator of any kind on states [..., heads, dk, dv] of as many
    leading dimensions."""
    missing = state.dim() - operator.dim()
    if missing == 0:
        return operator @ state
    return operator[(..., *[None] * missing)] * state


def apply(pair: Pair, state: torch.Tensor) -> torch.Tensor:
    """State [..., heads, dk, dv] behind the stretch, given the one before it."""
    more = state.dim() - pair.B.dim()
    operator, state = pair.A[(None,) * more], state[(None,) * -more]
    return act(operator, state) + pair.B


def compose(first: Pair, then: Pair) -> Pair:
    """The pair of two stretches in a row: ``(A2 A1, A2 B1 + B2)``."""
    matrices = then.A.dim() == then.B.dim()
    operator = then.A @ first.A if matrices else then.A * first.A
    return Pair(operator, apply(then, first.B))


def identity_like(pair: Pair) -> Pair:
    """The pair of no tokens at all, of the same shape and kind."""
    if pair.A.dim() == pair.B.dim():
        eye = torch.eye(pair.A.shape[-1], dtype=pair.A.dtype, device=pair.A.device)
        return Pair(eye.expand_as(pair.A), torch.zeros_like(pair.B))
    return Pair(torch.ones_like(pair.A), torch.zeros_like(pair.B))
