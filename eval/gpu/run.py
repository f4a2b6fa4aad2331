"""Everything that needs a GPU, by one command: build, check, time, serve.

    python -m eval.gpu.run --json gpu.json          # on a GPU: checks and times
    python -m eval.gpu.run --parts server ttft      # SGLang: the shipped hybrid; large models
    python -m eval.gpu.run --quick                  # anywhere: interpreted, tiny, no times

Every kernel is held against its torch oracle on fresh random inputs, then timed with
CUDA events on a cold cache, beside two floors measured in the same run: a copy's
bandwidth and the rate of a bfloat16 matrix product. What raises is told of and the rest
runs on. Exits with 1 if anything failed.
`eval/gpu/wheels.txt` lists what a machine without a network needs.
"""

from __future__ import annotations

import dataclasses
import os
import random
import sys
import traceback
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch

if not torch.cuda.is_available():
    # Before Triton is imported: it decides then.
    os.environ["TRITON_INTERPRET"] = "1"

import triton
from tqdm import tqdm

from sglang_pic.eval.command import Outcome, deliver, parser_of
from sglang_pic.eval.gpu import flashinfer_runs
from sglang_pic.eval.gpu.attention_times import BATCHES, Time, decode_times, link_times
from sglang_pic.eval.gpu.checks import Check, attention_checks
from sglang_pic.eval.gpu.linear import state_checks, state_times
from sglang_pic.eval.gpu.measure import Floors, floors
from sglang_pic.eval.gpu.scenario import Layout
from sglang_pic.eval.gpu.shapes import LATENT_SHAPES, SHAPES, TINY, TINY_LATENT
from sglang_pic.eval.tables import Table

# Small enough for an oracle that loops, with every ragged case in it.
CHECKED = Layout(segments=3, length=70, seam=16, question=20, requests=3)
SMOKE = Layout(segments=2, length=20, seam=4, question=5, requests=2, page=4)
PARTS = ("checks", "times", "server", "ttft")

T = TypeVar("T")


def checks(*, quick: bool, seed: int) -> list[Check]:
    """Every kernel at every shape, in float32 and in what models are served in."""
    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    tiny = (TINY, TINY_LATENT)
    shapes = SHAPES + LATENT_SHAPES if cuda and not quick else tiny
    dtypes = (torch.float32, torch.bfloat16 if cuda else torch.float16)
    found: list[Check] = []
    todo = [(shape, dtype) for shape in shapes for dtype in dtypes]
    for shape, dtype in tqdm(todo, desc="checks", unit="shape"):
        layout = SMOKE if shape in tiny else CHECKED
        found += attention_checks(shape, layout, device, dtype, seed)
        if shape.linear is not None and dtype is torch.float32:
            found += state_checks(shape, shape.linear, device, seed)
        of_flashinfer = shape in SHAPES and flashinfer_runs.installed()
        if of_flashinfer and dtype is torch.bfloat16:
            found += flashinfer_runs.launch_checks(shape, layout, seed)
    return found


def times(floor: Floors) -> tuple[list[Time], list[str]]:
    """All measurements, one model after the other; and what raised."""
    found: list[Time] = []
    failures: list[str] = []
    for shape in tqdm(SHAPES, desc="times", unit="model"):
        kinds = [
            ("link", link_times(shape, floor)),
            ("decode", decode_times(shape, floor, BATCHES)),
        ]
        if flashinfer_runs.installed():
            kinds.append(("FlashInfer", flashinfer_runs.launch_times(shape, floor)))
        if shape.linear is not None:
            kinds.append(("linear layers", state_times(shape, shape.linear, floor)))
        for kind, made in kinds:
            found += _until_it_raises(made, f"times of {kind}, {shape.name}", failures)
    return found, failures


def _until_it_raises(made: Iterator[T], what: str, failures: list[str]) -> Iterator[T]:
    try:
        yield from made
    except Exception as failed:
        traceback.print_exc()
        failures.append(f"{what}: {type(failed).__name__}: {failed}")


def run(*, quick: bool, seed: int, parts: Sequence[str] = PARTS[:2]) -> Outcome:
    """What is asked for, of ``PARTS``; without a GPU, or quick, no times."""
    rows: list[dict[str, Any]] = []
    tables: list[Table] = []
    config: dict[str, Any] = {"seed": seed, "triton": triton.__version__, "device": "cpu"}
    if torch.cuda.is_available():
        config["device"] = torch.cuda.get_device_name()
        config["compute_capability"] = torch.cuda.get_device_capability()
    if "checks" in parts:
        made = checks(quick=quick, seed=seed)
        rows += [{"kind": "check", **dataclasses.asdict(one), "ok": one.ok} for one in made]
        tables.append(_checked(made))
    if "times" in parts and torch.cuda.is_available() and not quick:
        floor = floors()
        config["floors"] = dataclasses.asdict(floor)
        timed, failures = times(floor)
        rows += [{"kind": "time", **dataclasses.asdict(one)} for one in timed]
        rows += [{"kind": "failure", "what": what, "ok": False} for what in failures]
        tables.append(_timed(timed, floor))
    if "server" in parts:
        from sglang_pic.eval.gpu.server import serve_hybrid

        served = serve_hybrid()
        rows += [{"kind": "server", **one} for one in served]
        cells = [[str(value) for value in one.values()] for one in served]
        tables.append(Table("Server", list(served[0]), cells))
    if "ttft" in parts:
        from sglang_pic.eval.gpu.ttft import first_tokens

        for outcome in first_tokens(quick=quick):
            rows += [{"kind": "ttft", **outcome.config, **one} for one in outcome.rows]
            tables += outcome.tables
    return Outcome(config, rows, tables)


def _checked(made: list[Check]) -> Table:
    rows = [
        [
            c.kernel,
            c.model,
            c.dtype,
            f"{c.error:.1e}",
            f"{c.bound:.0e}",
            "ok" if c.ok else c.failure[:60] or "FAILS",
        ]
        for c in made
    ]
    columns = ["kernel", "model", "type", "error", "bound", ""]
    return Table("Kernels against their oracles", columns, rows)


def _timed(made: list[Time], floor: Floors) -> Table:
    rows = [
        [
            one.what,
            one.model,
            f"{one.seconds * 1e6:.1f}",
            "" if one.share is None else f"{one.share:.2f}",
            one.of,
            "" if one.target is None else f"{one.target:.2f}",
        ]
        for one in made
    ]
    note = f"Copy {floor.copy / 1e12:.2f} TB/s, bf16 product {floor.matmul / 1e12:.0f} TFLOP/s."
    return Table("One layer", ["what", "model", "us", "share", "of", "target"], rows, note)


def main() -> None:
    parser = parser_of(__doc__ or "", "tiny shapes and no times")
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=PARTS[:2], help="(%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=None, help="of all that is drawn (a new one)")
    args = parser.parse_args()
    if not torch.cuda.is_available() and {"server", "ttft"} & set(args.parts):
        parser.error("servers are measured on a GPU")
    seed = random.randrange(1 << 31) if args.seed is None else args.seed
    outcome = run(quick=args.quick or not torch.cuda.is_available(), seed=seed, parts=args.parts)
    deliver(outcome, args)
    if not all(row.get("ok", True) for row in outcome.rows):
        sys.exit("something failed")


if __name__ == "__main__":
    main()
