"""Time to first token and throughput under load, at several request rates.

    python -m eval.load [--quick] [--workload NAME] [--rates R ...] [--hybrid]
                        [--json FILE] [--plot FILE]

Requests arrive as a Poisson process, whether or not earlier ones are answered. Every
method gets the same prompts at the same times and begins with an empty cache, so that
linked includes compiling. Methods take turns in random order. A rate that a method
cannot sustain is marked: there its time to first token is the length of the queue.

    stock          stock SGLang with its radix cache
    stock_nocache  stock SGLang, no request sees what another one left behind
    unlinked       our attention, stock scheduling and radix cache, linking off
    pic            linked

Workloads: ``dynamic_rag``, ``multi_agent``, ``edited_history`` (``eval.workloads``), and
``no_reuse``: requests that name no segment, one at a time and in turn on stock SGLang
and on ours. What it costs to have this project on and unused is what a request spends in
our functions, by the built-in timer: microseconds, and the share of its time. The ratio of
seconds is shown beside it, with an upper bound of 95 % over the pairs of this one start;
two starts of one and the same server differ by more than that.

``ttft_s`` is the median, ``throughput`` answers a second from the first arrival to
the last answer.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
import random
import statistics
import time
from collections.abc import Sequence
from typing import Any

import aiohttp
import numpy as np
from tqdm import tqdm

from sglang_pic.eval.bench import Bench, bench
from sglang_pic.eval.command import Outcome, add_speed_flags, deliver, new_figure, parser_of
from sglang_pic.eval.intervals import interval
from sglang_pic.eval.serving import Server
from sglang_pic.eval.tables import Table
from sglang_pic.eval.workloads import WORKLOADS, Prompt
from sglang_pic.timer import HOOKS

METHODS = ("stock", "stock_nocache", "unlinked", "pic")
LABELS = {"stock_nocache": "stock, no cache", "pic": "linked"}
SUSTAINED = 0.9  # answers a second over requests a second
NO_REUSE = "no_reuse"
NAMES = (*WORKLOADS, NO_REUSE)
SEGMENT_TOKENS = 128
ANSWER_TOKENS = 8
SEAM = 16
RATES, REQUESTS, PAIRS = (0.25, 0.5, 1.0, 2.0, 4.0), 60, 200
QUICK_RATES, QUICK_REQUESTS, QUICK_PAIRS = (0.5, 2.0), 8, 24
TIMED = 20  # requests of ``no_reuse`` under the timer
LOST_PROMPT = 256  # tokens of a prompt of ``no_reuse``


@dataclasses.dataclass(frozen=True)
class Timed:
    """One answer, in seconds from the request's arrival: its first token and its end.
    ``done`` counts from the first arrival of the run. ``reused``, ``compiled``: tokens."""

    first_s: float
    total_s: float
    done_s: float
    reused: int
    compiled: int


def arrivals(rng: random.Random, count: int, rate: float) -> list[float]:
    """Times of a Poisson process, the first at 0, in seconds."""
    gaps = [rng.expovariate(rate) for _ in range(count - 1)]
    return [0.0, *np.cumsum(gaps).tolist()]


def body_of(prompt: Prompt, method: str, salt: str, number: int, seam: int) -> dict[str, Any]:
    """The request that asks a prompt by one method."""
    body: dict[str, Any] = {
        "input_ids": prompt.ids,
        "sampling_params": {
            "max_new_tokens": ANSWER_TOKENS,
            "temperature": 0,
            "ignore_eos": True,
        },
        "cache_salt": f"{salt}-{number}" if method == "stock_nocache" else salt,
        "stream": True,
    }
    if method == "unlinked":
        body["pic"] = {"link": False}
    if method == "pic":
        body["pic"] = {"segments": prompt.ranges, "seam": seam}
    return body


async def _ask(
    session: aiohttp.ClientSession, url: str, body: dict[str, Any], begin: float, at: float
) -> Timed:
    await asyncio.sleep(max(0.0, begin + at - time.perf_counter()))
    first, head, last = 0.0, b"", b""
    async with session.post(f"{url}/generate", json=body) as response:
        if response.status != 200:
            raise RuntimeError(f"{url}: {response.status} {(await response.text())[:500]}")
        async for line in response.content:
            if line.startswith(b"data: {"):
                if not head:
                    first, head = time.perf_counter() - begin, line
                last = line
    done = time.perf_counter() - begin
    if "meta_info" not in (json.loads(last[6:]) if last else {}):
        raise RuntimeError(f"{url}: no answer came: {last[:500]!r}")
    # Which alone has the report.
    meta = json.loads(head[6:])["meta_info"]
    compiled = meta.get("pic", {}).get("tokens_compiled", 0)
    return Timed(first - at, done - at, done, meta["cached_tokens"], compiled)


async def drive(
    server: Server, bodies: Sequence[dict[str, Any]], times: Sequence[float]
) -> list[Timed]:
    """Send each request at its time, whatever became of the others.

    Raises:
        RuntimeError: a request was refused or not answered.
    """
    timeout = aiohttp.ClientTimeout(total=900)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        begin = time.perf_counter()
        asks = [
            _ask(session, server.url, body, begin, at)
            for body, at in zip(bodies, times, strict=True)
        ]
        return list(await asyncio.gather(*asks))


def measure(
    pair: Bench, workload: str, rate: float, count: int, seam: int, seed: int
) -> list[dict[str, Any]]:
    """All methods at one rate; flat rows."""
    rng = random.Random(f"{seed}-{workload}")
    prompts = WORKLOADS[workload](rng, lambda n: pair.tokens(rng, n), count, SEGMENT_TOKENS)
    times = arrivals(rng, count, rate)
    rows = []
    for method in rng.sample(METHODS, len(METHODS)):
        pair.flush()
        server = pair.stock if method.startswith("stock") else pair.ours
        salt = f"{workload}-{rate}-{method}-{rng.random()}"
        bodies = [body_of(p, method, salt, i, seam) for i, p in enumerate(prompts)]
        found = asyncio.run(drive(server, bodies, times))
        tokens = sum(len(prompt.ids) for prompt in prompts)
        reused = sum(one.reused for one in found)
        compiled = sum(one.compiled for one in found)
        rows.append(
            {
                "workload": workload,
                "method": method,
                "rate": rate,
                "requests": count,
                "ttft_s": statistics.median(one.first_s for one in found),
                "latency_s": statistics.median(one.total_s for one in found),
                "throughput": count / max(one.done_s for one in found),
                "tokens_reused": reused,
                "tokens_compiled": compiled,
                "tokens_computed": tokens - reused + compiled,
            }
        )
    return rows


# -- what it costs to have it installed ------------------------------------------------


def _plain(pair: Bench, rng: random.Random) -> dict[str, Any]:
    prompt = Prompt([], pair.tokens(rng, LOST_PROMPT))
    return body_of(prompt, "stock", str(rng.random()), 0, SEAM)


def measure_cost(pair: Bench, pairs: int, seed: int) -> list[dict[str, Any]]:
    """Requests without segments, in turn on both servers; flat rows."""
    rng = random.Random(f"{seed}-{NO_REUSE}")
    servers = {"stock": pair.stock, "ours": pair.ours}
    found: dict[str, list[Timed]] = {name: [] for name in servers}
    for i in tqdm(range(-2, pairs), desc=NO_REUSE, unit="pair"):
        body = _plain(pair, rng)
        for name in sorted(servers, reverse=i % 2 == 0):
            (one,) = asyncio.run(drive(servers[name], [body], [0.0]))
            if i >= 0:  # the first ones pay for lazy set-up
                found[name].append(one)
    logs = [
        math.log(ours.total_s / stock.total_s)
        for ours, stock in zip(found["ours"], found["stock"], strict=True)
    ]
    # Two-sided 90 %: its upper end is the one-sided bound of 95 %.
    _, upper = interval(logs, level=0.9)
    hooks = _in_hooks(pair, rng)
    return [
        {
            "workload": NO_REUSE,
            "method": name,
            "rate": None,
            "requests": len(timed),
            "ttft_s": statistics.median(one.first_s for one in timed),
            "latency_s": statistics.median(one.total_s for one in timed),
            "throughput": len(timed) / sum(one.total_s for one in timed),
            "ratio": math.exp(statistics.fmean(logs)) if name == "ours" else 1.0,
            "ratio_upper": math.exp(upper) if name == "ours" else 1.0,
            "hooks_us": hooks if name == "ours" else 0.0,
        }
        for name, timed in found.items()
    ]


def _in_hooks(pair: Bench, rng: random.Random) -> float:
    """Microseconds of own code a request without segments, in both processes."""
    pair.ours.post("/pic/timer", {"on": True})
    for _ in range(TIMED):
        asyncio.run(drive(pair.ours, [_plain(pair, rng)], [0.0]))
    shown = pair.ours.post("/pic/timer", {"on": False}).json()
    ours = (HOOKS, "match", "plan", "arrange")
    stages = [shown["front"]["stages"], *(rank["stages"] for rank in shown["ranks"])]
    spent = sum(found[name]["seconds"] for found in stages for name in ours if name in found)
    return 1e6 * spent / TIMED


# -- all of it --------------------------------------------------------------------


def run(
    pair: Bench,
    *,
    quick: bool,
    names: Sequence[str] = NAMES,
    rates: Sequence[float] | None = None,
    seam: int = SEAM,
    seed: int = 0,
) -> Outcome:
    """The workloads of ``names``, at ``rates`` in requests a second."""
    rates = rates or (QUICK_RATES if quick else RATES)
    count = QUICK_REQUESTS if quick else REQUESTS
    rng = random.Random(seed)
    for server in (pair.stock, pair.ours):
        server.generate(**{**_plain(pair, rng), "stream": False})
    points = [(name, rate) for name in names if name != NO_REUSE for rate in rates]
    rows = []
    for name, rate in tqdm(points, desc="load", unit="point"):
        rows += measure(pair, name, rate, count, seam, seed)
    if NO_REUSE in names:
        rows += measure_cost(pair, QUICK_PAIRS if quick else PAIRS, seed)
    config = {
        **pair.config,
        "segment_tokens": SEGMENT_TOKENS,
        "answer_tokens": ANSWER_TOKENS,
        "seam": seam,
        "seed": seed,
    }
    return Outcome(config, rows, tables_of(rows), plot(rows) if points else None)


def is_sustained(row: dict[str, Any]) -> bool:
    """Whether a method answered about as many requests a second as arrived."""
    return bool(row["throughput"] >= SUSTAINED * row["rate"])


def tables_of(rows: Sequence[dict[str, Any]]) -> list[Table]:
    """One table of the loads, one of the cost of having us installed."""
    loads = [row for row in rows if row["workload"] != NO_REUSE]
    cost = [row for row in rows if row["workload"] == NO_REUSE]
    made = []
    if loads:
        made.append(
            Table(
                "Under load: Poisson arrivals, caches empty at first",
                (
                    "workload, requests/s",
                    "method",
                    "TTFT, s",
                    "latency, s",
                    "answers/s",
                    "tokens computed",
                ),
                [
                    (
                        f"{row['workload']}, {row['rate']:g}",
                        LABELS.get(row["method"], row["method"]),
                        f"{row['ttft_s']:.2f}",
                        f"{row['latency_s']:.2f}",
                        f"{row['throughput']:.2f}{'' if is_sustained(row) else ' *'}",
                        str(row["tokens_computed"]),
                    )
                    for row in loads
                ],
                "Medians over requests; tokens computed include those of compiling. * fewer "
                "answers than requests a second: TTFT is that of a growing queue. No cache: the "
                "radix cache is on, each request under a salt of its own.",
            )
        )
    if cost:
        stock, ours = cost
        made.append(
            Table(
                "Cost of having it on and unused: requests without segments",
                (
                    "requests",
                    "own functions",
                    "of its time",
                    "stock, s",
                    "ours, s",
                    "ratio",
                    "bound",
                ),
                [
                    (
                        f"{ours['requests']} pairs of {LOST_PROMPT} + {ANSWER_TOKENS} tokens",
                        f"{ours['hooks_us']:.0f} us",
                        f"{ours['hooks_us'] / ours['latency_s'] / 1e6:.3%}",
                        f"{stock['latency_s']:.3f}",
                        f"{ours['latency_s']:.3f}",
                        f"{ours['ratio']:.3f}",
                        f"{ours['ratio_upper']:.3f}",
                    )
                ],
                "Own functions: by the built-in timer. Seconds are medians; the ratio is the "
                "geometric mean over interleaved pairs, its bound of 95 % that of these pairs: "
                "two starts of one server differ by several per cent.",
            )
        )
    return made


def plot(rows: Sequence[dict[str, Any]]) -> Any:
    """TTFT over request rate, one panel a workload."""
    names = [name for name in WORKLOADS if any(row["workload"] == name for row in rows)]
    figure, axes = new_figure(len(names), width=4)
    for axis, name in zip(axes, names, strict=True):
        for method in METHODS:
            line = [
                (row["rate"], row["ttft_s"])
                for row in rows
                if row["workload"] == name and row["method"] == method
            ]
            label = LABELS.get(method, method)
            axis.plot(*zip(*line, strict=True), marker="o", label=label)
        axis.set(title=name, xlabel="requests a second", yscale="log")
    axes[0].set_ylabel("median seconds to first token")
    axes[-1].legend()
    return figure


def main() -> None:
    parser = parser_of(__doc__, "two rates, few requests")
    parser.add_argument("--workload", choices=NAMES, help="one of them (all)")
    parser.add_argument(
        "--rates", type=float, nargs="+", help="requests a second (0.25 to 4, in five steps)"
    )
    add_speed_flags(parser, SEAM)
    args = parser.parse_args()
    if any(rate <= 0 for rate in args.rates or ()):
        parser.error("--rates must be above 0")
    names = (args.workload,) if args.workload else NAMES
    with bench("hybrid" if args.hybrid else "smollm2") as pair:
        outcome = run(
            pair, quick=args.quick, names=names, rates=args.rates, seam=args.seam, seed=args.seed
        )
    deliver(outcome, args)


if __name__ == "__main__":
    main()
