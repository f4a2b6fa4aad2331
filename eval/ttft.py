"""Time to first token: stock SGLang and ours, side by side in one run.

    python -m eval.ttft [--quick] [--hybrid] [--json FILE] [--plot FILE]

Of SmolLM2-135M or, with ``--hybrid``, of the shipped hybrid.

Methods, interleaved within each repetition, on fresh random documents:

    stock            stock SGLang as installed, nothing cached
    stock_prefix     the same documents in the same order, another question
    unlinked         our attention, stock scheduling, linking off, nothing cached
    unlinked_prefix  the same, prefix cached
    cold             linked, every segment compiled first (compile included)
    linked           linked, the same documents in another order, segments warm

Quote ``unlinked`` as the baseline: stock's CPU attention pads every query to
the whole prefix, which flatters whoever avoids it.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import pathlib
import random
import statistics
import tempfile
from typing import Any

from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import AutoConfig

from sglang_pic.eval.models.hybrid.weights import hybrid_path
from sglang_pic.eval.models.smollm2 import ensure_model
from sglang_pic.eval.results import write_json
from sglang_pic.eval.serving import Server, serve

METHODS = ("stock", "stock_prefix", "unlinked", "unlinked_prefix", "cold", "linked")
MAX_TOKENS = 7500
QUESTION_TOKENS = 32
POOL_TOKENS = 24000
QUICK = [(2, 64), (4, 128), (16, 64), (8, 256)]
FULL = [(s, t) for t in (64, 128, 256, 512) for s in (1, 2, 4, 8, 16) if s * t <= MAX_TOKENS]


def _body(ids: list[int], salt: str, pic: dict[str, Any] | None = None) -> dict[str, Any]:
    body: dict[str, Any] = {
        "input_ids": ids,
        "sampling_params": {"max_new_tokens": 1, "temperature": 0, "ignore_eos": True},
        "cache_salt": salt,
    }
    return body if pic is None else {**body, "pic": pic}


@dataclasses.dataclass(frozen=True)
class Bench:
    """What all repetitions share: two servers, seam width in tokens, and the
    vocabulary that documents are drawn from."""

    stock: Server
    ours: Server
    seam: int
    vocabulary: range


def ordinary_tokens(size: int) -> range:
    """Token ids of a vocabulary without the first and last ones, which are often special."""
    return range(size // 32, size - size // 32)


def measure(
    bench: Bench, rng: random.Random, segments: int, length: int
) -> dict[str, tuple[float, int, int]]:
    """One repetition: (seconds to first token, tokens reused, computed) by method."""
    stock, ours = bench.stock, bench.ours

    def ids(n: int) -> list[int]:
        return rng.choices(bench.vocabulary, k=n)

    documents = [ids(length) for _ in range(segments)]
    shuffled = rng.sample(documents, segments)
    total = segments * length + QUESTION_TOKENS
    ranges = [{"start": i * length, "end": (i + 1) * length} for i in range(segments)]
    link = {"segments": ranges, "seam": bench.seam}

    def prompt(documents: list[list[int]]) -> list[int]:
        return [token for document in documents for token in document] + ids(QUESTION_TOKENS)

    def salt() -> str:
        return f"{rng.random()}"

    plain, linked = salt(), salt()
    calls = {
        "stock": (stock, _body(prompt(documents), plain)),
        "unlinked": (ours, _body(prompt(documents), plain, {"link": False})),
        "cold": (ours, _body(prompt(documents), linked, link)),
        "stock_prefix": (stock, _body(prompt(documents), plain)),
        "unlinked_prefix": (ours, _body(prompt(documents), plain, {"link": False})),
        "linked": (ours, _body(prompt(shuffled), linked, link)),
    }
    results = {}
    for method, (server, body) in calls.items():
        seconds, first = server.first_token(**body)
        reused = first["meta_info"]["cached_tokens"]
        results[method] = seconds, reused, total - reused
    return results


def run(bench: Bench, grid: list[tuple[int, int]], repeats: int) -> Any:
    """Measure the grid; returns flat rows, one a method and point."""
    rng = random.Random(0)
    measure(bench, rng, 1, 64)  # first calls pay for lazy set-up
    rows = []
    with tqdm(total=len(grid) * repeats, desc="ttft", unit="rep") as bar:
        for segments, length in grid:
            reps = []
            for _ in range(repeats):
                reps.append(measure(bench, rng, segments, length))
                bar.update()
            for method in METHODS:
                seconds = [rep[method][0] for rep in reps]
                rows.append(
                    {
                        "method": method,
                        "segments": segments,
                        "segment_tokens": length,
                        "seam": bench.seam,
                        "ttft_s": statistics.median(seconds),
                        "ttft_s_min": min(seconds),
                        "ttft_s_max": max(seconds),
                        "tokens_reused": reps[-1][method][1],
                        "tokens_computed": reps[-1][method][2],
                    }
                )
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """Print one line a point: seconds by method, and what linking gains."""
    table = Table(title="median seconds to first token")
    columns = ["segments x tokens", *METHODS, "unlinked / linked", "tokens computed"]
    for name in columns:
        table.add_column(name, justify="right")
    points: dict[tuple[int, int], dict[str, Any]] = {}
    for row in rows:
        points.setdefault((row["segments"], row["segment_tokens"]), {})[row["method"]] = row
    for (segments, length), found in points.items():
        full, linked = found["unlinked"], found["linked"]
        table.add_row(
            f"{segments} x {length}",
            *(f"{found[method]['ttft_s']:.2f}" for method in METHODS),
            f"{full['ttft_s'] / linked['ttft_s']:.1f}x",
            f"{full['tokens_computed']} -> {linked['tokens_computed']}",
        )
    Console(width=120).print(table)


def plot(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Seconds over number of segments, one panel a segment length."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lengths = sorted({row["segment_tokens"] for row in rows})
    figure, axes = plt.subplots(
        1, len(lengths), figsize=(4 * len(lengths), 4), sharey=True, squeeze=False
    )
    for axis, length in zip(axes[0], lengths, strict=True):
        for method in METHODS:
            line = sorted(
                (row["segments"], row["ttft_s"], row["ttft_s_min"], row["ttft_s_max"])
                for row in rows
                if row["method"] == method and row["segment_tokens"] == length
            )
            x, y, low, high = zip(*line, strict=True)
            axis.plot(x, y, marker="o", label=method)
            axis.fill_between(x, low, high, alpha=0.15)
        axis.set(title=f"{length} tokens a segment", xlabel="segments", yscale="log")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("seconds to first token")
    axes[0][-1].legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="four points, three repetitions")
    parser.add_argument("--seam", type=int, default=16, help="seam width in tokens (%(default)s)")
    parser.add_argument("--page-size", type=int, default=1, help="tokens per page (%(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="repetitions (%(default)s)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", type=pathlib.Path, help="model directory (SmolLM2-135M)")
    which.add_argument("--hybrid", action="store_true", help="the shipped hybrid")
    parser.add_argument("--json", type=pathlib.Path, help="write the rows here")
    parser.add_argument("--plot", type=pathlib.Path, help="write a PNG here")
    args = parser.parse_args()
    grid, repeats = (QUICK, 3) if args.quick else (FULL, args.repeats)
    model = args.model or (hybrid_path() if args.hybrid else ensure_model())
    config = AutoConfig.from_pretrained(model)
    room = config.max_position_embeddings - QUESTION_TOKENS
    grid = [(segments, length) for segments, length in grid if segments * length < room]
    common = (f"--max-total-tokens={POOL_TOKENS}", f"--page-size={args.page_size}")
    with contextlib.ExitStack() as stack:
        logs = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        print("starting stock SGLang and ours, one after the other ...", flush=True)
        stock = stack.enter_context(
            serve(model, logs / "stock.log", *common, module="sglang.launch_server")
        )
        ours = stack.enter_context(serve(model, logs / "ours.log", *common))
        print(f"up after {stock.start_s:.0f} s and {ours.start_s:.0f} s", flush=True)
        bench = Bench(stock, ours, args.seam, ordinary_tokens(config.vocab_size))
        rows = run(bench, grid, repeats)
    show(rows)
    if args.json:
        settings = {
            "model": str(model),
            "dtype": "float32",
            "page_size": args.page_size,
            "question_tokens": QUESTION_TOKENS,
            "repeats": repeats,
            "start_s": {"stock": stock.start_s, "ours": ours.start_s},
        }
        write_json(args.json, settings, rows)
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
