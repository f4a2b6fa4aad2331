"""Triton kernels of latent attention, interpreted, against their torch oracles; and those
against float64 attention with every key at its true position."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from batches import CPU, LATENT, Batch, Layer, close, computed, latent
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_pic.attention.kernels import TORCH, Kernels, latent_kernels
from sglang_pic.attention.table_runner import TableRunner
from sglang_pic.attention.tables import Shape, Walkers, parts, tile_of, walkers
from sglang_pic.kernels.rotate import LayerRope

TRITON = latent_kernels()


def walked(batch: Batch, query: torch.Tensor, made: Walkers, kernels: Kernels) -> torch.Tensor:
    out = batch.empty(query)
    kernels.walk_rows(
        query, *batch.pool(), made.table, batch.turns(made.offset), out,
        scale=batch.scale, neox=batch.layer.neox, splits=made.splits,
    )  # fmt: skip
    return out


def by_parts(batch: Batch, query: torch.Tensor, made: Any, kernels: Kernels) -> torch.Tensor:
    cos, sin = batch.turns(made.offset)
    layer = batch.layer
    gathered = kernels.gather_rotate(
        query, made.table.query, cos, sin, neox=layer.neox, first=layer.latent
    )
    partial, lse = kernels.attend_parts(gathered, *batch.pool(), made.table, scale=batch.scale)
    return kernels.merge(partial, lse, made.table.merge_indptr, made.table.merge_index)


@settings(max_examples=8)
@given(batch=latent, data=st.data())
def test_walking_is_attention_at_true_positions(batch: Batch, data: Any) -> None:
    """Several requests, in chunks, the keys of each tile cut or whole."""
    counts = computed(batch)
    done = [data.draw(st.integers(max(0, n - 30), n - 1)) for n in counts]
    rows, query, exact = batch.rows(done, [n - d for n, d in zip(counts, done, strict=True)])
    tile = tile_of(batch.layer.heads, 1)
    for splits in (1, data.draw(st.integers(2, 4))):
        made = walkers(rows, range(len(rows)), tile, splits, CPU)
        for kernels in (TORCH, TRITON):
            close(walked(batch, query, made, kernels), exact)


@settings(max_examples=8)
@given(batch=latent, splits=st.sampled_from([1, 3]))
def test_a_decoding_row_may_be_cut(batch: Batch, splits: int) -> None:
    rows, query, exact = batch.rows([n - 1 for n in computed(batch)], [1] * len(batch.plans))
    made = walkers(rows, range(len(rows)), 1, splits, CPU)
    close(walked(batch, query, made, TRITON), exact)


@settings(max_examples=8)
@given(batch=latent, programs=st.sampled_from([1, 100]))
def test_parts_are_read_once_and_merged(batch: Batch, programs: int) -> None:
    rows, query, exact = batch.rows([n - 1 for n in computed(batch)], [1] * len(batch.plans))
    shape = Shape(tile=tile_of(batch.layer.heads, 1), kv_heads=1, programs=programs)
    made = parts(rows, range(len(rows)), shape, CPU)
    for kernels in (TORCH, TRITON):
        close(by_parts(batch, query, made, kernels), exact)


def test_only_the_rows_that_walk_are_written() -> None:
    batch = Batch(LATENT[0], [[0, 1], [1, 2], [2]], seam=3, page=1, seed=4)
    rows, query, exact = batch.rows(
        [0, 1, 0], [n - d for n, d in zip(computed(batch), [0, 1, 0], strict=True)]
    )
    for splits in (1, 3):
        out = walked(batch, query, walkers(rows, [0, 2], 4, splits, CPU), TRITON)
        other = slice(rows[1].first_query, rows[1].first_query + rows[1].extend)
        assert (out[other] == 7.0).all()
        for row in (rows[0], rows[2]):
            mine = slice(row.first_query, row.first_query + row.extend)
            close(out[mine], exact[mine])


@pytest.mark.parametrize("heads", [16, 128])
def test_sizes_of_deepseek(heads: int) -> None:
    """V2 Lite and V3."""
    layer = Layer(heads=heads, kv_heads=1, dim=576, rotary=64, neox=False, latent=512)
    batch = Batch(layer, [[0, 1], [1]], seam=2, page=4, seed=2)
    last = [n - 2 for n in computed(batch)]
    rows, query, exact = batch.rows(last, [2, 2])
    made = walkers(rows, [0, 1], tile_of(heads, 1), 2, CPU)
    close(walked(batch, query, made, TRITON), exact)
    rows, query, exact = batch.rows([n + 1 for n in last], [1, 1])
    shape = Shape(tile=tile_of(heads, 1), kv_heads=1, programs=1)
    close(by_parts(batch, query, parts(rows, [0, 1], shape, CPU), TRITON), exact)


@pytest.mark.parametrize("neox", [True, False])
def test_without_positions_nothing_is_turned(neox: bool) -> None:
    """Kimi Linear's layers; what the turns would have been is not there to be read."""
    layer = Layer(heads=4, kv_heads=1, dim=24, rotary=8, neox=neox, latent=16)
    batch = Batch(layer, [[0, 1], [1, 0]], seam=4, page=4, seed=1)
    rows, query, _ = batch.rows([0, 0], computed(batch))
    made = walkers(rows, [0, 1], 8, 2, CPU)
    found = []
    for kernels in (TORCH, TRITON):
        out = batch.empty(query)
        kernels.walk_rows(query, *batch.pool(), made.table, None, out, scale=batch.scale, splits=2)
        found.append(out)
    close(found[1], found[0])
    assert (found[1] - walked(batch, query, made, TRITON)).abs().max() > 1e-2


@pytest.mark.parametrize("kernels", [TORCH, TRITON])
def test_half_precision(kernels: Kernels) -> None:
    batch = Batch(LATENT[0], [[0, 1], [1, 0]], seam=4, page=4, dtype=torch.float16)
    rows, query, exact = batch.rows([n - 1 for n in computed(batch)], [1, 1])
    made = parts(rows, [0, 1], Shape(tile=2, kv_heads=1, programs=1), CPU)
    close(by_parts(batch, query, made, kernels), exact, torch.float16)
    one = walkers(rows, [0, 1], 1, 1, CPU)
    close(walked(batch, query, one, kernels), exact, torch.float16)


def test_a_narrower_pool_is_computed_with_as_queries_are() -> None:
    batch = Batch(LATENT[0], [[0, 1], [1, 0]], seam=4, page=4)
    rows, query, _ = batch.rows([n - 1 for n in computed(batch)], [1, 1])
    made = walkers(rows, [0, 1], 1, 1, CPU)
    found = []
    for keys, kernels in ((batch.keys.half(), TRITON), (batch.keys.half().float(), TORCH)):
        batch.keys, batch.values = keys, keys[..., : batch.layer.latent]
        found.append(walked(batch, query, made, kernels))
    close(*found)


@settings(max_examples=8)
@given(batch=latent, programs=st.sampled_from([1, 100]), data=st.data())
def test_a_step_runs_by_tables(batch: Batch, programs: int, data: Any) -> None:
    """Links and rows that decode, in one pass."""
    counts = computed(batch)
    done = [data.draw(st.sampled_from([0, n - 1])) for n in counts]
    rows, query, exact = batch.rows(done, [n - d for n, d in zip(counts, done, strict=True)])
    heads = batch.layer.heads
    runner = TableRunner(TRITON, Shape(tile_of(heads, 1), 1, programs), CPU)
    runner.plan(rows)
    out = batch.empty(query)
    rope = LayerRope(batch.cos_sin, batch.layer.neox, batch.layer.latent)
    runner.run(query, batch.pool(), rope, batch.scale, out)
    close(out, exact)
