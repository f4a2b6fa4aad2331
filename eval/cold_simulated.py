"""Cold prompts whose segments are compiled by several servers at once, simulated.

    python -m eval.cold --simulate [--quick] [--json FILE] [--plot FILE]

No server runs here. ``m`` workers compile the segments of one cold prompt, each its
share one after another; a value is written when it is compiled and fetched by the worker
that got the prompt, one after another as they come; then that one links. Shares are dealt

    lpt          the longest segment first, each to the worker with the least to do
    round_robin  in turn, as they stand in the prompt

``equal``: eleven segments of 2400 tokens, as HYPIC reports them (2321, 1173, 646 and
378 ms at 1, 2, 4 and 8 workers), whose time a compile is fitted to. ``drawn``: 64
segments of 200 to 8000 tokens, log-uniform, the mean over several draws. Other costs are
given as flags: measure them on servers of your own.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

from sglang_pic.eval.command import Outcome, new_figure
from sglang_pic.eval.tables import Table
from sglang_pic.server.sources import deal

# Workers and milliseconds: HYPIC's, of eleven segments of 2400 tokens.
PAPER = {1: 2321.0, 2: 1173.0, 4: 646.0, 8: 378.0}
PAPER_SEGMENTS, PAPER_TOKENS = 11, 2400
WORKERS, QUICK_WORKERS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64), (1, 2, 8, 64)
DRAWN, SHORTEST, LONGEST = 64, 200, 8000
DRAWS, QUICK_DRAWS = 50, 5


@dataclasses.dataclass(frozen=True)
class Costs:
    """Of one kind of server and store.

    Attributes:
        compile_us: microseconds that compiling a token takes.
        token_bytes: bytes that its value has.
        gb_s: at which one server reads and writes values, in 1e9 bytes a second.
        link_ms: milliseconds of the link, whatever the workers.
    """

    compile_us: float
    token_bytes: int
    gb_s: float
    link_ms: float

    def compile_ms(self, tokens: int) -> float:
        return tokens * self.compile_us / 1e3

    def move_ms(self, tokens: int) -> float:
        """To write or to read the value of so many tokens."""
        return tokens * self.token_bytes / self.gb_s / 1e6


def lpt(lengths: Sequence[int], workers: int) -> list[list[int]]:
    """Of each worker the indices of the segments that it compiles, in order: the longest
    first, each to the one with the least to do."""
    whose = deal(lengths, [0] * workers)
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return [[i for i in order if whose[i] == worker] for worker in range(workers)]


def round_robin(lengths: Sequence[int], workers: int) -> list[list[int]]:
    """The same, dealt in turn."""
    return [list(range(first, len(lengths), workers)) for first in range(workers)]


RULES: dict[str, Callable[[Sequence[int], int], list[list[int]]]] = {
    "lpt": lpt,
    "round_robin": round_robin,
}


def simulate(
    lengths: Sequence[int], shares: Sequence[Sequence[int]], costs: Costs
) -> tuple[float, float]:
    """Time to the first token of a cold prompt, and until its last segment is compiled, in
    ms. The first worker is the one that got the prompt."""
    compiled, there = 0.0, []
    own = 0.0
    for worker, share in enumerate(shares):
        at = written = 0.0
        for i in share:
            at += costs.compile_ms(lengths[i])
            # Written while the next one compiles.
            written = max(written, at) + costs.move_ms(lengths[i])
            if worker:
                there.append((written, i))
        compiled = max(compiled, at)
        own = at if worker == 0 else own
    fetched = 0.0
    for written, i in sorted(there):
        fetched = max(fetched, written) + costs.move_ms(lengths[i])
    return max(own, fetched) + costs.link_ms, compiled


def fitted_us() -> float:
    """Microseconds a token that fit HYPIC's times best, in the share of each: the busiest of
    its workers compiles ``ceil(11 / m)`` segments."""
    per_segment = [ms / math.ceil(PAPER_SEGMENTS / m) for m, ms in PAPER.items()]
    return sum(per_segment) / len(per_segment) / PAPER_TOKENS * 1e3


def drawn(seed: int) -> list[int]:
    """Lengths of one prompt's segments."""
    draw = random.Random(seed)
    spread = math.log(LONGEST / SHORTEST)
    return [round(SHORTEST * math.exp(draw.random() * spread)) for _ in range(DRAWN)]


def run(costs: Costs, *, quick: bool, seed: int = 0) -> Outcome:
    """Simulate every number of workers, both rules."""
    draws = QUICK_DRAWS if quick else DRAWS
    prompts = {
        "equal": [[PAPER_TOKENS] * PAPER_SEGMENTS],
        "drawn": [drawn(seed + i) for i in range(draws)],
    }
    rows: list[dict[str, Any]] = []
    for name, lengths in prompts.items():
        for workers in QUICK_WORKERS if quick else WORKERS:
            for rule, dealt in RULES.items():
                found = [simulate(one, dealt(one, workers), costs) for one in lengths]
                rows.append(
                    {
                        "prompt": name,
                        "workers": workers,
                        "rule": rule,
                        "ttft_ms": sum(ttft for ttft, _ in found) / len(found),
                        "compiled_ms": sum(compiled for _, compiled in found) / len(found),
                        "paper_ms": PAPER.get(workers) if name == "equal" else None,
                    }
                )
    config = {**dataclasses.asdict(costs), "draws": draws, "seed": seed}
    return Outcome(config, rows, [table_of(rows, name) for name in prompts], plot(rows))


def table_of(rows: Sequence[dict[str, Any]], prompt: str) -> Table:
    """One line a number of workers."""
    found = {(row["workers"], row["rule"]): row for row in rows if row["prompt"] == prompt}
    alone = found[1, "lpt"]["ttft_ms"]
    lines = []
    for workers in dict.fromkeys(workers for workers, _ in found):
        best, dealt = (found[workers, rule] for rule in RULES)
        paper = best["paper_ms"]
        lines.append(
            (
                str(workers),
                f"{best['ttft_ms']:.0f}",
                f"{dealt['ttft_ms']:.0f}",
                "" if paper is None else f"{paper:.0f}",
                f"{alone / best['ttft_ms']:.1f}x",
            )
        )
    what = (
        f"{PAPER_SEGMENTS} segments of {PAPER_TOKENS} tokens"
        if prompt == "equal"
        else f"{DRAWN} segments of {SHORTEST} to {LONGEST} tokens"
    )
    return Table(
        f"Cold prompt of {what}, simulated: ms to the first token",
        ("workers", "longest first", "in turn", "HYPIC", "longest first, gain"),
        lines,
    )


def plot(rows: Sequence[dict[str, Any]]) -> Any:
    """Milliseconds over workers, the paper's points among them."""
    figure, axes = new_figure(2)
    for axis, prompt in zip(axes, dict.fromkeys(row["prompt"] for row in rows), strict=True):
        for rule in RULES:
            found = [row for row in rows if (row["prompt"], row["rule"]) == (prompt, rule)]
            at = [row["workers"] for row in found]
            axis.plot(at, [row["ttft_ms"] for row in found], marker=".", label=rule)
        if prompt == "equal":
            axis.plot(list(PAPER), list(PAPER.values()), "k*", label="HYPIC")
        axis.set(title=prompt, xlabel="workers", ylabel="ms", xscale="log", yscale="log")
        axis.legend()
    return figure
