"""What a linked pass costs its device a layer and a step, counted: kernels, and tensors
that come from the host. What depends on lengths and plans goes there once a step."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from batches import CPU, Batch, Layer
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import GridExecutor

from sglang_pic.attention import ship as ship_module
from sglang_pic.attention.kernels import triton_kernels
from sglang_pic.attention.table_runner import TableRunner
from sglang_pic.attention.tables import Shape
from sglang_pic.kernels.operators.states import Cores
from sglang_pic.kernels.operators.storage import PackedPair
from sglang_pic.kernels.rotate import LayerRope
from sglang_pic.linear import packed
from sglang_pic.linear.shape import LinearShape
from sglang_pic.linear.state import CoreState
from sglang_pic.linear.step import LinkRow, build_link
from sglang_pic.link.plan import SegmentHit, make_plan, unlinked_plan
from sglang_pic.link.policy import LinkOptions

# What makes a tensor of a value of the host's, or reads one back: on a GPU the first is a
# copy, or a launch that no layer needs of its own, the second waits for the device.
FROM_HOST = {"aten::arange", "aten::lift_fresh", "aten::_local_scalar_dense", "aten::nonzero"}


# Of torch's in a layer: views, partial results, what is written into the output.
MOST_OPS = 16


class Ops(TorchDispatchMode):
    """Torch's operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[func.name().split(".")[0]] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Triton kernels by name, which do nothing."""
    seen: Counter[str] = Counter()
    monkeypatch.setattr(
        GridExecutor, "__call__", lambda self, *_, **__: seen.update([self.fn.__name__])
    )
    return seen


@pytest.fixture
def shipped(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Elements of each copy to the device that nobody waits for."""
    seen: list[int] = []
    usual = ship_module.to_device

    def counted(tensor: torch.Tensor, device: Any) -> torch.Tensor:
        seen.append(tensor.numel())
        return usual(tensor, device)

    monkeypatch.setattr(ship_module, "to_device", counted)
    return seen


def run_layers(batch: Batch, extend: list[int], layers: int, **shape: Any) -> Counter[str]:
    """Torch's operations in so many layers of one pass but the first, in which rotations
    are computed."""
    sizes = {"tile": 2, "kv_heads": batch.layer.kv_heads, "programs": 1, **shape}
    runner = TableRunner(triton_kernels(), Shape(**sizes), CPU)
    counts = [plan.n_tokens - plan.reused for plan in batch.plans]
    done = [n - e for n, e in zip(counts, extend, strict=True)]
    rows, query, _ = batch.rows(done, extend)
    runner.plan(rows)
    rope = LayerRope(batch.cos_sin, batch.layer.neox)
    out = torch.empty_like(query)

    def layer() -> None:
        runner.run(query, batch.pool(), rope, batch.scale, out)

    layer()
    with Ops() as ops:
        for _ in range(layers):
            layer()
    return ops.seen


@pytest.mark.parametrize("requests", [2, 3])
@pytest.mark.parametrize("segments", [3, 6])
@pytest.mark.parametrize(
    ("extend", "shape", "kernels"),
    [
        (3, {}, {"_walk_rows"}),
        (3, {"programs": 64}, {"_walk_rows", "_merge"}),
        (1, {"programs": 64}, {"_walk_rows", "_merge"}),
        (1, {"programs": 1}, {"_gather_rotate", "_attend_parts", "_merge"}),
    ],
    ids=["link", "link, cut", "decode, cut", "decode, shared"],
)
def test_a_layer_launches_a_few_kernels_whatever_the_batch(
    launched: Counter[str],
    requests: int,
    segments: int,
    extend: int,
    shape: dict[str, int],
    kernels: set[str],
) -> None:
    own = 0 if "_attend_parts" in kernels else segments
    prompts = [[i * own + j for j in range(segments)] for i in range(requests)]
    # Rows long enough to be worth a cut.
    batch = Batch(Layer(), prompts, seam=2, page=40)
    counts = [plan.n_tokens - plan.reused for plan in batch.plans]
    seen = run_layers(batch, [min(extend, n) for n in counts], 3, **shape)
    assert not FROM_HOST & seen.keys(), seen
    # Once in each of four layers.
    assert set(launched) == kernels and set(launched.values()) == {4}
    assert sum(seen.values()) <= 3 * MOST_OPS, seen


def test_a_steps_tables_go_in_one_copy(shipped: list[int]) -> None:
    batch = Batch(Layer(), [[0, 1, 2], [1, 2], [3]], seam=2, page=4)
    counts = [plan.n_tokens - plan.reused for plan in batch.plans]
    for extend in ([2] * 3, [1] * 3):
        rows, _, _ = batch.rows([n - e for n, e in zip(counts, extend, strict=True)], extend)
        runner = TableRunner(triton_kernels(), Shape(2, 2, 1), CPU)
        shipped.clear()
        runner.plan(rows)
        assert len(shipped) == 1, shipped


SHAPE = LinearShape(layers=2, heads=2, dk=16, dv=16, channels=8, history=3, scalar=False)


def core() -> CoreState:
    state = torch.zeros(SHAPE.layers, SHAPE.heads, SHAPE.dk, SHAPE.dv)
    pair = PackedPair.of_state(state, matrices=True)
    return CoreState(pair, None, torch.zeros(SHAPE.layers, SHAPE.channels, SHAPE.history))


def linked_rows(requests: int, segments: int) -> list[LinkRow]:
    length = 12
    hits = [
        SegmentHit(i * length, (i + 1) * length, i * length, torch.arange(length), (2, 11), core())
        for i in range(segments)
    ]
    total = segments * length + 3
    plan = make_plan(
        total, limit=total - 1, prefix=torch.empty(0, dtype=torch.int64), hits=hits,
        page=1,
    )  # fmt: skip
    live = total - plan.reused
    return [LinkRow(plan, LinkOptions(), i * live, plan.reused, live, i) for i in range(requests)]


@pytest.mark.parametrize(("requests", "segments"), [(1, 1), (3, 6)])
def test_a_linear_step_goes_in_one_copy(shipped: list[int], requests: int, segments: int) -> None:
    slots = torch.arange(requests) + 5
    step = build_link(linked_rows(requests, segments), SHAPE, slots)
    assert len(shipped) == 1
    assert step.slots.tolist() == slots.tolist()
    assert step.tokens.dtype == step.before.dtype == torch.int64
    assert step.walk.bounds.dtype == torch.int32


def test_what_all_layers_ask_for_is_made_once() -> None:
    lengths = [3, 5, 2]
    with Ops() as ops:
        tables = [(packed.indptr(lengths, CPU), packed.first(3, CPU)) for _ in range(4)]
    assert all(a is tables[0][0] and b is tables[0][1] for a, b in tables)
    assert ops.seen["aten::arange"] <= 1
    begun = [SHAPE.begun(2, CPU) for _ in range(2)]
    begun[0][:] = 7
    assert begun[1][:, :, SHAPE.dv :].equal(torch.eye(SHAPE.dk).expand(2, SHAPE.heads, -1, -1))


def test_memory_that_is_read_by_address_waits_for_its_stream(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Operators, states and tails alike."""

    @dataclasses.dataclass(eq=False)
    class OnGpu:
        is_cuda: bool = True
        device: str = "cuda:0"
        used: Any = None

        def record_stream(self, stream: Any) -> None:
            self.used = stream

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: ("stream of", device))
    tensors = [OnGpu() for _ in range(3)]
    pair = PackedPair(tensors[0], None, tensors[1])  # type: ignore[arg-type]
    Cores([pair], [tensors[2]]).used_here()  # type: ignore[list-item]
    assert all(tensor.used == ("stream of", "cuda:0") for tensor in tensors)


def test_a_pass_says_how_long_it_reads_the_table_of_rows() -> None:
    from sglang.srt.layers.attention.base_attn_backend import AttentionBackend, SharedReadEnds
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    from sglang_pic.attention.base import SpanBackend

    class Backend(SpanBackend, AttentionBackend):
        def __init__(self) -> None:
            pass

    Backend.__abstractmethods__ = frozenset()
    backend = Backend()
    stock: Callable[[Any], SharedReadEnds] = super(SpanBackend, backend).shared_read_ends
    for mode in (ForwardMode.EXTEND, ForwardMode.DECODE):
        backend.set_plans(["a", "b"], [None, None])
        assert backend.shared_read_ends(mode) is stock(mode)
        backend.set_plans(["a", "b"], [None, unlinked_plan(3)])
        assert backend.shared_read_ends(mode).value >= stock(mode).value
    assert backend.shared_read_ends(ForwardMode.DECODE) is SharedReadEnds.POST_REPLAY
    assert backend.shared_read_ends(ForwardMode.EXTEND) is SharedReadEnds.UNKNOWN


@pytest.mark.parametrize("extend", [1, 3])
@pytest.mark.parametrize(("requests", "segments"), [(2, 1), (4, 5)])
def test_a_layer_of_flashinfer_is_three_launches(
    monkeypatch: pytest.MonkeyPatch,
    shipped: list[int],
    requests: int,
    segments: int,
    extend: int,
) -> None:
    import flashinfer_cpu

    from sglang_pic.attention import flashinfer_launch as module

    pytest.importorskip("flashinfer")
    prompts = [list(range(segments)) for _ in range(requests)]
    batch = Batch(Layer(), prompts, seam=2, page=4)
    counts = [plan.n_tokens - plan.reused for plan in batch.plans]
    counts = [min(extend, n) for n in counts]
    done = [p.n_tokens - p.reused - n for p, n in zip(batch.plans, counts, strict=True)]
    rows, query, _ = batch.rows(done, counts)
    calls: Counter[str] = Counter()

    def counting(name: str, result: Any) -> Callable[..., Any]:
        return lambda *_, **__: (calls.update([name]), result)[1]

    stubs = {name: counting(name, query) for name in ("gather_rotate", "merge")}
    kernels = dataclasses.replace(triton_kernels(), **stubs)
    for _ in flashinfer_cpu.substitute():
        workspace = torch.empty(384 << 20, dtype=torch.uint8)
        layer = batch.layer
        shape = module.Shape(layer.heads, layer.kv_heads, layer.dim, 4, batch.dtype)
        launcher = module.Launcher(shape, workspace)
        launcher.plan(rows, batch.req_to_token, batch.pool_rows)
        # Of the layout, which lasts while the same rows decode, and of lengths.
        assert len(shipped) == 2
        monkeypatch.setattr(module, "kernels_for", lambda _: kernels)
        monkeypatch.setattr(module, "attend", counting("attend", (query, query)))
        rope = LayerRope(batch.cos_sin, batch.layer.neox)
        launcher.run(query, batch.keys, batch.values, rope, batch.scale)
        with Ops() as ops:
            for _ in range(3):
                launcher.run(query, batch.keys, batch.values, rope, batch.scale)
    assert calls == {"gather_rotate": 4, "attend": 4, "merge": 4}
    assert not FROM_HOST & ops.seen.keys() and sum(ops.seen.values()) <= 3 * MOST_OPS
