"""FlashInfer over spans without a GPU: its own Python and its own planner, attention in
torch; against the torch oracle, and float64 attention with every key at its true position.

The calls are checked by making them: FlashInfer's wrappers are the installed ones, only
the compiled module behind them is ours. Tolerances as in ``batches``: sums in another
order, a rotation more; 5e-7 was the worst of 3,500 random batches in float32, and a key
that is wrongly seen, or not, moves results by more than 0.01."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import flashinfer_cpu
import pytest
import torch
from batches import Batch, Layer, close, computed
from hypothesis import given, settings
from hypothesis import strategies as st
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from sglang_pic.attention import tables
from sglang_pic.attention.flashinfer_graphs import GraphParts, Room
from sglang_pic.attention.flashinfer_launch import Launcher, Shape, natural
from sglang_pic.attention.kernels import TORCH
from sglang_pic.attention.ragged import Layouts, arrange, pages_of
from sglang_pic.attention.step import StepRow
from sglang_pic.attention.table_runner import TableRunner
from sglang_pic.attention.tables import walkers
from sglang_pic.kernels.rotate import LayerRope
from sglang_pic.kernels.rows import walk_rows

flashinfer = pytest.importorskip("flashinfer")
CPU = torch.device("cpu")
WORKSPACE = 384 * 1024 * 1024


@pytest.fixture(scope="module", autouse=True)
def module() -> Iterator[flashinfer_cpu.Module]:
    yield from flashinfer_cpu.substitute()


def workspace() -> torch.Tensor:
    # As large as SGLang's, but never touched.
    return torch.empty(WORKSPACE, dtype=torch.uint8)


def shape_of(batch: Batch) -> Shape:
    layer = batch.layer
    return Shape(layer.heads, layer.kv_heads, layer.dim, batch.page, batch.dtype)


def rope_of(batch: Batch) -> LayerRope:
    return LayerRope(batch.cos_sin, batch.layer.neox)


class Paged(Batch):
    """A batch that remembers its page size."""

    def __init__(self, layer: Layer, prompts: list[list[int]], *, page: int, **options: Any):
        super().__init__(layer, prompts, page=page, **options)
        self.page = page


LAYERS = [
    Layer(),
    Layer(heads=6, kv_heads=2, dim=16, rotary=8),
    Layer(heads=2, kv_heads=1, dim=32, rotary=16, neox=False),
]

batches = st.builds(
    lambda layer, prompts, seam, page, seed: Paged(
        LAYERS[layer], prompts, seam=seam, page=page, seed=seed
    ),
    st.integers(0, len(LAYERS) - 1),
    # The same segment twice in a row, in several rows, none at all.
    st.lists(st.lists(st.integers(0, 3), min_size=0, max_size=4), min_size=1, max_size=3),
    st.integers(0, 9),
    st.sampled_from([1, 16, 64]),
    st.integers(0, 1000),
)


def launched(launcher: Launcher, batch: Batch, rows: list[StepRow], query: torch.Tensor) -> Any:
    launcher.plan(rows, batch.req_to_token, batch.pool_rows)
    return launcher.run(query, batch.keys, batch.values, rope_of(batch), batch.scale)


@settings(max_examples=40)
@given(batch=batches, data=st.data())
def test_launches_are_attention_at_true_positions(batch: Paged, data: Any) -> None:
    """Rows that link, rows in the middle of a chunked prefill, rows that decode, at once."""
    counts = computed(batch)
    done = [data.draw(st.integers(0, n - 1)) for n in counts]
    extend = [data.draw(st.sampled_from([1, n - d])) for n, d in zip(counts, done, strict=True)]
    rows, query, exact = batch.rows(done, extend)
    launcher = Launcher(shape_of(batch), workspace())
    found = launched(launcher, batch, rows, query)
    assert torch.equal(launcher.token, torch.arange(len(query)))
    close(found, exact)
    made = walkers(rows, range(len(rows)), 8, 1, CPU)
    oracle = torch.empty_like(query)
    walk_rows(
        query, *batch.pool(), made.table, batch.turns(made.offset), oracle,
        scale=batch.scale, neox=batch.layer.neox,
    )  # fmt: skip
    close(found, oracle)


@settings(max_examples=10)
@given(batch=batches, chunk=st.sampled_from([1, 7, 40]))
def test_chunks_add_up(batch: Paged, chunk: int) -> None:
    """All of a prompt pass by pass; one launcher, as in a server."""
    launcher = Launcher(shape_of(batch), workspace())
    counts = computed(batch)
    for first in range(0, min(max(counts), 6 * chunk), chunk):
        left = [min(chunk, n - first) for n in counts]
        alive = [i for i, n in enumerate(left) if n > 0]
        rows, query, exact = batch.rows([first] * len(left), [max(0, n) for n in left])
        picked = [rows[i] for i in alive]
        launcher.plan(picked, batch.req_to_token, batch.pool_rows[alive])
        close(launcher.run(query, batch.keys, batch.values, rope_of(batch), batch.scale), exact)


def test_half_precision() -> None:
    batch = Paged(Layer(), [[0, 1], [1, 0]], seam=4, page=16, dtype=torch.float16)
    rows, query, exact = batch.rows([0, computed(batch)[1] - 1], [computed(batch)[0], 1])
    found = launched(Launcher(shape_of(batch), workspace()), batch, rows, query)
    assert found.dtype == torch.float32
    close(found, exact, torch.float16)


def test_without_positions() -> None:
    """A layer without rotary embedding: queries are gathered only."""
    batch = Paged(Layer(), [[0, 1]], seam=4, page=1)
    rows, query, _ = batch.rows([0], [computed(batch)[0]])
    launcher = Launcher(shape_of(batch), workspace())
    launcher.plan(rows, batch.req_to_token, batch.pool_rows)
    found = launcher.run(query, batch.keys, batch.values, None, batch.scale)
    made = walkers(rows, [0], 8, 1, CPU)
    oracle = torch.empty_like(query)
    walk_rows(query, *batch.pool(), made.table, None, oracle, scale=batch.scale)
    close(found, oracle)


def test_the_future_of_a_seam_stays_unseen() -> None:
    batch = Paged(Layer(), [[0, 1, 2]], seam=4, page=1, seed=3)
    count = computed(batch)[0]
    rows, query, exact = batch.rows([0], [count])
    seer = batch.plans[0].spans[-1].first_seer
    assert 0 < seer < count
    batch.keys[batch.plans[0].spans[-1].slots] = 99.0
    batch.values[batch.plans[0].spans[-1].slots] = 99.0
    found = launched(Launcher(shape_of(batch), workspace()), batch, rows, query)
    close(found[:seer], exact[:seer])
    assert (found[seer:].double() - exact[seer:]).abs().min() > 0


def test_log_sum_exp_is_natural() -> None:
    """FlashInfer says base 2: 8 equal scores of 0 are log2(8) = 3 there."""
    torch.testing.assert_close(natural(torch.tensor([3.0])), torch.tensor([8.0]).log())


# -- what is launched -------------------------------------------------------------------


def test_a_span_is_one_request_whatever_the_runs_and_rows() -> None:
    batch = Paged(Layer(), [[3, 0, 1, 0], [2, 1, 0]], seam=2, page=1, seed=5)
    rows, _, _ = batch.rows([0, 0], computed(batch))
    layout = arrange(rows, [0, 1])
    spans = [span for plan in batch.plans for span in plan.spans]
    places = {span.place for span in spans}
    assert len(places) < len(spans)
    assert layout.length.numel() == len(places) + len(rows)
    # Every span is seen by the tokens behind it, every row's own by all it computes.
    seers = sum(
        n - span.first_seer
        for plan, n in zip(batch.plans, computed(batch), strict=True)
        for span in plan.spans
    )
    assert layout.query.numel() == seers + sum(computed(batch))
    assert layout.sees.shape == (layout.query.numel(), 2) and layout.causal


def test_single_tokens_need_no_mask(module: flashinfer_cpu.Module) -> None:
    batch = Paged(Layer(), [[0, 1], [1, 0]], seam=2, page=16)
    counts = computed(batch)
    launcher = Launcher(shape_of(batch), workspace())
    for extend, mode in (([1, 1], 0), ([counts[0], 1], 2)):
        rows, query, _ = batch.rows([n - e for n, e in zip(counts, extend, strict=True)], extend)
        launched(launcher, batch, rows, query)
        assert module.mask_modes[-1] == mode


def test_ordinary_rows_are_left_out() -> None:
    batch = Paged(Layer(), [[0], [1]], seam=2, page=1)
    counts = computed(batch)
    rows, query, exact = batch.rows([0, 0], counts)
    rows[0] = StepRow(None, 0, 0, counts[0])
    launcher = Launcher(shape_of(batch), workspace())
    found = launched(launcher, batch, rows, query)
    assert launcher.token.tolist() == list(range(counts[0], sum(counts)))
    close(found, exact[counts[0] :])


# -- decode -----------------------------------------------------------------------------


def decoding(prompts: list[list[int]], page: int, steps: int = 3) -> tuple[Paged, list[Any]]:
    """A batch, and its rows, queries and results in each of the last steps. Generated
    tokens stand at their row index, and so do the last ones of a prompt's text: they are
    taken for generated."""
    seed = 0
    while True:
        batch = Paged(Layer(), prompts, seam=2, page=page, seed=seed)
        if all(p.spans and p.n_tokens - p.spans[-1].end > steps for p in batch.plans):
            break
        seed += 1
    counts = computed(batch)
    passes = [batch.rows([n - s for n in counts], [1] * len(counts)) for s in range(steps, 0, -1)]
    short = [dataclasses.replace(p, n_tokens=p.n_tokens - steps) for p in batch.plans]
    return batch, [
        ([dataclasses.replace(r, plan=p) for r, p in zip(rows, short, strict=True)], query, exact)
        for rows, query, exact in passes
    ]


@pytest.mark.parametrize("page", [1, 16, 64])
def test_a_layout_lasts_while_the_same_rows_decode(page: int) -> None:
    batch, passes = decoding([[0, 1], [1, 0], [1]], page)
    launcher, layouts, kept = Launcher(shape_of(batch), workspace()), Layouts(), []
    for rows, query, exact in passes:
        close(launched(launcher, batch, rows, query), exact)
        layout, length = layouts.of(rows)
        kept.append(layout)
        own = layout.own.long()
        grown = [row.prefix + 1 - row.plan.reused for row in rows]
        assert length[own].tolist() == grown
    assert kept[1] is kept[0] and kept[2] is kept[0]
    fewer = [dataclasses.replace(row, first_query=i) for i, row in enumerate(passes[2][0][1:])]
    assert layouts.of(fewer)[0] is not kept[0]


def test_a_shared_page_is_read_once() -> None:
    batch, passes = decoding([[0, 1]] * 3, 16)
    rows = passes[0][0]
    layout, length = Layouts().of(rows)
    pages = pages_of(layout, length, 16, batch.req_to_token, batch.pool_rows)
    assert pages.indices.unique().numel() == pages.indices.numel()


# -- CUDA graphs --------------------------------------------------------------------------


def replay(graphs: GraphParts, batch: Paged, size: int, query: torch.Tensor) -> torch.Tensor:
    """What a replay does: the same operations over the same buffers. It passes no
    Python, and so no check that there are as many queries as were planned."""
    graphs._wrappers[size]._qo_indptr_last = graphs.room.queries(size)
    padded = torch.cat([query, query.new_zeros(size - len(query), *query.shape[1:])])
    stock = torch.full_like(padded, 7.0)
    return graphs.run(
        padded, batch.keys, batch.values, rope_of(batch), batch.scale, stock
    )  # fmt: skip


@pytest.mark.parametrize("page", [1, 16, 64])
def test_graphs_are_refilled(page: int) -> None:
    """Batches of several sizes and sharing degrees through the same buffers, in any order."""
    room = Room(batch=4, seen=3, spans=6, pages=2000)
    some, passes = decoding([[0, 1], [1, 0], [1]], page)
    graphs = GraphParts(shape_of(some), [rope_of(some), None], workspace(), room)
    for size in (4, 2):
        graphs.capture(size)
        assert replay(graphs, some, size, passes[0][1][:1]).isfinite().all()
        plan = list(graphs._wrappers[size]._plan_info)
        for rows, query, exact in passes:
            rows, query, exact = rows[:size], query[:size], exact[:size]
            rows[0] = dataclasses.replace(rows[0], plan=None)
            assert graphs.fits(size, rows)
            assert graphs.refill(size, rows, some.req_to_token, some.pool_rows)
            # A graph holds the numbers of its capture.
            assert list(graphs._wrappers[size]._plan_info) == plan
            found = replay(graphs, some, size, query)
            close(found[1 : len(query)], exact[1:])
            assert (found[0] == 7).all() and (found[len(query) :] == 7).all()


def test_a_graph_refuses_what_does_not_fit() -> None:
    batch, passes = decoding([[0, 1, 2, 3], [3, 2, 1, 0]], 16)
    rows = passes[0][0]
    table = (batch.req_to_token, batch.pool_rows)
    fitting = Room(batch=2, seen=4, spans=4, pages=200)
    for room in (
        fitting,
        dataclasses.replace(fitting, seen=3),
        dataclasses.replace(fitting, spans=3),
        dataclasses.replace(fitting, pages=3),
    ):
        graphs = GraphParts(shape_of(batch), [rope_of(batch)], workspace(), room)
        assert not graphs.refill(2, rows, *table), "nothing is captured yet"
        graphs.capture(2)
        assert graphs.refill(2, rows, *table) == (room is fitting)
    wide = Room(batch=2, seen=500, spans=50, pages=2000)
    graphs = GraphParts(shape_of(batch), [rope_of(batch)], workspace(), wide)
    graphs.capture(2)
    linking, _, _ = batch.rows([0, 0], computed(batch))
    assert graphs.fits(2, rows) and not graphs.fits(2, linking)


# -- FlashInfer's planner -----------------------------------------------------------------


@pytest.fixture
def planner() -> None:
    if flashinfer_cpu.planner() is None:
        pytest.skip("no nvcc to compile FlashInfer's planner")


def work(plan: list[int], ints: torch.Tensor) -> dict[str, Any]:
    """The pieces of work a plan launches: their request, tile of queries, chunk of keys."""
    names = ("padded", "rows", "rows_at", "tile", "request", "q_tile", "kv_tile", "merge", "o",
             "chunk", "v", "s", "valid", "graph", "split")  # fmt: skip
    made = dict(zip(names, plan, strict=True))

    def column(name: str, dtype: torch.dtype, count: int) -> list[int]:
        size = count * torch.empty((), dtype=dtype).element_size()
        return ints[made[name] : made[name] + size].view(dtype).tolist()

    count = made["padded"]
    valid = column("valid", torch.bool, count) if made["graph"] else [True] * count
    columns = [column(name, torch.int32, count) for name in ("request", "q_tile", "kv_tile")]
    pieces = [piece for ok, *piece in zip(valid, *columns, strict=True) if ok]
    (chunk,) = column("chunk", torch.int32, 1)
    return {"pieces": pieces, "tile": made["tile"], "chunk": chunk, "total": count}


def check_work(qo: torch.Tensor, lens: torch.Tensor, found: dict[str, Any]) -> None:
    """Every query of every request meets every key once; ``qo`` counts query heads that
    share a key head, as tiles do."""
    pieces = [tuple(piece) for piece in found["pieces"]]
    assert len(set(pieces)) == len(pieces) <= found["total"]
    expected = set()
    for request, (n, length) in enumerate(zip(qo.diff().tolist(), lens.tolist(), strict=True)):
        if n:
            chunks = -(-length // found["chunk"])
            expected |= {
                (request, i, j) for i in range(-(-n // found["tile"])) for j in range(chunks)
            }
    assert set(pieces) == expected


def planned(shape: Shape, qo: torch.Tensor, kv: torch.Tensor, graph: bool, rows: int) -> Any:
    ints = torch.zeros(8 << 20, dtype=torch.uint8)
    numbers = flashinfer_cpu.plan(
        ints, WORKSPACE, qo, kv, rows, len(qo) - 1, shape.heads, shape.kv_heads,
        shape.page, graph, shape.head_dim,
    )  # fmt: skip
    return numbers, ints


@pytest.mark.usefixtures("planner")
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("page", [1, 16, 64])
def test_plans_of_links_cover_all_work(page: int, dim: int) -> None:
    batch = Paged(Layer(), [[0, 1, 2], [2, 0]], seam=4, page=page, seed=1)
    rows, _, _ = batch.rows([0, 0], computed(batch))
    layout, length = Layouts().of(rows)
    pages = pages_of(layout, length, page, batch.req_to_token, batch.pool_rows)
    shape = Shape(32, 8, dim, page, torch.float16)
    numbers, ints = planned(shape, layout.qo_indptr, pages.indptr, False, layout.query.numel())
    check_work(layout.qo_indptr * 4, length, work(numbers, ints))


@pytest.mark.usefixtures("planner")
def test_idle_requests_of_a_graph_cost_no_work(module: flashinfer_cpu.Module) -> None:
    """The planner takes requests without queries and pages, and plans nothing for them."""
    batch, passes = decoding([[0, 1], [1, 0], [1]], 16)
    room = Room(batch=8, seen=6, spans=20, pages=2000)
    graphs = GraphParts(shape_of(batch), [rope_of(batch)], workspace(), room)
    graphs.capture(8)
    assert graphs.refill(8, passes[0][0], batch.req_to_token, batch.pool_rows)
    made = module.plans[-1]
    idle = int((made["qo"].diff() == 0).sum())
    assert idle == room.requests(8) - 5 and int((made["kv"].diff() == 0).sum()) == idle
    found = work(list(graphs._wrappers[8]._plan_info), made["ints"])
    check_work(made["qo"] * 2, made["lens"], found)


# -- the backend --------------------------------------------------------------------------


class Pool:
    """SGLang's KV pool, as far as it is asked."""

    def __init__(self, batch: Batch):
        self.batch = batch

    def get_key_buffer(self, layer_id: int) -> torch.Tensor:
        return self.batch.keys

    def get_kv_buffer(self, layer_id: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.batch.keys, self.batch.values

    def set_kv_buffer(self, layer: Any, where: Any, k: Any, v: Any, *scales: Any) -> None:
        self.batch.keys[where.loc] = k
        self.batch.values[where.loc] = v


@pytest.fixture
def backend_class(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Ours, in front of a stock backend that answers 5 and notes what it was given."""
    from sglang.srt.layers.attention.flashinfer_backend import FlashInferAttnBackend

    from sglang_pic.attention.flashinfer import PicFlashInferBackend

    def stock(self: Any, q: Any, k: Any, v: Any, layer: Any, batch: Any, save: bool = True) -> Any:
        self.stock_calls.append("forward")
        if save:
            self.token_to_kv_pool.set_kv_buffer(
                layer, SimpleNamespace(loc=batch.out_cache_loc), k, v
            )
        return torch.full_like(q, 5.0)

    def metadata(self: Any, batch: Any) -> None:
        self.stock_calls.append(batch)

    def graph_metadata(self: Any, batch: Any, in_capture: bool = False) -> None:
        # Every capture makes wrappers of its own; a replay plans those that are there.
        self.stock_calls.append(batch)
        if in_capture:
            self.decode_cuda_graph_metadata[batch.batch_size] = object()
        else:
            self.replanned = self.decode_cuda_graph_metadata[batch.batch_size]

    monkeypatch.setattr(FlashInferAttnBackend, "init_cuda_graph_state", lambda *_: None)
    monkeypatch.setattr(FlashInferAttnBackend, "init_forward_metadata", metadata)
    monkeypatch.setattr(FlashInferAttnBackend, "init_forward_metadata_out_graph", graph_metadata)
    monkeypatch.setattr(FlashInferAttnBackend, "forward_extend", stock)
    monkeypatch.setattr(FlashInferAttnBackend, "forward_decode", stock)
    return PicFlashInferBackend


def served(backend_class: Any, batch: Paged, plans: list[Any]) -> Any:
    """A backend of ours without a model: its layer 0 has the batch's pool."""
    backend = object.__new__(backend_class)
    backend.stock_calls = []
    backend.ropes, backend.refusal = {0: rope_of(batch)}, None
    backend.token_to_kv_pool = Pool(batch)
    backend.req_to_token_pool = SimpleNamespace(req_to_token=batch.req_to_token)
    backend.kv_cache_quant_method = SimpleNamespace(needs_global_scale=lambda: False)
    backend.workspace_buffer = workspace()
    backend._launcher, backend._graphs = Launcher(shape_of(batch), workspace()), None
    backend._running, backend._ordinary, backend._rows = None, False, None
    backend._stock, backend.decode_cuda_graph_metadata = {}, {}
    tile = tables.Shape(tile=2, kv_heads=batch.layer.kv_heads, programs=8)
    backend._tables = TableRunner(TORCH, tile, "cpu")
    backend.set_plans([str(i) for i in range(len(plans))], plans)
    return backend


def forward_batch(batch: Batch, rows: list[StepRow], decode: bool, size: int = 0) -> Any:
    """SGLang's batch of these rows; padded to a graph's size, what a replay is given."""
    idle = max(0, size - len(rows))
    lens = torch.tensor([row.prefix + row.extend for row in rows] + [1] * idle)
    slots = [
        batch.req_to_token[pool_row, row.prefix : row.prefix + row.extend].long()
        for pool_row, row in zip(batch.pool_rows, rows, strict=True)
    ]
    return SimpleNamespace(
        batch_size=len(lens),
        forward_mode=ForwardMode.DECODE if decode else ForwardMode.EXTEND,
        rids=[str(i) for i in range(len(rows))],
        seq_lens=lens,
        seq_lens_cpu=lens,
        seq_lens_sum=int(lens.sum()),
        extend_seq_lens_cpu=[row.extend for row in rows],
        extend_prefix_lens=torch.tensor([row.prefix for row in rows]),
        extend_prefix_lens_cpu=[row.prefix for row in rows],
        req_pool_indices=torch.cat([batch.pool_rows, batch.pool_rows.new_zeros(idle)]),
        out_cache_loc=torch.cat(slots),
        out_cache_loc_is_physical=False,
    )


def layer_of(batch: Batch) -> Any:
    layer = batch.layer
    return SimpleNamespace(
        layer_id=0, tp_q_head_num=layer.heads, tp_k_head_num=layer.kv_heads,
        qk_head_dim=layer.dim, v_head_dim=layer.dim, scaling=batch.scale,
        k_scale=None, v_scale=None,
    )  # fmt: skip


@pytest.mark.parametrize("most", [1 << 28, 0])
@pytest.mark.parametrize("linked", ["none", "all", "mixed"])
@pytest.mark.parametrize("decode", [False, True])
def test_the_backend(
    backend_class: Any, linked: str, decode: bool, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``most``: if gathered queries take more bytes than that, rows walk instead."""
    monkeypatch.setattr("sglang_pic.attention.flashinfer.MOST_TRANSIENT", most)
    batch = Paged(Layer(), [[0, 1], [1, 0]], seam=2, page=16, seed=2)
    counts = computed(batch)
    done = [n - 1 for n in counts] if decode else [0, 0]
    rows, query, exact = batch.rows(done, [n - d for n, d in zip(counts, done, strict=True)])
    plans = [
        row.plan if linked == "all" or (linked == "mixed" and i) else None
        for i, row in enumerate(rows)
    ]
    forward = forward_batch(batch, rows, decode)
    slots = forward.out_cache_loc
    keys, values = batch.keys[slots].clone(), batch.values[slots].clone()
    batch.keys[slots], batch.values[slots] = 77.0, 77.0  # written by the pass itself

    backend = served(backend_class, batch, plans)
    backend.init_forward_metadata(forward)
    run = backend.forward_decode if decode else backend.forward_extend
    found = run(query.flatten(1), keys, values, layer_of(batch), forward).view(query.shape)
    first = {"none": len(query), "all": 0, "mixed": rows[1].first_query}[linked]
    assert (found[:first] == 5).all()
    close(found[first:], exact[first:])
    assert torch.equal(batch.keys[slots], keys)
    if linked == "none":
        assert backend.stock_calls == [forward, "forward"]
    elif linked == "all":
        assert backend.stock_calls == []
    else:
        short, call = backend.stock_calls
        total = int(forward.seq_lens[0])
        assert call == "forward" and short.seq_lens.tolist() == [total, rows[1].extend]


def test_the_backend_in_a_graph(backend_class: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Captured, then refilled for a batch that is padded and has an ordinary row."""
    from sglang_pic.attention import flashinfer as module_of_ours

    size, (batch, passes) = 4, decoding([[0, 1], [1, 0], [1]], 16)
    rows, query, exact = passes[0]
    plans = [None, *(row.plan for row in rows[1:])]
    backend = served(backend_class, batch, plans)
    backend.init_cuda_graph_state(size, size)
    forward, padded = (forward_batch(batch, rows, True, n) for n in (0, size))
    assert not backend.fits_graph(forward, size)
    captured = {}
    for label in ("ordinary", "linked"):
        monkeypatch.setattr(module_of_ours, "get_capture_attention_variant", lambda of=label: of)
        backend.init_forward_metadata_out_graph(padded, in_capture=True)
        captured[label] = backend.decode_cuda_graph_metadata[size]
        assert (backend._running is backend._graphs) == (label == "linked")
    # Each graph replays over the wrappers of SGLang's that it was captured with.
    backend.init_forward_metadata_out_graph(padded)
    assert backend.replanned is captured["ordinary"]

    assert backend.fits_graph(forward, size)
    backend.init_forward_metadata_out_graph(padded)
    assert backend.replanned is captured["linked"]
    short = backend.stock_calls[-1]
    assert short.seq_lens.tolist() == [int(forward.seq_lens[0]), 1, 1, 1]
    backend._running = backend._graphs
    backend._graphs._wrappers[size]._qo_indptr_last = backend._graphs.room.queries(size)
    whole = torch.cat([query, query[:1]]).flatten(1)
    found = backend.forward_decode(whole, None, None, layer_of(batch), padded, False)
    found = found.view(size, *query.shape[1:])
    close(found[1:3], exact[1:])
    assert (found[0] == 5).all() and (found[3] == 5).all()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"dtype": torch.float32}, "half precision"),
        ({"kv_dtype": torch.float8_e4m3fn}, "of the model's type only"),
        ({"qk_head_dim": 80}, "head dimension 80"),
        ({"is_cross_attention": True}, "cross-attention"),
        ({"tp_k_head_num": 4}, "different shapes"),
    ],
)
def test_what_flashinfer_cannot_do_is_refused(change: dict[str, Any], reason: str | None) -> None:
    from sglang_pic.attention.flashinfer import flashinfer_refusal

    usual = {
        "layer_id": 0, "qk_head_dim": 128, "is_cross_attention": False,
        "tp_q_head_num": 8, "tp_k_head_num": 2,
    }  # fmt: skip
    dtype = change.get("dtype", torch.bfloat16)
    layers = [usual, {**usual, **{k: v for k, v in change.items() if k in usual}, "layer_id": 1}]
    kv_dtype = change.get("kv_dtype", dtype)
    found = flashinfer_refusal([SimpleNamespace(**layer) for layer in layers], dtype, kv_dtype)
    assert (found is None) if reason is None else (found is not None and reason in found)
