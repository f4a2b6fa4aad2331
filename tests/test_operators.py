"""Operators of linear layers: chunk form against recurrence, composition against a
single pass, storage, and every family against a model's own layer."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import itertools
import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sglang_pic.kernels import short_conv
from sglang_pic.kernels.operators import gated_delta, gla, kda, lightning, ssd
from sglang_pic.kernels.operators.pair import (
    Pair,
    apply,
    compose,
    identity_like,
)
from sglang_pic.kernels.operators.storage import pack

HEADS, GROUPS, DK, DV = 4, 2, 8, 5
Inputs = tuple[torch.Tensor, ...]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# Gates are set by hand. With those of a random initialisation operators vanish
# within 64 tokens and every wrong implementation passes (test_long_memory_matters).


@dataclasses.dataclass(frozen=True)
class Memory:
    """Log decay of a token, drawn between two bounds, and how often one is a reset."""

    least: float
    most: float
    resets: float = 0.0
    beta: float = 0.1

    def decay(self, shape: Sequence[int], generator: torch.Generator) -> torch.Tensor:
        def draw() -> torch.Tensor:
            return torch.rand(shape, generator=generator, dtype=torch.float64)

        g = -(self.least * (self.most / self.least) ** draw())
        return torch.where(draw() < self.resets, -30.0, g)


LONG = Memory(1e-4, 1e-2)
MIXED = Memory(1e-3, 1.0, resets=0.02, beta=1.0)
STRONG = Memory(1.0, 60.0, beta=1.0)
MEMORIES = st.sampled_from([LONG, MIXED, STRONG])


@dataclasses.dataclass(frozen=True)
class Family:
    """A family, and how its inputs (q, k, v, gates...) are made.

    ``groups``: heads of q and k. ``gates``: from decay and strengths.
    """

    module: ModuleType
    unit_keys: bool
    groups: int
    gates: Callable[[Memory, int, torch.Generator], Inputs]

    def draw(self, tokens: int, memory: Memory = LONG, seed: int = 0) -> Inputs:
        """q, k, v and gates of a sequence, float32 values as float64."""
        generator = torch.Generator().manual_seed(seed)

        def normal(heads: int, d: int) -> torch.Tensor:
            return torch.randn(tokens, heads, d, generator=generator, dtype=torch.float64)

        q, k, v = normal(self.groups, DK), normal(self.groups, DK), normal(HEADS, DV)
        inputs = (*self.keys(q, k), v, *self.gates(memory, tokens, generator))
        return tuple(x.float().double() for x in inputs)

    def keys(self, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return q * q.shape[-1] ** -0.5, F.normalize(k, dim=-1) if self.unit_keys else k

    def __str__(self) -> str:
        return self.module.__name__.rpartition(".")[2]


def strengths(memory: Memory, tokens: int, generator: torch.Generator) -> torch.Tensor:
    draw = torch.rand(tokens, HEADS, generator=generator, dtype=torch.float64)
    return memory.beta * draw


FAMILIES = [
    Family(gated_delta, True, HEADS, lambda m, n, r: (m.decay((n, HEADS), r), strengths(m, n, r))),
    Family(kda, True, HEADS, lambda m, n, r: (m.decay((n, HEADS, DK), r), strengths(m, n, r))),
    Family(gla, False, HEADS, lambda m, n, r: (m.decay((n, HEADS, DK), r),)),
    Family(ssd, False, GROUPS, lambda m, n, r: (m.decay((n, HEADS), r), strengths(m, n, r))),
    Family(lightning, False, HEADS, lambda m, n, r: (m.decay((HEADS,), r),)),
]
families = pytest.mark.parametrize("family", FAMILIES, ids=str)
seeds = st.integers(0, 2**31 - 1)


def cut(inputs: Inputs, first: int, last: int) -> Inputs:
    """The inputs of some tokens; what has one dimension is the same for all."""
    return tuple(x[first:last] if x.dim() > 1 else x for x in inputs)


def pack_rows(parts: Sequence[Inputs]) -> Inputs:
    return tuple(torch.cat(xs) if xs[0].dim() > 1 else xs[0] for xs in zip(*parts, strict=True))


def single(inputs: Inputs) -> Inputs:
    return tuple(x.float() for x in inputs)


def zero_state(*leading: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.zeros(*leading, HEADS, DK, DV, dtype=dtype)


def far(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest relative error of a head's state, [..., dk, dv]."""
    error = (actual.double() - exact.double()).norm(dim=(-2, -1))
    norm = exact.double().norm(dim=(-2, -1)).clamp_min(1e-30)
    return float((error / norm).max()) if error.numel() else 0.0


# -- The chunk form --


@families
@settings(max_examples=25)
@given(
    lengths=st.lists(
        st.sampled_from([0, 1, 7, 8, 9, 63, 64, 65, 128, 150]), min_size=1, max_size=4
    ),
    size=st.sampled_from([None, 8, 16, 64]),
    memory=MEMORIES,
    seed=seeds,
)
@example(lengths=[0], size=None, memory=LONG, seed=0)
@example(lengths=[64], size=64, memory=LONG, seed=0)
@example(lengths=[0, 130, 0, 64, 1], size=64, memory=STRONG, seed=0)
def test_chunk_is_the_recurrence(
    family: Family, lengths: list[int], size: int | None, memory: Memory, seed: int
) -> None:
    """In float64 to 1e-10, in float32 to 1e-5 of a head's state or output."""
    inputs = family.draw(sum(lengths), memory, seed)
    state = torch.randn(
        len(lengths), HEADS, DK, DV, generator=torch.Generator().manual_seed(seed)
    ).double()
    bounds = [0, *itertools.accumulate(lengths)]
    outputs, ends, starts = [], [], []
    longest = max(lengths)
    step = size or min(64, max(8, 2 ** max(0, longest - 1).bit_length()))
    for i, (first, last) in enumerate(itertools.pairwise(bounds)):
        at = state[i]
        for here in range(first, last, step):
            starts.append(at)
            out, at = family.module.recurrent(*cut(inputs, here, min(here + step, last)), at)
            outputs.append(out)
        ends.append(at)

    def check(actual: Any, tolerance: float) -> None:
        out, end, start = actual
        assert out.shape == (sum(lengths), HEADS, DV)
        assert far(end, torch.stack(ends)) < tolerance
        assert start.shape[0] == len(starts)
        if starts:
            assert far(start, torch.stack(starts)) < tolerance
            scale = torch.cat(outputs).norm(dim=-1).clamp_min(1e-2)
            error = (out.double() - torch.cat(outputs)).norm(dim=-1)
            assert float((error / scale.amax(0)).max()) < tolerance

    check(family.module.chunk(*inputs, state, lengths, size=size), 1e-10)
    check(family.module.chunk(*single(inputs), state.float(), lengths, size=size), 1e-5)


@families
def test_step_is_the_recurrence(family: Family) -> None:
    """Many sequences, a token each."""
    inputs = family.draw(6)
    state = torch.randn(6, HEADS, DK, DV, dtype=torch.float64)
    out, end = family.module.step(*inputs, state)
    for i in range(6):
        one, after = family.module.recurrent(*cut(inputs, i, i + 1), state[i])
        torch.testing.assert_close(out[i], one[0])
        torch.testing.assert_close(end[i], after)


@pytest.mark.parametrize("family", FAMILIES[:4], ids=str)
def test_no_decay_overflows(family: Family) -> None:
    """Decay so strong that e^{-G} alone would leave float32 within three tokens,
    and a memory that must still survive from the last token to the next."""
    inputs = list(single(family.draw(130)))
    inputs[3] = torch.full_like(inputs[3], -40.0)
    inputs[3][1::2] = -1e-3
    exact, _ = family.module.recurrent(*(x.double() for x in inputs), zero_state())
    out, end, _ = family.module.chunk(*inputs, zero_state(1, dtype=torch.float32), [130])
    assert out.isfinite().all() and end.isfinite().all()
    assert float((out.double() - exact).norm() / exact.norm()) < 1e-6


# -- Pairs --


@families
@settings(max_examples=25)
@given(data=st.data(), memory=MEMORIES, seed=seeds)
def test_linked_state_is_the_single_pass_state(
    family: Family, data: st.DataObject, memory: Memory, seed: int
) -> None:
    """Any split of a row into cores and seams between them, any lengths: cores by
    their pairs, seams by the recurrence, in float32, against float64 in one pass."""
    cores = data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=32), label="cores")
    seams = data.draw(
        st.lists(st.integers(0, 9), min_size=len(cores), max_size=len(cores)), label="seams"
    )
    bounds = [0, *itertools.accumulate(itertools.chain(*zip(seams, cores, strict=True)))]
    exact_inputs = family.draw(bounds[-1], memory, seed)
    inputs = single(exact_inputs)
    spans = list(itertools.pairwise(bounds))
    stored = pack_rows([cut(inputs, *span) for span in spans[1::2]])
    pairs = family.module.capture(*stored[1:], cores)

    state = torch.randn(1, HEADS, DK, DV, generator=torch.Generator().manual_seed(seed))
    _, exact = family.module.recurrent(*exact_inputs, state[0].double())
    for i, (first, last) in enumerate(spans[::2]):
        _, state, _ = family.module.chunk(*cut(inputs, first, last), state, [last - first])
        state = apply(Pair(pairs.A[i : i + 1], pairs.B[i : i + 1]), state)
    assert far(state[0], exact) < 1e-5


@families
@settings(max_examples=15)
@given(
    lengths=st.tuples(st.integers(0, 70), st.integers(0, 70), st.integers(0, 70)),
    memory=MEMORIES,
    seed=seeds,
)
def test_compose_and_capture_agree(
    family: Family, lengths: tuple[int, int, int], memory: Memory, seed: int
) -> None:
    """Composition is associative, has an identity, and is what capturing the joined
    stretch gives, at once or going on from an earlier capture."""
    inputs = family.draw(sum(lengths), memory, seed)
    a, b, c = (
        Pair(*(x[i] for x in dataclasses.astuple(family.module.capture(*inputs[1:], lengths))))
        for i in range(3)
    )
    whole = family.module.capture(*inputs[1:], [sum(lengths)])
    first, second, third = (
        cut(inputs, *span)[1:] for span in itertools.pairwise([0, *itertools.accumulate(lengths)])
    )
    grown = family.module.capture(*first, lengths[:1])
    grown = family.module.capture(*second, lengths[1:2], before=grown)
    grown = family.module.capture(*third, lengths[2:], before=grown)
    for other in (
        compose(compose(a, b), c),
        compose(a, compose(b, c)),
        compose(identity_like(whole), Pair(whole.A[0], whole.B[0])),
        compose(Pair(whole.A[0], whole.B[0]), identity_like(whole)),
        grown,
    ):
        for actual, exact in zip(
            dataclasses.astuple(other), dataclasses.astuple(whole), strict=True
        ):
            torch.testing.assert_close(actual.reshape(exact.shape), exact, atol=1e-10, rtol=1e-10)


@families
def test_nothing_at_all(family: Family) -> None:
    """No sequences, and sequences of no tokens: states stay, pairs are the identity."""
    none = family.draw(0)
    for n in (0, 2):
        state = zero_state(n) + 1
        out, end, starts = family.module.chunk(*none, state, [0] * n)
        assert out.shape == (0, HEADS, DV) and starts.shape == (0, HEADS, DK, DV)
        torch.testing.assert_close(end, state)
        pair = family.module.capture(*none[1:], [0] * n)
        torch.testing.assert_close(apply(pair, state), state)
        torch.testing.assert_close(pair.A, identity_like(pair).A)


@families
def test_kinds_of_operators(family: Family) -> None:
    shapes = {gated_delta: (DK, DK), kda: (DK, DK), gla: (DK,), ssd: (), lightning: ()}
    pair = family.module.capture(*family.draw(9)[1:], [4, 5])
    assert pair.A.shape == (2, HEADS, *shapes[family.module])
    assert pair.B.shape == (2, HEADS, DK, DV)


def test_order_of_decay_and_erasure() -> None:
    """Decay and erasure commute with a decay a head, not with one a channel: one
    token of KDA is (I - b k k^T) diag(a), and not the other way round."""
    _, k, v, g, beta = FAMILIES[1].draw(1, MIXED)
    pair = kda.capture(k, v, g, beta, [1])
    erase = torch.eye(DK).double() - beta[0, :, None, None] * k[0, :, :, None] * k[0, :, None, :]
    decay = torch.diag_embed(g[0].exp())
    torch.testing.assert_close(pair.A[0], erase @ decay)
    assert (pair.A[0] - decay @ erase).abs().max() > 1e-3
    same = g[..., :1].expand_as(g).contiguous()
    one = kda.capture(k, v, same, beta, [1])
    other = gated_delta.capture(k, v, same[..., 0], beta, [1])
    torch.testing.assert_close(one.A, other.A)


@pytest.mark.parametrize("family", [FAMILIES[2], FAMILIES[4]], ids=str)
def test_parallel_form(family: Family) -> None:
    """GLA and RetNet as their papers' parallel form has it: O = (Q K^T * D) V with
    D the decay between two tokens."""
    inputs = family.draw(50, MIXED)
    q, k, v, g = inputs
    total = g.expand(50, -1)[..., None] if g.dim() == 1 else g
    total = total.cumsum(0)
    decay = (total[:, None] - total[None]).exp()
    scores = torch.einsum("ihc,jhc,ijhc->ijh", q, k, decay.expand(-1, -1, -1, DK))
    out = torch.einsum("ijh,jhv->ihv", scores * torch.ones(50, 50).tril()[..., None], v)
    torch.testing.assert_close(family.module.chunk(*inputs, zero_state(1), [50])[0], out)


# -- The convolution --


@settings(max_examples=30)
@given(
    lengths=st.lists(st.integers(0, 9), max_size=5),
    width=st.integers(2, 5),
    bias=st.booleans(),
    silu=st.booleans(),
    seed=seeds,
)
def test_convolution(lengths: list[int], width: int, bias: bool, silu: bool, seed: int) -> None:
    torch.manual_seed(seed)
    x, weight = torch.randn(sum(lengths), 6).double(), torch.randn(6, width).double()
    offset = torch.randn(6).double() if bias else None
    history = torch.randn(len(lengths), 6, width - 1).double()
    y, after = short_conv.convolve(x, weight, offset, history, lengths, silu=silu)
    bounds = [0, *itertools.accumulate(lengths)]
    for i, (first, last) in enumerate(itertools.pairwise(bounds)):
        exact, end = short_conv.recurrent(x[first:last], weight, offset, history[i], silu=silu)
        torch.testing.assert_close(y[first:last], exact)
        torch.testing.assert_close(after[i], end)


# -- A layer with its convolution --

WIDTH = 4


@dataclasses.dataclass(frozen=True)
class Layer:
    """A linear layer without projections: convolution, then the recurrence.

    Attributes:
        x: [tokens, channels], a row's inputs, q, k and v behind one another.
        weight: [channels, WIDTH].
        gates: the family's, of the row's tokens.
    """

    family: Family
    x: torch.Tensor
    weight: torch.Tensor
    gates: Inputs

    @classmethod
    def draw(cls, family: Family, tokens: int, memory: Memory = LONG, seed: int = 0) -> Layer:
        generator = torch.Generator().manual_seed(seed)
        channels = 2 * family.groups * DK + HEADS * DV
        x = torch.randn(tokens, channels, generator=generator)
        weight = torch.randn(channels, WIDTH, generator=generator)
        return cls(family, x, weight, single(family.draw(tokens, memory, seed)[3:]))

    def double(self) -> Layer:
        gates = tuple(g.double() for g in self.gates)
        return Layer(self.family, self.x.double(), self.weight.double(), gates)

    def empty(self) -> tuple[torch.Tensor, torch.Tensor]:
        """History and state before a prompt's first token."""
        state = torch.zeros(1, HEADS, DK, DV, dtype=self.x.dtype)
        return self.x.new_zeros((1, self.x.shape[1], WIDTH - 1)), state

    def inputs(self, first: int, last: int, history: torch.Tensor) -> tuple[Inputs, torch.Tensor]:
        """What the recurrence sees of a stretch, and the history behind it."""
        y, history = short_conv.convolve(
            self.x[first:last], self.weight, None, history, [last - first]
        )
        keys = self.family.groups * DK
        q, k, v = y.split([keys, keys, HEADS * DV], -1)
        q, k = self.family.keys(q.unflatten(-1, (-1, DK)), k.unflatten(-1, (-1, DK)))
        gates = cut(self.gates, first, last)
        return (q, k, v.unflatten(-1, (-1, DV)), *gates), history


@dataclasses.dataclass(frozen=True)
class Stored:
    """What compiling a segment keeps: the pair of its core and its conv tail."""

    first: int
    core: int
    last: int
    pair: Pair
    tail: torch.Tensor


def compile_segment(layer: Layer, first: int, last: int, head: int) -> Stored:
    """From the segment alone: no history, no state."""
    core = first + head
    inputs, tail = layer.inputs(first, last, layer.empty()[0])
    pair = layer.family.module.capture(*cut(inputs, core - first, last - first)[1:], [last - core])
    return Stored(first, core, last, pair, tail)


def link(layer: Layer, segments: Sequence[Stored], tokens: int) -> tuple[torch.Tensor, ...]:
    """A row of stored segments and live tokens between them: live tokens and heads
    are computed, cores are not. Returns outputs of live tokens and the end state."""
    history, state = layer.empty()
    outputs, at = [], 0
    for segment in [*segments, None]:
        until = segment.core if segment else tokens
        inputs, history = layer.inputs(at, until, history)
        out, state, _ = layer.family.module.chunk(*inputs, state, [until - at])
        outputs.append(out)
        if segment is not None:
            state, history, at = apply(segment.pair, state), segment.tail, segment.last
    return torch.cat(outputs), state


def single_pass(layer: Layer, segments: Sequence[Stored], tokens: int) -> tuple[torch.Tensor, ...]:
    """The same row, token by token in float64; outputs of the tokens ``link`` computes."""
    layer = layer.double()
    history, state = layer.empty()
    y, _ = short_conv.recurrent(layer.x, layer.weight, None, history[0])
    chunked, _ = layer.inputs(0, tokens, history)
    torch.testing.assert_close(chunked[2].flatten(1), y[:, -HEADS * DV :])
    out, state = layer.family.module.recurrent(*chunked, state[0])
    live = torch.ones(tokens, dtype=torch.bool)
    for segment in segments:
        live[segment.core : segment.last] = False
    return out[live], state[None]


@families
@settings(max_examples=20)
@given(data=st.data(), seed=seeds)
def test_linked_layer_is_the_single_pass_layer(
    family: Family, data: st.DataObject, seed: int
) -> None:
    """Heads of at least 3 tokens cover the convolution of width 4: exact. A segment
    no longer than its head is live altogether."""
    lengths = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=12), label="segments")
    gaps = st.lists(st.integers(0, 6), min_size=len(lengths) + 1, max_size=len(lengths) + 1)
    live = data.draw(gaps, label="live tokens")
    heads = data.draw(st.integers(WIDTH - 1, 8), label="head")
    tokens = sum(lengths) + sum(live)
    layer = Layer.draw(family, tokens, LONG, seed)
    segments, at = [], 0
    for gap, length in zip(live, lengths, strict=False):
        if length > heads:
            segments.append(compile_segment(layer, at + gap, at + gap + length, heads))
        at += gap + length
    out, state = link(layer, segments, tokens)
    exact, end = single_pass(layer, segments, tokens)
    assert far(state, end) < 1e-5
    if out.numel():
        assert float((out.double() - exact).norm() / exact.norm()) < 1e-5


SEGMENT, LIVE, COUNT = 32, 5, 6
ROW = COUNT * (SEGMENT + LIVE) + LIVE


def segmented(layer: Layer, head: int) -> list[Stored]:
    """Six segments of 32 tokens with five live ones around each."""
    starts = [LIVE + i * (SEGMENT + LIVE) for i in range(COUNT)]
    return [compile_segment(layer, at, at + SEGMENT, head) for at in starts]


@functools.cache
def row(family: Family) -> tuple[Layer, torch.Tensor]:
    """A row, and its true end state."""
    layer = Layer.draw(family, ROW)
    return layer, single_pass(layer, [], ROW)[1]


@families
@pytest.mark.parametrize("head", range(6))
def test_heads_cover_the_convolution(family: Family, head: int) -> None:
    """Exact from width - 1 tokens on, and clearly not below."""
    layer, end = row(family)
    wrong = far(link(layer, segmented(layer, head), ROW)[1], end)
    assert wrong < 1e-5 if head >= WIDTH - 1 else wrong > 1e-2


def scalar_decay(layer: Layer, segment: Stored) -> torch.Tensor:
    """The decay of the mean channel alone, as if the family had nothing else."""
    g = layer.gates[0][segment.core : segment.last]
    scale = g.reshape(*g.shape[:2], -1).mean(-1).sum(0).exp()[None, :, None].expand(1, HEADS, DK)
    return torch.diag_embed(scale) if segment.pair.A.dim() == 4 else scale


def mistake(name: str, layer: Layer, segment: Stored) -> Stored:
    """A stored segment as a wrong implementation would have it."""
    pair = segment.pair
    if name == "no conv tail":
        return dataclasses.replace(segment, tail=torch.zeros_like(segment.tail))
    if name == "head twice":  # the pair is over head and core, and the head is computed too
        whole = compile_segment(layer, segment.first, segment.last, 0)
        return dataclasses.replace(segment, pair=whole.pair)
    operators = {
        "no operator": lambda: torch.zeros_like(pair.A),
        "identity": lambda: identity_like(pair).A,
        "transposed": lambda: pair.A.mT,
        "scalar decay": lambda: scalar_decay(layer, segment),
    }
    return dataclasses.replace(segment, pair=Pair(operators[name](), pair.B))


MISTAKES = ["no operator", "identity", "no conv tail", "head twice"]
MATRIX_MISTAKES = ["transposed", "scalar decay"]


@pytest.mark.parametrize(
    ("family", "name"),
    [
        *itertools.product(FAMILIES, MISTAKES),
        *itertools.product(FAMILIES[:2], MATRIX_MISTAKES),
        (FAMILIES[2], "scalar decay"),
    ],
    ids=str,
)
def test_mistakes_show(family: Family, name: str) -> None:
    layer, end = row(family)
    wrong = [mistake(name, layer, segment) for segment in segmented(layer, WIDTH - 1)]
    assert far(link(layer, wrong, ROW)[1], end) > 1e-2


def test_long_memory_matters() -> None:
    """With Qwen3-Next's initialisation (decay rates up to 16 a token) dropping the
    operator altogether goes unnoticed."""
    layer, _ = row(FAMILIES[0])
    rate = torch.linspace(0.5, 16, HEADS)
    noise = torch.randn(ROW, HEADS, generator=torch.Generator().manual_seed(0))
    layer = dataclasses.replace(layer, gates=(-rate * F.softplus(noise + 1), layer.gates[1]))
    wrong = [mistake("no operator", layer, s) for s in segmented(layer, WIDTH - 1)]
    _, end = single_pass(layer, wrong, ROW)
    assert far(link(layer, wrong, ROW)[1], end) < 1e-5


# -- Storage --


def layers_of(family: Family, segments: int, length: int, memory: Memory = LONG) -> Pair:
    """Pairs of ``segments`` stretches, with the stretches in the place of layers."""
    inputs = single(family.draw(segments * length, memory))
    return family.module.capture(*inputs[1:], [length] * segments)


@families
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_stored_pairs(family: Family, dtype: torch.dtype) -> None:
    pair = layers_of(family, 3, 40)
    packed = pack(pair, dtype=dtype)
    back = packed.unpack()
    assert back.A.dtype == back.B.dtype == torch.float32
    tolerance = 0.0 if dtype == torch.float32 else 2**-11
    torch.testing.assert_close(back.B, pair.B, rtol=tolerance, atol=1e-7 * (tolerance > 0))
    if pair.A.dim() == 4:
        torch.testing.assert_close(back.A, pair.A, rtol=tolerance, atol=1e-7 * (tolerance > 0))
        kept = 8 * 3 * HEADS
        assert packed.nbytes == dtype.itemsize * (pair.A.numel() + pair.B.numel()) + kept
    else:
        torch.testing.assert_close(back.A, pair.A, rtol=0, atol=0)
        assert packed.nbytes == 4 * pair.A.numel() + dtype.itemsize * pair.B.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_forgotten_operators_are_dropped(dtype: torch.dtype) -> None:
    """What is lost is at most the threshold times the state."""
    family, threshold = FAMILIES[0], 1e-3
    inputs = list(single(family.draw(80)))
    inputs[3] = inputs[3] * torch.tensor([1.0, 1.0, 100.0, 1.0])
    pair = family.module.capture(*inputs[1:], [40, 40])
    packed = pack(pair, dtype=dtype, threshold=threshold)
    assert packed.kept is not None and packed.kept.tolist() == [0, 1, 3, 4, 5, 7]
    assert packed.nbytes < pack(pair, dtype=dtype).nbytes
    back, state = packed.unpack(), torch.randn(HEADS, DK, DV)
    assert not back.A[:, 2].any() and back.A[:, 0].any()
    lost = (apply(pair, state) - apply(back, state))[:, 2].norm(dim=(-2, -1))
    rounding = 2**-11 * pair.B[:, 2].norm(dim=(-2, -1)) if dtype == torch.float16 else 1e-6
    assert (lost <= threshold * state[2].norm() + rounding).all()


@pytest.mark.parametrize("value", [1e5, -1e30, math.inf, math.nan])
@pytest.mark.parametrize("which", ["A", "B"])
def test_float16_does_not_overflow(value: float, which: str) -> None:
    """The tensor that does not fit stays float32, the other does not."""
    pair = layers_of(FAMILIES[0], 2, 20)
    getattr(pair, which)[1, 0, 2, 3] = value
    packed = pack(pair, dtype=torch.float16, threshold=1e-6)
    stored = {"A": packed.operator.dtype, "B": packed.state.dtype}
    assert stored.pop(which) == torch.float32
    assert list(stored.values()) == [torch.float16]
    back = packed.unpack()
    torch.testing.assert_close(
        getattr(back, which), getattr(pair, which), rtol=0, atol=0, equal_nan=True
    )


def test_float16_does_not_underflow() -> None:
    """A head whose whole state is tiny keeps its precision: a norm follows the layer."""
    pair = layers_of(FAMILIES[3], 2, 20)
    pair.B[1, 2] *= 1e-7
    assert pack(pair, dtype=torch.float16).state.dtype == torch.float32
    pair.B[1, 2] = 0
    assert pack(pair, dtype=torch.float16).state.dtype == torch.float16


@families
def test_float16_does_not_accumulate(family: Family) -> None:
    """Twenty segments of 512 tokens, stored in float16, most of what came before
    kept: 2e-4 after the first, and never more than one rounding of a value."""
    exact = layers_of(family, 20, 512, Memory(1e-5, 1e-3, beta=0.01))
    kept = exact.A.flatten(2).norm(dim=-1) if exact.A.dim() > 2 else exact.A
    assert kept.min() > 0.3
    stored = pack(exact, dtype=torch.float16).unpack()
    true, state, errors = zero_state(), zero_state(), []
    for i in range(20):
        true = apply(Pair(exact.A[i].double(), exact.B[i].double()), true)
        state = apply(Pair(stored.A[i], stored.B[i]), state.float())
        errors.append(far(state, true))
    assert errors[0] < 3e-4
    assert max(errors) < 2**-11


# -- Against the models' own layers --

HIDDEN = 32


@dataclasses.dataclass(frozen=True)
class Theirs:
    """A transformers layer, and how to read its projections.

    Attributes:
        model: module under ``transformers.models``.
        config, layer: names of its classes.
        options: of the configuration.
        project: (layer, hidden [tokens, HIDDEN]) to what the layer convolves,
            [tokens, channels], and gates.
        split: (layer, convolved [tokens, channels]) to q, k, v as our functions want them.
    """

    family: ModuleType
    model: str
    config: str
    layer: str
    options: dict[str, Any]
    project: Callable[[Any, torch.Tensor], tuple[torch.Tensor, Inputs]]
    split: Callable[[Any, torch.Tensor], Inputs]

    def build(self) -> tuple[Any, Any]:
        """Configuration and a layer with random weights and gates of long memory."""
        models = f"transformers.models.{self.model}"
        configuration = importlib.import_module(f"{models}.configuration_{self.model}")
        modeling = importlib.import_module(f"{models}.modeling_{self.model}")
        config = getattr(configuration, self.config)(
            hidden_size=HIDDEN, num_hidden_layers=2, **self.options
        )
        torch.manual_seed(0)
        layer = getattr(modeling, self.layer)(config, 0).eval()
        for module in layer.modules():
            for name, weight in module.named_parameters(recurse=False):
                if name == "A_log":
                    rate = torch.linspace(math.log(0.005), math.log(0.1), HEADS)
                    weight.data.copy_(rate.reshape(weight.shape))
                elif name in ("dt_bias", "D"):
                    weight.data.normal_(0, 0.5)
        return config, layer

    def __str__(self) -> str:
        return self.model


def normalised(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6)


def split_delta(y: torch.Tensor, key_heads: int, dk: int, dv: int) -> Inputs:
    q, k, v = y.split([key_heads * dk, key_heads * dk, HEADS * dv], -1)
    q, k = (normalised(x.unflatten(-1, (-1, dk))) for x in (q, k))
    q, k = (x.repeat_interleave(HEADS // key_heads, 1) for x in (q, k))
    return q * dk**-0.5, k, v.unflatten(-1, (-1, dv))


def gates_delta(layer: Any, a: torch.Tensor, b: torch.Tensor) -> Inputs:
    return -layer.A_log.exp() * F.softplus(a + layer.dt_bias), b.sigmoid()


def project_qwen3_next(layer: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, Inputs]:
    qkvz, ba = layer.in_proj_qkvz(hidden)[None], layer.in_proj_ba(hidden)[None]
    q, k, v, _, b, a = layer.fix_query_key_value_ordering(qkvz, ba)
    x = torch.cat([t[0].flatten(1) for t in (q, k, v)], -1)
    return x, gates_delta(layer, a[0], b[0])


def project_qwen3_5(layer: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, Inputs]:
    gates = gates_delta(layer, layer.in_proj_a(hidden), layer.in_proj_b(hidden))
    return layer.in_proj_qkv(hidden), gates


def three(layer: Any, hidden: torch.Tensor) -> torch.Tensor:
    return torch.cat([layer.q_proj(hidden), layer.k_proj(hidden), layer.v_proj(hidden)], -1)


def project_olmo(layer: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, Inputs]:
    g, beta = gates_delta(layer, layer.a_proj(hidden), layer.b_proj(hidden))
    return three(layer, hidden), (g, 2 * beta)


def project_kimi(layer: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, Inputs]:
    gates = layer.forget_gate(hidden[None])[0], layer.b_proj(hidden).sigmoid()
    return three(layer, hidden), gates


def project_mamba(layer: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, Inputs]:
    _, x, dt = layer.in_proj(hidden).split([layer.intermediate_size, layer.conv_dim, HEADS], -1)
    dt = F.softplus(dt + layer.dt_bias).clamp(*layer.time_step_limit)
    return x, (-layer.A_log.exp() * dt, dt)


def split_mamba(layer: Any, y: torch.Tensor) -> Inputs:
    v, k, q = y.split([HEADS * 16, GROUPS * DK, GROUPS * DK], -1)
    return tuple(x.unflatten(-1, (d, -1)) for x, d in ((q, GROUPS), (k, GROUPS), (v, HEADS)))


def project_minimax(layer: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, Inputs]:
    return layer.act_fn(layer.qkv_proj(hidden)), (-layer.slope_rate.flatten(),)


def split_minimax(layer: Any, y: torch.Tensor) -> Inputs:
    return y.unflatten(-1, (HEADS, -1)).split(DK, -1)


TYPES = {"layer_types": ["linear_attention", "full_attention"]}
GDN = {
    **TYPES,
    "linear_num_value_heads": HEADS,
    "linear_key_head_dim": DK,
    "linear_value_head_dim": DV,
}
SSM = {"n_groups": GROUPS, "expand": 2, "chunk_size": 32}
MAMBA = {f"mamba_{name}": value for name, value in SSM.items()}
MAMBA |= {"mamba_n_heads": HEADS, "mamba_d_head": 16, "mamba_d_state": DK}
THEIRS = [
    Theirs(
        gated_delta,
        "qwen3_next",
        "Qwen3NextConfig",
        "Qwen3NextGatedDeltaNet",
        {**GDN, "linear_num_key_heads": 2},
        project_qwen3_next,
        lambda layer, y: split_delta(y, 2, DK, DV),
    ),
    Theirs(
        gated_delta,
        "qwen3_5",
        "Qwen3_5TextConfig",
        "Qwen3_5GatedDeltaNet",
        {**GDN, "linear_num_key_heads": 2},
        project_qwen3_5,
        lambda layer, y: split_delta(y, 2, DK, DV),
    ),
    Theirs(
        gated_delta,
        "olmo_hybrid",
        "OlmoHybridConfig",
        "OlmoHybridGatedDeltaNet",
        {**GDN, "linear_num_key_heads": HEADS, "linear_allow_neg_eigval": True},
        project_olmo,
        lambda layer, y: split_delta(y, HEADS, DK, DV),
    ),
    Theirs(
        kda,
        "kimi_linear",
        "KimiLinearConfig",
        "KimiLinearDeltaAttention",
        {**TYPES, "linear_num_heads": HEADS, "linear_head_dim": DK},
        project_kimi,
        lambda layer, y: split_delta(y, HEADS, DK, DK),
    ),
    Theirs(
        kda,
        "glm5_next",
        "Glm5NextTextConfig",
        "Glm5NextTextLinearAttention",
        {
            **TYPES,
            "linear_num_heads": HEADS,
            "linear_head_dim": DK,
            "linear_lower_bound": -0.02,
        },
        project_kimi,
        lambda layer, y: split_delta(y, HEADS, DK, DK),
    ),
    Theirs(
        ssd,
        "mamba2",
        "Mamba2Config",
        "Mamba2Mixer",
        {**SSM, "num_heads": HEADS, "head_dim": 16, "state_size": DK},
        project_mamba,
        split_mamba,
    ),
    Theirs(
        ssd,
        "bamba",
        "BambaConfig",
        "BambaMixer",
        {**MAMBA, "attn_layer_indices": [1]},
        project_mamba,
        split_mamba,
    ),
    Theirs(
        ssd,
        "granitemoehybrid",
        "GraniteMoeHybridConfig",
        "GraniteMoeHybridMambaLayer",
        {**MAMBA, "layer_types": ["mamba", "attention"]},
        project_mamba,
        split_mamba,
    ),
    Theirs(
        ssd,
        "nemotron_h",
        "NemotronHConfig",
        "NemotronHMamba2Mixer",
        {
            **SSM,
            "hybrid_override_pattern": "M*",
            "mamba_num_heads": HEADS,
            "mamba_head_dim": 16,
            "ssm_state_size": DK,
        },
        project_mamba,
        split_mamba,
    ),
    Theirs(
        lightning,
        "minimax",
        "MiniMaxConfig",
        "MiniMaxLightningAttention",
        {
            **TYPES,
            "num_attention_heads": HEADS,
            "num_key_value_heads": HEADS,
            "head_dim": DK,
            "block_size": 32,
        },
        project_minimax,
        split_minimax,
    ),
]


@dataclasses.dataclass
class Running:
    """Their layer over a prompt, piece by piece, and what its cache holds."""

    theirs: Theirs
    layer: Any
    cache: Any

    @classmethod
    def start(cls, theirs: Theirs, config: Any, layer: Any) -> Running:
        if theirs.model == "minimax":
            return cls(theirs, layer, importlib.import_module(layer.__module__).MiniMaxCache())
        return cls(
            theirs, layer, importlib.import_module("transformers").DynamicCache(config=config)
        )

    def run(self, hidden: torch.Tensor) -> torch.Tensor:
        """Outputs [tokens, HIDDEN]."""
        if self.theirs.model == "minimax":
            return self.layer(hidden[None], None, None, past_key_values=self.cache)[0][0]
        return self.layer(hidden[None], cache_params=self.cache)[0]

    @property
    def state(self) -> torch.Tensor:
        """[1, heads, dk, dv]; Mamba keeps it transposed."""
        if self.theirs.model == "minimax":
            return self.cache.get_linear_cache(0)
        state = self.cache.layers[0].recurrent_states[0]
        return state.mT if self.theirs.family is ssd else state

    @state.setter
    def state(self, state: torch.Tensor) -> None:
        if self.theirs.model == "minimax":
            self.cache.set_linear_cache(0, state)
        else:
            self.state.copy_(state)

    @property
    def history(self) -> torch.Tensor | None:
        """[1, channels, 3], where the layer has a convolution."""
        if self.theirs.model == "minimax":
            return None
        return self.cache.layers[0].conv_states[0][..., 1:]

    def inputs(
        self, hidden: torch.Tensor, history: torch.Tensor | None
    ) -> tuple[Inputs, torch.Tensor | None]:
        """What our recurrence is given for these tokens, and the history behind them."""
        x, gates = self.theirs.project(self.layer, hidden)
        if history is not None:
            conv = self.layer.conv1d
            x, history = short_conv.convolve(
                x, conv.weight.squeeze(1), conv.bias, history, [x.shape[0]]
            )
        return (*self.theirs.split(self.layer, x), *gates), history


@pytest.mark.parametrize("theirs", THEIRS, ids=str)
@torch.no_grad()
def test_a_models_own_layer(theirs: Theirs) -> None:
    """Chunk form against their prompt, step against their decode, and a link in
    which everything but the core's pair and conv tail is their code."""
    config, layer = theirs.build()
    cores: list[torch.Tensor] = []
    norm = layer.o_norm if hasattr(layer, "o_norm") else layer.norm
    norm.register_forward_pre_hook(lambda _, arguments: cores.append(arguments[0]))
    hidden = 2 * torch.randn(151, HIDDEN)
    prompt, start, core, end = 150, 40, 43, 110

    whole = Running.start(theirs, config, layer)
    out = whole.run(hidden[:prompt])
    none = None if whole.history is None else torch.zeros_like(whole.history)
    inputs, history = whole.inputs(hidden[:prompt], none)
    zero = torch.zeros_like(whole.state)
    ours, state, _ = theirs.family.chunk(*inputs, zero, [prompt])
    if theirs.family is ssd:
        ours = ours + layer.D[:, None] * inputs[2]
    scale = cores[0].abs().max()
    torch.testing.assert_close(
        ours.flatten() / scale, cores[0].flatten() / scale, atol=1e-5, rtol=0
    )
    assert far(state, whole.state) < 1e-5
    if history is not None:
        torch.testing.assert_close(history, whole.history)

    linked = Running.start(theirs, config, layer)
    linked.run(hidden[:core])
    segment, tail = linked.inputs(hidden[start:end], none)
    pair = theirs.family.capture(*cut(segment, core - start, end - start)[1:], [end - core])
    before = linked.state.clone()
    linked.state = apply(pair, before)
    assert far(linked.state, zero + pair.B) > 1e-2
    if tail is not None and linked.history is not None:
        linked.history.copy_(tail)
    rest = linked.run(hidden[end:prompt])
    torch.testing.assert_close(rest, out[end:], atol=1e-5, rtol=1e-4)
    assert far(linked.state, whole.state) < 1e-5

    one, _ = whole.inputs(hidden[prompt:], history)
    _, stepped = theirs.family.step(*one, whole.state.clone())
    whole.run(hidden[prompt:])
    assert far(stepped, whole.state) < 1e-5
