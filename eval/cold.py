"""Cold prompts: their segments compiled by several servers at once, or read from a store.

    python -m eval.cold [--quick] [--json FILE] [--plot FILE]
    python -m eval.cold --simulate [--compile-us US] [--gb-s RATE] ...

Servers of one thread each, with one store, a directory; the first gets the prompts, the
others are its peers. Every prompt is of random tokens that nobody has. Cold: the time to the
first token over workers, of prompts that wait for their compiles; beside it stock SGLang's
time, on one thread too. Fetched: the seconds that a segment takes which the store has,
beside those of computing it, and from which length on reading is sooner: as measured, and
as the lines foretell by which a server decides (``server.sources.Pace``), fitted to the
other half of what was measured. That is asked of a tiny model too, which computes a short
segment sooner than anything reads it.

Two cores carry two workers. What more would bring: ``--simulate``, without servers
(``eval.cold_simulated``).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import pathlib
import random
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

from tqdm import tqdm
from transformers import AutoConfig

from sglang_pic.eval import cold_simulated
from sglang_pic.eval.bench import STOCK_MODULE, model_path, ordinary_tokens
from sglang_pic.eval.cold_simulated import Costs, fitted_us
from sglang_pic.eval.command import Outcome, deliver, new_figure, parser_of
from sglang_pic.eval.intervals import ratio_interval
from sglang_pic.eval.models.tiny import tiny_llama
from sglang_pic.eval.serving import Server, free_port, serve
from sglang_pic.eval.tables import Table
from sglang_pic.server.sources import COMPUTED, PEER, STORE, Pace

STOCK = 0  # workers
OPENING, QUESTION = 16, 24
POOL_TOKENS = 16384
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
WORKERS = "workers"
SMOLLM2, TINY = "smollm2", "tiny"


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is asked.

    Attributes:
        workers: servers; ``STOCK`` is stock SGLang alone.
        segments, tokens: of a cold prompt: how many, and of each.
        prompts: of each kind.
        lengths, tiny_lengths: of segments that are read and computed, by SmolLM2 and by a
            tiny model.
        segments_a_length: how many of each.
    """

    workers: tuple[int, ...]
    segments: tuple[int, ...]
    tokens: int
    prompts: int
    lengths: tuple[int, ...]
    tiny_lengths: tuple[int, ...]
    segments_a_length: int


FULL = Sizes(
    (STOCK, 1, 2, 3),
    (2, 4, 8, 16),
    384,
    6,
    (32, 64, 128, 256, 512, 1024),
    (64, 128, 256, 512, 1024, 2048),
    12,
)
QUICK = Sizes((STOCK, 1, 2), (2, 8), 256, 3, (32, 128, 512), (64, 512, 2048), 6)


@contextlib.contextmanager
def servers(model: pathlib.Path, workers: int) -> Iterator[list[Server]]:
    """So many, of which the first gets the prompts."""
    common = ("--skip-tokenizer-init", f"--max-total-tokens={POOL_TOKENS}")
    ports = [free_port() for _ in range(workers)]
    with contextlib.ExitStack() as stack:
        folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if workers == STOCK:
            log = folder / "stock.log"
            yield [
                stack.enter_context(serve(model, log, *common, module=STOCK_MODULE, env=ONE_THREAD))
            ]
            return
        peers = ",".join(f"http://127.0.0.1:{port}" for port in ports)
        ours = (
            *common,
            "--pic-cold=link",
            "--pic-company=off",
            "--pic-store-when=always",
            f"--pic-store={folder / 'store'}",
            *([f"--pic-peers={peers}"] if workers > 1 else []),
        )
        yield [
            stack.enter_context(
                serve(model, folder / f"{port}.log", *ours, port=port, env=ONE_THREAD)
            )
            for port in ports
        ]


Prompt = tuple[list[int], list[dict[str, int]]]


def prompt_of(rng: random.Random, vocabulary: Sequence[int], count: int, tokens: int) -> Prompt:
    """Token ids that nobody has, and the places of their segments."""
    ids = rng.choices(vocabulary, k=OPENING + count * tokens + QUESTION)
    starts = range(OPENING, OPENING + count * tokens, tokens)
    return ids, [{"start": at, "end": at + tokens} for at in starts]


def ask(server: Server, prompt: Prompt, *, marked: bool) -> tuple[float, dict[str, Any]]:
    """Seconds to the first token, and the answer's meta data."""
    ids, segments = prompt
    pic = {"pic": {"segments": segments}} if marked else {}
    sampling = {"max_new_tokens": 1, "temperature": 0}
    seconds, first = server.first_token(input_ids=ids, sampling_params=sampling, **pic)
    meta: dict[str, Any] = first["meta_info"]
    return seconds, meta


def cold_rows(
    pool: list[Server], workers: int, sizes: Sizes, vocabulary: Sequence[int], rng: random.Random
) -> Iterator[dict[str, Any]]:
    """One row a cold prompt.

    Raises:
        RuntimeError: one was not linked, or a peer was asked in vain.
    """
    marked = workers != STOCK
    # Whatever is loaded lazily is, on every server.
    for server in pool:
        for _ in range(2):
            ask(server, prompt_of(rng, vocabulary, 2, sizes.tokens), marked=marked)
    grid = [count for count in sizes.segments for _ in range(sizes.prompts)]
    for count in tqdm(grid, desc=f"{workers or 'stock'}: cold", unit="prompt"):
        seconds, meta = ask(pool[0], prompt_of(rng, vocabulary, count, sizes.tokens), marked=marked)
        waited = meta["pic"]["waited_for"] if marked else []
        sources = [one["source"] for one in waited if one["segment"] is not None]
        strange = [one for one in waited if one["source"] == COMPUTED and PEER in one["why"]]
        if strange or (marked and len(sources) != count):
            raise RuntimeError(f"of {count} segments these were waited for: {waited}")
        yield {
            "part": "cold",
            WORKERS: workers,
            "segments": count,
            "ttft_s": seconds,
            "by_peers": sources.count(PEER),
        }


def fetched_rows(
    server: Server,
    model: str,
    lengths: Sequence[int],
    count: int,
    vocabulary: Sequence[int],
    rng: random.Random,
) -> Iterator[dict[str, Any]]:
    """Seconds of each segment, computed and then read, one at a time.

    Raises:
        RuntimeError: it did not come from where it should.
    """
    grid = [length for _ in range(count) for length in lengths]
    for length in tqdm(grid, desc=f"fetched, {model}", unit="segment"):
        prompt = prompt_of(rng, vocabulary, 1, length)
        ids, (span,) = prompt
        publish = {"input_ids": ids[span["start"] : span["end"]], "publish": True}
        for source in (COMPUTED, STORE):
            _, meta = ask(server, prompt, marked=True)
            (one,) = [one for one in meta["pic"]["waited_for"] if one["segment"] is not None]
            if one["source"] != source:
                raise RuntimeError(f"expected from {source}: {one}")
            yield {
                "part": "fetched",
                "model": model,
                "source": source,
                "tokens": length,
                "seconds": one["seconds"],
                "bytes": one["bytes"],
            }
            server.post("/pic/compile", publish).raise_for_status()
            server.post("/flush_cache", {}).raise_for_status()


def crossing(rows: Sequence[dict[str, Any]]) -> tuple[float | None, float | None]:
    """From how many tokens on reading is sooner: measured, between the medians of
    neighbouring lengths, on one half of the rows; and by the lines, on the other."""
    lengths = sorted({row["tokens"] for row in rows})
    by: dict[tuple[str, int], list[float]] = {}
    for row in rows:
        by.setdefault((row["source"], row["tokens"]), []).append(row["seconds"])
    gains = [
        statistics.median(by[COMPUTED, n][::2]) - statistics.median(by[STORE, n][::2])
        for n in lengths
    ]
    measured: float | None = float(lengths[0]) if gains[0] > 0 else None
    for (n, before), (m, after) in zip(
        zip(lengths, gains, strict=True), zip(lengths[1:], gains[1:], strict=True), strict=False
    ):
        if before <= 0 < after:
            measured = n + (m - n) * -before / (after - before)
    lines = {COMPUTED: Pace(), STORE: Pace()}
    for (source, n), seconds in by.items():
        for one in seconds[1::2]:
            lines[source].see(n, one)
    foretold = None
    for n in range(1, 2 * lengths[-1]):
        computed, read = (lines[source].seconds(n) for source in (COMPUTED, STORE))
        if computed is not None and read is not None and read < computed:
            foretold = float(n)
            break
    return measured, foretold


def measure(*, quick: bool, seed: int = 0) -> Outcome:
    """Both parts, on servers of SmolLM2."""
    sizes = QUICK if quick else FULL
    model = model_path(SMOLLM2)
    vocabulary = ordinary_tokens(AutoConfig.from_pretrained(model).vocab_size)
    rows: list[dict[str, Any]] = []
    for workers in sizes.workers:
        with servers(model, workers) as pool:
            rows += cold_rows(pool, workers, sizes, vocabulary, random.Random(seed + workers))
            if workers == 1:
                rows += fetched_rows(
                    pool[0],
                    SMOLLM2,
                    sizes.lengths,
                    sizes.segments_a_length,
                    vocabulary,
                    random.Random(seed),
                )
    with tempfile.TemporaryDirectory() as folder:
        tiny = tiny_llama(folder)
        words = ordinary_tokens(AutoConfig.from_pretrained(tiny).vocab_size)
        with servers(tiny, 1) as pool:
            rows += fetched_rows(
                pool[0],
                TINY,
                sizes.tiny_lengths,
                sizes.segments_a_length,
                words,
                random.Random(seed),
            )
    crossings = {name: crossing(_fetched(rows, name)) for name in (SMOLLM2, TINY)}
    config = {
        **dataclasses.asdict(sizes),
        "seed": seed,
        "sooner_read_from": {name: found for name, (found, _) in crossings.items()},
        "foretold": {name: found for name, (_, found) in crossings.items()},
    }
    return Outcome(
        config, rows, [_cold_table(rows, sizes), _fetched_table(rows, config)], _plot(rows)
    )


def _fetched(rows: Sequence[dict[str, Any]], model: str) -> list[dict[str, Any]]:
    return [row for row in rows if row["part"] == "fetched" and row["model"] == model]


def _ttft(rows: Sequence[dict[str, Any]], workers: int, count: int) -> list[float]:
    return [
        row["ttft_s"]
        for row in rows
        if row["part"] == "cold" and (row[WORKERS], row["segments"]) == (workers, count)
    ]


def _cold_table(rows: Sequence[dict[str, Any]], sizes: Sizes) -> Table:
    lines = []
    for count in sizes.segments:
        alone = _ttft(rows, 1, count)
        line = [f"{count} x {sizes.tokens}"]
        for workers in sizes.workers:
            found = _ttft(rows, workers, count)
            low, high = ratio_interval(alone, found)
            gain = statistics.fmean(alone) / statistics.fmean(found)
            line.append(f"{statistics.fmean(found):.2f} s, {gain:.2f}x [{low:.2f}, {high:.2f}]")
        lines.append(tuple(line))
    names = ["stock" if workers == STOCK else f"{workers} of ours" for workers in sizes.workers]
    return Table(
        "Cold prompts: seconds to the first token, compiled by one server and several",
        ("segments x tokens", *names),
        lines,
        "Each server of one thread. Ratios to one server of ours, with intervals of 95 %. "
        "Ours compiles and links, which `--pic-cold exact`, the default, does not wait for where "
        "one server would compile alone.",
    )


def _fetched_table(rows: Sequence[dict[str, Any]], config: dict[str, Any]) -> Table:
    lines, notes = [], []
    for model in (SMOLLM2, TINY):
        of_model = _fetched(rows, model)
        for length in sorted({row["tokens"] for row in of_model}):
            found = {source: _seconds(of_model, source, length) for source in (COMPUTED, STORE)}
            low, high = ratio_interval(found[COMPUTED], found[STORE])
            computed, read = (1e3 * statistics.fmean(found[one]) for one in (COMPUTED, STORE))
            ratio = f"{computed / read:.2f} [{low:.2f}, {high:.2f}]"
            lines.append((model, str(length), f"{computed:.1f}", f"{read:.1f}", ratio))
        measured, foretold = (config[name][model] for name in ("sooner_read_from", "foretold"))
        notes.append(
            f"{model}: sooner read from {_tokens(measured)} on as measured, from "
            f"{_tokens(foretold)} on by lines through the other half of the rows."
        )
    return Table(
        "A missing segment, computed or read from the store: ms",
        ("model", "tokens", "computed", "read", "computed / read"),
        lines,
        " ".join(notes),
    )


def _seconds(rows: Sequence[dict[str, Any]], source: str, tokens: int) -> list[float]:
    return [row["seconds"] for row in rows if (row["source"], row["tokens"]) == (source, tokens)]


def _tokens(count: float | None) -> str:
    return "no length" if count is None else f"{count:.0f} tokens"


def _plot(rows: Sequence[dict[str, Any]]) -> Any:
    figure, axes = new_figure(2)
    cold = [row for row in rows if row["part"] == "cold"]
    counts = sorted({row["segments"] for row in cold})
    for workers in dict.fromkeys(row[WORKERS] for row in cold):
        label = "stock" if workers == STOCK else f"{workers} of ours"
        means = [statistics.fmean(_ttft(rows, workers, count)) for count in counts]
        axes[0].plot(counts, means, marker="o", label=label)
    axes[0].set(xlabel="segments", ylabel="seconds to the first token", ylim=(0, None))
    axes[0].legend()
    for model in (SMOLLM2, TINY):
        fetched = _fetched(rows, model)
        lengths = sorted({row["tokens"] for row in fetched})
        for source, label in ((COMPUTED, "computed"), (STORE, "read")):
            means = [1e3 * statistics.fmean(_seconds(fetched, source, n)) for n in lengths]
            axes[1].plot(lengths, means, marker="o", label=f"{model}, {label}")
    axes[1].set(xlabel="tokens of a segment", ylabel="ms", yscale="log")
    axes[1].legend()
    return figure


def main() -> None:
    parser = parser_of(__doc__, "two workers, fewer prompts")
    parser.add_argument("--simulate", action="store_true", help="without servers")
    costs = parser.add_argument_group("costs of the simulation")
    costs.add_argument("--compile-us", type=float, help="of a token (fitted to HYPIC's times)")
    costs.add_argument("--token-bytes", type=int, default=131072, help="(%(default)s)")
    costs.add_argument("--gb-s", type=float, default=25.0, help="of the store (%(default)s)")
    costs.add_argument("--link-ms", type=float, default=0.0, help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn (%(default)s)")
    args = parser.parse_args()
    if args.simulate:
        outcome = cold_simulated.run(costs_of(args), quick=args.quick, seed=args.seed)
    else:
        outcome = measure(quick=args.quick, seed=args.seed)
    deliver(outcome, args)


def costs_of(args: argparse.Namespace) -> Costs:
    """The costs that the flags name."""
    compile_us = fitted_us() if args.compile_us is None else args.compile_us
    return Costs(compile_us, args.token_bytes, args.gb_s, args.link_ms)


if __name__ == "__main__":
    main()
