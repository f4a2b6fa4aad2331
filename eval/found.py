"""What is reused where no client marks anything, on three kinds of chats.

    python -m eval.found [--quick] [--workload NAME] [--json FILE] [--plot FILE]

A plain OpenAI client sends each workload (``eval.found_chats``) to stock SGLang, and to ours
four times over, to a tenant each: with marks, and without, found by structure and by content.
Between two requests the server is idle until what recurs is compiled. Of the second half of
the requests, when most has come before:

    reused   share of prompt tokens that were not computed
    ttft_s   median of the time of an answer of one token
    kl       KL(stock || method) of that token in nats, over the 20 tokens that stock finds
             likeliest and all others as one class; the mean

And where nothing recurs: what finding costs a request, by the built-in timer.
"""

from __future__ import annotations

import itertools
import pathlib
import random
import statistics
import tempfile
import time
import uuid
from collections.abc import Sequence
from typing import Any

import openai
from tqdm import tqdm

from sglang_pic.eval.bench import Bench, bench
from sglang_pic.eval.command import Outcome, deliver, new_figure, parser_of
from sglang_pic.eval.found_chats import TEMPLATE, WORKLOADS, Body, nothing
from sglang_pic.eval.serving import Server
from sglang_pic.eval.tables import Table
from sglang_pic.link.divergence import kl_with_remainder

METHODS = ("stock", "marked", "structure", "content")
REQUESTS, QUICK_REQUESTS = 32, 12
COSTS = 12
TOP = 20
FLOOR = -20.0  # log-probability of a token that the other does not list
IDLE_S, WAIT_S = 0.3, 60.0


def ask(server: Server, body: Body, salt: str, pic: dict[str, Any] | None) -> dict[str, Any]:
    """One answer of one token: seconds, tokens of the prompt and reused, and the likeliest
    tokens with their log-probabilities."""
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=600)
    extra: dict[str, Any] = {"cache_salt": salt}
    if pic is not None:
        extra["pic"] = pic
    start = time.perf_counter()
    answer = client.chat.completions.create(
        model="default",
        max_tokens=1,
        temperature=0,
        logprobs=True,
        top_logprobs=TOP,
        extra_body=extra,
        **body,
    )
    seconds = time.perf_counter() - start
    usage, listed = answer.usage, answer.choices[0].logprobs
    assert usage is not None and listed is not None and listed.content is not None
    report = (usage.model_extra or {}).get("pic")
    details = usage.prompt_tokens_details
    cached = (details.cached_tokens if details else None) or 0
    (first,) = listed.content
    return {
        "seconds": seconds,
        "tokens": usage.prompt_tokens,
        "reused": cached if report is None else report["tokens_reused"],
        "top": {one.token: one.logprob for one in first.top_logprobs},
        "segments": [] if report is None else report["segments"],
    }


def settle(server: Server) -> None:
    """Wait until nothing is being compiled, for a while.

    Raises:
        RuntimeError: that does not come.
    """
    until = time.monotonic() + WAIT_S
    before = None
    while time.monotonic() < until:
        time.sleep(IDLE_S)
        front = server.get("/pic/stats").json()["front"]
        now = front["compiling"], front["compiles"], front["chunks_compiled"]
        if now == before and not front["compiling"]:
            return
        before = now
    raise RuntimeError(f"{server.url}: still compiling after {WAIT_S:.0f} s")


def divergence(reference: dict[str, float], other: dict[str, float]) -> float:
    """KL of two lists of likeliest tokens, over those of the first."""
    tokens = sorted(reference)
    return kl_with_remainder(
        [reference[token] for token in tokens], [other.get(token, FLOOR) for token in tokens]
    )


def measure(
    pair: Bench, workload: str, requests: int, rng: random.Random, bar: Any
) -> list[dict[str, Any]]:
    """One workload by all methods; a row each."""
    chats = list(itertools.islice(WORKLOADS[workload](rng), requests))
    salts = {method: f"found-{uuid.uuid4()}" for method in METHODS}
    found: dict[str, list[dict[str, Any]]] = {method: [] for method in METHODS}
    for chat in chats:
        for method in METHODS:
            server = pair.stock if method == "stock" else pair.ours
            body = chat.marked if method == "marked" else chat.plain
            # Turns would be an edge over stock that has nothing to do with what is found.
            pic: dict[str, Any] | None = None if method == "stock" else {"turns": False}
            if pic is not None and method != "marked":
                pic["find"] = method
            found[method].append(ask(server, body, salts[method], pic))
            if method != "stock":
                settle(pair.ours)
            bar.update()
    half = requests // 2
    rows = []
    for method, answers in found.items():
        late = answers[half:]
        divergences = [
            divergence(one["top"], other["top"])
            for one, other in zip(found["stock"][half:], late, strict=True)
        ]
        rows.append(
            {
                "workload": workload,
                "method": method,
                "prompt_tokens": statistics.mean(one["tokens"] for one in late),
                "reused": sum(one["reused"] for one in late) / sum(one["tokens"] for one in late),
                "ttft_s": statistics.median(one["seconds"] for one in late),
                "kl": 0.0 if method == "stock" else statistics.mean(divergences),
                "segments": statistics.mean(len(one["segments"]) for one in late),
            }
        )
    return rows


def cost(pair: Bench, rng: random.Random) -> dict[str, Any]:
    """What finding costs a request of which nothing recurs."""
    salt = f"found-{uuid.uuid4()}"
    chats = list(itertools.islice(nothing(rng), COSTS + 1))
    ask(pair.ours, chats[0].plain, salt, {"find": "content"})
    pair.ours.post("/pic/timer", {"on": True}).raise_for_status()
    answers = [ask(pair.ours, chat.plain, salt, {"find": "content"}) for chat in chats[1:]]
    timer = pair.ours.post("/pic/timer", {"on": False}).json()
    seconds = timer["front"]["stages"]["find"]["seconds"] / COSTS
    return {
        "workload": "nothing recurs",
        "method": "content",
        "prompt_tokens": statistics.mean(one["tokens"] for one in answers),
        "find_us": 1e6 * seconds,
        "ttft_s": statistics.median(one["seconds"] for one in answers),
        "find_of_ttft": seconds / statistics.median(one["seconds"] for one in answers),
        "compiled": sum(bool(one["segments"]) for one in answers),
    }


def run(
    pair: Bench, *, quick: bool, seed: int = 0, workloads: Sequence[str] = tuple(WORKLOADS)
) -> Outcome:
    """Measure all of it; one row a workload and method, and one of the cost."""
    rng = random.Random(seed)
    requests = QUICK_REQUESTS if quick else REQUESTS
    rows: list[dict[str, Any]] = []
    with tqdm(total=requests * len(workloads) * len(METHODS), desc="found", unit="req") as bar:
        for workload in workloads:
            rows += measure(pair, workload, requests, rng, bar)
    rows.append(cost(pair, rng))
    config = {**pair.config, "requests": requests, "seed": seed}
    return Outcome(config, rows, [table_of(rows), costs_of(rows[-1])], plot(rows))


def table_of(rows: Sequence[dict[str, Any]]) -> Table:
    """One line a workload and method."""
    lines = [
        (
            f"{row['workload']}, {row['method']}",
            f"{row['prompt_tokens']:.0f}",
            f"{row['segments']:.1f}",
            f"{row['reused']:.1%}",
            f"{row['ttft_s']:.2f}",
            f"{row['kl']:.3f}",
        )
        for row in rows
        if "reused" in row
    ]
    return Table(
        "Found without marks",
        ("", "prompt tokens", "segments", "reused", "seconds to first token", "KL, nats"),
        lines,
        "Of the second half of the requests.",
    )


def costs_of(row: dict[str, Any]) -> Table:
    """What finding costs where nothing recurs."""
    return Table(
        "Where nothing recurs",
        ("", "prompt tokens", "finding, ms a request", "of time to first token"),
        [
            (
                "content",
                f"{row['prompt_tokens']:.0f}",
                f"{row['find_us'] / 1000:.2f}",
                f"{row['find_of_ttft']:.2%}",
            )
        ],
        "Tokenising, which is done in any case, is not in it.",
    )


def plot(rows: Sequence[dict[str, Any]]) -> Any:
    """Shares reused, a group of bars a workload."""
    figure, (axis,) = new_figure(width=7)
    shown = [row for row in rows if "reused" in row]
    names = list(dict.fromkeys(row["workload"] for row in shown))
    width = 0.8 / len(METHODS)
    for i, method in enumerate(METHODS):
        heights = [row["reused"] for row in shown if row["method"] == method]
        axis.bar([j + i * width for j in range(len(names))], heights, width, label=method)
    axis.set_xticks([j + 0.4 - width / 2 for j in range(len(names))], names)
    axis.set_ylabel("share of prompt tokens reused")
    axis.set_ylim(0, 1)
    axis.legend()
    return figure


def main() -> None:
    parser = parser_of(__doc__, f"{QUICK_REQUESTS} requests a workload")
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn (%(default)s)")
    parser.add_argument("--workload", choices=WORKLOADS, help="this one alone")
    args = parser.parse_args()
    workloads = tuple(WORKLOADS) if args.workload is None else (args.workload,)
    with tempfile.TemporaryDirectory() as folder:
        template = pathlib.Path(folder) / "template.jinja"
        template.write_text(TEMPLATE)
        with bench("smollm2", "--chat-template", str(template)) as pair:
            outcome = run(pair, quick=args.quick, seed=args.seed, workloads=workloads)
    deliver(outcome, args)


if __name__ == "__main__":
    main()
