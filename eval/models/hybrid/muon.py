"""Muon: momentum whose matrices are orthogonalised before they are applied.

Keller Jordan et al., 2024 (https://kellerjordan.github.io/posts/muon): five
steps of a Newton-Schulz iteration, here for all matrices of one shape at once.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


class Muon(torch.optim.Optimizer):
    """For matrices; embeddings, gates and vectors want another optimizer."""

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
    ):
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(parameters, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            alike: dict[tuple[int, ...], list[tuple[nn.Parameter, Tensor]]] = {}
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(weight)
                state["momentum"].mul_(group["momentum"]).add_(weight.grad)
                update = weight.grad.add(state["momentum"], alpha=group["momentum"])
                wide = update if weight.shape[0] <= weight.shape[1] else update.T
                alike.setdefault(tuple(wide.shape), []).append((weight, wide))
            for pairs in alike.values():
                updates = orthogonal(torch.stack([update for _, update in pairs]))
                for (weight, _), update in zip(pairs, updates, strict=True):
                    update = update if update.shape == weight.shape else update.T
                    scale = max(1.0, weight.shape[0] / weight.shape[1]) ** 0.5
                    weight.mul_(1 - group["lr"] * group["weight_decay"])
                    weight.add_(update, alpha=-group["lr"] * scale)


def orthogonal(x: Tensor, steps: int = 5) -> Tensor:
    """Roughly the nearest semi-orthogonal matrices to [count, rows, columns], rows <= columns."""
    a, b, c = _COEFFICIENTS
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.transpose(1, 2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x
