"""Time to first token on the GPU, of models of 8B parameters with random weights: stock
SGLang and ours, both on the one card."""

from __future__ import annotations

import pathlib
import tempfile
from collections.abc import Iterator

import torch

from sglang_pic.eval import ttft
from sglang_pic.eval.bench import bench
from sglang_pic.eval.command import Outcome
from sglang_pic.eval.gpu.models import CONFIGS, write_model

GRID = ((8, 256), (8, 1024), (20, 512))
QUICK_GRID = GRID[:1]
REPEATS, QUICK_REPEATS = 7, 3
FLAGS = (
    "--dtype=bfloat16",
    "--load-format=dummy",
    "--attention-backend=triton",
    "--sampling-backend=pytorch",
    "--max-running-requests=8",
    "--cuda-graph-max-bs-decode=4",
    "--disable-prefill-cuda-graph",
)
# Of the memory that is free when each starts, for its weights and pools: the second one
# finds two thirds of the card, and keeps states beside its pools.
STOCK_SHARE = "--mem-fraction-static=0.35"
OUR_FLAGS = ("--mem-fraction-static=0.55", "--pic-state-mib=16384")


def first_tokens(*, quick: bool) -> Iterator[Outcome]:
    """One outcome a model, as ``eval.ttft`` has it."""
    grid = QUICK_GRID if quick else GRID
    for name in CONFIGS:
        with tempfile.TemporaryDirectory() as directory:
            model = write_model(name, pathlib.Path(directory))
            with bench(
                str(model), *FLAGS, STOCK_SHARE, ours=OUR_FLAGS, pool=ttft.pool_of(grid)
            ) as pair:
                canary = pair.ours.get("/pic/info").json()["canary"]
                outcome = ttft.run(
                    pair, quick=quick, grid=grid, repeats=QUICK_REPEATS if quick else REPEATS
                )
        device = torch.cuda.get_device_name()
        outcome.config.update(model=name, dtype="bfloat16", device=device, canary=canary)
        yield outcome
