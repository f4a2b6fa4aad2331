"""Compile every Triton kernel for a Hopper, without a GPU: registers, shared memory, spills.

    python -m eval.gpu.aot --quick
    python -m eval.gpu.aot --json aot.json

Exits with 1 if a kernel could not be launched. ``--quick`` compiles at two models' shapes, one
of them of latent attention.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import sys
from collections.abc import Iterator
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from tqdm import tqdm

from sglang_pic.attention.kernels import latent_kernels, triton_kernels
from sglang_pic.attention.tables import tile_of, walkers
from sglang_pic.eval.command import Outcome, deliver, parser_of
from sglang_pic.eval.gpu.linear import launch_states
from sglang_pic.eval.gpu.offline import SHARED_LIMIT, Compiled, compiling
from sglang_pic.eval.gpu.scenario import Layout, Scenario
from sglang_pic.eval.gpu.shapes import LATENT_SHAPES, SHAPES, ModelShape
from sglang_pic.eval.tables import Table

WINDOW = 1023
LAYOUT = Layout(segments=2, length=32, seam=16, question=8, requests=2)


def launches(shape: ModelShape, dtype: torch.dtype) -> Iterator[str]:
    """Launch every kernel as a server of this shape would; says what for."""
    kernels = latent_kernels() if shape.latent else triton_kernels()
    # DeepSeek's rotary slices are turned by pairs.
    neox = not shape.latent
    made = Scenario(shape, LAYOUT, "cpu", dtype)
    tile = tile_of(shape.heads, shape.kv_heads)
    link, decode = made.link_rows(), made.decode_rows()
    forms = (
        ("link", link, tile, 1),
        ("link, cut", link, tile, 2),
        ("decode, cut", decode, 1, 2),
    )
    windows = (None,) if shape.latent else (None, WINDOW)
    for (what, rows, size, splits), window in itertools.product(forms, windows):
        by_position = window is not None
        walked = walkers(rows, range(len(rows)), size, splits, made.device, by_position=by_position)
        query = made.normal(sum(row.extend for row in rows), shape.heads, shape.dim)
        out = query.new_empty((*query.shape[:2], shape.latent or shape.dim))
        turns = made.turns(walked.offset)
        options: dict[str, Any] = {"scale": made.scale, "neox": neox, "splits": splits}
        if window is not None:
            options["window"] = window
        kernels.walk_rows(query, *made.pool(), walked.table, turns, out, **options)
        yield f"{what}, windowed" if by_position else what
    shared = made.parts(decode, tile, 1)
    query = made.normal(len(decode), shape.heads, shape.dim)
    cos, sin = made.turns(shared.offset)
    gathered = kernels.gather_rotate(
        query, shared.table.query, cos, sin, neox=neox, first=shape.latent
    )
    partial, lse = kernels.attend_parts(gathered, *made.pool(), shared.table, scale=made.scale)
    kernels.merge(partial, lse, shared.table.merge_indptr, shared.table.merge_index)
    yield "decode, shared"
    slots = torch.arange(16)
    keys = made.keys[..., shape.latent :]
    kernels.relocate(keys, made.values, slots, slots + 16, made.turns(slots))
    yield "relocate"
    launch_states(shape)
    yield "states"


def run(*, quick: bool) -> Outcome:
    """Compile at the shapes of all models, or of two."""
    rows: list[dict[str, Any]] = []
    shapes = SHAPES[1:2] + LATENT_SHAPES[:1] if quick else SHAPES + LATENT_SHAPES
    for shape in tqdm(shapes, desc="models", unit="model"):
        with compiling() as found:
            for what in launches(shape, torch.bfloat16):
                known = {"model": shape.name, "for": what}
                rows += [{**known, **dataclasses.asdict(one)} for one in found]
                found.clear()
    return Outcome({"target": "sm_90", "triton": triton.__version__}, rows, [_table(rows)])


def _table(rows: list[dict[str, Any]]) -> Table:
    names = [field.name for field in dataclasses.fields(Compiled)]
    cells = [
        [
            row["model"],
            row["for"],
            *(f"{row[n]:.1f}" if n == "seconds" else str(row[n]) for n in names),
        ]
        for row in rows
    ]
    note = f"Bytes. A block may take {SHARED_LIMIT} bytes of shared memory, a thread 255 registers."
    return Table("Compiled for sm_90", ["model", "for", *names], cells, note)


def main() -> None:
    parser = parser_of(__doc__ or "", "two models' shapes")
    args = parser.parse_args()
    outcome = run(quick=args.quick)
    deliver(outcome, args)
    if any(row["shared"] > SHARED_LIMIT for row in outcome.rows):
        sys.exit("a kernel needs more shared memory than there is")


if __name__ == "__main__":
    main()
