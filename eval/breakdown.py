"""How time to first token grows, and where the time of one linked request goes.

    python -m eval.breakdown [--quick] [--hybrid] [--json FILE] [--plot FILE]

Varied one at a time: the number of segments, the tokens of each, and the requests
that arrive at once (their mean). Methods, on our server, caches warm where named:

    unlinked  our attention, stock scheduling, linking off, nothing cached
    linked    the same documents compiled, in another order, with a new question

``slope``: least squares over the axis, milliseconds a segment, a token or a request,
with the half-width of its interval of 95 % over all repetitions.
What can be expected: linked grows with the seams and the question, not with the
segments' tokens, but for the attention paid to them.

The stages of a linked request come from the server's built-in timer (``POST
/pic/timer``): own wall time, in milliseconds a request; ``elsewhere`` is what is left
of the time to first token: SGLang's processes and ours around the stages, and the way
between them.
"""

from __future__ import annotations

import asyncio
import random
import statistics
from collections.abc import Sequence
from typing import Any

from scipy import stats
from tqdm import tqdm
from transformers import AutoTokenizer

from sglang_pic.eval.bench import Bench, bench
from sglang_pic.eval.command import Outcome, add_speed_flags, deliver, new_figure, parser_of
from sglang_pic.eval.load import drive
from sglang_pic.eval.tables import Table
from sglang_pic.eval.workloads import QUESTION_TOKENS, Prompt
from sglang_pic.link.report import HIT

METHODS = ("unlinked", "linked")
AXES = {
    "segments": (1, 2, 4, 8, 16),
    "segment_tokens": (32, 64, 128, 256, 512),
    "requests": (1, 2, 4, 8),
}
QUICK_AXES = {"segments": (1, 4, 8), "segment_tokens": (64, 128, 256), "requests": (1, 2, 4)}
# What is held fixed while another axis varies.
POINT = {"segments": 4, "segment_tokens": 128, "requests": 1}
REPEATS, QUICK_REPEATS = 5, 2
SEAM = 16
STAGED = (8, 128)  # segments and tokens of each of the request that is taken apart
STAGED_REQUESTS = 10
WHOLE = "time to first token"


def _body(prompt: Prompt, salt: str, pic: dict[str, Any]) -> dict[str, Any]:
    return {
        "input_ids": prompt.ids,
        "sampling_params": {"max_new_tokens": 1, "temperature": 0, "ignore_eos": True},
        "cache_salt": salt,
        "pic": pic,
        "stream": True,
    }


def _asked(
    pair: Bench, rng: random.Random, documents: list[list[int]], method: str, seam: int
) -> dict[str, Any]:
    """One request over documents that are compiled already."""
    prompt = Prompt(rng.sample(documents, len(documents)), pair.tokens(rng, QUESTION_TOKENS))
    if method == "unlinked":
        return _body(prompt, str(rng.random()), {"link": False})
    return _body(prompt, "growth", {"segments": prompt.ranges, "seam": seam, "turns": False})


def _compiled(
    pair: Bench, rng: random.Random, segments: int, length: int, seam: int
) -> list[list[int]]:
    """Fresh documents, compiled by asking once."""
    documents = [pair.tokens(rng, length) for _ in range(segments)]
    asyncio.run(drive(pair.ours, [_asked(pair, rng, documents, "linked", seam)], [0.0]))
    return documents


def grow(pair: Bench, *, quick: bool, seam: int, seed: int) -> list[dict[str, Any]]:
    """All axes; one row a point and method."""
    rng = random.Random(f"{seed}-growth")
    repeats = QUICK_REPEATS if quick else REPEATS
    points = [
        (axis, value)
        for axis, values in (QUICK_AXES if quick else AXES).items()
        for value in values
    ]
    _compiled(pair, rng, 2, 64, seam)  # first calls pay for lazy set-up
    rows = []
    for axis, value in tqdm(points, desc="growth", unit="point"):
        point = {**POINT, axis: value}
        seconds: dict[str, list[float]] = {method: [] for method in METHODS}
        for _ in range(repeats):
            documents = _compiled(pair, rng, point["segments"], point["segment_tokens"], seam)
            for method in METHODS:
                count = point["requests"]
                bodies = [_asked(pair, rng, documents, method, seam) for _ in range(count)]
                found = asyncio.run(drive(pair.ours, bodies, [0.0] * count))
                seconds[method].append(statistics.fmean(one.first_s for one in found))
        rows += [
            {
                "axis": axis,
                "value": value,
                "method": method,
                "ttft_s": statistics.median(times),
                "ttft_s_each": times,
            }
            for method, times in seconds.items()
        ]
    return rows


def slopes(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Milliseconds a step of each axis and method, with its interval."""
    made = []
    for axis in dict.fromkeys(row["axis"] for row in rows):
        for method in METHODS:
            line = [row for row in rows if (row["axis"], row["method"]) == (axis, method)]
            points = [(row["value"], 1000 * s) for row in line for s in row["ttft_s_each"]]
            fit = stats.linregress(*zip(*points, strict=True))
            width = float(fit.stderr * stats.t.ppf(0.975, max(1, len(points) - 2)))
            made.append(
                {
                    "axis": axis,
                    "method": method,
                    "slope_ms": float(fit.slope),
                    "slope_ms_within": width,
                    "intercept_ms": float(fit.intercept),
                }
            )
    return made


def take_apart(pair: Bench, *, seam: int, seed: int) -> list[dict[str, Any]]:
    """One row a stage of a linked request: milliseconds, and calls."""
    rng = random.Random(f"{seed}-stages")
    tokenizer = AutoTokenizer.from_pretrained(pair.model)
    documents = [tokenizer.decode(pair.tokens(rng, STAGED[1])) for _ in range(STAGED[0])]
    question = tokenizer.decode(pair.tokens(rng, QUESTION_TOKENS))

    lengths: list[int] = []

    def ask() -> float:
        parts = [{"segment": text} for text in rng.sample(documents, len(documents))]
        pic = {"parts": [*parts, question], "seam": seam, "turns": False}
        seconds, first = pair.ours.first_token(
            pic=pic, cache_salt="stages", sampling_params={"max_new_tokens": 1, "temperature": 0}
        )
        segments = first["meta_info"]["pic"]["segments"]
        if any(segment["reason"] != HIT for segment in segments):
            raise RuntimeError(f"not all segments were linked: {segments}")
        lengths.extend(segment["end"] - segment["start"] for segment in segments)
        return seconds

    ask()  # compiles
    pair.ours.post("/pic/timer", {"on": True})
    firsts = [ask() for _ in range(STAGED_REQUESTS)]
    shown = pair.ours.post("/pic/timer", {"on": False}).json()
    rows = []
    for process, stages in (
        ("front", shown["front"]["stages"]),
        ("scheduler", shown["ranks"][0]["stages"]),
    ):
        for name, total in stages.items():
            rows.append(
                {
                    "process": process,
                    "stage": name,
                    "calls": total["calls"] / STAGED_REQUESTS,
                    "ms": 1000 * total["seconds"] / STAGED_REQUESTS,
                }
            )
    whole = 1000 * statistics.fmean(firsts)
    rows.sort(key=lambda row: -row["ms"])
    left = whole - sum(row["ms"] for row in rows)
    return [
        *rows,
        {"process": "all", "stage": "elsewhere", "calls": 1, "ms": left},
        {
            "process": "all",
            "stage": WHOLE,
            "calls": 1,
            "ms": whole,
            "segments": STAGED[0],
            "segment_tokens": statistics.fmean(lengths),
        },
    ]


def run(pair: Bench, *, quick: bool, seam: int = SEAM, seed: int = 0) -> Outcome:
    """Growth, its slopes, and the stages of one request."""
    points = grow(pair, quick=quick, seam=seam, seed=seed)
    fitted = slopes(points)
    stages = take_apart(pair, seam=seam, seed=seed)
    config = {
        **pair.config,
        "fixed": POINT,
        "staged": dict(zip(("segments", "segment_tokens"), STAGED, strict=True)),
        "question_tokens": QUESTION_TOKENS,
        "seam": seam,
        "seed": seed,
    }
    tables = [growth_table(fitted, points, seam), stage_table(stages, pair.name)]
    return Outcome(config, [*points, *fitted, *stages], tables, plot(points, stages))


def growth_table(
    fitted: Sequence[dict[str, Any]], points: Sequence[dict[str, Any]], seam: int
) -> Table:
    """One line an axis: slopes of both methods."""
    lines = []
    for axis in dict.fromkeys(row["axis"] for row in fitted):
        found = {row["method"]: row for row in fitted if row["axis"] == axis}
        values = [row["value"] for row in points if row["axis"] == axis]
        full, linked = found["unlinked"], found["linked"]
        sure = all(row["slope_ms"] > row["slope_ms_within"] for row in (full, linked))
        ratio = f"{full['slope_ms'] / linked['slope_ms']:.1f}x" if sure else ""
        lines.append(
            (
                f"{axis.replace('_', ' ')}, {min(values)} to {max(values)}",
                *(
                    f"{row['slope_ms']:.2f} ± {row['slope_ms_within']:.2f}"
                    for row in (full, linked)
                ),
                ratio,
            )
        )
    return Table(
        "Growth of time to first token, milliseconds a step",
        ("varied", "unlinked", "linked", "ratio"),
        lines,
        f"Held fixed: {POINT['segments']} segments of {POINT['segment_tokens']} tokens, one "
        f"request, seam {seam}. No ratio where a slope may be 0.",
    )


def stage_table(stages: Sequence[dict[str, Any]], model: str) -> Table:
    """One line a stage."""
    whole = next(row for row in stages if row["stage"] == WHOLE)
    return Table(
        f"One linked request of {whole['segments']} segments of text, "
        f"{whole['segment_tokens']:.0f} tokens each ({model})",
        ("stage", "process", "calls", "ms"),
        [(row["stage"], row["process"], f"{row['calls']:g}", f"{row['ms']:.2f}") for row in stages],
        f"Own times, by the built-in timer; means of {STAGED_REQUESTS} requests.",
    )


def plot(points: Sequence[dict[str, Any]], stages: Sequence[dict[str, Any]]) -> Any:
    """TTFT over each axis, and the stages as bars."""
    names = list(dict.fromkeys(row["axis"] for row in points))
    figure, axes = new_figure(len(names) + 1, width=4)
    for axis, name in zip(axes, names, strict=False):
        for method in METHODS:
            line = [
                (row["value"], row["ttft_s"])
                for row in points
                if (row["axis"], row["method"]) == (name, method)
            ]
            axis.plot(*zip(*line, strict=True), marker="o", label=method)
        axis.set(xlabel=name.replace("_", " "), ylim=(0, None))
    axes[0].set_ylabel("seconds to first token")
    axes[0].legend()
    parts = [row for row in stages if row["stage"] != WHOLE]
    axes[-1].barh([row["stage"] for row in parts], [row["ms"] for row in parts])
    axes[-1].invert_yaxis()
    axes[-1].set(xlabel="ms of one linked request")
    return figure


def main() -> None:
    parser = parser_of(__doc__, "three points an axis, two repetitions")
    add_speed_flags(parser, SEAM)
    args = parser.parse_args()
    with bench("hybrid" if args.hybrid else "smollm2") as pair:
        outcome = run(pair, quick=args.quick, seam=args.seam, seed=args.seed)
    deliver(outcome, args)


if __name__ == "__main__":
    main()
