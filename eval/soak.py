"""Soak: a long run of mixed traffic over a corpus ten times the cache.

    python -m eval.soak [--minutes 20] [--quick] [--hybrid] [--peer] [--json FILE] [--plot FILE]

Twelve clients at once, of three tenants: links, conversations, growing segments, several
samples, batches, ordinary and exact requests, segments that are found; compiles, pins with
a time, deletes, flushes, dry runs; malformed requests, aborts, streams dropped half-way,
clients that leave. Hostile ones too: forged commands, ambiguous names, mutated bodies,
thousands of small segments of as many strangers, aborts and departures while segments
compile. With ``--peer`` segments are compiled by another server too and come from a store
that both have; it is killed every two minutes. SGLang retracts requests by force and
checks its own memory at every step.

Answers to prompts that were asked in quiet before must be the same (``eval.recorded``):
``exact`` ones were recomputed in full; ``linked`` ones are compared where the same
segments were there; ``pinned`` ones always. Every status must be one that the request
may get. Afterwards nothing may be missing from the pool.

The resident memory of each of the server's processes must not grow over the last half:
of an hour or more the interval of 95 % of its slope includes 0, or its upper end is at
most ``BOUNDED``; of a shorter run, in which caches and arenas still fill, the upper end is
at most ``MAX_GROWTH``. Any check that fails fails the command.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import pathlib
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import aiohttp
import requests
from tqdm import tqdm
from transformers import AutoConfig

from sglang_pic.eval.bench import linear_layers, model_path, ordinary_tokens
from sglang_pic.eval.command import Outcome, deliver, new_figure, parser_of
from sglang_pic.eval.models.tiny import tiny_llama
from sglang_pic.eval.mortal import Mortal
from sglang_pic.eval.recorded import (
    EXACT,
    LINKED,
    PINNED,
    TOLERANCE,
    Answer,
    Sample,
    asking,
)
from sglang_pic.eval.serving import Server, free_port, serve
from sglang_pic.eval.storm import CLIENTS, DEEDS, HELD, TENANTS, Material, Seen, link_of, storm
from sglang_pic.eval.tables import Table
from sglang_pic.eval.watch import Growth, Watch, growth, last_half
from sglang_pic.eval.workloads import draw

MINUTES, QUICK_MINUTES = 20.0, 1.25
MIB = 1 << 20
CACHE_TOKENS = 8192  # that segments and conversations may hold
CORPUS = 10  # times as many
POOL_TOKENS = 12288
DOCUMENT_TOKENS = (48, 208)
SAMPLES = {EXACT: 12, LINKED: 12, PINNED: 4}
PINNED_DOCUMENTS = 3
# From here on memory must have come to rest.
PLATEAU_MINUTES = 60.0
# Bytes a minute, of one process: 90 MiB a day; what a run of minutes may still take; one
# that is not yet warm: threads, arenas and lazy imports.
BOUNDED, MAX_GROWTH, QUICK_GROWTH = MIB // 16, 2 * MIB, 60 * MIB
IDLE_S = 60.0
HARD = (
    "--page-size=16",
    "--chunked-prefill-size=64",
    "--enable-mixed-chunk",
    "--max-running-requests=16",
    "--skip-tokenizer-init",
    # So that requests wait for compiles.
    "--pic-cold=link",
)
STRICT = {
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1",
    "SGLANG_CHECK_KV_PAGE_INVARIANTS": "1",
    "SGLANG_TEST_RETRACT": "1",
    "SGLANG_TEST_RETRACT_INTERVAL": "7",
    # Else the server closes what has been quiet for five seconds, maybe as it is used again.
    "SGLANG_TIMEOUT_KEEP_ALIVE": "3600",
}


@dataclasses.dataclass(frozen=True)
class Check:
    """One thing that must hold, and what was found."""

    name: str
    ok: bool
    found: str


# -- the server ---------------------------------------------------------------------


def cache_flags(config: Any) -> tuple[str, ...]:
    """Budgets for ``CACHE_TOKENS`` tokens of a model, and the pool around them."""
    linear = linear_layers(config)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    layers = config.num_hidden_layers - linear
    kv = 2 * layers * config.num_key_value_heads * head * 4 * CACHE_TOKENS
    flags = (f"--max-total-tokens={POOL_TOKENS}", f"--pic-kv-mib={-(-kv // MIB)}")
    if not linear:
        return flags
    states = linear * config.linear_num_value_heads * config.linear_value_head_dim
    pair = 2 * states * config.linear_key_head_dim * 4
    documents = CACHE_TOKENS // (sum(DOCUMENT_TOKENS) // 2)
    return (*flags, f"--pic-state-mib={-(-pair * documents // MIB)}")


@contextlib.contextmanager
def soaked(model: pathlib.Path, log: pathlib.Path, *flags: str) -> Iterator[Server]:
    """A server with a small cache and strict checks."""
    cache = cache_flags(AutoConfig.from_pretrained(model))
    with serve(model, log, *HARD, *cache, *flags, env=STRICT) as server:
        yield server


@contextlib.contextmanager
def with_peer(model: pathlib.Path, log: pathlib.Path) -> Iterator[tuple[Server, Mortal]]:
    """``soaked``, with a store, and a peer that is killed."""
    other = free_port()
    with tempfile.TemporaryDirectory() as store:
        shared = (f"--pic-store=file://{store}?mib=256", "--pic-store-when=always")
        cache = cache_flags(AutoConfig.from_pretrained(model))
        peer = Mortal(model, log.with_suffix(".peer"), other, *HARD, *cache, *shared)
        asks = (f"--pic-peers=http://127.0.0.1:{other}", "--pic-peer-timeout=10")
        with peer.living(), soaked(model, log, *shared, *asks) as server:
            yield server, peer


# -- what is asked ------------------------------------------------------------------


def material_of(server: Server, vocabulary: range, seed: int) -> Material:
    """Corpus and openings, and prompts whose answers are recorded now."""
    rng = random.Random(seed)

    def tokens(low: int, high: int) -> list[int]:
        return rng.choices(vocabulary, k=rng.randint(low, high))

    documents: list[list[int]] = []
    while sum(map(len, documents)) < CORPUS * CACHE_TOKENS:
        documents.append(tokens(*DOCUMENT_TOKENS))
    openings = [tokens(16, 160) for _ in range(6)]
    held = [tokens(96, 128) for _ in range(PINNED_DOCUMENTS)]
    kinds = [kind for kind, count in SAMPLES.items() for _ in range(count)]
    samples = []
    for i, kind in enumerate(tqdm(kinds, desc="recording", unit="prompt")):
        opening = rng.choice([[], *openings])
        chosen = rng.sample(held, 2) if kind == PINNED else draw(rng, documents, rng.randint(1, 3))
        body = link_of(opening, chosen, tokens(4, 24)) | asking(rng.randint(4, 24))
        # Companies come and go.
        body["pic"]["company"] = "off"
        if kind == EXACT:
            body["pic"]["require_exact"] = True
        else:
            body["pic"] |= {"mode": rng.choice(["share", "share", "relocate"]), "turns": i % 2 == 0}
        samples.append(_record(server, kind, body, len(opening), f"record-{seed}-{i}"))
    _pin(server, held)
    return Material(documents, openings, samples, vocabulary)


def _record(server: Server, kind: str, body: dict[str, Any], opening: int, salt: str) -> Sample:
    """Ask a prompt alone, under a salt of its own, of which nothing stays."""
    answer = Answer.of(server.generate(**body, cache_salt=salt))
    if kind != EXACT and set(answer.plan) != {"hit"}:
        raise RuntimeError(f"in quiet a link found its segments {answer.plan}")
    if server.post("/pic/flush", {"cache_salt": salt}).status_code != 200:
        raise RuntimeError("what was recorded is still cached")
    return Sample(kind, body, opening, answer)


def _pin(server: Server, documents: list[list[int]]) -> None:
    body = {"input_ids": documents, "cache_salt": HELD}
    made = server.post("/pic/compile", body).json()["segments"]
    for segment in made:
        pinned = server.post(f"/pic/segments/{segment['id']}/pin", {"cache_salt": HELD})
        if pinned.status_code != 200:
            raise RuntimeError(f"a sample's segment cannot be pinned: {pinned.text}")


# -- the run ------------------------------------------------------------------------


def run(
    server: Server,
    vocabulary: range,
    *,
    minutes: float,
    seed: int = 0,
    model: str = "tiny",
    beside: Callable[[], list[Check]] = list,
) -> tuple[Outcome, list[Check]]:
    """Record, storm, check; the server must be idle and of ``soaked``'s flags.

    Args:
        beside: further checks, when the storm is over.
    """
    capacity = server.forest()["available_tokens"]
    material = material_of(server, vocabulary, seed)
    watch = Watch(server)
    started = server.log.stat().st_size
    seconds = 60 * minutes
    seen = asyncio.run(_storm(server, material, watch, seconds, seed))
    grown = growth(watch.sights)
    checks = [*checks_of(seen, watch, grown, minutes), *beside()]
    try:
        checks += _afterwards(server, capacity, started)
    except (requests.RequestException, RuntimeError) as error:
        checks.append(Check("answers afterwards", False, repr(error)))
    config = {
        "model": model,
        "dtype": "float32",
        "minutes": minutes,
        "clients": CLIENTS,
        "tenants": [*TENANTS, HELD],
        "documents": len(material.documents),
        "corpus_tokens": sum(map(len, material.documents)),
        "cache_tokens": CACHE_TOKENS,
        "pool_tokens": capacity,
        "flags": HARD,
        "environment": STRICT,
        "tolerance": TOLERANCE,
        "seed": seed,
        "start_s": server.start_s,
    }
    rows = [
        *({"check": c.name, "ok": c.ok, "found": c.found} for c in checks),
        *(
            {"deed": deed, "status": status, "answers": count}
            for (deed, status), count in sorted(seen.answers.items())
        ),
        *(
            {"process": name, "bytes_a_minute": found.slope, "low": found.low, "high": found.high}
            for name, found in grown.items()
        ),
        *(sight.to_json() for sight in watch.sights),
    ]
    tables = [table_of(checks), traffic_of(seen), memory_table(watch, grown)]
    return Outcome(config, rows, tables, plot(watch, grown)), checks


async def _storm(
    server: Server, material: Material, watch: Watch, seconds: float, seed: int
) -> Seen:
    timeout = aiohttp.ClientTimeout(total=300)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        beside = [
            asyncio.create_task(watch.run(session)),
            asyncio.create_task(_show(seconds, watch)),
        ]
        try:
            return await storm(session, server.url, material, seconds, seed)
        finally:
            for task in beside:
                task.cancel()
            ended = await asyncio.gather(*beside, return_exceptions=True)
            watch.problems += [repr(end) for end in ended if isinstance(end, Exception)]


async def _show(seconds: float, watch: Watch) -> None:
    """Progress, and how much memory the server takes."""
    bar = tqdm(range(int(seconds)), desc="storm", unit="s", mininterval=5)
    for _ in bar:
        if watch.sights:
            resident = watch.sights[-1].resident
            bar.set_postfix_str(f"{resident >> 20} MiB resident", refresh=False)
        await asyncio.sleep(1)


# -- what must hold -----------------------------------------------------------------


def checks_of(seen: Seen, watch: Watch, grown: dict[str, Growth], minutes: float) -> list[Check]:
    """What must have held during a run of so many minutes."""
    done = {deed for deed, _ in seen.answers}
    idle = sorted(set(DEEDS) - done)
    compared = ", ".join(f"{seen.compared[kind]} {kind}" for kind in SAMPLES)
    passed = ", ".join(f"{seen.passed[kind]} {kind}" for kind in (LINKED, PINNED))
    return [
        Check("every answer as expected", not seen.problems, _few(seen.problems) or "yes"),
        Check("every deed done", not idle, ", ".join(idle) or f"{len(DEEDS)} kinds"),
        Check(
            "answers as recorded",
            all(seen.compared[kind] > 0 for kind in SAMPLES) and seen.worst <= TOLERANCE,
            f"{compared}; of another plan {passed}; {seen.worst:.1e} apart at most",
        ),
        Check("requests retracted", seen.retractions > 0, f"{seen.retractions} times, of samples"),
        Check(
            "integrity and budgets",
            not watch.problems and watch.forests > 0,
            _few(watch.problems)
            or f"{watch.forests} checks of the forest, {len(watch.sights)} of budgets",
        ),
        _memory_flat(grown, minutes),
    ]


def of_peer(server: Server, peer: Mortal) -> list[Check]:
    """That it was asked, in vain too, and that the store was read."""
    front = server.get("/pic/stats").json()["front"]
    came, failed = (sum(front[f"peer_{what}"].values()) for what in ("segments", "failures"))
    read = front["sources"].get("store", 0)
    lives = f"{peer.deaths} deaths" if peer.failure is None else peer.failure[-500:]
    return [
        Check("peer killed", peer.deaths > 0 and peer.failure is None, lives),
        Check("segments of the peer", came > 0, f"{came} came, {failed} did not"),
        Check("segments of the store", read > 0, f"{read} read"),
    ]


def _memory_flat(grown: dict[str, Growth], minutes: float) -> Check:
    limit = MAX_GROWTH if minutes >= MINUTES else QUICK_GROWTH
    if minutes >= PLATEAU_MINUTES:
        limit = BOUNDED
    growing = [
        name
        for name, found in grown.items()
        if found.high > limit and (minutes < PLATEAU_MINUTES or found.low > 0)
    ]
    shown = ", ".join(f"{name} {_per_minute(found)}" for name, found in grown.items())
    asked = "each flat or " if minutes >= PLATEAU_MINUTES else ""
    return Check(
        "memory flat",
        not growing,
        f"{shown} MiB a minute ({asked}at most {limit / MIB:g})",
    )


def _per_minute(found: Growth) -> str:
    return f"{found.slope / MIB:+.3f} ± {found.width / MIB:.3f}"


def _afterwards(server: Server, capacity: int, started: int) -> Iterator[Check]:
    """What must hold when nothing runs any more; ``started``: bytes of log before."""

    def held_of(state: dict[str, Any]) -> dict[str, int]:
        return {name: state[f"{name}_tokens"] for name in ("available", "evictable", "protected")}

    def is_whole(state: dict[str, Any]) -> bool:
        """Idle at last, the server computes in company what has recurred."""
        return state["live_plans"] == 0 and sum(held_of(state).values()) == capacity

    state = _wait(server, is_whole)
    held = held_of(state)
    yield Check(
        "no leak",
        is_whole(state),
        f"{held} of {capacity}, {state['live_plans']} live plans",
    )
    listed = server.get(f"/pic/segments?cache_salt={HELD}").json()["segments"]
    for segment in listed:
        server.post(f"/pic/segments/{segment['id']}/unpin", {"cache_salt": HELD})
    state = _wait(server, lambda state: state["protected_tokens"] == 0)
    yield Check(
        "pins ended", state["protected_tokens"] == 0, f"{state['protected_tokens']} tokens held"
    )
    prompt = {"input_ids": list(range(20, 60)), "sampling_params": {"max_new_tokens": 4}}
    answer = server.generate(**prompt)
    yield Check("answers afterwards", len(answer["output_ids"]) == 4, "one ordinary request")

    def is_empty(state: dict[str, Any]) -> bool:
        if state["available_tokens"] == capacity and not state["segments"]:
            return True
        server.post("/flush_cache", {})
        return False

    empty = _wait(server, is_empty)
    yield Check(
        "nothing stays",
        is_empty(empty),
        f"{empty['available_tokens']} of {capacity} tokens free after a flush",
    )
    log = server.log.read_bytes()[started:].decode(errors="replace").splitlines()
    bad = [line for line in log if "Traceback" in line or "leak" in line.lower()]
    yield Check("log", not bad, "; ".join(bad[:3]) or "no traceback, no leak")


def _few(problems: list[str]) -> str:
    """The first of them, and how many there are."""
    shown = "; ".join(problem[:300] for problem in problems[:3])
    return f"{len(problems)}: {shown}" if problems else ""


def _wait(server: Server, is_idle: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """The forest when it is idle, or after a minute."""
    until = time.monotonic() + IDLE_S
    while not is_idle(state := server.forest()) and time.monotonic() < until:
        time.sleep(0.5)
    return state


# -- how it is shown ----------------------------------------------------------------


def table_of(checks: list[Check]) -> Table:
    return Table(
        "Soak: what must hold",
        ("check", "held", "found"),
        [(check.name, "yes" if check.ok else "NO", check.found) for check in checks],
    )


def traffic_of(seen: Seen) -> Table:
    """Answers by deed and status."""
    statuses = sorted({status for _, status in seen.answers})
    deeds = sorted({deed for deed, _ in seen.answers})
    return Table(
        f"Traffic: {sum(seen.answers.values())} requests",
        ("deed", *statuses),
        [(deed, *(str(seen.answers[deed, status] or "") for status in statuses)) for deed in deeds],
        "By HTTP status; left: the client did not wait for it.",
    )


def memory_table(watch: Watch, grown: dict[str, Growth]) -> Table:
    """Resident memory of each process."""
    half = last_half(watch.sights)
    rows = []
    for name, found in grown.items():
        rss = [sight.processes[name].rss for sight in half]
        uss = [sight.processes[name].uss for sight in half]
        first = watch.sights[0].processes.get(name)
        rows.append(
            (
                name,
                f"{first.rss / MIB:.1f}" if first else "",
                f"{rss[0] / MIB:.1f}",
                f"{rss[-1] / MIB:.1f}",
                f"{max(rss) / MIB:.1f}",
                f"{uss[-1] / MIB:.1f}",
                _per_minute(found),
            )
        )
    return Table(
        "Memory of the server's processes",
        ("process", "start", "half-time", "end", "most", "end, own", "growth"),
        rows,
        "MiB resident; own: shared with no other process; growth over the last half, MiB a "
        "minute, with the interval of 95 %.",
    )


def plot(watch: Watch, grown: dict[str, Growth]) -> Any:
    """Memory of each process, with the line fitted to the last half, and of the cache."""
    figure, axes = new_figure(2, height=3.5)
    minutes = [sight.s / 60 for sight in watch.sights]
    for name, found in grown.items():
        there = [(sight.s / 60, sight.processes.get(name)) for sight in watch.sights]
        known = [(minute, memory.rss / MIB) for minute, memory in there if memory is not None]
        (line,) = axes[0].plot(*zip(*known, strict=True), label=name)
        half = known[len(known) // 2 :]
        middle, mean = (sum(values) / len(half) for values in zip(*half, strict=True))
        ends = [half[0][0], half[-1][0]]
        fitted = [mean + found.slope / MIB * (end - middle) for end in ends]
        axes[0].plot(ends, fitted, color=line.get_color(), linestyle=":")
    axes[0].set(xlabel="minutes", ylabel="MiB resident", ylim=(0, None))
    axes[0].legend()
    for name in ("segment", "company", "turn", "prefix", "pinned"):
        axes[1].plot(minutes, [sight.kv[name] / MIB for sight in watch.sights], label=name)
    budget = watch.sights[0].kv["budget"] / MIB
    axes[1].axhline(budget, color="black", linestyle=":", label="budget of segment + turn")
    axes[1].set(xlabel="minutes", ylabel="MiB of KV", ylim=(0, 1.7 * budget))
    axes[1].legend(ncols=2, loc="upper right")
    return figure


def main() -> None:
    parser = parser_of(__doc__, f"{QUICK_MINUTES:g} minutes, memory hardly judged")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--hybrid", action="store_true", help="the shipped hybrid")
    which.add_argument("--model", help="directory of any other model (a tiny random Llama)")
    parser.add_argument(
        "--peer", action="store_true", help="with a store, and a peer that is killed"
    )
    parser.add_argument("--log", type=pathlib.Path, help="the server's (a temporary file)")
    parser.add_argument("--minutes", type=float, help=f"of traffic ({MINUTES:g})")
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn (%(default)s)")
    args = parser.parse_args()
    minutes = args.minutes or (QUICK_MINUTES if args.quick else MINUTES)
    name = "hybrid" if args.hybrid else args.model
    with tempfile.TemporaryDirectory() as folder:
        model = model_path(name) if name else tiny_llama(folder)
        vocabulary = ordinary_tokens(AutoConfig.from_pretrained(model).vocab_size)
        print(f"starting a server with {name or 'a tiny Llama'} ...", flush=True)
        log = args.log or pathlib.Path(folder) / "soak.log"
        settings: dict[str, Any] = {"minutes": minutes, "seed": args.seed, "model": name or "tiny"}
        if args.peer:
            with with_peer(model, log) as (server, peer):
                outcome, checks = run(
                    server, vocabulary, beside=lambda: of_peer(server, peer), **settings
                )
        else:
            with soaked(model, log) as server:
                outcome, checks = run(server, vocabulary, **settings)
    deliver(outcome, args)
    if not all(check.ok for check in checks):
        sys.exit("soak: a check failed")


if __name__ == "__main__":
    main()
