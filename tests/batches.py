"""Linked rows over one pool, and what dense attention at true positions makes of them."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import torch
from hypothesis import strategies as st

from sglang_pic.attention.step import StepRow
from sglang_pic.kernels.rotate import angles, rotate
from sglang_pic.link.plan import LinkPlan, SegmentHit, make_plan
from sglang_pic.link.policy import Outline, Seam

CPU = torch.device("cpu")
# Sums in another order, weights in base 2: a few units in the last place of sums of
# a hundred terms of order one. A wrong key moves results by more than 0.01.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3}


@dataclasses.dataclass
class Layer:
    """Sizes of one attention layer; ``latent``: of its keys' first channels, which are its
    values too, 0 where these have memory of their own."""

    heads: int = 4
    kv_heads: int = 2
    dim: int = 16
    rotary: int = 16
    neox: bool = True
    latent: int = 0


def table_of(positions: int, rotary: int) -> torch.Tensor:
    frequency = 10000.0 ** (-torch.arange(0, rotary, 2, dtype=torch.float64) / rotary)
    angle = torch.arange(positions)[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], -1).float()


class Batch:
    """Linked rows over one pool, their keys where links expect them, and what dense
    attention at true positions makes of them."""

    def __init__(
        self,
        layer: Layer,
        prompts: list[list[int]],
        *,
        seam: int,
        page: int,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        window: int | None = None,
    ):
        """``prompts``: segments of each row, by number; a question follows."""
        torch.manual_seed(seed)
        draw = random.Random(seed)
        self.layer, self.dtype, self.window = layer, dtype, window
        self.cos_sin = table_of(1024, layer.rotary)
        lengths = {s: draw.randint(1, 3 * page + 20) for row in prompts for s in row}
        pool = 4096
        self.keys, self.values = self._drawn(pool)
        free = list(range(1, pool // page))
        draw.shuffle(free)

        def pages(n: int) -> torch.Tensor:
            """Slots of n tokens, on pages anywhere."""
            starts = torch.tensor([free.pop() for _ in range(-(-n // page))], dtype=torch.int64)
            return (starts[:, None] * page + torch.arange(page)).reshape(-1)[:n]

        content, held = {}, {}
        for name, length in lengths.items():
            key, value = self._drawn(length)
            slots = pages(length)
            self.keys[slots] = self._at(key, torch.arange(length))
            self.values[slots] = value
            content[name], held[name] = (key, value), slots[: length // page * page]

        self.req_to_token = torch.zeros(16, 1024, dtype=torch.int32)
        self.pool_rows = torch.tensor(draw.sample(range(16), len(prompts)))
        self.plans: list[LinkPlan] = []
        self.queries: list[torch.Tensor] = []
        self.exact: list[torch.Tensor] = []
        for row, prompt in enumerate(prompts):
            before, question = draw.randint(0, 5), draw.randint(0, 9)
            drawn = [self._drawn(before)]
            hits, at = [], before
            for name in prompt:
                length = lengths[name]
                core = Seam(seam).core(Outline(length, opening=at == 0), page=page)
                hits.append(SegmentHit(at, at + length, at, held[name], core))
                drawn.append(content[name])
                at += length
            n = at + question + 1
            drawn.append(self._drawn(question + 1))
            plan = make_plan(
                n, limit=n - 1, prefix=torch.empty(0, dtype=torch.int64), hits=hits,
                page=page,
            )  # fmt: skip
            live = plan.order[plan.reused :]
            private = pages(live.numel())
            all_keys, all_values = (torch.cat(some) for some in zip(*drawn, strict=True))
            self.keys[private] = self._at(all_keys[live], live)
            self.values[private] = all_values[live]
            slots = torch.cat([plan.slots, private])
            self.req_to_token[self.pool_rows[row], :n] = slots.int()
            query = torch.randn(n, layer.heads, layer.dim)
            self.plans.append(plan)
            self.queries.append(self._at(query, torch.arange(n)))
            self.exact.append(self._dense(query, all_keys, all_values))
        self.keys, self.values = self.keys.to(dtype), self.values.to(dtype)
        if layer.latent:
            self.values = self.keys[..., : layer.latent]

    def _drawn(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of so many tokens."""
        layer = self.layer
        key = torch.randn(count, layer.kv_heads, layer.dim)
        if layer.latent:
            return key, key[..., : layer.latent]
        return key, torch.randn(count, layer.kv_heads, layer.dim)

    def _at(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        first = self.layer.latent
        return rotate(x, *angles(self.cos_sin, positions), neox=self.layer.neox, first=first)

    def empty(self, query: torch.Tensor) -> torch.Tensor:
        """Where results of these queries go, filled with sevens."""
        width = self.layer.latent or self.layer.dim
        return query.new_full((*query.shape[:2], width), 7.0)

    def _dense(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        n, group = query.shape[0], self.layer.heads // self.layer.kv_heads
        where = torch.arange(n)
        q = self._at(query, where).double()
        k = self._at(key, where).double().repeat_interleave(group, 1)
        scores = torch.einsum("nhd,mhd->hnm", q, k) * self.scale
        ago = where[:, None] - where
        far = n if self.window is None else self.window
        scores.masked_fill_((ago < 0) | (ago > far), -torch.inf)
        wide = value.double().repeat_interleave(group, 1)
        return torch.einsum("hnm,mhd->nhd", scores.softmax(-1), wide)

    @property
    def scale(self) -> float:
        return self.layer.dim**-0.5

    def rows(self, done: list[int], extend: list[int]) -> tuple[list[StepRow], Any, Any]:
        """Rows of a pass in which row i computes ``extend[i]`` tokens behind
        ``done[i]``; their queries, packed, and the exact result."""
        rows, query, exact, at = [], [], [], 0
        for plan, q, wanted, d, n in zip(
            self.plans, self.queries, self.exact, done, extend, strict=True
        ):
            live = plan.order[plan.reused :][d : d + n]
            rows.append(StepRow(plan, at, plan.reused + d, n))
            query.append(q[live])
            exact.append(wanted[live])
            at += n
        return rows, torch.cat(query).to(self.dtype), torch.cat(exact)

    def pool(self) -> tuple[torch.Tensor, ...]:
        return self.keys, self.values, self.req_to_token, self.pool_rows

    def turns(self, offset: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return angles(self.cos_sin, -offset)


LAYERS = [
    Layer(),
    Layer(heads=6, kv_heads=2, dim=16, rotary=8),  # partial rotary, group of 3
    Layer(heads=2, kv_heads=1, dim=24, rotary=16, neox=False),  # no power of two, pairs
    Layer(heads=8, kv_heads=1, dim=32, rotary=8),
]


LATENT = [
    Layer(heads=16, kv_heads=1, dim=40, rotary=8, neox=False, latent=32),
    Layer(heads=72, kv_heads=1, dim=40, rotary=8, latent=32),  # a token is two tiles
    Layer(heads=6, kv_heads=1, dim=72, rotary=24, latent=48),  # no powers of two
]


def _batches(
    windows: st.SearchStrategy[int | None],
    layers: list[Layer] = LAYERS,
    rows: int = 3,
    pages: tuple[int, ...] = (1, 4, 16),
) -> st.SearchStrategy[Batch]:
    return st.builds(
        lambda layer, prompts, seam, page, seed, window: Batch(
            layers[layer], prompts, seam=seam, page=page, seed=seed, window=window
        ),
        st.integers(0, len(layers) - 1),
        st.lists(st.lists(st.integers(0, 3), min_size=0, max_size=4), min_size=1, max_size=rows),
        st.integers(0, 9),
        st.sampled_from(pages),
        st.integers(0, 1000),
        windows,
    )


batches = _batches(st.none())
latent = _batches(st.none(), LATENT, 2, (1, 4))
windowed = _batches(st.sampled_from([0, 1, 5, 12, 30, 70, 500]))


def computed(batch: Batch) -> list[int]:
    """Tokens that each row computes."""
    return [plan.n_tokens - plan.reused for plan in batch.plans]


def close(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype = torch.float32) -> None:
    torch.testing.assert_close(found.double(), expected.double(), atol=TOLERANCE[dtype], rtol=0)
