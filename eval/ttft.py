"""Time to first token: stock SGLang and ours, side by side in one run.

    python -m eval.ttft [--quick] [--hybrid] [--json FILE] [--plot FILE]

Of SmolLM2-135M or, with ``--hybrid``, of the shipped hybrid.

Methods, interleaved within each repetition, on fresh random documents and empty caches:

    stock            stock SGLang as installed, nothing cached
    stock_prefix     the same documents in the same order, another question
    unlinked         our attention, stock scheduling, linking off, nothing cached
    unlinked_prefix  the same, prefix cached
    cold             linked, every segment compiled first (compile included)
    linked           linked, the same documents in another order, segments warm
    in_company       the same, compiled in each other's company: nothing is recomputed

Quote ``unlinked`` as the baseline: stock's CPU attention pads every query to
the whole prefix, which flatters whoever avoids it. A cached prefix is the limit: it
computes the question alone.
"""

from __future__ import annotations

import functools
import random
import statistics
import uuid
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm
from transformers import AutoConfig

from sglang_pic.eval.bench import POOL_TOKENS, Bench, bench, linear_layers
from sglang_pic.eval.command import Outcome, deliver, new_figure, parser_of
from sglang_pic.eval.serving import Server
from sglang_pic.eval.tables import Table
from sglang_pic.eval.workloads import QUESTION_TOKENS, Prompt

METHODS = (
    "stock", "stock_prefix", "unlinked", "unlinked_prefix", "cold", "linked", "in_company",
)  # fmt: skip
MAX_TOKENS = 7700
SEAM = 16
REPEATS, QUICK_REPEATS = 5, 3
QUICK = [(segments, 256) for segments in (2, 4, 8, 16)]
FULL = [
    *((s, t) for t in (64, 128, 256, 512) for s in (1, 2, 4, 8, 16) if s * t <= MAX_TOKENS),
    (4, 1900),
]
# Tokens of a hybrid's convolution in front of one.
HISTORY = 3
# Held at once: segments alone, a company's first order, its second, and what is kept of
# both.
PROMPTS_HELD = 4.2


def pool_of(grid: Sequence[tuple[int, int]]) -> int:
    """Tokens of a pool in which no point of a grid evicts what it measures."""
    largest = max(segments * length for segments, length in grid) + QUESTION_TOKENS
    return max(POOL_TOKENS, int(PROMPTS_HELD * largest))


def _body(ids: list[int], salt: str, pic: dict[str, Any] | None = None) -> dict[str, Any]:
    body: dict[str, Any] = {
        "input_ids": ids,
        "sampling_params": {"max_new_tokens": 1, "temperature": 0, "ignore_eos": True},
        "cache_salt": salt,
    }
    return body if pic is None else {**body, "pic": pic}


def narrowest(pair: Bench) -> int:
    """Seam in company: nothing, or of a hybrid the convolution's history."""
    return HISTORY if linear_layers(AutoConfig.from_pretrained(pair.model)) else 0


def most_computed(
    method: str, segments: int, length: int, seam: int, narrow: int, page: int
) -> int:
    """Tokens that a method may compute of a prompt, its compiles included; more, and
    something that it should have found was not there.

    Args:
        narrow: the seam in company.
    """
    total = segments * length + QUESTION_TOKENS
    if method in ("stock", "unlinked"):
        return total
    if method in ("stock_prefix", "unlinked_prefix"):
        return QUESTION_TOKENS + page
    width = narrow if method == "in_company" else seam
    # Whole pages are reused, and the last token's never.
    edges = segments * (width + 2 * page) + QUESTION_TOKENS + page
    return edges + (segments * length if method == "cold" else 0)


def measure(
    pair: Bench,
    rng: random.Random,
    segments: int,
    length: int,
    seam: int,
    *,
    narrow: int,
    page: int,
) -> dict[str, tuple[float, int, int]]:
    """One repetition: (seconds to first token, tokens reused, computed) by method.

    Args:
        narrow: the seam in company.
        page: tokens a page.

    Raises:
        RuntimeError: a method computed more than it should.
    """
    documents = [pair.tokens(rng, length) for _ in range(segments)]
    shuffled = rng.sample(documents, segments)
    while segments > 1 and shuffled == documents:
        shuffled = rng.sample(documents, segments)
    # Nothing is found that another method, or another run, has left.
    salts = {
        method: f"ttft-{uuid.uuid4()}" for method in ("stock", "unlinked", "linked", "company")
    }

    def body(documents: list[list[int]], salt: str, pic: Any = None) -> dict[str, Any]:
        prompt = Prompt(documents, pair.tokens(rng, QUESTION_TOKENS))
        if pic is not None and "link" not in pic:
            pic = {"segments": prompt.ranges, "seam": seam, "turns": False, **pic}
        return _body(prompt.ids, salts[salt], pic)

    off = {"link": False}
    calls = {
        "stock": (pair.stock, body(documents, "stock")),
        "unlinked": (pair.ours, body(documents, "unlinked", off)),
        "cold": (pair.ours, body(documents, "linked", {})),
        "stock_prefix": (pair.stock, body(documents, "stock")),
        "unlinked_prefix": (pair.ours, body(documents, "unlinked", off)),
        "linked": (pair.ours, body(shuffled, "linked", {})),
    }
    results = {}
    pair.flush()
    for method, (server, asked) in calls.items():
        results[method] = _ask(server, asked)
    if segments > 1:
        pair.flush()
        named = {"input_ids": documents, "company": True, "cache_salt": salts["company"]}
        pair.ours.post("/pic/compile", named, timeout=600).raise_for_status()
        results["in_company"] = _ask(pair.ours, body(shuffled, "company", {"company_seam": 0}))
    for method, (_, _, computed) in results.items():
        most = most_computed(method, segments, length, seam, narrow, page)
        if computed > most:
            raise RuntimeError(
                f"{method} computed {computed} tokens of {segments} x {length}, {most} at most: "
                "the pool is too small"
            )
    return results


def _ask(server: Server, asked: dict[str, Any]) -> tuple[float, int, int]:
    seconds, first = server.first_token(**asked)
    meta = first["meta_info"]
    reused = meta["cached_tokens"]
    compiled = meta.get("pic", {}).get("tokens_compiled", 0)
    return seconds, reused, len(asked["input_ids"]) - reused + compiled


def run(
    pair: Bench,
    *,
    quick: bool,
    seam: int = SEAM,
    repeats: int | None = None,
    seed: int = 0,
    grid: Sequence[tuple[int, int]] | None = None,
) -> Outcome:
    """Measure the grid, of segments and their tokens; one row a method and point."""
    rng = random.Random(seed)
    page = pair.ours.get("/server_info").json()["page_size"]
    repeats = repeats or (QUICK_REPEATS if quick else REPEATS)
    room = pair.context - QUESTION_TOKENS
    asked = grid or (QUICK if quick else FULL)
    grid = [point for point in asked if point[0] * point[1] <= room]
    once = functools.partial(measure, pair, rng, seam=seam, narrow=narrowest(pair), page=page)
    once(1, 64)  # first calls pay for lazy set-up
    rows = []
    with tqdm(total=len(grid) * repeats, desc="ttft", unit="rep") as bar:
        for segments, length in grid:
            reps = []
            for _ in range(repeats):
                reps.append(once(segments, length))
                bar.update()
            rows += [_row(reps, method, segments, length, seam) for method in reps[0]]
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
    """One line a point: seconds by method, what linking gains, and what a cached prefix
    of the same length takes."""
    points: dict[tuple[int, int], dict[str, Any]] = {}
    for row in rows:
        points.setdefault((row["segments"], row["segment_tokens"]), {})[row["method"]] = row
    methods = [method for method in METHODS if any(method in found for found in points.values())]
    lines = []
    for (segments, length), found in points.items():
        best = found[_best(found)]
        full, limit = found["unlinked"], found["unlinked_prefix"]
        lines.append(
            (
                f"{segments} x {length}",
                *(
                    f"{found[method]['ttft_s']:.2f}" if method in found else ""
                    for method in methods
                ),
                f"{full['ttft_s'] / best['ttft_s']:.1f}x",
                f"{best['ttft_s'] / limit['ttft_s']:.2f}",
                f"{full['tokens_computed']} → {best['tokens_computed']}",
            )
        )
    return Table(
        f"Seconds to first token ({model}), median",
        (
            "segments x tokens",
            *(method.replace("_", " ") for method in methods),
            f"unlinked / {methods[-1].replace('_', ' ')}",
            "of a cached prefix",
            "tokens computed",
        ),
        lines,
        "Random documents, linked in shuffled order. Compare linked with unlinked: stock's CPU "
        "attention pads every query to the whole cached prefix. A company of one is none: its "
        "segment is compared as compiled alone.",
    )


def _best(found: dict[str, Any]) -> str:
    """What a set of documents that was met before is served as."""
    return "in_company" if "in_company" in found else "linked"


LABELS = {
    "stock": "stock",
    "unlinked_prefix": "prefix cached",
    "linked": "linked",
    "in_company": "linked, in company",
}


def plot(rows: Sequence[dict[str, Any]]) -> Any:
    """Seconds over number of segments, of the length with most points; the gain at the
    end of each line."""
    lengths = [row["segment_tokens"] for row in rows]
    length = max(lengths, key=lambda one: (lengths.count(one), one))
    figure, axes = new_figure(width=7)
    axis = axes[0]
    lines = {
        method: sorted(
            (row["segments"], row["ttft_s"], row["ttft_s_min"], row["ttft_s_max"])
            for row in rows
            if row["method"] == method and row["segment_tokens"] == length
        )
        for method in LABELS
    }
    for method, line in lines.items():
        if not line:
            continue
        x, y, low, high = zip(*line, strict=True)
        (drawn,) = axis.plot(x, y, marker="o")
        axis.fill_between(x, low, high, alpha=0.15)
        gain = lines["stock"][-1][1] / y[-1]
        axis.annotate(
            LABELS[method] + (f"  {gain:.0f}x" if method != "stock" else ""),
            (x[-1], y[-1]), textcoords="offset points", xytext=(8, 0), va="center",
            color=drawn.get_color(),
        )  # fmt: skip
    counts = sorted({row["segments"] for row in rows if row["segment_tokens"] == length})
    over_documents(axis, counts, f"documents of {length} tokens in a new order")
    return figure


def over_documents(axis: Any, counts: Sequence[int], title: str) -> None:
    """Seconds over so many documents, with room for labels at the lines' ends."""
    axis.set(
        title=title,
        xlabel="documents in the prompt",
        ylabel="seconds to first token",
        yscale="log",
    )
    axis.set_xscale("log", base=2)
    axis.set_xticks(counts, [str(count) for count in counts])
    axis.set_xlim(counts[0] / 1.1, counts[-1] * 1.9)
    axis.yaxis.set_major_formatter("{x:g}")


def main() -> None:
    parser = parser_of(__doc__, "one length of document, three repetitions")
    parser.add_argument("--seam", type=int, default=SEAM, help="in tokens (%(default)s)")
    parser.add_argument("--page-size", type=int, default=1, help="tokens a page (%(default)s)")
    parser.add_argument("--repeats", type=int, help=f"repetitions ({REPEATS})")
    parser.add_argument("--seed", type=int, default=0, help="of documents (%(default)s)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", default="smollm2", help="model directory (SmolLM2-135M)")
    which.add_argument("--hybrid", action="store_true", help="the shipped hybrid")
    args = parser.parse_args()
    name = "hybrid" if args.hybrid else args.model
    pool = pool_of(QUICK if args.quick else FULL)
    with bench(name, f"--page-size={args.page_size}", pool=pool) as pair:
        outcome = run(pair, quick=args.quick, seam=args.seam, repeats=args.repeats, seed=args.seed)
    outcome.config["page_size"] = args.page_size
    deliver(outcome, args)


if __name__ == "__main__":
    main()
