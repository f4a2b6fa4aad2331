"""Triton kernels, interpreted, against their torch oracles; and those against float64
attention with every key at its true position."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_pic.attention.kernels import TORCH, Kernels, triton_kernels
from sglang_pic.attention.step import StepRow
from sglang_pic.attention.tables import Shape, build_tables, parts, walkers
from sglang_pic.kernels import rows as torch_rows
from sglang_pic.kernels.rotate import angles, rotate
from sglang_pic.kernels.triton import walk
from sglang_pic.link.plan import LinkPlan, SegmentHit, make_plan
from sglang_pic.link.policy import Seam

TRITON = triton_kernels()
CPU = torch.device("cpu")
# Sums in another order, weights in base 2: a few units in the last place of sums of
# a hundred terms of order one. A wrong key moves results by more than 0.01.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3}


@dataclasses.dataclass
class Layer:
    """Sizes of one attention layer."""

    heads: int = 4
    kv_heads: int = 2
    dim: int = 16
    rotary: int = 16
    neox: bool = True


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
    ):
        """``prompts``: segments of each row, by number; a question follows."""
        torch.manual_seed(seed)
        draw = random.Random(seed)
        self.layer, self.dtype = layer, dtype
        self.cos_sin = table_of(1024, layer.rotary)
        lengths = {s: draw.randint(1, 3 * page + 20) for row in prompts for s in row}
        pool = 4096
        self.keys = torch.randn(pool, layer.kv_heads, layer.dim)
        self.values = torch.randn(pool, layer.kv_heads, layer.dim)
        free = list(range(1, pool // page))
        draw.shuffle(free)

        def pages(n: int) -> torch.Tensor:
            """Slots of n tokens, on pages anywhere."""
            starts = torch.tensor([free.pop() for _ in range(-(-n // page))], dtype=torch.int64)
            return (starts[:, None] * page + torch.arange(page)).reshape(-1)[:n]

        content, held = {}, {}
        for name, length in lengths.items():
            key = torch.randn(length, layer.kv_heads, layer.dim)
            value = torch.randn(length, layer.kv_heads, layer.dim)
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
            key = [torch.randn(before, layer.kv_heads, layer.dim)]
            value = [torch.randn(before, layer.kv_heads, layer.dim)]
            hits, at = [], before
            for name in prompt:
                length = lengths[name]
                opening = at == 0
                hits.append(SegmentHit(at, at + length, at, held[name], opening=opening))
                key.append(content[name][0])
                value.append(content[name][1])
                at += length
            n = at + question + 1
            key.append(torch.randn(question + 1, layer.kv_heads, layer.dim))
            value.append(torch.randn(question + 1, layer.kv_heads, layer.dim))
            plan = make_plan(
                n, limit=n - 1, prefix=torch.empty(0, dtype=torch.int64), hits=hits,
                policy=Seam(seam), page=page,
            )  # fmt: skip
            live = plan.order[plan.reused :]
            private = pages(live.numel())
            all_keys, all_values = torch.cat(key), torch.cat(value)
            self.keys[private] = self._at(all_keys[live], live)
            self.values[private] = all_values[live]
            slots = torch.cat([plan.slots, private])
            self.req_to_token[self.pool_rows[row], :n] = slots.int()
            query = torch.randn(n, layer.heads, layer.dim)
            self.plans.append(plan)
            self.queries.append(self._at(query, torch.arange(n)))
            self.exact.append(self._dense(query, all_keys, all_values))
        self.keys, self.values = self.keys.to(dtype), self.values.to(dtype)

    def _at(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return rotate(x, *angles(self.cos_sin, positions), neox=self.layer.neox)

    def _dense(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        n, group = query.shape[0], self.layer.heads // self.layer.kv_heads
        where = torch.arange(n)
        q = self._at(query, where).double()
        k = self._at(key, where).double().repeat_interleave(group, 1)
        scores = torch.einsum("nhd,mhd->hnm", q, k) * self.scale
        scores.masked_fill_(torch.ones(n, n, dtype=torch.bool).triu(1), -torch.inf)
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

batches = st.builds(
    lambda layer, prompts, seam, page, seed: Batch(
        LAYERS[layer], prompts, seam=seam, page=page, seed=seed
    ),
    st.integers(0, len(LAYERS) - 1),
    st.lists(st.lists(st.integers(0, 3), min_size=0, max_size=4), min_size=1, max_size=3),
    st.integers(0, 9),
    st.sampled_from([1, 4, 16]),
    st.integers(0, 1000),
)


def computed(batch: Batch) -> list[int]:
    """Tokens that each row computes."""
    return [plan.n_tokens - plan.reused for plan in batch.plans]


def close(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype = torch.float32) -> None:
    torch.testing.assert_close(found.double(), expected.double(), atol=TOLERANCE[dtype], rtol=0)


@settings(max_examples=12)
@given(batch=batches, data=st.data())
def test_walking_is_attention_at_true_positions(batch: Batch, data: Any) -> None:
    """Oracle against float64, kernel against oracle; several requests, in chunks."""
    counts = computed(batch)
    done = [data.draw(st.integers(0, n - 1)) for n in counts]
    rows, query, exact = batch.rows(done, [n - d for n, d in zip(counts, done, strict=True)])
    made = walkers(rows, range(len(rows)), 8, 1, CPU)
    for kernels in (TORCH, TRITON):
        out = torch.full_like(query, 7.0)
        kernels.walk_rows(
            query, *batch.pool(), made.table, batch.turns(made.offset), out,
            scale=batch.scale, neox=batch.layer.neox,
        )  # fmt: skip
        close(out, exact)


@settings(max_examples=6)
@given(batch=batches, splits=st.sampled_from([1, 2]))
def test_keys_may_be_cached_unrotated(batch: Batch, splits: int) -> None:
    """MEPIC's form gives the same; every key rotated back, its position in a table."""
    step = 1 if splits > 1 else 5
    counts = [min(step, n) for n in computed(batch)]
    rows, query, exact = batch.rows(
        [total - n for total, n in zip(computed(batch), counts, strict=True)], counts
    )
    position = torch.zeros_like(batch.req_to_token)
    keys = batch.keys.clone()
    for plan, pool_row in zip(batch.plans, batch.pool_rows, strict=True):
        order = plan.order.clone()
        position[pool_row, : len(order)] = order.int()
        for span in plan.spans:
            order[span.row_start : span.row_start + span.n_tokens] -= span.offset
        slots = batch.req_to_token[pool_row, : len(order)].long()
        cos, sin = angles(batch.cos_sin, -order)
        keys[slots] = rotate(batch.keys[slots], cos, sin, neox=batch.layer.neox)
    made = walkers(rows, range(len(rows)), 1 if splits > 1 else 8, splits, CPU)
    for module in (torch_rows, walk):
        out = torch.empty_like(query)
        module.walk_unrotated(
            query, keys, batch.values, batch.req_to_token, position, batch.pool_rows,
            made.table, batch.cos_sin, out, scale=batch.scale, neox=batch.layer.neox,
            splits=splits,
        )  # fmt: skip
        close(out, exact)


@settings(max_examples=8)
@given(batch=batches, splits=st.sampled_from([2, 3]))
def test_a_decoding_row_may_be_cut(batch: Batch, splits: int) -> None:
    rows, query, exact = batch.rows([n - 1 for n in computed(batch)], [1] * len(batch.plans))
    made = walkers(rows, range(len(rows)), 1, splits, CPU)
    out = torch.empty_like(query)
    TRITON.walk_rows(
        query, *batch.pool(), made.table, batch.turns(made.offset), out,
        scale=batch.scale, neox=batch.layer.neox, splits=splits,
    )  # fmt: skip
    close(out, exact)


def by_parts(batch: Batch, query: torch.Tensor, made: Any, kernels: Kernels) -> Any:
    cos, sin = batch.turns(made.offset)
    gathered = kernels.gather_rotate(query, made.table.query, cos, sin, neox=batch.layer.neox)
    partial, lse = kernels.attend_parts(gathered, *batch.pool(), made.table, scale=batch.scale)
    return kernels.merge(partial, lse, made.table.merge_indptr, made.table.merge_index)


@settings(max_examples=12)
@given(batch=batches, tile=st.sampled_from([1, 2]), programs=st.sampled_from([1, 100]))
def test_parts_are_read_once_and_merged(batch: Batch, tile: int, programs: int) -> None:
    rows, query, exact = batch.rows([n - 1 for n in computed(batch)], [1] * len(batch.plans))
    shape = Shape(tile=tile, kv_heads=batch.layer.kv_heads, programs=programs)
    made = parts(rows, range(len(rows)), shape, CPU)
    for kernels in (TORCH, TRITON):
        close(by_parts(batch, query, made, kernels), exact)


@pytest.mark.parametrize("kernels", [TORCH, TRITON])
def test_half_precision(kernels: Kernels) -> None:
    batch = Batch(Layer(), [[0, 1], [1, 0]], seam=4, page=4, dtype=torch.float16)
    rows, query, exact = batch.rows([n - 1 for n in computed(batch)], [1, 1])
    shape = Shape(tile=2, kv_heads=2, programs=1)
    made = parts(rows, [0, 1], shape, CPU)
    close(by_parts(batch, query, made, kernels), exact, torch.float16)
    walked = walkers(rows, [0, 1], 1, 1, CPU)
    out = torch.empty_like(query)
    kernels.walk_rows(
        query, *batch.pool(), walked.table, batch.turns(walked.offset), out, scale=batch.scale
    )
    close(out, exact, torch.float16)


@pytest.mark.parametrize("layer", LAYERS)
def test_relocating_is_copying_and_turning(layer: Layer) -> None:
    buffers = torch.randn(2, 40, layer.kv_heads, layer.dim)
    cos_sin = table_of(64, layer.rotary)
    slots = torch.randperm(40)
    source, target, n = slots[:11], slots[11:22], 11
    for turns in (angles(cos_sin, torch.randint(-60, 60, (n,))), None):
        expected, found = buffers.clone(), buffers.clone()
        TORCH.relocate(*expected, source, target, turns, neox=layer.neox)
        TRITON.relocate(*found, source, target, turns, neox=layer.neox)
        close(found, expected)
        assert not torch.equal(expected[0, target], buffers[0, target])


def test_the_future_of_a_seam_stays_unseen() -> None:
    """A row in whose middle a seam is computed: what stands behind it changes nothing."""
    batch = Batch(Layer(), [[0, 1, 2]], seam=4, page=1, seed=3)
    count = computed(batch)[0]
    rows, query, exact = batch.rows([0], [count])
    made = walkers(rows, [0], 8, 1, CPU)
    last = batch.plans[0].spans[-1]
    assert 0 < last.first_seer < count
    batch.keys[last.slots] = 99.0
    batch.values[last.slots] = 99.0
    out = torch.empty_like(query)
    TRITON.walk_rows(
        query, *batch.pool(), made.table, batch.turns(made.offset), out, scale=batch.scale
    )
    close(out[: last.first_seer], exact[: last.first_seer])
    assert (out[last.first_seer :].double() - exact[last.first_seer :]).abs().min() > 0


def test_the_sharing_degree_chooses() -> None:
    batch = Batch(Layer(), [[0, 1], [1, 0], [2]], seam=2, page=1, seed=5)
    counts = computed(batch)
    shape = Shape(tile=4, kv_heads=2, programs=8)
    rows, _, _ = batch.rows([n - 1 for n in counts], [1] * 3)
    together = build_tables(rows, shape, CPU)
    assert together is not None and together.parts is not None and together.decodes is None
    apart = build_tables([rows[0], dataclasses.replace(rows[2], first_query=1)], shape, CPU)
    assert apart is not None and apart.parts is None and apart.decodes is not None
    assert apart.decodes.splits == 1
    long = dataclasses.replace(rows[0], prefix=1000)
    cut = build_tables([long], shape, CPU)
    assert cut is not None and cut.decodes is not None and cut.decodes.splits == 4
    mixed, _, _ = batch.rows([0, counts[1] - 1, counts[2] - 1], [counts[0], 1, 1])
    made = build_tables([*mixed, StepRow(None, 99, 4, 1)], shape, CPU)
    assert made is not None and made.links is not None and made.ordinary
    assert made.linked == [0, 1, 2]
    assert build_tables([StepRow(None, 0, 0, 3)], shape, CPU) is None
