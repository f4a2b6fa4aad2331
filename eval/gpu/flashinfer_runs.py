"""FlashInfer's launches over spans, checked and timed where FlashInfer is installed."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from sglang_pic.attention.flashinfer_launch import Launcher, Shape
from sglang_pic.attention.kernels import TORCH
from sglang_pic.attention.step import StepRow
from sglang_pic.attention.tables import tile_of
from sglang_pic.eval.gpu.attention_times import BATCHES, LINK, Time
from sglang_pic.eval.gpu.checks import BOUND, Check, compared
from sglang_pic.eval.gpu.measure import Floors, time_s
from sglang_pic.eval.gpu.scenario import Layout, Scenario
from sglang_pic.eval.gpu.shapes import ModelShape
from sglang_pic.kernels.rotate import LayerRope

WORKSPACE_BYTES = 384 << 20


def installed() -> bool:
    return importlib.util.find_spec("flashinfer") is not None and torch.cuda.is_available()


def _launcher(made: Scenario, rows: Sequence[StepRow]) -> Launcher:
    shape, page = made.shape, made.layout.page
    of = Shape(shape.heads, shape.kv_heads, shape.dim, page, made.dtype)
    launcher = Launcher(of, torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device="cuda"))
    launcher.plan(rows, made.req_to_token, made.pool_rows)
    return launcher


def launch_checks(shape: ModelShape, layout: Layout, seed: int) -> Iterator[Check]:
    """Link and decode in bfloat16 against the torch oracle in float32."""
    made = Scenario(shape, layout, "cuda", torch.bfloat16, seed)
    rope = LayerRope(made.cos_sin, True)
    pool = [t.float() if t.is_floating_point() else t for t in made.pool()]
    for name, rows in (("link", made.link_rows()), ("decode", made.decode_rows())):
        query = made.normal(sum(row.extend for row in rows), shape.heads, shape.dim)

        def both(rows: Any = rows, query: Any = query) -> tuple[torch.Tensor, torch.Tensor]:
            found = _launcher(made, rows).run(query, made.keys, made.values, rope, made.scale)
            walked = made.walkers(rows, tile_of(shape.heads, shape.kv_heads), 1)
            expected = torch.empty_like(query, dtype=torch.float32)
            TORCH.walk_rows(
                query.float(), *pool, walked.table, made.turns(walked.offset), expected,
                scale=made.scale,
            )  # fmt: skip
            return found, expected

        dtype = torch.bfloat16
        yield compared(f"FlashInfer, {name}", shape.name, dtype, BOUND[dtype], both)


def launch_times(shape: ModelShape, floors: Floors) -> Iterator[Time]:
    """A 20-segment link and decode over shared spans, one layer, launched eagerly."""
    token = 2 * shape.kv_heads * shape.dim * torch.bfloat16.itemsize
    made = Scenario(shape, LINK, "cuda", torch.bfloat16)
    yield _timed("link, FlashInfer", made, made.link_rows())
    for batch in BATCHES:
        layout = dataclasses.replace(LINK, requests=batch, decoded=500)
        made = Scenario(shape, layout, "cuda", torch.bfloat16)
        rows = made.decode_rows()
        timed = _timed(f"decode of {batch}, shared spans, FlashInfer", made, rows)
        unique = LINK.segments * LINK.length * token
        unique += sum(row.prefix + 1 - row.plan.reused for row in rows if row.plan) * token
        share = unique / timed.seconds / floors.copy
        of = "copy bandwidth, unique bytes, launching included"
        yield dataclasses.replace(timed, share=share, of=of)


def _timed(what: str, made: Scenario, rows: Sequence[StepRow]) -> Time:
    shape, rope = made.shape, LayerRope(made.cos_sin, True)
    launcher = _launcher(made, rows)
    query = made.normal(sum(row.extend for row in rows), shape.heads, shape.dim)
    seconds = time_s(lambda: launcher.run(query, made.keys, made.values, rope, made.scale))
    return Time(what, shape.name, seconds)
