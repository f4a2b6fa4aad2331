"""Random layers, segments and requests at a model's shapes, on any device."""

from __future__ import annotations

import dataclasses

import torch

from sglang_pic.attention.step import StepRow
from sglang_pic.attention.tables import (
    Shape,
    SharedParts,
    Walkers,
    parts,
    walkers,
)
from sglang_pic.eval.gpu.shapes import ModelShape
from sglang_pic.kernels.rotate import angles
from sglang_pic.link.plan import LinkPlan, SegmentHit, make_plan
from sglang_pic.link.policy import Outline, Seam


@dataclasses.dataclass
class Layout:
    """How many ``requests`` name ``segments`` of ``length`` tokens each, in orders of
    their own, behind heads of ``seam`` tokens; a question of ``question`` tokens follows.
    ``shared``: all name the same ones, else every one has copies of its own."""

    segments: int
    length: int
    seam: int
    question: int
    requests: int = 1
    page: int = 16
    shared: bool = True
    decoded: int = 0


class Scenario:
    """One attention layer's pool with all that a layout needs in it.

    Attributes:
        keys, values: [slots, kv_heads, dim]; of latent attention the values are the keys'
            first numbers.
        req_to_token: int32 [requests, width]; pool_rows: int64 [requests].
        plans: of the requests.
    """

    def __init__(
        self,
        shape: ModelShape,
        layout: Layout,
        device: torch.device | str,
        dtype: torch.dtype,
        seed: int = 0,
    ):
        self.shape, self.layout, self.device, self.dtype = shape, layout, device, dtype
        self._random = torch.Generator().manual_seed(seed)
        self._on_device = torch.Generator(device).manual_seed(seed)
        page = layout.page
        copies = 1 if layout.shared else layout.requests
        n = layout.segments * layout.length + layout.question
        private = layout.segments * (layout.seam + 2 * page) + layout.question + layout.decoded
        pages = copies * layout.segments * -(-layout.length // page)
        pages += layout.requests * -(-(private + layout.decoded + page) // page) + 1
        order = torch.randperm(pages - 1, generator=self._random) + 1
        self._free = iter(order.tolist())
        slots = pages * page
        self.keys = self.normal(slots, shape.kv_heads, shape.dim)
        self.values = self.keys[..., : shape.latent]
        if not shape.latent:
            self.values = self.normal(slots, shape.kv_heads, shape.dim)
        inverse = 10000.0 ** (-torch.arange(0, shape.rotary, 2, dtype=torch.float64) / shape.rotary)
        angle = torch.arange(n + layout.decoded + page)[:, None] * inverse
        self.cos_sin = torch.cat([angle.cos(), angle.sin()], -1).float().to(device)
        width = n + layout.decoded + 1
        self.req_to_token = torch.zeros(layout.requests, width, dtype=torch.int32)
        self.pool_rows = torch.arange(layout.requests, device=device)
        self.plans: list[LinkPlan] = []
        held = [self._pages(layout.length) for _ in range(copies * layout.segments)]
        for request in range(layout.requests):
            names = torch.randperm(layout.segments, generator=self._random).tolist()
            own = 0 if layout.shared else request * layout.segments
            core = Seam(layout.seam).core(Outline(layout.length), page=page)
            hits = [
                SegmentHit(
                    i * layout.length, (i + 1) * layout.length, i * layout.length, slots_of, core
                )
                for i, slots_of in enumerate(held[own + name] for name in names)
            ]
            plan = make_plan(
                n, limit=n - 1, prefix=torch.empty(0, dtype=torch.int64), hits=hits,
                page=page,
            )  # fmt: skip
            mine = self._pages(width - plan.reused)
            row = torch.cat([plan.slots, mine])
            self.req_to_token[request, : len(row)] = row.int()
            self.plans.append(plan)
        self.req_to_token = self.req_to_token.to(device)

    def _pages(self, tokens: int) -> torch.Tensor:
        """int64 [tokens], slots on pages anywhere in the pool."""
        page = self.layout.page
        starts = torch.tensor([next(self._free) for _ in range(-(-tokens // page))])
        return (starts[:, None] * page + torch.arange(page)).reshape(-1)[:tokens]

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Normal numbers on the device."""
        made = torch.randn(shape, generator=self._on_device, device=self.device)
        return made.to(self.dtype if dtype is None else dtype)

    @property
    def scale(self) -> float:
        return float(self.shape.dim**-0.5)

    def pool(self) -> tuple[torch.Tensor, ...]:
        return self.keys, self.values, self.req_to_token, self.pool_rows

    def turns(self, offset: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Angles back by each offset."""
        return angles(self.cos_sin, -offset)

    def link_rows(self) -> list[StepRow]:
        """All that the requests compute, at once."""
        rows, at = [], 0
        for plan in self.plans:
            count = plan.n_tokens - plan.reused
            rows.append(StepRow(plan, at, plan.reused, count))
            at += count
        return rows

    def decode_rows(self) -> list[StepRow]:
        """One token each, behind ``decoded`` others."""
        return [
            StepRow(plan, i, plan.n_tokens + self.layout.decoded, 1)
            for i, plan in enumerate(self.plans)
        ]

    def walkers(self, rows: list[StepRow], tile: int, splits: int) -> Walkers:
        return walkers(rows, range(len(rows)), tile, splits, self.device)

    def parts(self, rows: list[StepRow], tile: int, programs: int) -> SharedParts:
        shape = Shape(tile=tile, kv_heads=self.shape.kv_heads, programs=programs)
        return parts(rows, range(len(rows)), shape, self.device)
