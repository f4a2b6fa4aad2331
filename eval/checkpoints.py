"""Ordinary prefixes of hybrids: how much of what requests share is gone on from.

    python -m eval.checkpoints [--quick] [--json FILE] [--plot FILE]
    python -m eval.checkpoints --simulate [FILE] [--json FILE] [--plot FILE]

On servers with the shipped hybrid or another, one after another, at equal memory for states:

    no_buffer     stock SGLang, states at the ends of sequences
    extra_buffer  stock SGLang, states on its grid while a prompt is computed too
    blocks        stock SGLang, a state every 512 tokens of a prompt, with memory for all
    checkpoints   ours beside no_buffer

Unmarked requests, one at a time, each kind into an empty cache: questions about documents,
users behind prompts that branch, and prompts that share nothing, of which the time that
checkpoints take on the scheduler's thread is told (by the built-in timer). Every answer is
compared with no_buffer's, greedily decoded.

``--simulate`` replays streams instead, those of FILE and synthetic ones, over ways of
placing states (``eval.replay``). Without a model: in seconds.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
import pathlib
import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

from tqdm import tqdm
from transformers import AutoConfig

from sglang_pic.eval.bench import AS_ASKED, STOCK_MODULE, linear_layers, model_path, ordinary_tokens
from sglang_pic.eval.command import Outcome, deliver, new_figure, parser_of
from sglang_pic.eval.intervals import ratio_interval
from sglang_pic.eval.models.tiny import tiny_granite
from sglang_pic.eval.replay import (
    SYNTHETIC,
    Fixed,
    Histogram,
    Latest,
    Policy,
    Request,
    Sparse,
    recorded,
    replay,
)
from sglang_pic.eval.serving import Server, serve
from sglang_pic.eval.tables import Table

MIB = 1 << 20
POOL_TOKENS = 65536
ANSWER_TOKENS = 8
# Slots of states that running requests need.
RUNNING = 4
BLOCK = 512
NO_BUFFER, EXTRA_BUFFER, BLOCKS, OURS = "no_buffer", "extra_buffer", "blocks", "checkpoints"
GRANITE = "granite"
DOCUMENTS, BRANCHES, NOTHING = "documents", "branches", "nothing shared"


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of the workloads, in tokens and requests."""

    documents: int
    document_tokens: int
    questions: int  # a document
    branches: int
    branch_requests: int
    alone: int
    states: int


FULL = Sizes(12, 3800, 30, 6, 240, 60, 36)
QUICK = Sizes(10, 800, 10, 5, 100, 12, 16)


@dataclasses.dataclass(frozen=True)
class Arm:
    """A server to compare.

    Attributes:
        ours: with checkpoints; else stock SGLang.
        states: that it may keep, those of running requests apart.
    """

    name: str
    ours: bool
    states: int
    flags: tuple[str, ...]


def arms(mib: int, states: int, sizes: Sizes) -> list[Arm]:
    """All of them, at so much memory, which holds so many states."""
    plain = (
        "--page-size=1",
        "--mamba-radix-cache-strategy=no_buffer",
        "--disable-overlap-schedule",
    )
    blocks = sizes.documents * sizes.document_tokens // BLOCK + 2 * states
    return [
        Arm(NO_BUFFER, False, states, plain),
        Arm(EXTRA_BUFFER, False, states, ("--mamba-radix-cache-strategy=extra_buffer",)),
        Arm(BLOCKS, False, blocks, (*plain, f"--chunked-prefill-size={BLOCK}")),
        Arm(OURS, True, states, (*plain, f"--pic-state-mib={mib}")),
    ]


def state_nbytes(config: Any) -> int:
    """Bytes that a state of all linear layers takes, float32; of gated delta nets or of
    Mamba-2."""
    if hasattr(config, "mamba_d_state"):
        value, across = config.mamba_n_heads * config.mamba_d_head, config.mamba_d_state
        key, width = config.mamba_n_groups * across, config.mamba_d_conv
    else:
        across = config.linear_key_head_dim
        key = config.linear_num_key_heads * across
        value = config.linear_num_value_heads * config.linear_value_head_dim
        width = config.linear_conv_kernel_dim
    return linear_layers(config) * (value * across + (2 * key + value) * (width - 1)) * 4


def workloads(
    rng: random.Random, vocabulary: Sequence[int], sizes: Sizes
) -> Iterator[tuple[str, list[list[int]]]]:
    """Prompts by name, in the order in which they are asked."""

    def tokens(count: int) -> list[int]:
        return rng.choices(vocabulary, k=count)

    documents = [tokens(sizes.document_tokens) for _ in range(sizes.documents)]
    asked = [one for one in range(sizes.documents) for _ in range(sizes.questions)]
    rng.shuffle(asked)
    yield DOCUMENTS, [[*documents[one], *tokens(rng.randint(16, 64))] for one in asked]
    companies = [tokens(600 + 100 * i) for i in range(sizes.branches)]
    teams = [[tokens(200 + 80 * i) for i in range(sizes.branches)] for _ in companies]
    prompts = []
    for _ in range(sizes.branch_requests):
        one, team = rng.randrange(sizes.branches), rng.randrange(sizes.branches)
        prompts.append([*companies[one], *teams[one][team], *tokens(rng.randint(16, 200))])
    yield BRANCHES, prompts
    yield NOTHING, [tokens(rng.randint(300, 1200)) for _ in range(sizes.alone)]


def shared(prompts: Sequence[list[int]]) -> list[int]:
    """Of each prompt the tokens that it begins with as an earlier one does."""
    seen: list[list[int]] = []
    found = []
    for ids in prompts:
        at = bisect.bisect(seen, ids)
        found.append(max((_common(ids, one) for one in seen[max(0, at - 1) : at + 1]), default=0))
        seen.insert(at, ids)
    return found


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    for at, (a, b) in enumerate(zip(one, other)):  # noqa: B905
        if a != b:
            return at
    return min(len(one), len(other))


def ask(server: Server, name: str, arm: Arm, prompts: Sequence[list[int]]) -> list[dict[str, Any]]:
    """One row a prompt."""
    rows = []
    known = shared(prompts)
    for i, ids in enumerate(tqdm(prompts, desc=f"{arm.name}: {name}", unit="prompt")):
        asked = {"max_new_tokens": ANSWER_TOKENS, "temperature": 0, "ignore_eos": True}
        ttft, first, last = server.streamed(input_ids=ids, sampling_params=asked)
        rows.append(
            {
                "arm": arm.name,
                "workload": name,
                "prompt_tokens": len(ids),
                "shared_tokens": known[i],
                "cached_tokens": first["meta_info"]["cached_tokens"],
                "ttft_s": ttft,
                "answer": last["output_ids"],
            }
        )
    return rows


def measure(model: pathlib.Path, sizes: Sizes, *, seed: int) -> Outcome:
    """All arms over all workloads; a row a request."""
    config = AutoConfig.from_pretrained(model)
    mib = math.ceil(sizes.states * state_nbytes(config) / MIB)
    states = mib * MIB // state_nbytes(config)
    vocabulary = ordinary_tokens(config.vocab_size)
    rows: list[dict[str, Any]] = []
    seconds, held = 0.0, {}
    for arm in arms(mib, states, sizes):
        # Beside those, ours has its memory elsewhere.
        slots = RUNNING + (0 if arm.ours else arm.states)
        common = (
            "--skip-tokenizer-init",
            f"--max-total-tokens={POOL_TOKENS}",
            "--max-running-requests=1",
            f"--max-mamba-cache-size={slots}",
        )
        module: dict[str, Any] = {} if arm.ours else {"module": STOCK_MODULE}
        with tempfile.TemporaryDirectory() as logs:
            log = pathlib.Path(logs) / "server.log"
            own = AS_ASKED if arm.ours else ()
            with serve(model, log, *common, *arm.flags, *own, **module) as server:
                for name, prompts in workloads(random.Random(seed), vocabulary, sizes):
                    server.post("/flush_cache", {}).raise_for_status()
                    if arm.ours and name == NOTHING:
                        server.post("/pic/timer", {"on": True})
                    found = ask(server, name, arm, prompts)
                    rows += found
                    if arm.ours and name == NOTHING:
                        seconds = _own_seconds(server) / sum(row["ttft_s"] for row in found)
                if arm.ours:
                    held = server.forest()["checkpoints"]
    _compare(rows)
    settings = {
        **dataclasses.asdict(sizes),
        "model": model.name,
        "states_fit": states,
        "state_mib": mib,
        "seed": seed,
        "share_of_time_where_nothing_is_shared": seconds,
        "checkpoints": held,
    }
    return Outcome(settings, rows, [_table(rows, settings)], _plot(rows))


def run(*, quick: bool) -> Outcome:
    """For the report."""
    return measure(model_path("hybrid"), QUICK if quick else FULL, seed=0)


def _own_seconds(server: Server) -> float:
    shown = server.post("/pic/timer", {"on": False}).json()
    return sum(rank["stages"].get("checkpoints", {}).get("seconds", 0.0) for rank in shown["ranks"])


def _compare(rows: list[dict[str, Any]]) -> None:
    """Say of each row whether its answer is that of the first arm, and drop the tokens."""
    answers: dict[tuple[str, int], list[int]] = {}
    at: dict[tuple[str, str], int] = {}
    for row in rows:
        which = (row["arm"], row["workload"])
        key = (row["workload"], at.get(which, 0))
        at[which] = key[1] + 1
        answer = row.pop("answer")
        row["same_answer"] = answers.setdefault(key, answer) == answer


def _of(rows: Sequence[dict[str, Any]], arm: str, name: str) -> list[dict[str, Any]]:
    return [row for row in rows if row["arm"] == arm and row["workload"] == name]


def _table(rows: Sequence[dict[str, Any]], config: dict[str, Any]) -> Table:
    lines = []
    for name in (DOCUMENTS, BRANCHES, NOTHING):
        base = _of(rows, NO_BUFFER, name)
        for arm in (NO_BUFFER, EXTRA_BUFFER, BLOCKS, OURS):
            found = _of(rows, arm, name)
            tokens = sum(row["prompt_tokens"] for row in found)
            computed = tokens - sum(row["cached_tokens"] for row in found)
            again = sum(max(0, row["shared_tokens"] - row["cached_tokens"]) for row in found)
            times = [row["ttft_s"] for row in base], [row["ttft_s"] for row in found]
            low, high = ratio_interval(*times)
            lines.append(
                (
                    f"{name}: {arm}",
                    f"{tokens}",
                    f"{computed}",
                    f"{100 * computed / tokens:.0f} %",
                    f"{again}",
                    f"{sum(times[0]) / sum(times[1]):.2f} [{low:.2f}, {high:.2f}]",
                    f"{sum(row['same_answer'] for row in found)} of {len(found)}",
                )
            )
    share = config["share_of_time_where_nothing_is_shared"]
    held = config["checkpoints"]
    note = (
        "Again: what an earlier prompt begins with too. At equal memory, of "
        f"{config['states_fit']} states ({BLOCKS}: for all of its own). "
        f"TTFT as {NO_BUFFER}'s over this one's, with its interval of 95 %. Ours placed "
        f"{held['placed']} checkpoints and holds {held['held']}; where nothing is shared they "
        f"take {100 * share:.2f} % of the time to the first token."
    )
    return Table(
        "Ordinary prefixes of a hybrid",
        (
            "requests and cache",
            "prompt tokens",
            "computed",
            "share",
            "of it again",
            "TTFT gain",
            "same answers",
        ),
        lines,
        note,
    )


def _plot(rows: Sequence[dict[str, Any]]) -> Any:
    figure, axes = new_figure(2)
    for axis, name in zip(axes, (DOCUMENTS, BRANCHES), strict=True):
        for arm in (NO_BUFFER, EXTRA_BUFFER, BLOCKS, OURS):
            computed, line = 0, []
            for row in _of(rows, arm, name):
                computed += row["prompt_tokens"] - row["cached_tokens"]
                line.append(computed)
            axis.plot(range(1, len(line) + 1), line, label=arm)
        axis.set_title(name)
        axis.set_xlabel("requests")
        axis.set_ylabel("prompt tokens computed")
    axes[0].legend()
    return figure


# -- simulation ---------------------------------------------------------------------------

CACHED = (20, 50)
WARM_UP, SYNTHETIC_REQUESTS = 100, 1200
STATES = (0.5, 1, 1.5, 2, 4, 8)
FIXED = {"none": (1,), "block": (512, 1024, 2048), "balanced": (1, 2, 4, 8), "log": (1, 2, 4, 8)}


def policies(paths: int) -> Iterator[tuple[str, float, Policy]]:
    """Name, how many states, and the policy itself, for a cache of so many paths."""
    for rule, sizes in FIXED.items():
        for size in sizes:
            yield rule, size, Fixed(rule, size)
    for most in (1, 2, 4, 8, 12):
        yield "global histogram", most, Histogram(most)
    for each in STATES:
        yield "branches, last used", each, Latest(max(1, int(each * paths)))
        yield "ours", each, Sparse(max(1, int(each * paths)))


def simulate(file: pathlib.Path | None, *, seed: int = 0) -> Outcome:
    """All policies over all streams; a row each."""
    streams: dict[str, list[Request]] = {} if file is None else recorded(file)
    for name, make in SYNTHETIC.items():
        streams[name] = list(make(random.Random(seed), SYNTHETIC_REQUESTS))
    rows = []
    jobs = [(name, paths) for name in streams for paths in CACHED]
    for name, paths in tqdm(jobs, unit="stream"):
        for policy, size, made in policies(paths):
            found = replay(streams[name], made, paths, warm_up=WARM_UP)
            rows.append(
                {"stream": name, "cached": paths, "policy": policy, "size": size, **found.to_json()}
            )
    lines = []
    for name, paths in jobs:
        mine = [row for row in rows if (row["stream"], row["cached"]) == (name, paths)]
        cells = [_best(mine, policy, 1.6) for policy in ("ours", "branches, last used")]
        cells += [_best(mine, policy, 99) for policy in ("global histogram", "block", "balanced")]
        lines.append((f"{name}, {paths} paths", *cells))
    note = (
        "Share of the overlap that is gone on from, and states held a path: the best of each "
        "kind, ours and SGLang's with at most 1.6 states a path (or the fewest there are)."
    )
    columns = ("stream", "ours", "last used", "global histogram", "block", "balanced")
    config = {"file": str(file) if file else None, "warm_up": WARM_UP, "seed": seed}
    return Outcome(config, rows, [Table("Replayed", columns, lines, note)], _plot_streams(rows))


def _best(rows: Sequence[dict[str, Any]], policy: str, most: float) -> str:
    of = [row for row in rows if row["policy"] == policy]
    fits = [row for row in of if row["states_per_path"] <= most] or of[:1]
    best = max(fits, key=lambda row: row["resumed_share"])
    return f"{100 * best['resumed_share']:.1f} % @ {best['states_per_path']:.2f}"


def _plot_streams(rows: Sequence[dict[str, Any]]) -> Any:
    streams = list(dict.fromkeys(row["stream"] for row in rows))
    figure, axes = new_figure(len(streams), width=3.6)
    for axis, name in zip(axes, streams, strict=True):
        mine = [row for row in rows if row["stream"] == name and row["cached"] == CACHED[-1]]
        for policy in dict.fromkeys(row["policy"] for row in mine):
            points = sorted(
                (row["states_per_path"], row["recomputed_tokens"] / row["overlap_tokens"])
                for row in mine
                if row["policy"] == policy
            )
            axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=policy)
        axis.set_xscale("symlog", linthresh=1)
        axis.set_title(name)
        axis.set_xlabel("states a path")
    axes[0].set_ylabel("share of the overlap computed again")
    axes[-1].legend(fontsize=7)
    return figure


def main() -> int:
    parser = parser_of(__doc__, "fewer and shorter documents, fewer requests")
    parser.add_argument(
        "--model",
        default="hybrid",
        help="the shipped hybrid, a tiny random granite, or a directory (%(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn (%(default)s)")
    parser.add_argument(
        "--simulate", nargs="?", const="", metavar="FILE", help="replay streams, no server"
    )
    args = parser.parse_args()
    if args.simulate is not None:
        file = pathlib.Path(args.simulate) if args.simulate else None
        deliver(simulate(file, seed=args.seed), args)
    else:
        sizes = QUICK if args.quick else FULL
        with tempfile.TemporaryDirectory() as folder:
            granite = args.model == GRANITE
            model = tiny_granite(folder) if granite else model_path(args.model)
            deliver(measure(model, sizes, seed=args.seed), args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
