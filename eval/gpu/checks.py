"""Every kernel against its torch oracle, on fresh random inputs."""

from __future__ import annotations

import dataclasses
import math
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch

from sglang_pic.attention.kernels import TORCH, Kernels, latent_kernels, triton_kernels
from sglang_pic.attention.tables import tile_of
from sglang_pic.eval.gpu.scenario import Layout, Scenario
from sglang_pic.eval.gpu.shapes import ModelShape

# Largest difference over the largest value expected. float32: sums in another order.
# Narrower types: weights and partial sums are rounded to them, once a tile.
BOUND = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@dataclasses.dataclass(frozen=True)
class Check:
    """One comparison: largest difference, relative to the largest value expected; infinite
    where a kernel raised ``failure``."""

    kernel: str
    model: str
    dtype: str
    error: float
    bound: float
    failure: str = ""

    @property
    def ok(self) -> bool:
        return self.error <= self.bound


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, relative to the largest value expected."""
    found, expected = found.double().cpu(), expected.double().cpu()
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def compared(
    kernel: str, model: str, dtype: torch.dtype, bound: float,
    run: Callable[[], tuple[torch.Tensor, torch.Tensor]],
) -> Check:  # fmt: skip
    """Hold what ``run`` found against what it expected. A kernel that does not compile, or
    that a device refuses, is one failed check: of the others is still told."""
    name = str(dtype).removeprefix("torch.")
    try:
        error = difference(*run())
    except Exception as failed:
        traceback.print_exc()
        return Check(kernel, model, name, math.inf, bound, f"{type(failed).__name__}: {failed}")
    return Check(kernel, model, name, error, bound)


def attention_checks(
    shape: ModelShape, layout: Layout, device: str, dtype: torch.dtype, seed: int
) -> Iterator[Check]:
    """Kernels of ``kernels.triton`` for full attention."""
    made = Scenario(shape, layout, device, dtype, seed)
    # What the oracle computes from, it computes in float32.
    pool = [t.float() if t.is_floating_point() else t for t in made.pool()]
    tile = tile_of(shape.heads, shape.kv_heads)
    link, decode = made.link_rows(), made.decode_rows()
    # DeepSeek's rotary slices are turned by pairs.
    neox = not shape.latent
    ours = latent_kernels() if shape.latent else triton_kernels()

    def check(kernel: str, run: Callable[[Kernels, Any, Any], torch.Tensor], query: Any) -> Check:
        def both() -> tuple[torch.Tensor, torch.Tensor]:
            return run(ours, query, made.pool()), run(TORCH, query.float(), pool)

        return compared(kernel, shape.name, dtype, BOUND[dtype], both)

    for name, rows, size, splits in (
        ("walk_rows, link", link, tile, 1),
        ("walk_rows, link in 3 splits", link, tile, 3),
        ("walk_rows, decode in 3 splits", decode, 1, 3),
    ):
        walked = made.walkers(rows, size, splits)
        query = made.normal(sum(row.extend for row in rows), shape.heads, shape.dim)

        def walk(kernels: Kernels, q: Any, of: Any, walked: Any = walked) -> torch.Tensor:
            out = q.new_empty((*q.shape[:2], shape.latent or shape.dim))
            kernels.walk_rows(
                q, *of, walked.table, made.turns(walked.offset), out,
                scale=made.scale, neox=neox, splits=walked.splits,
            )  # fmt: skip
            return out

        yield check(name, walk, query)

    shared = made.parts(decode, tile, 64)

    def by_parts(kernels: Kernels, q: Any, of: Any) -> torch.Tensor:
        table = shared.table
        cos, sin = made.turns(shared.offset)
        gathered = kernels.gather_rotate(q, table.query, cos, sin, neox=neox, first=shape.latent)
        partial, lse = kernels.attend_parts(gathered, *of, table, scale=made.scale)
        return kernels.merge(partial, lse, table.merge_indptr, table.merge_index)

    query = made.normal(len(decode), shape.heads, shape.dim)
    yield check("gather_rotate, attend_parts, merge: decode", by_parts, query)

    source, target = torch.arange(64, device=device).chunk(2)
    turns = made.turns(source - 40)

    def relocate(kernels: Kernels, q: Any, of: Any) -> torch.Tensor:
        keys, values = of[0].clone(), of[1].clone()
        if shape.latent:
            values, keys = keys.split([shape.latent, shape.rotary], -1)
        kernels.relocate(keys, values, source, target, turns, neox=neox)
        return torch.cat([keys[target], values[target]], -1)

    yield check("relocate", relocate, query)
