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

import random
import statistics
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from sglang_pic.eval.bench import Bench, bench
from sglang_pic.eval.command import Outcome, deliver, new_figure, parser_of
from sglang_pic.eval.tables import Table
from sglang_pic.eval.workloads import QUESTION_TOKENS, Prompt

METHODS = ("stock", "stock_prefix", "unlinked", "unlinked_prefix", "cold", "linked")
MAX_TOKENS = 7500
SEAM = 16
REPEATS, QUICK_REPEATS = 5, 3
QUICK = [(2, 64), (4, 128), (16, 64), (8, 256)]
FULL = [(s, t) for t in (64, 128, 256, 512) for s in (1, 2, 4, 8, 16) if s * t <= MAX_TOKENS]


def _body(ids: list[int], salt: str, pic: dict[str, Any] | None = None) -> dict[str, Any]:
    body: dict[str, Any] = {
        "input_ids": ids,
        "sampling_params": {"max_new_tokens": 1, "temperature": 0, "ignore_eos": True},
        "cache_salt": salt,
    }
    return body if pic is None else {**body, "pic": pic}


def measure(
    pair: Bench, rng: random.Random, segments: int, length: int, seam: int
) -> dict[str, tuple[float, int, int]]:
    """One repetition: (seconds to first token, tokens reused, computed) by method."""
    documents = [pair.tokens(rng, length) for _ in range(segments)]
    shuffled = rng.sample(documents, segments)
    while segments > 1 and shuffled == documents:
        shuffled = rng.sample(documents, segments)
    stock, unlinked, linked = (f"{rng.random()}" for _ in range(3))

    def body(documents: list[list[int]], salt: str, pic: Any = None) -> dict[str, Any]:
        prompt = Prompt(documents, pair.tokens(rng, QUESTION_TOKENS))
        if pic == "link":
            pic = {"segments": prompt.ranges, "seam": seam, "turns": False}
        return _body(prompt.ids, salt, pic)

    calls = {
        "stock": (pair.stock, body(documents, stock)),
        "unlinked": (pair.ours, body(documents, unlinked, {"link": False})),
        "cold": (pair.ours, body(documents, linked, "link")),
        "stock_prefix": (pair.stock, body(documents, stock)),
        "unlinked_prefix": (pair.ours, body(documents, unlinked, {"link": False})),
        "linked": (pair.ours, body(shuffled, linked, "link")),
    }
    results = {}
    for method, (server, asked) in calls.items():
        seconds, first = server.first_token(**asked)
        meta = first["meta_info"]
        reused = meta["cached_tokens"]
        compiled = meta.get("pic", {}).get("tokens_compiled", 0)
        results[method] = seconds, reused, len(asked["input_ids"]) - reused + compiled
    return results


def run(
    pair: Bench,
    *,
    quick: bool,
    seam: int = SEAM,
    repeats: int | None = None,
    seed: int = 0,
) -> Outcome:
    """Measure the grid; one row a method and point."""
    rng = random.Random(seed)
    repeats = repeats or (QUICK_REPEATS if quick else REPEATS)
    room = pair.context - QUESTION_TOKENS
    grid = [(segments, length) for segments, length in (QUICK if quick else FULL)]
    grid = [(segments, length) for segments, length in grid if segments * length < room]
    measure(pair, rng, 1, 64, seam)  # first calls pay for lazy set-up
    rows = []
    with tqdm(total=len(grid) * repeats, desc="ttft", unit="rep") as bar:
        for segments, length in grid:
            reps = []
            for _ in range(repeats):
                reps.append(measure(pair, rng, segments, length, seam))
                bar.update()
            rows += [_row(reps, method, segments, length, seam) for method in METHODS]
    config = {
        **pair.config,
        "question_tokens": QUESTION_TOKENS,
        "repeats": repeats,
        "seam": seam,
        "seed": seed,
    }
    return Outcome(config, rows, [table_of(rows, pair.name)], plot(rows))


def _row(
    reps: Sequence[dict[str, tuple[float, int, int]]],
    method: str,
    segments: int,
    length: int,
    seam: int,
) -> dict[str, Any]:
    seconds = [rep[method][0] for rep in reps]
    return {
        "method": method,
        "segments": segments,
        "segment_tokens": length,
        "seam": seam,
        "ttft_s": statistics.median(seconds),
        "ttft_s_min": min(seconds),
        "ttft_s_max": max(seconds),
        "tokens_reused": reps[-1][method][1],
        "tokens_computed": reps[-1][method][2],
    }


def table_of(rows: Sequence[dict[str, Any]], model: str) -> Table:
    """One line a point: seconds by method, and what linking gains."""
    points: dict[tuple[int, int], dict[str, Any]] = {}
    for row in rows:
        points.setdefault((row["segments"], row["segment_tokens"]), {})[row["method"]] = row
    lines = []
    for (segments, length), found in points.items():
        full, linked = found["unlinked"], found["linked"]
        lines.append(
            (
                f"{segments} x {length}",
                *(f"{found[method]['ttft_s']:.2f}" for method in METHODS),
                f"{full['ttft_s'] / linked['ttft_s']:.1f}x",
                f"{full['tokens_computed']} → {linked['tokens_computed']}",
            )
        )
    return Table(
        f"Seconds to first token ({model}), median",
        (
            "segments x tokens",
            *(method.replace("_", " ") for method in METHODS),
            "unlinked / linked",
            "tokens computed",
        ),
        lines,
        "Random documents, linked in shuffled order. Compare linked with unlinked: stock's CPU "
        "attention pads every query to the whole cached prefix.",
    )


def plot(rows: Sequence[dict[str, Any]]) -> Any:
    """Seconds over number of segments, one panel a segment length; of what was
    measured at one length alone, one point."""
    lengths = sorted({row["segment_tokens"] for row in rows})
    figure, axes = new_figure(len(lengths), width=4)
    for axis, length in zip(axes, lengths, strict=True):
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
        axis.sharey(axes[0])
    axes[0].set_ylabel("seconds to first token")
    axes[-1].legend()
    return figure


def main() -> None:
    parser = parser_of(__doc__, "four points, three repetitions")
    parser.add_argument("--seam", type=int, default=SEAM, help="in tokens (%(default)s)")
    parser.add_argument("--page-size", type=int, default=1, help="tokens a page (%(default)s)")
    parser.add_argument("--repeats", type=int, help=f"repetitions ({REPEATS})")
    parser.add_argument("--seed", type=int, default=0, help="of documents (%(default)s)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", default="smollm2", help="model directory (SmolLM2-135M)")
    which.add_argument("--hybrid", action="store_true", help="the shipped hybrid")
    args = parser.parse_args()
    name = "hybrid" if args.hybrid else args.model
    with bench(name, f"--page-size={args.page_size}") as pair:
        outcome = run(pair, quick=args.quick, seam=args.seam, repeats=args.repeats, seed=args.seed)
    outcome.config["page_size"] = args.page_size
    deliver(outcome, args)


if __name__ == "__main__":
    main()
