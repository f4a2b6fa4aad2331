"""``sglang-pic estimate``: what segments would save of recorded requests, without a server.

Plays them in order through a prefix cache that never evicts, and through the same with
segments on top: those that are marked, those that structure finds, those that content
finds too. What takes a cut of memory or time takes it in all of them alike.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from sglang_pic.config import PicConfig
from sglang_pic.errors import PicConfigError
from sglang_pic.find.cutting import Cutter
from sglang_pic.find.log import OfModel, Plain, Rendering, bodies, prompt_of
from sglang_pic.find.own import rules_with
from sglang_pic.find.replay import PREFIX, Prompt, Replay, Tally
from sglang_pic.forest.cost import PrefillCost

LABELS = {PREFIX: "prefix cache", "marked": "and marked segments", "structure": "and structure"}
LABELS["content"] = "and content"


def estimate_parser() -> argparse.ArgumentParser:
    """Parser of the flags."""
    defaults = PicConfig()
    parser = argparse.ArgumentParser(
        prog="sglang-pic estimate",
        description="Play recorded requests: what a prefix cache would save, and segments on top.",
    )
    parser.add_argument(
        "log",
        type=pathlib.Path,
        help="bodies of requests, one a line; or a directory",
    )
    parser.add_argument(
        "--model",
        type=pathlib.Path,
        metavar="DIR",
        help="a model's directory, for its tokens, chat template and costs (words are counted)",
    )
    parser.add_argument(
        "--rules", metavar="FILE", help="rules of your own, as --pic-find-rules takes them"
    )
    parser.add_argument(
        "--seam", type=int, default=defaults.seam, metavar="W", help="as --pic-seam (%(default)s)"
    )
    parser.add_argument(
        "--min-segment",
        type=int,
        default=defaults.min_segment,
        metavar="TOKENS",
        help="as --pic-min-segment (%(default)s)",
    )
    parser.add_argument(
        "--speed",
        type=float,
        metavar="TOKENS",
        help="tokens of a short prompt that your server computes in a second, to tell times",
    )
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the numbers here")
    parser.add_argument("--plot", type=pathlib.Path, metavar="FILE", help="write a PNG here")
    return parser


@dataclasses.dataclass(frozen=True)
class Played:
    """What came of a log.

    Attributes:
        tallies: by method.
        prompts: that were played.
        skipped: lines that hold no prompt.
        cost: of a token; ``None`` without a model whose shape is known.
    """

    tallies: dict[str, Tally]
    prompts: int
    skipped: int
    cost: PrefillCost | None

    def rows(self, speed: float | None) -> list[dict[str, Any]]:
        """Flat numbers, one object a method.

        Args:
            speed: tokens a second, of a short prompt.
        """
        stock = self.tallies[PREFIX].work
        per_token = 1.0 if self.cost is None else self.cost.per_token
        return [
            {
                "method": method,
                "prompts": self.prompts,
                "tokens": tally.tokens,
                "saved": tally.saved,
                "linked": tally.linked,
                "compiled": tally.compiled,
                "held_tokens": tally.held,
                "held_bytes": None if self.cost is None else tally.held * self.cost.kv_bytes,
                "work_of_prefix_cache": tally.work / stock if stock else 1.0,
                "seconds": None if speed is None else tally.work / per_token / speed,
                "linked_by_rule": dict(tally.rules.most_common()),
            }
            for method, tally in self.tallies.items()
        ]


def cost_of(config: Any) -> PrefillCost | None:
    """What a dense transformer's token costs, KV in 16 bits; ``None`` where a ``config.json``
    is of another kind."""
    try:
        hidden, layers = int(config["hidden_size"]), int(config["num_hidden_layers"])
        heads, inner = int(config["num_attention_heads"]), int(config["intermediate_size"])
        groups = int(config.get("num_key_value_heads") or heads)
        width = int(config.get("head_dim") or hidden // heads)
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None
    attention = hidden * width * 2 * (heads + groups)
    return PrefillCost(
        per_token=2.0 * layers * (attention + 3 * hidden * inner),
        per_pair=4.0 * layers * heads * width,
        kv_bytes=2 * layers * groups * width * 2,
    )


def model_of(path: pathlib.Path) -> tuple[Rendering, PrefillCost | None]:
    """How a model's directory tokenises, and what its tokens cost.

    Raises:
        PicConfigError: it holds no fast tokenizer.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise PicConfigError(f"--model: no tokenizer in {path}: {error}") from error
    if not tokenizer.is_fast:
        raise PicConfigError("--model: needs a fast tokenizer, which maps offsets")
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = {}
    return OfModel(tokenizer), cost_of(config)


def play(
    log: pathlib.Path, rendering: Rendering, cutter: Cutter, seam: int, cost: PrefillCost | None
) -> Played:
    """Play a log.

    Raises:
        OSError: it cannot be read.
        PicConfigError: there is no prompt in it.
    """
    replay = Replay(seam) if cost is None else Replay(seam, cost.flops)
    prompts = skipped = 0
    for prompt in _prompts(log, rendering, cutter):
        if prompt is None:
            skipped += 1
            continue
        prompts += 1
        replay.play(prompt)
    if not prompts:
        raise PicConfigError(f"{log}: no request with a prompt in it")
    return Played(replay.tallies, prompts, skipped, cost)


def _prompts(log: pathlib.Path, rendering: Rendering, cutter: Cutter) -> Iterator[Prompt | None]:
    for body in bodies(log):
        try:
            yield None if body is None else prompt_of(body, rendering, cutter)
        except Exception:  # of a chat template: it takes no such conversation
            yield None


# -- what it prints ---------------------------------------------------------------


def table_of(rows: Sequence[dict[str, Any]]) -> Table:
    """The methods, one a row."""
    table = Table(box=box.SIMPLE_HEAD, padding=0)
    table.add_column("", no_wrap=True)
    for name in ("saved", "of all", "on top", "compiled", "held", "memory", "time"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        memory = row["held_bytes"]
        seconds = row["seconds"]
        share = f"{row['work_of_prefix_cache']:.0%}"
        table.add_row(
            LABELS[row["method"]],
            f"{row['saved']:,}",
            f"{row['saved'] / row['tokens']:.1%}",
            f"{row['linked'] / row['tokens']:.1%}",
            f"{row['compiled']:,}",
            f"{row['held_tokens']:,}",
            "-" if memory is None else f"{memory / 2**20:,.0f} MiB",
            share if seconds is None else f"{seconds:,.1f} s, {share}",
        )
    return table


def rules_of(rows: Sequence[dict[str, Any]]) -> Table:
    """Tokens that each rule saves."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("rule")
    found = [row for row in rows if row["method"] in ("structure", "content")]
    for row in found:
        table.add_column(f"tokens, {row['method']}", justify="right")
    saved = {rule for row in found for rule in row["linked_by_rule"]}
    for rule in sorted(saved, key=lambda rule: -found[-1]["linked_by_rule"].get(rule, 0)):
        table.add_row(rule, *(f"{row['linked_by_rule'].get(rule, 0):,}" for row in found))
    return table


def plot(played: Played, path: pathlib.Path) -> None:
    """Shares saved, prompt by prompt.

    Raises:
        PicConfigError: matplotlib is not installed.
    """
    try:
        from sglang_pic.eval.command import new_figure, save
    except ImportError as error:
        raise PicConfigError(f"--plot needs sglang-pic[eval]: {error}") from error
    figure, (axis,) = new_figure()
    for method, tally in played.tallies.items():
        axis.plot(range(1, played.prompts + 1), tally.curve, label=LABELS[method])
    axis.set_xlabel("requests")
    axis.set_ylabel("share of prompt tokens saved")
    axis.set_ylim(0, 1)
    axis.legend()
    save(figure, path)


def main(argv: Sequence[str] | None = None) -> None:
    """Play a log and print what came of it; ends with 2 where that cannot be."""
    parser = estimate_parser()
    args = parser.parse_args(argv)
    if args.seam < 0 or args.min_segment < 1 or (args.speed is not None and args.speed <= 0):
        parser.error("--seam must be at least 0, --min-segment at least 1, --speed above 0")
    try:
        cutter = Cutter(args.min_segment, rules_with(args.rules))
        rendering, cost = (Plain(), None) if args.model is None else model_of(args.model)
        played = play(args.log, rendering, cutter, args.seam, cost)
        rows = played.rows(args.speed)
        if args.plot is not None:
            plot(played, args.plot)
    except (OSError, PicConfigError) as error:
        parser.error(str(error))
    console = Console()
    unit = "words" if args.model is None else "tokens"
    console.print(
        f"{played.prompts} requests, {rows[0]['tokens']:,} {unit}; {played.skipped} lines without "
        f"a prompt. As if nothing were evicted; time as a share of the prefix cache's."
    )
    console.print(table_of(rows))
    console.print(rules_of(rows))
    if args.json is not None:
        content = {"model": str(args.model) if args.model else None, "skipped": played.skipped}
        args.json.write_text(
            json.dumps({**content, "rows": rows}, indent=1) + "\n", encoding="utf-8"
        )
