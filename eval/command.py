"""What the command lines of all evaluations have in common."""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

from sglang_pic.eval.results import write_json
from sglang_pic.eval.tables import Table


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What an evaluation found: the settings it ran with, flat rows for the JSON,
    and the same for people. ``figure`` is a matplotlib figure, if there is one."""

    config: dict[str, Any]
    rows: list[dict[str, Any]]
    tables: Sequence[Table]
    figure: Any = None


def parser_of(doc: str, quick: str) -> argparse.ArgumentParser:
    """A parser with the flags that every evaluation takes.

    Args:
        doc: the module's docstring.
        quick: what ``--quick`` leaves to do.
    """
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--json", type=pathlib.Path, help="write the rows here")
    parser.add_argument("--plot", type=pathlib.Path, help="write a PNG here")
    return parser


def add_speed_flags(parser: argparse.ArgumentParser, seam: int) -> None:
    """Flags of the evaluations that need no more than prompts of random tokens."""
    parser.add_argument("--hybrid", action="store_true", help="the shipped hybrid, not SmolLM2")
    parser.add_argument("--seam", type=int, default=seam, help="in tokens (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn (%(default)s)")


def new_figure(columns: int = 1, *, width: float = 5, height: float = 4) -> tuple[Any, Any]:
    """A figure of ``columns`` panels in one row, and the list of their axes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, columns, figsize=(width * columns, height), squeeze=False)
    for axis in axes[0]:
        axis.grid(alpha=0.3)
    return figure, list(axes[0])


def save(figure: Any, path: pathlib.Path) -> None:
    """Write a figure as PNG and close it."""
    import matplotlib.pyplot as plt

    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def deliver(outcome: Outcome, args: argparse.Namespace) -> None:
    """Print the tables; write JSON and PNG where they were asked for."""
    for table in outcome.tables:
        table.print()
    if args.json:
        write_json(args.json, outcome.config, outcome.rows)
    if args.plot and outcome.figure is not None:
        save(outcome.figure, args.plot)
