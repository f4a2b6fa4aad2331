"""Triton kernels of linear states, interpreted, against their torch forms in float64.

Errors are those of a head's state, relative. The interpreter takes products in
float32 whatever precision a kernel asks for; what tf32x3 loses, about 2^-21, is
of the same size as the tolerance.
"""

from __future__ import annotations

import contextlib
import dataclasses
import types
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import triton.language as tl
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sglang.kernels.ops.attention.fla import chunk as fla_chunk
from sglang.kernels.ops.attention.fla import (
    chunk_delta_h,
    chunk_fwd,
    chunk_o,
    cumsum,
    op,
    utils,
    wy_fast,
)
from triton.runtime.autotuner import Autotuner

from sglang_pic.forest.kept import Kept
from sglang_pic.kernels.operators import gated_delta
from sglang_pic.kernels.operators import pair as algebra
from sglang_pic.kernels.operators import wy as torch_wy
from sglang_pic.kernels.operators.pair import Pair
from sglang_pic.kernels.operators.states import Cores, Walk
from sglang_pic.kernels.operators.storage import pack
from sglang_pic.kernels.triton import wy
from sglang_pic.linear import gdn, step
from sglang_pic.linear.kernels import TORCH, triton_kernels
from sglang_pic.linear.packed import indptr
from sglang_pic.linear.shape import LinearShape
from sglang_pic.linear.state import CoreState
from sglang_pic.linear.states import PackedStates
from sglang_pic.link.policy import LinkOptions

TRITON = triton_kernels()
CPU = torch.device("cpu")
HEADS = 2
TOLERANCE = 1e-6
seeds = st.integers(0, 2**31 - 1)


def far(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest relative error of a matrix [..., rows, columns]."""
    assert actual.shape == exact.shape
    error = (actual.double() - exact.double()).norm(dim=(-2, -1))
    norm = exact.double().norm(dim=(-2, -1)).clamp_min(1e-30)
    return float((error / norm).max()) if error.numel() else 0.0


def double(pair: Pair) -> Pair:
    return Pair(pair.A.double(), pair.B.double())


# -- States in front of runs --


def draw_pairs(n: int, dk: int, dv: int, *, matrix: bool) -> Pair:
    """Contractions of norm 0.9, so that what stood 20 pieces before still counts."""
    if matrix:
        A = torch.linalg.qr(torch.randn(n, HEADS, dk, dk))[0] * 0.9
    else:
        A = 0.8 + 0.2 * torch.rand(n, HEADS)
    return Pair(A, torch.randn(n, HEADS, dk, dv))


def walk_of(rows: Sequence[tuple[bool, int]]) -> tuple[Walk, int, int]:
    """A walk of rows (whether a core opens it, runs), a core between any two runs
    but every third, and how many cores and inner runs it has."""
    bounds, source, target, opening = [0], [], [], []
    cores = inner = run = 0
    for core_first, runs in rows:
        opening.append(-1 if core_first else run)
        for i in range(runs):
            core = core_first if i == 0 else i % 3 > 0
            if i > 0:
                inner += 1
                source.append(-inner)
                target.append(-1 if core else run)
            if core:
                source.append(cores)
                target.append(run)
                cores += 1
            run += 1
        bounds.append(len(source))
    tables = (torch.tensor(t, dtype=torch.int32) for t in (bounds, source, target, opening))
    return Walk(*tables, run), cores, inner


# How a core is stored, and how a link takes it.
KINDS = ("float32", "float16", "operator dropped", "wide state", "last", "opening")


def draw_cores(kinds: Sequence[str], layers: int, dk: int, dv: int, *, matrix: bool) -> Cores:
    """Cores as a link finds them, each of a segment that is stored in its own way."""
    pairs = []
    for kind in kinds:
        pair = draw_pairs(layers, dk, dv, matrix=matrix)
        if kind == "operator dropped":
            pair.A[layers // 2, 0] *= 1e-9
        if kind == "wide state":
            pair.B[0, 1] *= 1e-7  # float16 would lose it
        dtype = torch.float32 if kind == "float32" else torch.float16
        stored = pack(pair, dtype=dtype, threshold=1e-6)
        core = CoreState(stored, None, torch.randn(layers, 8, 3))
        if kind == "opening":
            core = CoreState(None, stored.state, core.conv_tail)
        options = LinkOptions(state="last" if kind == "last" else "compose")
        shape = LinearShape(layers, HEADS, dk, dv, 8, 3, scalar=not matrix)
        pairs.append(step._pair(core, options, shape))
    return Cores(pairs, [])


def exact_states(
    cores: Cores, layer: int, inner: Pair | None, walk: Walk, states: torch.Tensor
) -> torch.Tensor:
    return TORCH.states_before(
        cores, layer, double(inner) if inner else None, walk, states.double()
    )


@settings(max_examples=16)
@given(
    rows=st.lists(st.tuples(st.booleans(), st.integers(1, 5)), min_size=1, max_size=3),
    kinds=st.lists(st.sampled_from(KINDS), min_size=15, max_size=15),
    layer=st.integers(0, 2),
    dk=st.sampled_from([16, 32, 128]),
    dv=st.sampled_from([16, 64]),
    matrix=st.booleans(),
    seed=seeds,
)
@example([(False, 1), (True, 1)], ["float32"] * 15, 1, 64, 32, True, 0)
@example([(True, 2), (False, 3)], ["float16"] * 15, 2, 256, 16, True, 0)
@example([(True, 2), (False, 3)], ["float16", "opening"] * 8, 1, 256, 256, False, 0)
@example([(False, 21)], ["float32"] * 21, 0, 16, 16, True, 0)
@example([(False, 6), (True, 6)], [*KINDS] * 2, 1, 16, 16, True, 0)
@example([(False, 6), (True, 6)], [*KINDS] * 2, 1, 16, 16, False, 0)
@example([(True, 3)], ["operator dropped", "opening", "last"], 1, 32, 16, True, 0)
def test_states_before(
    rows: list[tuple[bool, int]],
    kinds: list[str],
    layer: int,
    dk: int,
    dv: int,
    matrix: bool,
    seed: int,
) -> None:
    """Cores as they are stored, of any kinds side by side, in one layer of three."""
    torch.manual_seed(seed)
    walk, n_cores, n_inner = walk_of(rows)
    cores = draw_cores(kinds[: max(1, n_cores)], 3, dk, dv, matrix=matrix)
    inner = draw_pairs(n_inner, dk, dv, matrix=matrix) if n_inner else None
    arguments = (cores, layer, inner, walk, torch.randn(len(rows), HEADS, dk, dv))
    assert far(TRITON.states_before(*arguments), exact_states(*arguments)) < TOLERANCE


def test_states_of_any_layout() -> None:
    """Runs' pairs in SGLang's layout or another, and the result without a copy."""
    torch.manual_seed(0)
    walk, n_cores, n_inner = walk_of([(False, 3), (True, 2)])
    cores = draw_cores(["float32"] * n_cores, 3, 32, 16, matrix=True)
    shape = LinearShape(3, HEADS, 32, 16, 8, 3, scalar=False)
    inner = shape.pair(torch.randn(n_inner, HEADS, 16 + 32, 32) / 6)
    other = Pair(inner.A.contiguous(), inner.B.contiguous())
    pool = torch.randn(9, HEADS, 16, 32)
    for pairs in (inner, other):
        arguments = (cores, 1, pairs, walk, pool[[7, 2]].mT)
        found = TRITON.states_before(*arguments)
        assert far(found, exact_states(*arguments)) < TOLERANCE
        assert found.mT.is_contiguous()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("matrix", [True, False])
def test_cores_are_read_where_the_store_keeps_them(matrix: bool, dtype: str) -> None:
    """As compiled, and as loaded from a file, which has rows contiguous."""
    torch.manual_seed(0)
    config = types.SimpleNamespace(state_dtype=dtype, operator_threshold=1e-6, state_mib=9)
    store = PackedStates(config, Kept(9 << 20))
    pair = draw_pairs(3, 32, 16, matrix=matrix)
    tail, end = torch.randn(5, 3, 8, 3)[1], torch.randn(3, HEADS, 16, 32).mT
    assert store.add("s", ("us", ""), core_end=9, conv_tail=tail, end=end, pairs={4: pair})
    saved = {name: tensor.contiguous() for name, tensor in store.tensors("s").items()}
    where = {"device": "cpu", "cost": 1.0, "uses": 1, "offer": True, "evict": False}
    assert store.adopt("loaded", ("us", ""), 9, saved, **where)
    walk, n_cores, _ = walk_of([(True, 1), (True, 1)])
    shape = LinearShape(3, HEADS, 32, 16, 8, 3, scalar=not matrix)
    for name in ("s", "loaded"):
        held = store.find(name, ("us", ""))
        assert held is not None
        found = [held.core(4, 9, opening=opening) for opening in (True, False)]
        runs = [(step.Core(core, 5, 0), LinkOptions()) for core in found if core]
        cores = step._cores(runs, shape, None)
        assert len(cores.pairs) == n_cores
        opening, composed = cores.pairs
        assert opening.state is held.end and composed is held.pairs[4]
        assert cores.tail_places.tolist() == [held.conv_tail.data_ptr()] * 2
        arguments = (cores, 2, None, walk, torch.randn(2, HEADS, 32, 16))
        assert far(TRITON.states_before(*arguments), exact_states(*arguments)) < TOLERANCE


@pytest.mark.parametrize("matrix", [True, False])
@pytest.mark.parametrize("ablation", ["identity_operator", "float16_pairs", "no_conv_tail"])
def test_ablated_cores(ablation: str, matrix: bool) -> None:
    """They are copies, in the same form."""
    torch.manual_seed(0)
    shape = LinearShape(3, HEADS, 32, 16, 8, 3, scalar=not matrix)
    pair = draw_pairs(3, 32, 16, matrix=matrix)
    core = CoreState(pack(pair), None, torch.randn(3, 8, 3))
    runs = [(step.Core(core, 5, 0), LinkOptions(ablation=ablation))]
    cores = step._cores(runs, shape, None)
    operator, state = pair.A, pair.B
    if ablation == "identity_operator":
        operator = algebra.identity_like(pair).A
    if ablation == "float16_pairs":
        operator, state = operator.half().float(), state.half().float()
    assert torch.equal(cores.unpacked[0].A, operator) and torch.equal(cores.unpacked[0].B, state)
    assert bool(cores.tails[0].any()) == (ablation != "no_conv_tail")
    walk, _, _ = walk_of([(True, 1)])
    arguments = (cores, 1, None, walk, torch.randn(1, HEADS, 32, 16))
    assert far(TRITON.states_before(*arguments), exact_states(*arguments)) < TOLERANCE


def test_addresses_of_another_layout_are_refused() -> None:
    stored = pack(draw_pairs(2, 16, 16, matrix=True))
    for wrong in (
        dataclasses.replace(stored, state=stored.state.contiguous()),
        dataclasses.replace(stored, state=torch.randn(2, HEADS, 32, 16)[:, :, :16].mT),
        dataclasses.replace(stored, operator=stored.operator.contiguous()),
    ):
        with pytest.raises((ValueError, RuntimeError)):
            wrong.places()
    with pytest.raises(ValueError):
        _ = Cores([stored], [torch.randn(2, 3, 8).mT]).tail_places


# -- Histories --


@settings(max_examples=15)
@given(
    rows=st.integers(1, 3),
    cores=st.integers(1, 3),
    borrowed=st.integers(0, 4),
    runs=st.integers(1, 6),
    channels=st.sampled_from([1, 96, 200]),
    width=st.integers(2, 5),
    layer=st.integers(0, 2),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    seed=seeds,
)
def test_histories_before(
    rows: int,
    cores: int,
    borrowed: int,
    runs: int,
    channels: int,
    width: int,
    layer: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    """Bit for bit: nothing is computed. (The interpreter's bfloat16 rounds towards zero.)"""
    torch.manual_seed(seed)
    places = (rows + cores) * (width - 1) + borrowed
    before = torch.randint(places, (runs, width - 1))
    conv = torch.randn(8, channels, width - 1).to(dtype)
    slots = torch.randperm(8)[:rows]
    tails = [torch.randn(3, channels, width - 1) for _ in range(cores)]
    inputs = torch.randn(9, 2 * channels).to(dtype)[:, :channels]
    args = (before, conv, slots, Cores([], tails), layer, inputs, torch.randperm(9)[:borrowed])
    found = TRITON.histories_before(*args)
    assert found.dtype is dtype and found.is_contiguous()
    assert torch.equal(found, TORCH.histories_before(*args))


# -- Capture --


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Of packed stretches: unit keys of half as many heads, and a memory of some
    hundred tokens, so that operators do not vanish."""

    k: torch.Tensor
    v: torch.Tensor
    g: torch.Tensor
    beta: torch.Tensor

    @classmethod
    def draw(cls, lengths: Sequence[int], dk: int, dv: int, seed: int = 0) -> Inputs:
        torch.manual_seed(seed)
        tokens = sum(lengths)
        return cls(
            F.normalize(torch.randn(tokens, 1, dk), dim=-1),
            torch.randn(tokens, HEADS, dv),
            -0.02 * torch.rand(tokens, HEADS),
            torch.rand(tokens, HEADS),
        )

    def to(self, dtype: torch.dtype) -> Inputs:
        return Inputs(self.k.to(dtype), self.v.to(dtype), self.g, self.beta)

    def pair(self, lengths: Sequence[int], before: Pair | None = None) -> Pair:
        k = self.k.double().repeat_interleave(HEADS, 1)
        rest = (x.double() for x in (self.v, self.g, self.beta))
        return gated_delta.capture(k, *rest, lengths, before=double(before) if before else None)


def shape_of(dk: int, dv: int) -> LinearShape:
    return LinearShape(1, HEADS, dk, dv, 8, 3, scalar=False)


LENGTHS = st.lists(st.sampled_from([0, 1, 3, 63, 64, 65, 130]), min_size=1, max_size=3)


@settings(max_examples=8)
@given(
    lengths=LENGTHS.filter(any),
    dk=st.sampled_from([64, 128]),
    dv=st.sampled_from([16, 64]),
    begun=st.booleans(),
    seed=seeds,
)
@example(lengths=[1], dk=128, dv=128, begun=False, seed=0)
@example(lengths=[130, 0, 1, 64], dk=64, dv=64, begun=True, seed=0)
def test_advance(lengths: list[int], dk: int, dv: int, begun: bool, seed: int) -> None:
    """From float32 factors, beginning cores or going on with them: 2e-6, of which
    the factors' triangular systems have half."""
    inputs, shape = Inputs.draw(lengths, dk, dv, seed), shape_of(dk, dv)
    running = shape.begun(len(lengths), CPU)
    if begun:
        running += torch.randn_like(running) / dk
    exact = inputs.pair(lengths, before=shape.pair(running) if begun else None)
    w, u, g = torch_wy.factors(inputs.k, inputs.v, inputs.g, inputs.beta, lengths)
    for advance in (torch_wy.advance, wy.advance):
        moved = running.clone()
        advance(moved, inputs.k, w, u, g, indptr(lengths, CPU))
        found = shape.pair(moved)
        assert far(found.A, exact.A) < 2e-6
        assert far(found.B, exact.B) < 2e-6


def test_advance_keeps_half_precision_factors() -> None:
    """Of float16 factors it makes what float32 arithmetic makes of the same factors."""
    lengths = [130, 40]
    inputs, shape = Inputs.draw(lengths, 64, 64), shape_of(64, 64)
    factors = torch_wy.factors(inputs.k, inputs.v, inputs.g, inputs.beta, lengths)
    k, w, u = (x.half() for x in (inputs.k, *factors[:2]))
    found, exact = shape.begun(2, CPU), shape.begun(2, CPU)
    wy.advance(found, k, w, u, factors[2], indptr(lengths, CPU))
    torch_wy.advance(exact, k, w, u, factors[2], indptr(lengths, CPU))
    assert far(found, exact) < 2e-6


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """SGLang's own Triton kernels in the interpreter, which knows no device context,
    has nothing to time, and replaces functions of ``tl`` but not other names of them."""
    monkeypatch.setattr(utils, "custom_device_ctx", lambda index: contextlib.nullcontext())
    monkeypatch.setattr(Autotuner, "run", run_first)
    for module in (chunk_delta_h, chunk_fwd, chunk_o, cumsum, op, wy_fast):
        for name in ("exp", "exp2"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, lambda x, name=name: getattr(tl, name)(x))
    yield


def run_first(self: Autotuner, *args: Any, **kwargs: Any) -> Any:
    config = self.configs[0]
    return self.fn.run(*args, **kwargs, **config.all_kwargs())


@pytest.mark.usefixtures("interpreted")
def test_capture_by_sglang_kernels() -> None:
    """SGLang's chunk kernel under values [v | 0] on the state [0 | I] makes the pair, to
    float32 rounding; in float16, to what that keeps of a state at every chunk."""
    lengths = [65, 1, 40]
    inputs, shape = Inputs.draw(lengths, 64, 64), shape_of(64, 64)
    exact = inputs.pair(lengths)
    for dtype, tolerance in ((torch.float32, 2e-6), (torch.float16, 2e-3)):
        x, running = inputs.to(dtype), shape.begun(3, CPU)
        widened = torch.cat([x.v, torch.zeros_like(x.v)], -1)[None]
        fla_chunk.chunk_gated_delta_rule_fwd(
            q=x.k[None],
            k=x.k[None],
            v=widened,
            g=x.g[None],
            beta=x.beta[None],
            scale=1.0,
            initial_state=running,
            initial_state_indices=torch.arange(3, dtype=torch.int32),
            cu_seqlens=indptr(lengths, CPU),
        )
        found = shape.pair(running)
        assert far(found.A, exact.A) < tolerance
        assert far(found.B, exact.B) < tolerance


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float16, 2e-3)])
def test_capture_by_factors(dtype: torch.dtype, tolerance: float) -> None:
    """What runs on a GPU: SGLang's factors, then ``advance``; no less precise than
    SGLang's chunk kernel in the same type."""
    lengths = [65, 1, 40]
    inputs, shape = Inputs.draw(lengths, 64, 64), shape_of(64, 64)
    x, running = inputs.to(dtype), shape.begun(3, CPU)
    arguments = (x.k[None], x.v[None], x.g[None], x.beta[None])
    gdn._advance_by_factors(*arguments, running, lengths)
    found, exact = shape.pair(running), inputs.pair(lengths)
    assert far(found.A, exact.A) < tolerance
    assert far(found.B, exact.B) < tolerance
