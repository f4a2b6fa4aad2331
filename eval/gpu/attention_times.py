"""How fast attention over spans is, held against plain kernels and the floors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch

from sglang_pic.attention.kernels import triton_kernels
from sglang_pic.attention.step import StepRow
from sglang_pic.attention.tables import Shape, TableStep, build_tables, tile_of
from sglang_pic.eval.gpu.measure import Floors, graph_s
from sglang_pic.eval.gpu.scenario import Layout, Scenario
from sglang_pic.eval.gpu.shapes import ModelShape

LINK = Layout(segments=20, length=512, seam=16, question=64, page=16)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
# Targets of issue 6, on an H200.
LINK_RATE, DECODE_BANDWIDTH = 0.6, 0.8


@dataclasses.dataclass(frozen=True)
class Time:
    """One measurement: seconds, and what it is a share of."""

    what: str
    model: str
    seconds: float
    share: float | None = None
    of: str = ""
    target: float | None = None


def plain_prefill(made: Scenario, queries: int, keys: int) -> dict[str, Callable[[], Any]]:
    """Prefill kernels over as many contiguous keys: FlashInfer's where it is installed,
    and torch's flash attention."""
    from torch.nn.attention.bias import causal_lower_right

    shape = made.shape
    q = made.normal(queries, shape.heads, shape.dim)
    k, v = (made.normal(keys, shape.kv_heads, shape.dim) for _ in range(2))
    group = shape.heads // shape.kv_heads
    wide = [x.repeat_interleave(group, 1).transpose(0, 1)[None] for x in (k, v)]
    mask = causal_lower_right(queries, keys)

    def torch_flash() -> Any:
        return torch.nn.functional.scaled_dot_product_attention(
            q.transpose(0, 1)[None], *wide, attn_mask=mask
        )

    found: dict[str, Callable[[], Any]] = {"torch": torch_flash}
    try:
        import flashinfer
    except ImportError:
        return found

    def flashinfer_prefill() -> Any:
        return flashinfer.single_prefill_with_kv_cache(q, k, v, causal=True)

    return {"FlashInfer": flashinfer_prefill, **found}


def _step(shape: ModelShape, rows: list[StepRow]) -> TableStep:
    """As a server would run them."""
    cores = torch.cuda.get_device_properties(0).multi_processor_count
    of = Shape(tile_of(shape.heads, shape.kv_heads), shape.kv_heads, 2 * cores)
    made = build_tables(rows, of, "cuda")
    assert made is not None
    return made


def link_times(shape: ModelShape, floors: Floors) -> Iterator[Time]:
    """A 20-segment link's attention, one layer; rates in pairs of query and key."""
    made = Scenario(shape, LINK, "cuda", torch.bfloat16)
    rows = made.link_rows()
    (row,) = rows
    walked = _step(shape, rows).links
    assert walked is not None
    turns = made.turns(walked.offset)
    query = made.normal(row.extend, shape.heads, shape.dim)
    out = torch.empty_like(query)
    kernels = triton_kernels()
    ours = graph_s(
        lambda: kernels.walk_rows(
            query, *made.pool(), walked.table, turns, out,
            scale=made.scale, splits=walked.splits,
        )
    )  # fmt: skip
    # A token that is computed sees all that stands before it.
    plan, count = made.plans[0], row.extend
    pairs = int((plan.order[plan.reused :] + 1).sum())
    keys = plan.n_tokens
    plain_pairs = count * keys - count * (count - 1) // 2
    rates = {}
    for name, call in plain_prefill(made, count, keys).items():
        seconds = graph_s(call)
        rates[name] = plain_pairs / seconds
        yield Time(f"plain prefill, as many queries and keys, {name}", shape.name, seconds)
    name, best = max(rates.items(), key=lambda item: item[1])
    share = pairs / ours / best
    yield Time("link, walk_rows", shape.name, ours, share, f"the rate of {name}", LINK_RATE)


def decode_times(shape: ModelShape, floors: Floors, batches: tuple[int, ...]) -> Iterator[Time]:
    """One step's attention, one layer: documents shared by all, and copies of their own."""
    kernels = triton_kernels()
    token = 2 * shape.kv_heads * shape.dim * torch.bfloat16.itemsize
    cores = torch.cuda.get_device_properties(0).multi_processor_count
    tile = tile_of(shape.heads, shape.kv_heads)
    for batch in batches:
        layout = dataclasses.replace(LINK, requests=batch, decoded=500)
        made = Scenario(shape, layout, "cuda", torch.bfloat16)
        rows = made.decode_rows()
        query = made.normal(batch, shape.heads, shape.dim)
        shared = made.parts(rows, tile, 2 * cores)
        cos, sin = made.turns(shared.offset)
        out = torch.empty_like(query)

        def together(made: Any = made, shared: Any = shared, query: Any = query,
                     cos: Any = cos, sin: Any = sin, out: Any = out) -> None:  # fmt: skip
            table = shared.table
            gathered = kernels.gather_rotate(query, table.query, cos, sin, neox=True)
            partial, lse = kernels.attend_parts(gathered, *made.pool(), table, scale=made.scale)
            merged = kernels.merge(partial, lse, table.merge_indptr, table.merge_index)
            out[table.token] = merged.to(out.dtype)

        seconds = graph_s(together)
        unique = int(shared.table.kv_len.sum()) * token
        yield Time(
            f"decode of {batch}, shared spans", shape.name, seconds,
            unique / seconds / floors.copy, "copy bandwidth, unique bytes", DECODE_BANDWIDTH,
        )  # fmt: skip
        apart = Scenario(shape, dataclasses.replace(layout, shared=False), "cuda", torch.bfloat16)
        own = apart.decode_rows()
        walked = _step(shape, own).decodes
        assert walked is not None
        turns = apart.turns(walked.offset)

        def alone(made: Any = apart, walked: Any = walked, query: Any = query,
                  turns: Any = turns, out: Any = out) -> None:  # fmt: skip
            kernels.walk_rows(
                query, *made.pool(), walked.table, turns, out,
                scale=made.scale, splits=walked.splits,
            )  # fmt: skip

        copies = graph_s(alone)
        yield Time(
            f"decode of {batch}, copies of their own", shape.name, copies,
            copies / seconds, "times the shared form",
        )  # fmt: skip
