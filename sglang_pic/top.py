"""``sglang-pic top``: what a server's cache holds and does, polled and drawn."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import requests
from rich import box
from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from sglang_pic.client import NotFoundError, PicClient, PicServerError, Segment

HELD = ("segment", "company", "turn", "prefix", "free")
TIMEOUT_S = 10.0
HOTTEST = 10
# A frame fits 80 columns.
BAR_CELLS = 36
LABEL_CELLS = 8
UNITS = ("", "k", "M", "G", "T")
STYLES = {
    "pinned": "magenta",
    "segment": "green",
    "company": "bright_green",
    "turn": "cyan",
    "checkpoint": "bright_cyan",
    "document": "bright_yellow",
    "prefix": "blue",
    "running": "yellow",
    "free": "bright_black",
}


class TopError(RuntimeError):
    """The server does not tell its numbers; the message says why."""


@dataclasses.dataclass(frozen=True)
class Poll:
    """The numbers of one moment.

    Attributes:
        at: seconds, on a clock that only goes forward.
        front: counters of the front process.
        ranks: ``stats`` of each data-parallel rank.
        segments: those of one tenant.
    """

    at: float
    front: dict[str, Any]
    ranks: list[dict[str, Any]]
    segments: list[Segment]


def poll(client: PicClient) -> Poll:
    """Ask once.

    Raises:
        TopError: no answer, or not that of a server of ours.
    """
    try:
        stats, segments = client.stats(), client.segments()
        return Poll(time.monotonic(), stats["front"], stats["ranks"], segments)
    except NotFoundError as error:
        raise TopError(f"a server at {client.url}, but none of ours: {error}") from error
    except PicServerError as error:
        hint = ": --api-key" if error.status in (401, 403) else ""
        raise TopError(f"the server at {client.url} refuses{hint}: {error}") from error
    except (requests.JSONDecodeError, KeyError, TypeError) as error:
        why = f"its answer cannot be read: {error!r}"
        raise TopError(f"no server of ours at {client.url}: {why}") from error
    except (requests.ConnectionError, requests.Timeout) as error:
        raise TopError(f"no server answers at {client.url}: {_cause(error)}") from error
    except requests.RequestException as error:
        raise TopError(f"no server answers at {client.url}: {error}") from error


def _cause(error: BaseException) -> BaseException:
    """What the operating system said, below what libraries made of it."""
    while error.__context__ is not None:
        error = error.__context__
    return error


# -- drawing ----------------------------------------------------------------------


def frame(now: Poll, before: Poll | None = None) -> RenderableType:
    """Everything on one screen; rates need the poll ``before``."""
    counters = [
        _counters("prompt tokens", now, before, _prompt_tokens),
        _counters("segments named", now, before, lambda poll: poll.front["segments"]),
        _counters("answers", now, before, _answers),
        *([_found(now)] if now.front["chunks_seen"] else []),
        *([_documents(now, before)] if now.ranks[0]["encoded"]["encoder"] else []),
        _counters("evicted tokens, states", now, before, lambda poll: _over_ranks(poll, "evicted")),
        _counters("refused", now, before, lambda poll: _over_ranks(poll, "refused")),
    ]
    return Group(_headline(now), _budgets(now), Columns(counters), _hottest(now.segments))


def _headline(now: Poll) -> Text:
    front = now.front
    prompt = front["tokens_reused"] + front["tokens_computed"]
    line = Text.assemble(
        ("reuse ", "bold"),
        f"{front['tokens_reused'] / prompt:.0%}" if prompt else "-",
        (" of prompt tokens   compiling ", "bold"),
        f"{front['compiling']}",
        ("   failed compiles ", "bold"),
        f"{front['compile_failures']}",
        ("   saved ", "bold"),
        f"about {front['seconds_saved']:.1f} s",
    )
    audit = front["audit"]
    if audit["audits"]:
        line.append("   audits ", "bold")
        mean = audit["kl_sum"] / audit["audits"]
        line.append(f"{audit['audits']}, KL {mean:.3g}, at most {audit['kl_max']:.3g}")
    for rank, stats in enumerate(now.ranks):
        if stats["refusal"] is not None:
            line.append(f"\nrank {rank} does not link: {stats['refusal']}", "bold red")
    if front["linking_off"] is not None:
        line.append(f"\nlinking is switched off: {front['linking_off']}", "bold red")
    return line


def _budgets(now: Poll) -> Group:
    lines: list[RenderableType] = []
    for rank, stats in enumerate(now.ranks):
        suffix = f" {rank}" if len(now.ranks) > 1 else ""
        kv, state = stats["kv"], stats["state"]
        # What running requests compute belongs to nobody yet.
        running = max(0, kv["capacity"] - sum(kv[k] for k in HELD))
        limit = f"budget {_bytes(kv['budget'])} of {_bytes(kv['capacity'])}"
        lines += _bar(f"KV{suffix}", {**kv, "running": running}, kv["capacity"], limit)
        if state["budget"]:
            limit = f"budget {_bytes(state['budget'])}"
            encoded = stats["encoded"]
            held = {**state, "document": encoded["bytes"]} if encoded["encoder"] else state
            lines += _bar(f"state{suffix}", held, state["budget"], limit)
    return Group(*lines)


def _bar(
    label: str, held: Mapping[str, int], whole: int, limit: str
) -> tuple[Text, RenderableType]:
    """A bar of what is held, by kind, and the same in words. Pinned is part of segment."""
    kinds = {kind: held[kind] for kind in STYLES if kind in held}
    cells = {**kinds, "segment": kinds["segment"] - kinds["pinned"]}
    bar = Text()
    for kind, size in cells.items():
        if kind != "free":
            bar.append("█" * round(BAR_CELLS * size / max(whole, 1)), STYLES[kind])
    bar.truncate(BAR_CELLS)
    bar.append("░" * (BAR_CELLS - len(bar)), STYLES["free"])
    words = [
        Text.assemble((f"{kind} ", STYLES[kind]), _bytes(size), no_wrap=True)
        for kind, size in kinds.items()
    ]
    return (
        Text.assemble(f"{label:<{LABEL_CELLS}}", bar, f"  {limit}"),
        Padding(Columns(words, padding=(0, 2, 0, 0)), (0, 0, 0, LABEL_CELLS)),
    )


def _counters(
    title: str, now: Poll, before: Poll | None, read: Callable[[Poll], Mapping[str, float]]
) -> Table:
    """Counters since start, and how fast they grow."""
    table = _table(title)
    table.add_column("")
    table.add_column("all", justify="right")
    table.add_column("a second", justify="right")
    earlier = read(before) if before is not None else {}
    for name, value in sorted(read(now).items()):
        rate = "-"
        if before is not None:
            # A server that has started anew counts from zero.
            grown = max(0.0, value - earlier.get(name, 0))
            rate = f"{grown / max(now.at - before.at, 1e-9):,.1f}"
        table.add_row(name, f"{value:,.0f}", rate)
    return table


def _found(now: Poll) -> Table:
    """What was found in prompts without segments, by rule, what saves most first."""
    front = now.front
    table = _table("found by rule")
    names = {
        "seen": "chunks_seen",
        "recur": "chunks_recurring",
        "compiled": "chunks_compiled",
        "linked": "chunks_linked",
        "tokens": "tokens_found",
    }
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right")
    for rule in sorted(front["chunks_seen"], key=lambda rule: -front["tokens_found"].get(rule, 0)):
        table.add_row(rule, *(_short(front[key].get(rule, 0)) for key in names.values()))
    return table


def _documents(now: Poll, before: Poll | None) -> Table:
    """What a trained encoder has read."""

    def read(poll: Poll) -> dict[str, float]:
        return {
            "encoded": poll.front["documents_encoded"],
            "tokens encoded": poll.front["tokens_encoded"],
            "tokens of prompts": poll.front["tokens_outside"],
            "no room": sum(stats["encoded"]["no_room"] for stats in poll.ranks),
        }

    return _counters("documents", now, before, read)


def _prompt_tokens(poll: Poll) -> dict[str, float]:
    front = poll.front
    return {
        "linked": front["tokens_reused"] - front["tokens_prefix"],
        "prefix": front["tokens_prefix"],
        "computed": front["tokens_computed"],
        "compiled": front["tokens_compiled"],
    }


def _answers(poll: Poll) -> dict[str, float]:
    unlinked = {f"not linked: {why}": n for why, n in poll.front["unlinked"].items()}
    return {**poll.front["answers"], **unlinked}


def _over_ranks(poll: Poll, key: str) -> dict[str, float]:
    return {name: sum(stats[key][name] for stats in poll.ranks) for name in poll.ranks[0][key]}


def _hottest(segments: Sequence[Segment]) -> Table:
    table = _table("hottest segments", padding=0)
    # Whole on the narrowest screen: it is what pin and delete take.
    table.add_column("id", min_width=32)
    for name in ("hits", "tokens", "held", "KV", "state", "value", "used"):
        table.add_column(name, justify="right", min_width=len(name))
    table.add_column("")
    for one in sorted(segments, key=lambda segment: -segment.hits)[:HOTTEST]:
        table.add_row(
            one.id,
            *(_short(count) for count in (one.hits, one.tokens, one.held)),
            *(_short(size, 1024) for size in (one.kv_bytes, one.state_bytes)),
            _short(one.value),
            _short(one.last_use),
            Text("pinned" if one.pinned else "", STYLES["pinned"]),
        )
    return table


def _table(title: str, padding: int = 1) -> Table:
    return Table(
        title=title,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, padding),
    )


def _short(number: float, thousand: int = 1000) -> str:
    """In five characters: ``7``, ``0.25``, ``1.2k``, ``219M``, ``1e-06``."""
    if 0 < number < 0.01:
        return f"{number:.0e}"
    unit = 0
    while number >= 999.5 and unit < len(UNITS) - 1:
        number, unit = number / thousand, unit + 1
    digits = 1 if unit and number < 9.95 else 2 if number % 1 and number < 9.95 else 0
    return f"{number:.{digits}f}{UNITS[unit]}"


def _bytes(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


# -- the command ------------------------------------------------------------------


def top_parser() -> argparse.ArgumentParser:
    """Parser of the flags."""
    parser = argparse.ArgumentParser(
        prog="sglang-pic top", description="Watch a server: what its cache holds and does."
    )
    parser.add_argument("--url", default="http://127.0.0.1:30000", help="the server (%(default)s)")
    parser.add_argument("--api-key", metavar="KEY", help="SGLang's --api-key, if it has one")
    parser.add_argument(
        "--cache-salt", metavar="SALT", help="whose segments to show (those without a salt)"
    )
    parser.add_argument(
        "--interval", type=float, default=2.0, metavar="S", help="seconds between (%(default)s)"
    )
    parser.add_argument("--once", action="store_true", help="print one frame and end")
    parser.add_argument(
        "--json",
        type=pathlib.Path,
        metavar="FILE",
        help="append each poll's numbers to a file, a line of JSON each",
    )
    return parser


def _write(poll: Poll, path: pathlib.Path) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(dataclasses.asdict(poll)) + "\n")


def watch(client: PicClient, console: Console, path: pathlib.Path | None) -> Iterator[None]:
    """Poll and draw, for ever; yields after each frame. A server that goes away is
    shown as such, above the last numbers, and asked again."""
    last: Poll | None = None
    drawn: RenderableType = ""
    with Live(console=console, screen=console.is_terminal, auto_refresh=False) as live:
        while True:
            try:
                now = poll(client)
            except TopError as error:
                problem = Panel(Text(str(error)), title="no new numbers", style="bold red")
                live.update(Group(problem, drawn), refresh=True)
            else:
                drawn = frame(now, last)
                live.update(drawn, refresh=True)
                if path is not None:
                    _write(now, path)
                last = now
            yield


def main(argv: Sequence[str] | None = None) -> None:
    """Watch until interrupted, or once."""
    parser = top_parser()
    args = parser.parse_args(argv)
    if args.interval <= 0:
        parser.error("--interval: must be more than 0")
    client = PicClient(args.url, args.api_key, args.cache_salt, timeout_s=TIMEOUT_S)
    console = Console()
    if args.once:
        try:
            now = poll(client)
        except TopError as error:
            parser.exit(1, f"{parser.prog}: {error}\n")
        console.print(frame(now))
        if args.json is not None:
            _write(now, args.json)
        return
    with contextlib.suppress(KeyboardInterrupt):
        for _ in watch(client, console, args.json):
            time.sleep(args.interval)
