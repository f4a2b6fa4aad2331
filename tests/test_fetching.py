"""Where a missing segment comes from: what the front asks of the store, and when not."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from test_compiler import FakeEngine, made_by

from sglang_pic.forest.keys import namespace, segment_id
from sglang_pic.server import fetching as fetching_module
from sglang_pic.server.compiler import COMPILED, FETCHED, SHARED, Caller, CompileItem
from sglang_pic.server.fetching import FromStore
from sglang_pic.server.sources import (
    ADAPTER,
    BACK_OFF,
    BACK_OFF_S,
    COMPUTED,
    HELD,
    IN_STORE,
    KEPT_S,
    LATE,
    MOST_FAILURES,
    NO_SEGMENT,
    SOONER_COMPUTED,
    STORE,
    BackOff,
    Pace,
    source_of,
)
from sglang_pic.server.stored import Segments

SPACE = namespace((), None)


def item(n: int, length: int = 3, **changes: Any) -> CompileItem:
    made = {"salt": SPACE, "extra_key": None, "lora_path": None, "seams": (16,), **changes}
    return CompileItem((n,) * length, **made)


def name(one: CompileItem) -> str:
    return segment_id(one.salt or "", None, one.ids)


class Scheduler:
    """Answers ``fetch`` and ``fetched`` as ``manage.commands`` does.

    Args:
        fates: by the item's first token, what is told of it one question after another;
            the last again and again.
    """

    def __init__(self, fates: dict[int, list[tuple[str, str | None]]]):
        self.fates = fates
        self.begun: list[dict[str, Any]] = []
        self.dropped: list[str] = []
        self.names: dict[str, int] = {}
        self.asked = 0
        self.fails = False

    async def __call__(self, do: str, **fields: Any) -> list[Any]:
        await asyncio.sleep(0)
        if self.fails:
            raise RuntimeError("no scheduler")
        if do == "fetch":
            self.begun.append(fields)
            ids, at = fields["ids"], 0
            for length in fields["lengths"]:
                path = tuple(ids[at : at + length])
                self.names[segment_id(namespace((), fields["cache_salt"] or None), None, path)] = (
                    path[0]
                )
                at += length
            return [{}]
        if fields.get("drop"):
            self.dropped += fields["segments"]
            return [{"segments": []}]
        self.asked += 1
        told = []
        for one in fields["segments"]:
            fate = self.fates[self.names[one]]
            state, reason = fate[0] if len(fate) == 1 else fate.pop(0)
            told.append({"state": state, "reason": reason, "seconds": 0.1, "bytes": 100})
        return [{"segments": told}]


def from_store(
    scheduler: Scheduler, timeout_s: float = 5.0, longest: int = 1000
) -> FromStore[CompileItem]:
    kind = Segments(lambda space: space.removeprefix(SPACE), 0)
    return FromStore(scheduler, kind, lambda: longest, timeout_s)


HERE, GONE, LOOKING, COMING = ("here", None), ("gone", "not_in_store"), ("looking", None), (
    "coming", None,
)  # fmt: skip


def test_what_the_store_has_is_not_computed() -> None:
    async def run() -> None:
        scheduler = Scheduler({1: [LOOKING, COMING, HERE], 2: [GONE], 3: [("gone", "damaged")]})
        engine = FakeEngine()
        engine.go.set()
        fetching = from_store(scheduler)
        compiler = made_by(engine, fetching=fetching)
        opening = item(9, seams=(), segment=False, salt=None)
        items = [item(1), item(2), item(3), item(1), opening]
        made = await compiler.compile(items, Caller("a"))
        assert [one.outcome for one in made] == [FETCHED, COMPILED, COMPILED, SHARED, COMPILED]
        assert [(one.source.kind, one.source.reason) for one in made] == [
            (STORE, IN_STORE),
            (COMPUTED, "not_in_store"),
            (COMPUTED, "damaged"),
            (STORE, IN_STORE),
            (COMPUTED, NO_SEGMENT),
        ]
        assert made[0].source.nbytes == 100 and made[0].tokens == 0
        assert sorted(engine.first_tokens) == [2, 3, 9]
        # All in one command.
        assert [one["lengths"] for one in scheduler.begun] == [[3, 3, 3]]
        assert scheduler.dropped == [] and fetching._coming == {}

    asyncio.run(run())


def test_others_compile_while_one_is_fetched() -> None:
    async def run() -> None:
        scheduler = Scheduler({1: [COMING], 2: [GONE]})
        engine = FakeEngine()
        engine.go.set()
        compiler = made_by(engine, fetching=from_store(scheduler))
        both = asyncio.ensure_future(compiler.compile([item(1), item(2)]))
        await asyncio.sleep(0.05)
        assert engine.first_tokens == [2] and not both.done()
        scheduler.fates[1] = [HERE]
        assert [one.outcome for one in await both] == [FETCHED, COMPILED]

    asyncio.run(run())


def test_a_slow_store_costs_its_time_limit_and_then_nothing() -> None:
    async def run() -> None:
        scheduler = Scheduler({n: [LOOKING] for n in range(1, 9)})
        engine = FakeEngine()
        engine.go.set()
        fetching = from_store(scheduler, timeout_s=0.05)
        compiler = made_by(engine, fetching=fetching)
        reasons = []
        for n in range(1, MOST_FAILURES + 2):
            (made,) = await compiler.compile([item(n)])
            assert made.outcome == COMPILED
            reasons.append(made.source.reason)
        assert reasons == [LATE] * MOST_FAILURES + [BACK_OFF]
        assert scheduler.dropped == [name(item(n)) for n in range(1, MOST_FAILURES + 1)]
        assert fetching._coming == {} and not fetching._asked

    asyncio.run(run())


def test_a_scheduler_that_fails_costs_a_compile() -> None:
    async def run() -> None:
        scheduler = Scheduler({})
        scheduler.fails = True
        engine = FakeEngine()
        engine.go.set()
        (made,) = await made_by(engine, fetching=from_store(scheduler)).compile([item(1)])
        assert made.outcome == COMPILED and made.source.reason == "store_not_asked"

    asyncio.run(run())


def test_who_leaves_takes_nothing_from_others() -> None:
    async def run() -> None:
        scheduler = Scheduler({1: [COMING]})
        compiler = made_by(FakeEngine(), fetching=from_store(scheduler))
        leaving = asyncio.ensure_future(compiler.compile([item(1)]))
        staying = asyncio.ensure_future(compiler.compile([item(1)]))
        await asyncio.sleep(0.02)
        leaving.cancel()
        scheduler.fates[1] = [HERE]
        (made,) = await staying
        assert made.source.kind == STORE

    asyncio.run(run())


def test_what_is_known_ahead_is_read_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching_module, "KNOWN_S", 0.05)

    async def run() -> None:
        scheduler = Scheduler({1: [LOOKING, COMING], 2: [GONE], 3: [LOOKING]})
        fetching = from_store(scheduler)
        adapter = item(4, extra_key="lora")
        assert await fetching.known([item(1), item(2), item(3), adapter]) == [True] + [False] * 3
        scheduler.fates = {1: [HERE], 3: [("here", "came_meanwhile")]}
        assert (await fetching.fetch(item(1))).kind == STORE
        assert (await fetching.fetch(item(3))).kind == HELD
        assert (await fetching.fetch(adapter)).reason == ADAPTER
        assert len(scheduler.begun) == 1

    asyncio.run(run())


def test_a_command_is_no_longer_than_a_prompt() -> None:
    async def run() -> None:
        scheduler = Scheduler({n: [HERE] for n in range(20)})
        fetching = from_store(scheduler, longest=10)
        wanted = [item(n, length=4) for n in range(5)] + [item(7, length=4, named=True)]
        assert {one.kind for one in await asyncio.gather(*map(fetching.fetch, wanted))} == {STORE}
        sent = [(one["lengths"], one["named"]) for one in scheduler.begun]
        assert sent == [([4, 4], False), ([4, 4], False), ([4], False), ([4], True)]

    asyncio.run(run())


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_one_function_decides() -> None:
    clock = Clock()
    reading, computing = Pace(clock), Pace(clock)

    def of(
        tokens: int, refusal: str | None = None, backs_off: bool = False, always: bool = False
    ) -> tuple[str, str]:
        return source_of(
            tokens,
            refusal=refusal,
            backs_off=backs_off,
            always=always,
            reading=reading,
            computing=computing,
        )

    assert of(10, refusal=ADAPTER) == (COMPUTED, ADAPTER)
    assert of(10, backs_off=True) == (COMPUTED, BACK_OFF)
    # Nothing is measured: it is tried.
    assert of(10) == (STORE, IN_STORE)
    for tokens in (100, 1000, 2000):
        reading.see(tokens, 0.1 + tokens * 1e-4)
        computing.see(tokens, tokens * 3e-4)
    # Reading pays from 500 tokens on.
    assert of(450) == (COMPUTED, SOONER_COMPUTED) and of(550) == (STORE, IN_STORE)
    assert of(450, always=True) == (STORE, IN_STORE)
    clock.now += KEPT_S + 1
    assert of(450) == (STORE, IN_STORE)


def test_a_pace_is_a_line_that_never_falls() -> None:
    pace = Pace()
    assert pace.seconds(10) is None
    pace.see(100, 1.0)
    assert pace.seconds(200) == pytest.approx(2.0)
    pace.see(200, 0.5)
    assert pace.seconds(1000) == pytest.approx(0.75)


def test_a_store_that_fails_is_left_alone_longer_each_time() -> None:
    clock = Clock()
    back_off = BackOff(clock)
    for wait in (BACK_OFF_S, 2 * BACK_OFF_S):
        for _ in range(MOST_FAILURES):
            assert not back_off.is_on
            back_off.failed()
        clock.now += wait - 0.1
        assert back_off.is_on
        clock.now += 0.2
    back_off.failed()
    back_off.worked()
    for _ in range(MOST_FAILURES - 1):
        back_off.failed()
    assert not back_off.is_on
