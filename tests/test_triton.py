"""Triton kernels, interpreted, against their torch oracles; and those against float64
attention with every key at its true position."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from batches import CPU, LAYERS, Batch, Layer, batches, close, computed, table_of, windowed
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_pic.attention.kernels import TORCH, Kernels, triton_kernels
from sglang_pic.attention.step import StepRow
from sglang_pic.attention.tables import MIN_CHUNK, Shape, build_tables, parts, walkers
from sglang_pic.kernels.rotate import angles

TRITON = triton_kernels()


@settings(max_examples=12)
@given(batch=batches, data=st.data())
def test_walking_is_attention_at_true_positions(batch: Batch, data: Any) -> None:
    """Oracle against float64, kernel against oracle; several requests, in chunks, the keys
    of each tile cut or whole."""
    counts = computed(batch)
    done = [data.draw(st.integers(0, n - 1)) for n in counts]
    rows, query, exact = batch.rows(done, [n - d for n, d in zip(counts, done, strict=True)])
    for splits in (1, data.draw(st.integers(2, 4))):
        made = walkers(rows, range(len(rows)), 8, splits, CPU)
        for kernels in (TORCH, TRITON):
            out = torch.full_like(query, 7.0)
            kernels.walk_rows(
                query, *batch.pool(), made.table, batch.turns(made.offset), out,
                scale=batch.scale, neox=batch.layer.neox, splits=splits,
            )  # fmt: skip
            close(out, exact)


def test_only_the_rows_that_walk_are_written() -> None:
    """Cut as well: the others' results are theirs."""
    batch = Batch(Layer(), [[0, 1], [1, 2], [2]], seam=3, page=1, seed=4)
    rows, query, exact = batch.rows(
        [0, 1, 0], [n - d for n, d in zip(computed(batch), [0, 1, 0], strict=True)]
    )
    made = walkers(rows, [0, 2], 4, 3, CPU)
    out = torch.full_like(query, 7.0)
    TRITON.walk_rows(
        query, *batch.pool(), made.table, batch.turns(made.offset), out,
        scale=batch.scale, neox=batch.layer.neox, splits=3,
    )  # fmt: skip
    other = slice(rows[1].first_query, rows[1].first_query + rows[1].extend)
    assert (out[other] == 7.0).all()
    for row in (rows[0], rows[2]):
        mine = slice(row.first_query, row.first_query + row.extend)
        close(out[mine], exact[mine])


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


@settings(max_examples=12)
@given(batch=windowed, data=st.data())
def test_a_window_is_over_positions(batch: Batch, data: Any) -> None:
    """As above, of layers that see a window alone."""
    counts = computed(batch)
    done = [data.draw(st.integers(0, n - 1)) for n in counts]
    rows, query, exact = batch.rows(done, [n - d for n, d in zip(counts, done, strict=True)])
    made = walkers(rows, range(len(rows)), 8, 1, CPU, by_position=True)
    for kernels in (TORCH, TRITON):
        out = torch.full_like(query, 7.0)
        kernels.walk_rows(
            query, *batch.pool(), made.table, batch.turns(made.offset), out,
            scale=batch.scale, neox=batch.layer.neox, window=batch.window,
        )  # fmt: skip
        close(out, exact)


@settings(max_examples=10)
@given(batch=windowed, splits=st.sampled_from([1, 3]), back=st.integers(1, 6))
def test_decoding_within_a_window(batch: Batch, splits: int, back: int) -> None:
    """Cut or whole, from tables that grew or were built anew."""
    last = [n - 1 for n in computed(batch)]
    rows, query, exact = batch.rows(last, [1] * len(last))
    shape = Shape(tile=2, kv_heads=batch.layer.kv_heads, programs=1, windows=True)
    before, _, _ = batch.rows([max(0, n - back) for n in last], [1] * len(last))
    step = build_tables(before, shape, CPU)
    assert step is not None and step.within is not None and step.within.links is None
    grown = step.grown(rows, shape)
    tables = [walkers(rows, range(len(rows)), 1, splits, CPU, by_position=True)]
    if grown is not None:
        assert grown.within is not None and grown.within.decodes is not None
        tables.append(grown.within.decodes)
    for made in tables:
        out = torch.empty_like(query)
        TRITON.walk_rows(
            query, *batch.pool(), made.table, batch.turns(made.offset), out,
            scale=batch.scale, neox=batch.layer.neox, splits=made.splits, window=batch.window,
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


@settings(max_examples=15)
@given(batch=batches, programs=st.sampled_from([1, 100]), back=st.integers(1, 6))
def test_tables_grow_with_the_rows_that_decode(batch: Batch, programs: int, back: int) -> None:
    """A step on, tables that only grew see what those built anew do."""
    shape = Shape(tile=2, kv_heads=batch.layer.kv_heads, programs=programs)
    last = [n - 1 for n in computed(batch)]
    before, _, _ = batch.rows([max(0, n - back) for n in last], [1] * len(last))
    step = build_tables(before, shape, CPU)
    rows, query, exact = batch.rows(last, [1] * len(last))
    assert step is not None
    grown = step.grown(rows, shape)
    seen = all(
        span.first_seer <= max(0, n - back)
        for plan, n in zip(batch.plans, last, strict=True)
        for span in plan.spans
    )
    if grown is None:
        # Spans have come into sight, or a row's keys go to more pieces.
        longest = [max(row.prefix for row in some) // MIN_CHUNK for some in (before, rows)]
        assert not seen or longest[0] != longest[1]
        return
    assert seen
    if grown.parts is not None:
        close(by_parts(batch, query, grown.parts, TORCH), exact)
    if grown.decodes is not None:
        out = torch.empty_like(query)
        TORCH.walk_rows(
            query, *batch.pool(), grown.decodes.table, batch.turns(grown.decodes.offset), out,
            scale=batch.scale, neox=batch.layer.neox,
        )  # fmt: skip
        close(out, exact)
    # Behind other tokens, or behind several of its own, it is another step.
    ahead = dataclasses.replace(rows[0], first_query=rows[0].first_query + 50)
    assert step.grown([ahead, *rows[1:]], shape) is None
    # Another plan, or another row, is another batch.
    other = dataclasses.replace(rows[0], plan=dataclasses.replace(batch.plans[0]))
    assert step.grown([other, *rows[1:]], shape) is None
    assert step.grown([*rows, rows[0]], shape) is None


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


@pytest.mark.parametrize("kernels", [TORCH, TRITON])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_narrower_pool_is_computed_with_as_queries_are(
    kernels: Kernels, dtype: torch.dtype
) -> None:
    batch = Batch(Layer(), [[0, 1], [1, 0]], seam=4, page=4)
    rows, query, _ = batch.rows([n - 1 for n in computed(batch)], [1, 1])
    keys, values, *where = batch.pool()
    narrow = (keys.to(dtype), values.to(dtype))
    rounded = tuple(one.float() for one in narrow)
    walked = walkers(rows, [0, 1], 1, 1, CPU)
    made = parts(rows, [0, 1], Shape(tile=2, kv_heads=2, programs=1), CPU)
    cos, sin = batch.turns(made.offset)
    gathered = TORCH.gather_rotate(query, made.table.query, cos, sin, neox=batch.layer.neox)
    found = []
    for form, pool in ((kernels, narrow), (TORCH, rounded)):
        out = torch.empty_like(query)
        turns = batch.turns(walked.offset)
        form.walk_rows(query, *pool, *where, walked.table, turns, out, scale=batch.scale)
        partial, lse = form.attend_parts(gathered, *pool, *where, made.table, scale=batch.scale)
        merged = form.merge(partial, lse, made.table.merge_indptr, made.table.merge_index)
        found.append((out, merged))
    for one, other in zip(*found, strict=True):
        close(one, other)


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
    batch = Batch(Layer(), [[0, 1], [1, 0], [2]], seam=4, page=1, seed=5)
    counts = computed(batch)
    shape = Shape(tile=4, kv_heads=2, programs=8)
    rows, _, _ = batch.rows([n - 1 for n in counts], [1] * 3)
    together = build_tables(rows, shape, CPU)
    assert together is not None and together.parts is not None and together.decodes is None
    alone = build_tables(rows, dataclasses.replace(shape, tile=1), CPU)
    assert alone is not None and alone.parts is None and alone.decodes is not None
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
    # Keys of a link are cut where its tiles are few and its keys many.
    assert len(made.links.table.tile_row) == 3
    for prefix, programs, splits in ((0, 60, 1), (1000, 3, 1), (300, 60, 3), (9000, 60, 20)):
        row = dataclasses.replace(mixed[0], prefix=prefix)
        step = build_tables([row], dataclasses.replace(shape, programs=programs), CPU)
        assert step is not None and step.links is not None and step.links.splits == splits
