"""Every evaluation in its quick form, and ``docs/results.md`` made of what they found.

    python -m eval.report [--docs DIRECTORY] [--results DIRECTORY]

All parts with one model share one stock server and one of ours. A part that fails is
left out of the page, named at the end, and fails the command.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import pathlib
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any, cast

from sglang_pic.eval import (
    breakdown,
    checkpoints,
    cold,
    found,
    hybrid_quality,
    load,
    memory,
    pareto,
    recurrence,
    scheduler_cost,
    steady_state,
    text_quality,
    ttft,
)
from sglang_pic.eval.bench import Bench, bench
from sglang_pic.eval.command import Outcome, save
from sglang_pic.eval.encoder import served, speed
from sglang_pic.eval.results import machine, versions, write_json

DOCS = pathlib.Path(__file__).resolve().parent.parent / "docs"
HYBRID_SEAM = hybrid_quality.DEFAULT_SEAM


@dataclasses.dataclass(frozen=True)
class Part:
    """One section of the page: its title, the command that makes it alone, its quick
    form as a function of the servers, and the name of its files."""

    title: str
    command: str
    run: Callable[[Bench], Outcome]
    name: str


def _part(title: str, module: Any, flags: str = "", name: str = "", **options: Any) -> Part:
    short = module.__name__.rpartition(".")[2]
    command = f"python -m eval.{short} --quick{flags}"
    run = functools.partial(module.run, quick=True, **options)
    return Part(title, command, run, name or short)


ON_SMOLLM2 = (
    _part("Quality on real text", text_quality),
    # The front that the README shows is of a run of its own.
    _part("Loss against recomputed tokens", pareto, name="pareto_quick"),
    _part("Time to first token", ttft),
    _part("Under load", load),
    _part("Memory", memory),
    # One of three workloads, and three minutes of seventeen.
    _part("Found without marks", found, " --workload stuffed", workloads=("stuffed",)),
    _part("Growth, and one request taken apart", breakdown),
)
ALONE = (
    Part(
        "Cost on the scheduler's thread",
        "python -m eval.scheduler_cost --quick",
        lambda _: scheduler_cost.run(quick=True),
        "scheduler_cost",
    ),
    Part(
        "Do sets of segments recur?",
        "python -m eval.recurrence --quick",
        lambda _: recurrence.run(quick=True),
        "recurrence",
    ),
    Part(
        "Ordinary prefixes of the hybrid",
        "python -m eval.checkpoints --quick",
        lambda _: checkpoints.run(quick=True),
        "checkpoints",
    ),
    Part(
        "Cold prompts, by several servers",
        "python -m eval.cold --quick",
        lambda _: cold.measure(quick=True),
        "cold",
    ),
    Part(
        "Documents read by a trained encoder",
        "python -m eval.encoder.served --quick",
        lambda _: served.measure(quick=True),
        "encoder_served",
    ),
    Part(
        "Time to first token over encoded documents",
        "python -m eval.encoder.speed --quick",
        lambda _: speed.measure(quick=True),
        "encoder_speed",
    ),
)
_HYBRID = f" --hybrid --seam {HYBRID_SEAM}"
ON_HYBRID = (
    _part("Quality of the hybrid", hybrid_quality),
    _part("Steady state of the hybrid", steady_state, _HYBRID, seam=HYBRID_SEAM),
    _part("Memory of the hybrid", memory, _HYBRID, "memory_hybrid", seam=HYBRID_SEAM),
    _part("Time to first token of the hybrid", ttft, _HYBRID, "ttft_hybrid", seam=HYBRID_SEAM),
)

PARTS = (*ON_SMOLLM2, *ON_HYBRID, *ALONE)


@dataclasses.dataclass(frozen=True)
class Done:
    """A part that was run, and its seconds."""

    part: Part
    outcome: Outcome
    seconds: float


def run_alone(parts: Sequence[Part]) -> list[Done]:
    """Run parts that need no server."""
    return run_all(parts, cast(Bench, _NoServers()))


class _NoServers:
    def flush(self) -> None:
        pass


def run_on(name: str, parts: Sequence[Part], *, ours: tuple[str, ...] = ()) -> list[Done]:
    """Run parts on one pair of servers; what fails is shown and left out."""
    try:
        with bench(name, ours=ours) as pair:
            return run_all(parts, pair)
    except Exception:
        traceback.print_exc()
        return []


def run_all(parts: Sequence[Part], pair: Bench) -> list[Done]:
    """Run what runs; a part that fails is shown and left out."""
    done = []
    for part in parts:
        print(f"report: {part.title}", flush=True)
        start = time.monotonic()
        try:
            pair.flush()
            outcome = part.run(pair)
        except Exception:
            traceback.print_exc()
            continue
        done.append(Done(part, outcome, time.monotonic() - start))
        for table in outcome.tables:
            table.print()
    return done


def page(done: Sequence[Done], figures: str) -> str:
    """The page as Markdown. ``figures``: where the plots lie, as seen from the page."""
    host = machine()
    gib = host["memory_bytes"] / 2**30
    lines = [
        "# Results",
        "",
        "Made by `make report`: the quick form of every evaluation, in one run on one machine. "
        "What is not here was not run. Each section's command makes it alone; without `--quick` "
        "it takes longer and measures more. Nothing here ran on a GPU.",
        "",
        f"- Date: {time.strftime('%Y-%m-%d')}",
        f"- Machine: {host['processor']}, {host['cores']} cores, {gib:.0f} GiB",
        f"- Versions: {', '.join(f'{name} {value}' for name, value in versions().items())}",
        "",
    ]
    for one in done:
        lines += [f"## {one.part.title}", "", f"    {one.part.command}", ""]
        for table in one.outcome.tables:
            lines += [table.markdown()]
        if one.outcome.figure is not None:
            lines += [f"![{one.part.title}]({figures}/{one.part.name}.png)", ""]
        lines += [f"Took {one.seconds:.0f} s.", ""]
    return "\n".join(lines).rstrip() + "\n"


def write(done: Sequence[Done], docs: pathlib.Path, results: pathlib.Path) -> None:
    """Write page and plots below ``docs``, the rows below ``results``."""
    for one in done:
        write_json(results / f"{one.part.name}.json", one.outcome.config, one.outcome.rows)
    docs.mkdir(parents=True, exist_ok=True)
    (docs / "results.md").write_text(page(done, "figures"), encoding="utf-8")
    for one in done:
        if one.outcome.figure is not None:
            save(one.outcome.figure, docs / "figures" / f"{one.part.name}.png")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--docs", type=pathlib.Path, default=DOCS, help="page and plots (docs)")
    parser.add_argument(
        "--results", type=pathlib.Path, default=pathlib.Path("results"), help="JSON (results)"
    )
    args = parser.parse_args()
    done = [
        *run_on("smollm2", ON_SMOLLM2),
        *run_on("hybrid", ON_HYBRID, ours=hybrid_quality.OURS),
        *run_alone(ALONE),
    ]
    write(done, args.docs, args.results)
    print(f"report: {args.docs / 'results.md'}, {sum(one.seconds for one in done):.0f} s of runs")
    ran = [one.part for one in done]
    failed = [part.title for part in PARTS if part not in ran]
    if failed:
        sys.exit(f"report: failed and left out: {', '.join(failed)}")


if __name__ == "__main__":
    main()
