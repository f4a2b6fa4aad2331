"""Reuse and time to first token over many batches of new questions.

    python -m eval.steady_state [--quick] [--hybrid] [--json FILE] [--plot FILE]

The corpus is four times what the cache holds; each question is over four documents,
drawn by Zipf's law and never asked before. A cache that is keyed by prefix, or that
fills with what nobody asks for again, is good in the first batches and useless after
some more. Each method begins with an empty cache and gets the same prompts, one at a time.

    stock     stock SGLang with its radix cache
    unlinked  the same on our attention, linking off
    pic       linked; ``tokens_computed`` counts those of compiling too

``trend``: slope of the share of tokens saved over the batches of the second half, in
points a batch, with its interval of 95 % (least squares): 0 is a flat line.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from typing import Any

from scipy import stats
from tqdm import tqdm

from sglang_pic.eval.bench import Bench, bench
from sglang_pic.eval.command import Outcome, add_speed_flags, deliver, new_figure, parser_of
from sglang_pic.eval.tables import Table
from sglang_pic.eval.workloads import QUESTION_TOKENS, Prompt, draw

METHODS = ("stock", "unlinked", "pic")
LABELS = {"pic": "linked"}
BATCHES = 50
QUESTIONS, QUICK_QUESTIONS = 8, 4  # a batch
DOCUMENTS = 4  # a question
DOCUMENT_TOKENS = 256
CORPUS = 4  # times the cache
SEAM = 16


def run(pair: Bench, *, quick: bool, seam: int = SEAM, seed: int = 0) -> Outcome:
    """All batches; one row a batch and method."""
    rng = random.Random(seed)
    count = CORPUS * pair.pool // DOCUMENT_TOKENS
    corpus = [pair.tokens(rng, DOCUMENT_TOKENS) for _ in range(count)]
    questions = QUICK_QUESTIONS if quick else QUESTIONS
    batches = [
        [
            Prompt(draw(rng, corpus, DOCUMENTS), pair.tokens(rng, QUESTION_TOKENS))
            for _ in range(questions)
        ]
        for _ in range(BATCHES)
    ]
    rows = []
    for method in METHODS:
        _batch(pair, method, batches[0], seam)  # first calls pay for lazy set-up
        pair.flush()
        for batch, prompts in enumerate(tqdm(batches, desc=f"{method:8s}", unit="batch")):
            rows.append({"batch": batch, **_batch(pair, method, prompts, seam)})
    held = pair.ours.forest()
    config = {
        **pair.config,
        "documents": count,
        "document_tokens": DOCUMENT_TOKENS,
        "corpus_over_cache": CORPUS,
        "documents_a_question": DOCUMENTS,
        "questions_a_batch": questions,
        "seam": seam,
        "seed": seed,
        "tokens_held_at_the_end": pair.pool - held["available_tokens"],
    }
    return Outcome(config, rows, [table_of(rows, config)], plot(rows))


def _batch(pair: Bench, method: str, prompts: Sequence[Prompt], seam: int) -> dict[str, Any]:
    server = pair.stock if method == "stock" else pair.ours
    seconds, reused, compiled = [], 0, 0
    for prompt in prompts:
        body: dict[str, Any] = {
            "input_ids": prompt.ids,
            "sampling_params": {"max_new_tokens": 1, "temperature": 0, "ignore_eos": True},
        }
        if method == "pic":
            body["pic"] = {"segments": prompt.ranges, "seam": seam}
        if method == "unlinked":
            body["pic"] = {"link": False}
        ttft, first = server.first_token(**body)
        meta = first["meta_info"]
        seconds.append(ttft)
        reused += meta["cached_tokens"]
        compiled += meta.get("pic", {}).get("tokens_compiled", 0)
    total = sum(len(prompt.ids) for prompt in prompts)
    return {
        "method": method,
        "tokens": total,
        "tokens_reused": reused,
        "tokens_compiled": compiled,
        "tokens_computed": total - reused + compiled,
        "ttft_s": statistics.fmean(seconds),
    }


def saved(rows: Sequence[dict[str, Any]]) -> float:
    """Share of prompt tokens that were not computed, compiling included, in %."""
    tokens = sum(row["tokens"] for row in rows)
    return 100 * (tokens - sum(row["tokens_computed"] for row in rows)) / tokens


def trend(rows: Sequence[dict[str, Any]], method: str) -> tuple[float, float]:
    """Slope of the saved share over the second half, in points a batch, and the
    half-width of its interval of 95 %."""
    found = [row for row in rows if row["method"] == method]
    found = found[len(found) // 2 :]
    fit = stats.linregress([row["batch"] for row in found], [saved([row]) for row in found])
    return float(fit.slope), float(fit.stderr * stats.t.ppf(0.975, len(found) - 2))


def table_of(rows: Sequence[dict[str, Any]], config: dict[str, Any]) -> Table:
    """Means over fifths of the run, side by side."""
    of = {method: [row for row in rows if row["method"] == method] for method in METHODS}
    last = len(of["pic"])
    step = max(1, last // 5)
    lines = []
    for start in range(0, last, step):
        found = {method: of[method][start : start + step] for method in METHODS}
        ttft = {
            method: statistics.fmean(row["ttft_s"] for row in some)
            for method, some in found.items()
        }
        lines.append(
            (
                f"{start + 1} to {min(start + step, last)}",
                *(f"{saved(found[method]):.0f}" for method in METHODS),
                *(f"{ttft[method]:.2f}" for method in METHODS),
                f"{ttft['unlinked'] / ttft['pic']:.2f}x",
            )
        )
    slope, width = trend(rows, "pic")
    names = [LABELS.get(method, method) for method in METHODS]
    return Table(
        f"{last} batches of {config['questions_a_batch']} new questions, corpus "
        f"{CORPUS} times the cache ({config['model']})",
        (
            "batches",
            *(f"saved, {name}, %" for name in names),
            *(f"TTFT {name}, s" for name in names),
            "unlinked / linked",
        ),
        lines,
        f"Saved: share of prompt tokens not computed, compiling included. Trend of linked over "
        f"the second half: {slope:+.2f} ± {width:.2f} points a batch. At the end "
        f"{config['tokens_held_at_the_end']} of {config['pool_tokens']} tokens were held.",
    )


def plot(rows: Sequence[dict[str, Any]]) -> Any:
    """Saved share and TTFT over batches."""
    figure, axes = new_figure(2, height=3.5)
    for method in METHODS:
        found = [row for row in rows if row["method"] == method]
        x = [row["batch"] + 1 for row in found]
        label = LABELS.get(method, method)
        axes[0].plot(x, [saved([row]) for row in found], label=label)
        axes[1].plot(x, [row["ttft_s"] for row in found], label=label)
    axes[0].set(xlabel="batch", ylabel="prompt tokens not computed, %", ylim=(None, 100))
    axes[1].set(xlabel="batch", ylabel="mean seconds to first token", ylim=(0, None))
    axes[1].legend()
    return figure


def main() -> None:
    parser = parser_of(__doc__, f"{QUICK_QUESTIONS} questions a batch")
    add_speed_flags(parser, SEAM)
    args = parser.parse_args()
    with bench("hybrid" if args.hybrid else "smollm2") as pair:
        outcome = run(pair, quick=args.quick, seam=args.seam, seed=args.seed)
    deliver(outcome, args)


if __name__ == "__main__":
    main()
