"""Torch kernels against float64 attention over the whole sequence."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_pic.attention.step import StepRow, build_step, walks_within
from sglang_pic.kernels.attend import attend, attend_dense
from sglang_pic.kernels.merge import merge
from sglang_pic.kernels.rotate import angles, rotate
from sglang_pic.kernels.walk import TILE, make_tiles, walk
from sglang_pic.link.plan import SegmentHit, make_plan
from sglang_pic.link.policy import Outline, Seam


def table(positions: int, dim: int, scale: float = 1.0) -> torch.Tensor:
    frequency = 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angle = torch.arange(positions)[:, None] * frequency
    return (torch.cat([angle.cos(), angle.sin()], -1) * scale).float()


@pytest.mark.parametrize("neox", [True, False])
@pytest.mark.parametrize("rotary", [8, 16])
@pytest.mark.parametrize("mscale", [1.0, 1.3])
def test_rotations_add_up(neox: bool, rotary: int, mscale: float) -> None:
    """Rotating by p and then by -s is rotating by p - s, for every layout and scale."""
    x = torch.randn(50, 3, 16)
    plain, scaled = table(200, rotary), table(200, rotary, mscale)
    p, s = torch.randint(0, 99, (50,)), torch.randint(-99, 99, (50,))
    there = rotate(x, *angles(plain, p), neox=neox)
    moved = rotate(there, *angles(scaled, -s), neox=neox)
    direct = rotate(x, *angles(plain, p - s), neox=neox)
    torch.testing.assert_close(moved, direct, atol=2e-5, rtol=0)
    assert (there - direct).abs().max() > 0.1
    torch.testing.assert_close(moved[..., rotary:], x[..., rotary:])


@pytest.mark.parametrize(
    ("heads", "kv_heads", "n", "m"), [(4, 2, 5, 9), (9, 3, 7, 7), (2, 2, 1, 3)]
)
def test_attend_matches_float64(heads: int, kv_heads: int, n: int, m: int) -> None:
    q, k, v = torch.randn(n, heads, 16), torch.randn(m, kv_heads, 16), torch.randn(m, kv_heads, 16)
    out, lse = attend(q, k, v, scale=0.3)
    group = heads // kv_heads
    kk, vv = (x.double().repeat_interleave(group, 1).transpose(0, 1) for x in (k, v))
    exact, exact_lse = attend_dense(q.double().transpose(0, 1), kk, vv, 0.3)
    torch.testing.assert_close(out.double(), exact.transpose(0, 1), atol=1e-5, rtol=0)
    torch.testing.assert_close(lse.double(), exact_lse.T, atol=1e-5, rtol=0)


def test_walk_without_tiles_is_causal() -> None:
    q, k, v = torch.randn(90, 4, 16), torch.randn(90, 2, 16), torch.randn(90, 2, 16)
    tiled = walk(q, k, v, make_tiles(torch.arange(1, 91)), scale=0.3)
    torch.testing.assert_close(walk(q, k, v, None, scale=0.3), tiled, atol=1e-5, rtol=0)


@pytest.mark.parametrize("n", [1, 7, TILE, 3 * TILE + 5])
def test_walk_matches_float64(n: int) -> None:
    heads, kv_heads, m = 4, 2, n + 50
    visible = torch.sort(torch.randint(1, m + 1, (n,))).values
    q, k, v = torch.randn(n, heads, 16), torch.randn(m, kv_heads, 16), torch.randn(m, kv_heads, 16)
    out = walk(q, k, v, make_tiles(visible), scale=0.3)
    mask = torch.zeros(n, m).masked_fill(torch.arange(m) >= visible[:, None], -torch.inf)
    kk, vv = (x.double().repeat_interleave(2, 1).transpose(0, 1) for x in (k, v))
    exact, _ = attend_dense(q.double().transpose(0, 1), kk, vv, 0.3, mask)
    torch.testing.assert_close(out.double(), exact.transpose(0, 1), atol=1e-5, rtol=0)


def linked_attention(lengths: list[int], seam: int, chunk: int, window: int | None = None) -> None:
    """One row of segments, computed in chunks through plan, step, kernels; against
    dense attention in which every key sits at its true position, of which a query
    sees those ``window`` or fewer before its own."""
    heads, kv_heads, dim, page = 4, 2, 16, 1
    n = sum(lengths) + 3
    cos_sin = table(n + 1, dim)
    keys, values = torch.randn(n, kv_heads, dim), torch.randn(n, kv_heads, dim)
    queries = torch.randn(n, heads, dim)
    pool_k, pool_v = torch.zeros(2 * n, kv_heads, dim), torch.zeros(2 * n, kv_heads, dim)
    hits, at = [], 0
    for length in lengths:
        slots = torch.arange(at, at + length)
        local = angles(cos_sin, torch.arange(length))
        pool_k[slots] = rotate(keys[at : at + length], *local, neox=True)
        pool_v[slots] = values[at : at + length]
        core = Seam(seam).core(Outline(length, opening=at == 0), page=page)
        hits.append(SegmentHit(at, at + length, at, slots, core))
        at += length
    plan = make_plan(
        n, limit=n - 1, prefix=torch.empty(0, dtype=torch.int64), hits=hits, page=page,
    )  # fmt: skip
    live = plan.order[plan.reused :]
    private = torch.arange(n, n + live.numel())
    true = angles(cos_sin, live)
    pool_k[private] = rotate(keys[live], *true, neox=True)
    pool_v[private] = values[live]
    row = torch.cat([plan.slots, private])
    rotated = rotate(queries[live], *true, neox=True)

    everywhere = angles(cos_sin, torch.arange(n))
    k_true = rotate(keys, *everywhere, neox=True).repeat_interleave(2, 1).double()
    q_true = rotate(queries, *everywhere, neox=True).double()
    scores = torch.einsum("nhd,mhd->hnm", q_true, k_true) * 0.25
    ago = torch.arange(n)[:, None] - torch.arange(n)
    scores.masked_fill_((ago < 0) | (ago > (n if window is None else window)), -torch.inf)
    weights, wide = scores.softmax(-1), values.double().repeat_interleave(2, 1)
    exact = torch.einsum("hnm,mhd->nhd", weights, wide)[live]

    for done in range(0, live.numel(), chunk):
        extend = min(chunk, live.numel() - done)
        prefix = plan.reused + done
        step = build_step(
            [StepRow(plan, 0, prefix, extend, row[: prefix + extend])], torch.device("cpu")
        )
        assert step is not None
        new = rotated[done : done + extend]
        if extend > 1 or window is not None:
            walks = step.walks
            if window is not None:
                walks = walks_within(step, window, torch.device("cpu"))
                reach = int(live[done + extend - 1] - live[done]) + 1 + window
                assert all(row_walk.slots.numel() <= reach for row_walk in walks)
            (row_walk,) = walks
            key = pool_k[row_walk.slots]
            if row_walk.offset is not None:
                key = rotate(key, *angles(cos_sin, row_walk.offset), neox=True)
            got = walk(new, key, pool_v[row_walk.slots], row_walk.tiles, scale=0.25)
        else:
            parts = step.parts
            assert parts is not None
            q = rotate(new[parts.query], *angles(cos_sin, -parts.offset), neox=True)
            partial, lse = torch.empty(q.shape), torch.empty(q.shape[:2])
            for i in range(len(parts.qo_indptr) - 1):
                of_q = slice(parts.qo_indptr[i], parts.qo_indptr[i + 1])
                keys_of = parts.slots[parts.kv_indptr[i] : parts.kv_indptr[i + 1]]
                partial[of_q], lse[of_q] = attend(
                    q[of_q], pool_k[keys_of], pool_v[keys_of], scale=0.25
                )
            got = merge(partial, lse, parts.merge_indptr, parts.merge_index)
        expected = exact[done : done + extend]
        torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=0)


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=5),
    seam=st.integers(0, 25),
    chunk=st.sampled_from([1, 1, 2, 7, 30, 200]),
)
def test_linking_is_attention_at_true_positions(lengths, seam, chunk) -> None:
    linked_attention(lengths, seam, chunk)


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=5),
    seam=st.integers(0, 25),
    chunk=st.sampled_from([1, 2, 7, 30, 200]),
    window=st.sampled_from([0, 1, 5, 12, 40, 500]),
)
def test_a_window_is_over_positions_in_the_prompt(lengths, seam, chunk, window) -> None:
    linked_attention(lengths, seam, chunk, window)


def test_a_shared_span_is_read_once() -> None:
    """Two rows that reuse the same pages at different positions share one part."""
    slots = torch.arange(10)
    rows = []
    for i, start in enumerate((3, 7)):
        plan = make_plan(
            start + 12, limit=start + 11, prefix=slots[:0],
            hits=[SegmentHit(start, start + 10, start, slots, (2, 9))], page=1,
        )  # fmt: skip
        row = torch.arange(100 * (i + 1), 100 * (i + 1) + start + 12)
        rows.append(StepRow(plan, i, start + 11, 1, row))
    step = build_step(rows, torch.device("cpu"))
    assert step is not None and step.parts is not None
    assert step.parts.qo_indptr == [0, 2, 3, 4]
    assert step.parts.offset.tolist() == [3, 7, 0, 0]
    assert step.parts.slots[:7].tolist() == slots[2:9].tolist()


def test_segments_that_begin_alike_are_not_mixed_up() -> None:
    """Same first page, same length, another end: two parts."""
    rows = []
    for i, tail in enumerate((50, 60)):
        slots = torch.cat([torch.arange(5), torch.arange(tail, tail + 5)])
        plan = make_plan(
            12, limit=11, prefix=slots[:0], hits=[SegmentHit(0, 10, 0, slots, (0, 9))], page=1,
        )  # fmt: skip
        rows.append(StepRow(plan, i, 11, 1, torch.arange(200, 212)))
    step = build_step(rows, torch.device("cpu"))
    assert step is not None and step.parts is not None
    assert len(step.parts.qo_indptr) - 1 == 4
