"""Random linear layers at a model's shapes: their kernels checked, timed, launched."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from sglang_pic.eval.gpu.attention_times import Time
from sglang_pic.eval.gpu.checks import Check, compared
from sglang_pic.eval.gpu.measure import Floors, graph_s
from sglang_pic.eval.gpu.shapes import Linear, ModelShape
from sglang_pic.kernels.operators import gated_delta, states, wy
from sglang_pic.kernels.operators.chunks import CHUNK
from sglang_pic.kernels.operators.pair import Pair
from sglang_pic.kernels.operators.states import Cores, Walk
from sglang_pic.kernels.operators.storage import pack

SEGMENTS, LENGTH, SEAM = 20, 512, 16
# Targets of issue 6, on an H200: seconds of one layer's composition, and the share of a
# compile that its capture may take.
COMPOSITION_S, CAPTURE_SHARE = 50e-6, 0.05
# Sums in another order and products of three tf32 parts, over the pieces of a row.
STATE_BOUND = 1e-5
# Products of bfloat16 factors with a float32 state in two parts.
FACTOR_BOUND = 1e-4
# How a store may keep pairs.
STORED = (torch.float32, torch.float16)


@dataclasses.dataclass
class Layer:
    """Random inputs of one gated-delta-net layer."""

    linear: Linear
    device: str
    seed: int = 0

    def __post_init__(self) -> None:
        self._random = torch.Generator().manual_seed(self.seed)

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self._random).to(self.device)

    def pairs(self, count: int) -> Pair:
        """Operators that forget a little, in the layout of SGLang's pools."""
        n = self.linear
        eye = torch.eye(n.dk, device=self.device)
        operator = 0.9 * eye + self.normal(count, n.heads, n.dk, n.dk) * (0.1 / n.dk)
        return Pair(operator.mT.contiguous().mT, self.normal(count, n.heads, n.dv, n.dk).mT)

    def cores(self, count: int, dtype: torch.dtype) -> Cores:
        """As the store keeps them, of one layer."""
        drawn = [self.pairs(1) for _ in range(count)]
        tail = (1, self.linear.channels, self.linear.width - 1)
        return Cores(
            [pack(pair, dtype=dtype) for pair in drawn], [self.normal(*tail) for _ in drawn]
        )

    def walk(self, rows: int, segments: int) -> Walk:
        """Rows of ``segments`` cores with a run behind each."""
        source, target, bounds = [], [], [0]
        for row in range(rows):
            for i in range(segments):
                if i:
                    source.append(-1 - (row * (segments - 1) + i - 1))
                    target.append(-1)
                source.append(row * segments + i)
                target.append(row * segments + i)
            bounds.append(len(source))

        def table(values: Sequence[int]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int32, device=self.device)

        openings = table([-1] * rows)
        return Walk(table(bounds), table(source), table(target), openings, rows * segments)

    def tokens(self, lengths: Sequence[int]) -> tuple[torch.Tensor, ...]:
        """k, v, g, beta of packed stretches, float32."""
        n, total = self.linear, sum(lengths)
        k = torch.nn.functional.normalize(self.normal(total, n.key_heads, n.dk), dim=-1)
        g = torch.nn.functional.logsigmoid(self.normal(total, n.heads) + 3)
        beta = self.normal(total, n.heads).sigmoid()
        return k, self.normal(total, n.heads, n.dv), g, beta


def state_checks(shape: ModelShape, linear: Linear, device: str, seed: int) -> Iterator[Check]:
    """Kernels of ``kernels.triton`` for linear layers."""
    from sglang_pic.kernels.triton import states as triton_states
    from sglang_pic.kernels.triton import wy as triton_wy

    made = Layer(linear, device, seed)

    def check(kernel: str, bound: float, both: Callable[[], Any]) -> Check:
        return compared(kernel, shape.name, torch.float32, bound, both)

    rows, segments = 2, 3
    inner = made.pairs(rows * (segments - 1))
    walk, slots = made.walk(rows, segments), made.normal(rows, linear.heads, linear.dk, linear.dv)
    wide = Pair(inner.A.double(), inner.B.double())
    for stored in STORED:
        cores = made.cores(rows * segments, stored)

        def before(cores: Cores = cores) -> tuple[torch.Tensor, torch.Tensor]:
            found = triton_states.states_before(cores, 0, inner, walk, slots)
            return found, states.states_before(cores, 0, wide, walk, slots.double())

        yield check(f"states_before, {_name(stored)} pairs", STATE_BOUND, before)

    width = linear.width - 1
    conv, cores = made.normal(4, linear.channels, width), made.cores(3, torch.float32)
    inputs, borrowed = made.normal(9, linear.channels), torch.tensor([2, 5], device=device)
    places = 2 * width + 3 * width + 2
    chosen = torch.randint(0, places, (5, width), generator=made._random).to(device)
    gather = (chosen, conv, torch.tensor([3, 1], device=device), cores, 0, inputs, borrowed)
    yield check(
        "histories_before",
        0.0,
        lambda: (triton_states.histories_before(*gather), states.histories_before(*gather)),
    )

    lengths = [1, CHUNK, CHUNK + 7, 3]
    k, v, g, beta = made.tokens(lengths)
    keys = k.repeat_interleave(linear.heads // linear.key_heads, 1)
    wide_k, wide_v, wide_g, wide_beta = (x.double() for x in (keys, v, g, beta))
    captured = gated_delta.capture(wide_k, wide_v, wide_g, wide_beta, lengths)

    def advanced() -> torch.Tensor:
        w, u, total = wy.factors(k, v, g, beta, lengths)
        running = torch.zeros(len(lengths), linear.heads, linear.dv + linear.dk, linear.dk)
        running[:, :, linear.dv :] = torch.eye(linear.dk)
        running = running.to(device)
        bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], device=device)
        triton_wy.advance(running, k, w, u, total, bounds)
        return running

    yield check(
        "advance (WY), A", FACTOR_BOUND, lambda: (advanced()[:, :, linear.dv :].mT, captured.A)
    )
    yield check(
        "advance (WY), B", FACTOR_BOUND, lambda: (advanced()[:, :, : linear.dv].mT, captured.B)
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def state_times(shape: ModelShape, linear: Linear, floors: Floors) -> Iterator[Time]:
    """One layer of a 20-segment link, and of its compile."""
    from sglang_pic.kernels.triton.states import states_before
    from sglang_pic.kernels.triton.wy import advance

    made = Layer(linear, "cuda")
    inner = made.pairs(SEGMENTS - 1)
    walk, slot = made.walk(1, SEGMENTS), made.normal(1, linear.heads, linear.dk, linear.dv)
    for stored in STORED:
        cores = made.cores(SEGMENTS, stored)
        seconds = graph_s(functools.partial(states_before, cores, 0, inner, walk, slot))
        yield Time(
            f"states in front of {SEGMENTS} runs, {_name(stored)} pairs", shape.name, seconds,
            seconds / COMPOSITION_S, "50 us", 1.0,
        )  # fmt: skip

    lengths = [LENGTH] * SEGMENTS
    k, v, g, beta = made.tokens(lengths)
    narrow = [x.bfloat16() for x in (k, v)]
    w = made.normal(sum(lengths), linear.heads, linear.dk).bfloat16()
    u = made.normal(sum(lengths), linear.heads, linear.dv).bfloat16()
    bounds = torch.arange(0, SEGMENTS + 1, device="cuda") * LENGTH
    eye = torch.eye(linear.dk, device="cuda")
    running = made.normal(SEGMENTS, linear.heads, linear.dv + linear.dk, linear.dk) * 0
    running[:, :, linear.dv :] = eye
    captured = graph_s(lambda: advance(running, narrow[0], w, u, g, bounds))
    # A compile's forward, of one layer: its share of all weights, met by every token.
    layers = shape.layers + shape.linear_layers
    compile_s = 2 * shape.parameters / layers * sum(lengths) / floors.matmul
    yield Time(
        f"capture of {SEGMENTS} cores of {LENGTH}, from WY factors", shape.name, captured,
        captured / compile_s, "their compile, one layer, at the rate of a product", CAPTURE_SHARE,
    )  # fmt: skip
    yield from _sglang_times(made, shape, narrow, g, beta, lengths)


def _sglang_times(
    made: Layer,
    shape: ModelShape,
    narrow: Sequence[torch.Tensor],
    g: torch.Tensor,
    beta: torch.Tensor,
    lengths: Sequence[int],
) -> Iterator[Time]:
    """SGLang's own chunk kernel over the same tokens, where SGLang is installed."""
    try:
        from sglang.kernels.ops.attention.fla.chunk import chunk_gated_delta_rule
    except ImportError:
        return
    n = made.linear
    k, v = (x[None] for x in narrow)
    pool = made.normal(len(lengths), n.heads, n.dv, n.dk)
    index = torch.arange(len(lengths), dtype=torch.int32, device="cuda")
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], device="cuda")

    def walk() -> Any:
        return chunk_gated_delta_rule(
            k, k, v, g[None], beta.bfloat16()[None],
            initial_state=pool, initial_state_indices=index, cu_seqlens=cu,
        )  # fmt: skip

    yield Time("SGLang's chunk kernel over the same tokens", shape.name, graph_s(walk))


def launch_states(shape: ModelShape) -> None:
    """Launch every kernel of linear layers as a server of this shape would."""
    if shape.linear is None:
        return
    from sglang_pic.kernels.triton.states import histories_before, states_before
    from sglang_pic.kernels.triton.wy import advance

    n = shape.linear
    made = Layer(n, "cpu")
    inner, slot = made.pairs(1), made.normal(1, n.heads, n.dk, n.dv)
    for stored in STORED:
        cores = made.cores(2, stored)
        states_before(cores, 0, inner, made.walk(1, 2), slot)
    width = n.width - 1
    conv = made.normal(2, n.channels, width).bfloat16()
    slots, before = torch.tensor([0]), torch.zeros(2, width, dtype=torch.int64)
    histories_before(before, conv, slots, cores, 0, made.normal(4, n.channels).bfloat16(), slots)
    k, v, g, _ = made.tokens([CHUNK])
    w = made.normal(CHUNK, n.heads, n.dk).bfloat16()
    running = made.normal(1, n.heads, n.dv + n.dk, n.dk)
    advance(running, k.bfloat16(), w, v.bfloat16(), g, torch.tensor([0, CHUNK]))
