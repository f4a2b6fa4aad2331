"""What is compiled, when, and for whom: without a server."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Coroutine
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sglang_pic.metrics.front import Counts
from sglang_pic.server import compiler as compiler_module
from sglang_pic.server.compiler import (
    COMPILED,
    FAILED,
    LATE,
    QUEUE_FULL,
    SHARED,
    Caller,
    CompileItem,
    Compiler,
    Made,
)
from sglang_pic.server.queue import FairQueue


def item(n: int, tokens: int = 3, salt: str = "salt") -> CompileItem:
    return CompileItem((n,) * tokens, salt, None, None)


class FakeEngine:
    """Answers like SGLang, after the test lets it; ``bad`` is a token it cannot bear."""

    def __init__(self, bad: int | None = None):
        self.sent: list[Any] = []
        self.running = self.most = 0
        self.go = asyncio.Event()
        self.bad = bad

    @property
    def first_tokens(self) -> list[int]:
        return [sent.input_ids[0] for sent in self.sent]

    async def __call__(self, sent: Any) -> Any:
        self.sent.append(sent)
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await self.go.wait()
        finally:
            self.running -= 1
        if sent.input_ids[0] == self.bad:
            raise RuntimeError("no memory")
        yield {"meta_info": {"prompt_tokens": len(sent.input_ids), "cached_tokens": 0}}


def made_by(
    engine: FakeEngine, most: int = 64, of_tenant: int = 64, length: int = 4096, **options: Any
) -> Compiler:
    return Compiler(engine, FairQueue(most, of_tenant, length), **options)


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counts:
    monkeypatch.setattr(compiler_module, "counts", made := Counts())
    return made


def start(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.ensure_future(work)


async def soon() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


C3, S = Made(COMPILED, 3), Made(SHARED)


def test_waiting_requests_share_one_compile() -> None:
    async def run() -> None:
        engine = FakeEngine()
        compiler = made_by(engine)
        first = start(compiler.compile([item(1), item(2), item(1)]))
        await soon()
        second = start(compiler.compile([item(2), item(3)]))
        await soon()
        engine.go.set()
        # Each token counts once: for who had it compiled, the first time.
        assert await first == [C3, C3, S]
        assert await second == [S, C3]
        assert engine.first_tokens == [1, 2, 3]

    asyncio.run(run())


def test_one_bad_item_fails_alone(counts: Counts) -> None:
    async def run() -> None:
        engine = FakeEngine(bad=2)
        engine.go.set()
        compiler = made_by(engine)
        good, bad, other = await compiler.compile([item(1), item(2), item(3)])
        assert good == other == C3
        assert bad.outcome == FAILED and "no memory" in str(bad.error)
        assert (counts.compile_failures, counts.compiling) == (1, 0)
        engine.bad = None
        assert await compiler.compile([item(2)]) == [C3]

    asyncio.run(run())


def test_an_aborted_compile_has_failed() -> None:
    async def aborting(sent: Any) -> Any:
        yield {"meta_info": {"finish_reason": {"type": "abort", "message": "by somebody"}}}

    async def run() -> None:
        (made,) = await Compiler(aborting, FairQueue(1, 1, 1)).compile([item(1)])
        assert made.outcome == FAILED and "by somebody" in str(made.error)

    asyncio.run(run())


# -- how many at a time, and whose ------------------------------------------------


def test_a_thousand_segments_neither_fill_nor_starve(counts: Counts) -> None:
    """One client's thousand beside three of another: never more under way than the
    caps say, and the other's are served among the first."""

    async def run() -> None:
        engine = FakeEngine()
        engine.go.set()
        compiler = made_by(engine, most=6, of_tenant=4)
        many = [item(n, salt="a") for n in range(1000)]
        big = start(compiler.compile(many, Caller("a")))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        few = [item(n, salt="b") for n in range(2000, 2003)]
        assert await compiler.compile(few, Caller("b")) == [C3] * 3
        assert len(engine.sent) < 40
        assert await big == [C3] * 1000
        assert engine.most <= 6
        assert counts.compiling == 0

    asyncio.run(run())


def test_one_tenant_has_its_own_cap() -> None:
    async def run() -> None:
        engine = FakeEngine()
        compiler = made_by(engine, most=6, of_tenant=4)
        big = start(compiler.compile([item(n) for n in range(10)], Caller("a")))
        await soon()
        assert engine.running == 4
        other = start(compiler.compile([item(n, salt="b") for n in range(10)], Caller("b")))
        await soon()
        assert engine.running == 6
        engine.go.set()
        await asyncio.gather(big, other)
        assert engine.most == 6

    asyncio.run(run())


def test_requests_of_one_tenant_take_turns() -> None:
    """Clients that share a salt are told apart by their requests."""

    async def run() -> None:
        engine = FakeEngine()
        engine.go.set()
        compiler = made_by(engine, most=1)
        big = start(compiler.compile([item(n) for n in range(100)]))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        await compiler.compile([item(200), item(201)])
        assert len(engine.sent) < 20
        await big

    asyncio.run(run())


def test_a_full_queue_refuses_what_is_over(counts: Counts) -> None:
    async def run() -> None:
        engine = FakeEngine()
        compiler = made_by(engine, most=1, length=3)
        waiting = start(compiler.compile([item(n) for n in range(5)], Caller("a")))
        await soon()
        assert counts.compiles_refused == 2
        # Another tenant has its own queue.
        other = start(compiler.compile([item(9, salt="b")], Caller("b")))
        await soon()
        engine.go.set()
        assert [made.outcome for made in await waiting] == [COMPILED] * 3 + [QUEUE_FULL] * 2
        assert await other == [C3]
        # What was refused may come again.
        assert await compiler.compile([item(4)], Caller("a")) == [C3]

    asyncio.run(run())


# -- whose priority -----------------------------------------------------------------


def lowest_first(priority: int | None) -> int:
    return 1000 if priority is None else priority


def test_a_compile_is_scheduled_as_its_caller() -> None:
    async def run() -> None:
        engine = FakeEngine()
        engine.go.set()
        caller = Caller("a", priority=5, routing_key="here", no_logs=True)
        wanted = CompileItem((1,) * 3, "salt", "extra", "adapter", rank=1)
        await made_by(engine).compile([wanted], caller)
        (sent,) = engine.sent
        assert (sent.priority, sent.routing_key, sent.no_logs) == (5, "here", True)
        assert (sent.routed_dp_rank, sent.lora_path, sent.extra_key) == (1, "adapter", "extra")

    asyncio.run(run())


def test_the_most_urgent_that_waits_decides() -> None:
    async def run() -> None:
        engine = FakeEngine()
        compiler = made_by(engine, most=1, urgency=lowest_first)
        low = start(compiler.compile([item(n) for n in range(5)], Caller(priority=9)))
        await soon()
        # In front of what waits; one that waits is raised with it, one sent is not.
        urgent = Caller(priority=1, no_logs=True)
        high = start(compiler.compile([item(0), item(3), item(7)], urgent))
        passing = start(compiler.compile([item(4)], Caller(priority=0)))
        await soon()
        passing.cancel()
        await soon()
        engine.go.set()
        await asyncio.gather(low, high)
        assert engine.first_tokens == [0, 3, 7, 1, 2, 4] or engine.first_tokens[1:3] == [7, 3]
        sent = {sent.input_ids[0]: (sent.priority, sent.no_logs) for sent in engine.sent}
        assert sent == {
            0: (9, False), 3: (1, True), 7: (1, True), 1: (9, False), 2: (9, False), 4: (9, False)
        }  # fmt: skip

    asyncio.run(run())


# -- who leaves, and when --------------------------------------------------------


def test_a_client_that_leaves_takes_no_compile_of_others_with_it(counts: Counts) -> None:
    async def run() -> None:
        engine = FakeEngine()
        compiler = made_by(engine, most=1)
        leaver = start(compiler.compile([item(1), item(2), item(3)]))
        await soon()
        stayer = start(compiler.compile([item(1), item(3)]))
        await soon()
        leaver.cancel()
        await soon()
        assert counts.compiling == 2
        engine.go.set()
        assert await stayer == [S, S]
        # Nobody waited for the second any more, and it was not sent.
        assert engine.first_tokens == [1, 3]
        assert counts.compiling == 0

    asyncio.run(run())


def test_what_is_sent_goes_on_without_its_client() -> None:
    async def run() -> None:
        engine = FakeEngine()
        compiler = made_by(engine)
        leaver = start(compiler.compile([item(1)]))
        await soon()
        leaver.cancel()
        await soon()
        later = start(compiler.compile([item(1)]))
        await soon()
        engine.go.set()
        assert await later == [S] and len(engine.sent) == 1

    asyncio.run(run())


def test_a_link_waits_no_longer_than_it_may(counts: Counts) -> None:
    """What is late goes on without the link that wanted it, and serves the next one."""

    async def run() -> None:
        engine = FakeEngine()
        compiler = made_by(engine)
        began = time.monotonic()
        items = [item(1), item(2), item(1)]
        results = await compiler.compile(items, timeout_s=0.02, limit_s=0.05)
        assert 0.05 <= time.monotonic() - began < 1
        assert results == [Made(LATE)] * 3
        assert (counts.compiling, counts.compile_timeouts) == (2, 2)
        patient = start(compiler.compile([item(1), item(3)], timeout_s=60))
        await soon()
        engine.go.set()
        assert await patient == [S, C3]
        assert (counts.compiling, counts.compile_timeouts) == (0, 2)

    asyncio.run(run())


def test_a_prompt_is_not_computed_beside_its_own_compile() -> None:
    """What was sent stands before the link anyway: with a short timeout it waits on."""

    async def run() -> None:
        engine = FakeEngine()
        link = start(made_by(engine).compile([item(1)], timeout_s=0.01, limit_s=60))
        await asyncio.sleep(0.05)
        assert not link.done()
        engine.go.set()
        assert await link == [C3]

    asyncio.run(run())


@pytest.mark.parametrize(("tokens", "waits"), [(50, True), (3, False)])
def test_a_link_goes_on_where_that_is_sooner_done(tokens: int, waits: bool) -> None:
    """In front of it 40 tokens wait to be sent: too many for one that names few."""

    async def run() -> None:
        engine = FakeEngine()
        compiler = made_by(engine, most=1)
        others = start(compiler.compile([item(n, tokens=20) for n in range(3)]))
        await soon()
        wanted = item(9, tokens=tokens)
        link = start(compiler.compile([wanted], Caller("b"), timeout_s=0.02, limit_s=60))
        await asyncio.sleep(0.06)
        assert link.done() != waits
        engine.go.set()
        await others
        assert (await link)[0].outcome == (COMPILED if waits else LATE)
        # Given up before it was sent: nothing is computed twice.
        assert (9 in engine.first_tokens) == waits

    asyncio.run(run())


def test_an_urgent_link_does_not_wait_behind_what_it_may_overtake() -> None:
    async def run() -> None:
        engine = FakeEngine()
        compiler = made_by(engine, urgency=lowest_first)
        low = start(compiler.compile([item(1)], Caller(priority=9)))
        await soon()
        urgent = Caller(priority=1)
        (made,) = await compiler.compile([item(1)], urgent, timeout_s=0.02, limit_s=60)
        assert made == Made(LATE)
        engine.go.set()
        assert await low == [C3]
        assert await compiler.compile([], timeout_s=60) == []

    asyncio.run(run())


# -- the queue by itself --------------------------------------------------------------


def test_a_long_list_is_not_starved_by_those_that_come_later() -> None:
    """Of the same tenant, as urgent, and as many as can be served."""
    queue: FairQueue[int] = FairQueue(1, 1, 1000)
    queue.add(range(10), "a", 0)
    served = []
    for later in range(1000, 1100):
        queue.add([later], "a", 0)
        taken = queue.take()
        assert taken is not None
        queue.done("a")
        served.append(taken)
    assert [one for one in served if one < 10] == list(range(10))
    # And it is not served alone.
    assert served.index(1000) < 5


@given(st.randoms(use_true_random=False), st.integers(1, 5), st.integers(1, 3), st.integers(1, 8))
def test_the_queue_keeps_its_bounds_and_loses_nothing(
    rng: random.Random, most: int, of_tenant: int, length: int
) -> None:
    queue: FairQueue[int] = FairQueue(most, of_tenant, length)
    waiting: dict[int, tuple[str, int]] = {}
    under_way: list[tuple[int, str]] = []
    seen, number = set(), 0

    def of(tenant: str) -> list[int]:
        return [one for one, (whose, _) in waiting.items() if whose == tenant]

    for _ in range(200):
        tenant, urgency = rng.choice("abc"), rng.randrange(3)
        act = rng.randrange(5)
        if act == 0:
            count = rng.randrange(1, 5)
            asked = list(range(number, number + count))
            number += count
            room = max(0, length - len(of(tenant)))
            assert queue.add(asked, tenant, urgency) == asked[:room]
            waiting.update(dict.fromkeys(asked[:room], (tenant, urgency)))
        elif act == 1 and waiting:
            one = rng.choice(list(waiting))
            queue.move(one, waiting[one][0], urgency)
            waiting[one] = (waiting[one][0], urgency)
        elif act == 2 and waiting:
            one = rng.choice(list(waiting))
            queue.remove(one, waiting.pop(one)[0])
        elif act == 3:
            taken = queue.take()
            busy = [whose for _, whose in under_way]
            free = [whose for whose, _ in waiting.values() if busy.count(whose) < of_tenant]
            if taken is None:
                assert len(under_way) == most or not free
            else:
                whose, its = waiting.pop(taken)
                assert len(under_way) < most and busy.count(whose) < of_tenant
                assert all(its <= waiting[other][1] for other in of(whose))
                assert taken not in seen
                seen.add(taken)
                under_way.append((taken, whose))
        elif act == 4 and under_way:
            _, whose = under_way.pop(rng.randrange(len(under_way)))
            queue.done(whose)
        assert len(queue) == len(waiting)
    for _, whose in under_way:
        queue.done(whose)
    for one, (whose, _) in waiting.items():
        queue.remove(one, whose)
    assert not queue._tenants  # of salts there is no end


@given(
    st.lists(
        st.tuples(st.sampled_from(["ask", "leave", "tick", "go"]), st.integers(0, 3)),
        max_size=30,
    )
)
@example([("ask", 0), ("tick", 0), ("ask", 1), ("tick", 0), ("go", 0), ("leave", 1)])
def test_every_place_comes_back_whenever_clients_leave(steps: list[tuple[str, int]]) -> None:
    """Between any two steps of the loop, that in which a compile is sent and has not
    begun included."""

    async def run() -> None:
        engine = FakeEngine()
        compiler = made_by(engine, most=1)
        asked = []
        for what, n in steps:
            if what == "ask":
                asked.append(start(compiler.compile([item(n)])))
            elif what == "leave" and asked:
                asked[n % len(asked)].cancel()
            elif what == "go":
                engine.go.set()
            else:
                await asyncio.sleep(0)
        engine.go.set()
        await asyncio.gather(*asked, return_exceptions=True)
        await soon()
        assert not compiler._jobs and not compiler._tasks and engine.running == 0
        made = await asyncio.wait_for(compiler.compile([item(8), item(9), item(10)]), 5)
        assert made == [C3, C3, C3]

    asyncio.run(run())
