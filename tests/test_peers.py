"""Segments that peers compile: who gets which, what comes of it, and what when it does not."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st
from test_compiler import FakeEngine, made_by
from test_fetching import GONE, HERE, SPACE, Scheduler, from_store, item

from sglang_pic.errors import PicConfigError
from sglang_pic.metrics.front import Counts
from sglang_pic.server import peer as peer_module
from sglang_pic.server import peers as peers_module
from sglang_pic.server.asked import MOST_BYTES
from sglang_pic.server.compiler import COMPILED, FETCHED
from sglang_pic.server.peer import BUSY, FAILED, LATE, Peer
from sglang_pic.server.peers import OTHER_VALUE, FromPeers
from sglang_pic.server.roster import Named, OfRouter, check_peers, roster_of
from sglang_pic.server.sources import COMPILED_THERE, COMPUTED, MOST_FAILURES, PEER, deal


@pytest.fixture(autouse=True)
def counts(monkeypatch: pytest.MonkeyPatch) -> Counts:
    made = Counts()
    for module in (peer_module, peers_module):
        monkeypatch.setattr(module, "counts", made)
    return made


# -- who gets which -----------------------------------------------------------------

tokens = st.integers(1, 5000)


@given(st.lists(tokens, max_size=24), st.lists(st.integers(0, 9000), min_size=1, max_size=6))
def test_the_longest_go_first_to_whoever_is_free(lengths: list[int], loads: list[int]) -> None:
    whose = deal(lengths, loads)
    ends = list(loads)
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        assert ends[whose[i]] == min(ends)
        ends[whose[i]] += lengths[i]


@given(st.lists(tokens, min_size=1, max_size=24), st.integers(1, 6))
def test_no_deal_is_much_worse_than_the_best(lengths: list[int], workers: int) -> None:
    """Graham's bound for LPT, by what no deal can go below."""
    ends = [0] * workers
    for length, worker in zip(lengths, deal(lengths, ends), strict=True):
        ends[worker] += length
    ordered = sorted(lengths, reverse=True)
    two = sum(ordered[workers - 1 : workers + 1]) if len(ordered) > workers else 0
    assert max(ends) <= 4 / 3 * max(sum(lengths) / workers, ordered[0], two) + 1e-9


@given(st.lists(tokens, max_size=24), st.integers(0, 4), st.floats(0, 50))
def test_nothing_goes_away_that_is_sooner_computed_here(
    lengths: list[int], others: int, moving: float
) -> None:
    whose, ends = deal(lengths, [0] * (1 + others), moving), [0] * (1 + others)
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if whose[i]:
            assert ends[whose[i]] + lengths[i] * moving < ends[0]
        ends[whose[i]] += lengths[i]


# -- one peer -----------------------------------------------------------------------

Handler = Callable[[web.Request], Any]


@contextlib.asynccontextmanager
async def server(
    compile: Handler | None = None, *, name: str = "other", load: Any = 0, **routes: Handler
) -> AsyncIterator[str]:
    """A peer of a few lines; its address."""

    async def told(request: web.Request) -> web.Response:
        return web.json_response({"server": name, "tokens": load})

    app = web.Application()
    app.router.add_get("/pic/load", told)
    app.router.add_post("/pic/compile", compile or compiled)
    for path, handler in routes.items():
        app.router.add_get(f"/{path}", handler)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


async def compiled(request: web.Request) -> web.Response:
    body = await request.json()
    segment = {"id": "0", "tokens": len(body["input_ids"]), "tokens_computed": 0}
    return web.json_response({"segments": [segment], "companies": []})


async def slow(request: web.Request) -> web.Response:
    await asyncio.sleep(5)
    return await compiled(request)


def answering(status: int, content: bytes) -> Handler:
    async def answer(request: web.Request) -> web.Response:
        return web.Response(status=status, body=content, content_type="application/json")

    return answer


BAD: dict[str, tuple[Handler, str]] = {
    "busy": (answering(503, b'{"error": {}}'), BUSY),
    "refuses": (answering(400, b'{"error": {"message": "no"}}'), FAILED),
    "has another key": (answering(401, b"{}"), FAILED),
    "no JSON": (answering(200, b"<html>"), FAILED),
    "another JSON": (answering(200, b'{"segments": 7}'), FAILED),
    "no object": (answering(200, b"[1]"), FAILED),
    "nested": (answering(200, b"[" * 60000), FAILED),
    "endless": (answering(200, b'{"segments": [' + b" " * (2 * MOST_BYTES) + b"{}]}"), FAILED),
    "slow": (slow, LATE),
}


@pytest.mark.parametrize("case", BAD)
def test_a_peer_that_does_not_do_it_is_a_reason(case: str) -> None:
    handler, reason = BAD[case]

    async def run() -> None:
        async with server(handler) as url:
            peer = Peer(url, None, timeout_s=0.3)
            assert await peer.compile([1, 2], salt=None, seam=16, no_logs=False) == reason

    asyncio.run(run())


def test_a_peer_gets_the_key_the_tenant_and_the_tokens() -> None:
    async def run() -> None:
        seen: list[Any] = []

        async def note(request: web.Request) -> web.Response:
            seen.append((request.headers["Authorization"], await request.json()))
            return await compiled(request)

        async with server(note) as url:
            peer = Peer(url + "/", "secret", 5.0)
            assert await peer.compile((5, 6), salt="a", seam=3, no_logs=True) is None
        body = {"input_ids": [5, 6], "cache_salt": "a", "seam": 3, "no_logs": True}
        assert seen == [("Bearer secret", {**body, "publish": True})]

    asyncio.run(run())


@pytest.mark.parametrize("load", [-1, "7", True, None])
def test_a_load_that_is_none_counts_as_no_answer(load: Any) -> None:
    async def run() -> None:
        async with server(load=load) as url:
            peer = Peer(url, None, 1.0)
            await peer.look()
            assert not peer.is_known

    asyncio.run(run())


def test_a_peer_that_is_gone_is_left_alone(counts: Counts) -> None:
    async def run() -> None:
        async with server() as url:
            peer = Peer(url, None, 1.0)
            await peer.look()
            assert peer.is_known and peer.server == "other"
        for _ in range(MOST_FAILURES):
            assert await peer.compile([1], salt=None, seam=16, no_logs=False) == FAILED
        assert peer.back_off.is_on and counts.peer_back_offs == {url: 1}

    asyncio.run(run())


async def in_pieces(request: web.Request) -> web.StreamResponse:
    """As a slow network brings it."""
    response = web.StreamResponse()
    await response.prepare(request)
    for part in (b'{"segm', b'ents": [', b'{"id": "0"}]}'):
        await response.write(part)
        await asyncio.sleep(0.02)
    return response


def test_an_answer_may_come_in_pieces() -> None:
    async def run() -> None:
        async with server(in_pieces) as url:
            peer = Peer(url, None, 5.0)
            assert await peer.compile([1], salt=None, seam=16, no_logs=False) is None

    asyncio.run(run())


def test_nothing_is_sent_on_to_another_address() -> None:
    async def run() -> None:
        seen: list[str] = []

        async def note(request: web.Request) -> web.Response:
            seen.append(request.path)
            return await compiled(request)

        async with server(note) as other:

            async def moved(request: web.Request) -> web.Response:
                raise web.HTTPTemporaryRedirect(f"{other}/pic/compile")

            async with server(moved) as url:
                peer = Peer(url, "secret", 5.0)
                assert await peer.compile([1], salt=None, seam=16, no_logs=False) == FAILED
        assert seen == []

    asyncio.run(run())


# -- a prompt's segments ------------------------------------------------------------


def from_peers(scheduler: Scheduler, *urls: str, waiting: int = 0, timeout_s: float = 5.0) -> Any:
    async def own() -> int:
        return waiting

    store = from_store(scheduler)
    tenant_of = lambda space: space.removeprefix(SPACE)  # noqa: E731
    return FromPeers(store, Named(urls), "me", own, None, timeout_s, tenant_of, 0)


def compile_all(peers: FromPeers, items: list[Any]) -> Any:
    engine = FakeEngine()
    engine.go.set()
    return made_by(engine, fetching=peers).compile(items)


def sources(made: Any) -> list[tuple[str, str, str]]:
    return [(one.outcome, one.source.kind, one.source.reason) for one in made]


HERE_COMPUTED = (COMPILED, COMPUTED, "not_in_store")
FROM_PEER = (FETCHED, PEER, COMPILED_THERE)


def test_segments_are_dealt_out_and_come_from_the_store(counts: Counts) -> None:
    async def run() -> None:
        # Of four, two are compiled by the peer; its values are there when it has answered.
        fates = {n: [GONE, HERE] for n in (1, 2, 3, 4)}
        async with server() as url:
            peers = from_peers(Scheduler(fates), url)
            items = [item(1, 10), item(2, 40), item(3, 30), item(4, 20)]
            made = await compile_all(peers, items)
            # 40 and 10 here, 30 and 20 there, whatever stands first.
            assert sources(made) == [HERE_COMPUTED, HERE_COMPUTED, FROM_PEER, FROM_PEER]
            assert counts.peer_segments == {url: 2}
            # What it was given it has now.
            assert peers.busiest([40, 30, 20, 10]) == 100

    asyncio.run(run())


def test_only_failures_in_a_row_leave_a_peer_alone(counts: Counts) -> None:
    async def run() -> None:
        does = [slow, compiled] * (2 * MOST_FAILURES)

        async def now(request: web.Request) -> web.Response:
            return await does.pop(0)(request)

        async with server(now) as url:
            fates = {n: [GONE, HERE] for n in range(len(does))}
            peers = from_peers(Scheduler(fates), url, waiting=1 << 40, timeout_s=0.2)
            # Nothing is sooner computed than read, however fast that was here.
            peers._store._always = True
            kinds = [sources(await compile_all(peers, [item(n, 50)]))[0][1] for n in fates]
            assert kinds == [COMPUTED, PEER] * (2 * MOST_FAILURES)
        assert counts.peer_back_offs == {}

    asyncio.run(run())


def test_a_busy_peer_gets_nothing_and_a_busy_server_gives_all() -> None:
    async def run(own: int, there: int) -> Any:
        async with server(load=there) as url:
            fates = {n: [GONE, HERE] for n in (1, 2, 3)}
            peers = from_peers(Scheduler(fates), url, waiting=own)
            return sources(await compile_all(peers, [item(n, 50) for n in (1, 2, 3)]))

    assert asyncio.run(run(0, 1000)) == [HERE_COMPUTED] * 3
    assert asyncio.run(run(1000, 0)) == [FROM_PEER] * 3


@pytest.mark.parametrize("case", [*BAD, "gone", "another model"])
def test_what_a_peer_does_not_bring_is_computed(case: str, counts: Counts) -> None:
    async def run() -> None:
        handler, reason = BAD.get(case, (compiled, OTHER_VALUE))
        async with server(handler) as url:
            if case == "gone":
                url = "http://127.0.0.1:9"
            peers = from_peers(Scheduler({1: [GONE]}), url, waiting=9, timeout_s=0.3)
            (made,) = await compile_all(peers, [item(1, 50)])
        expected = "not_in_store" if case == "gone" else reason
        assert sources([made]) == [(COMPILED, COMPUTED, expected)]
        assert made.tokens == 50
        assert counts.peer_failures == ({} if case == "gone" else {url: 1})
        assert not peers._tasks or all(task.done() for task in peers._tasks)

    asyncio.run(run())


def test_a_server_knows_itself_among_its_peers() -> None:
    async def run() -> None:
        async with server(name="me") as url:
            peers = from_peers(Scheduler({1: [GONE]}), url, waiting=1000)
            assert sources(await compile_all(peers, [item(1, 50)])) == [HERE_COMPUTED]

    asyncio.run(run())


def test_what_a_peer_has_asked_for_is_compiled_here() -> None:
    """Or two servers would wait for each other."""

    async def run() -> None:
        async with server() as url:
            peers = from_peers(Scheduler({1: [GONE], 2: [GONE, HERE]}), url, waiting=1000)
            made = await compile_all(peers, [item(1, 50, here=True), item(2, 50)])
            assert sources(made) == [HERE_COMPUTED, FROM_PEER]

    asyncio.run(run())


def test_only_what_the_store_could_have_is_dealt_out() -> None:
    async def run() -> None:
        async with server() as url:
            peers = from_peers(Scheduler({}), url, waiting=1000)
            kinds = [
                item(1, seams=(), segment=False, salt=None),
                item(2, extra_key="k"),
                item(3, lora_path="adapter"),
            ]
            assert {one[1] for one in sources(await compile_all(peers, kinds))} == {COMPUTED}

    asyncio.run(run())


@given(st.integers(0, 2**32 - 1))
def test_whatever_peers_do_every_segment_is_there(seed: int) -> None:
    draw = random.Random(seed)
    handlers = [compiled, *(handler for name, (handler, _) in BAD.items() if name != "slow")]

    async def run() -> None:
        async with contextlib.AsyncExitStack() as stack:
            urls = [
                await stack.enter_async_context(server(draw.choice(handlers), name=str(i)))
                for i in range(draw.randint(0, 3))
            ]
            lengths = [draw.randint(1, 60) for _ in range(draw.randint(1, 9))]
            fates = {i: draw.choice([[GONE], [GONE, HERE], [HERE]]) for i in range(len(lengths))}
            peers = from_peers(Scheduler(fates), *urls, waiting=draw.randint(0, 60))
            items = [item(i, length) for i, length in enumerate(lengths)]
            for one, length in zip(await compile_all(peers, items), lengths, strict=True):
                assert (one.outcome, one.tokens) in {(COMPILED, length), (FETCHED, 0)}

    asyncio.run(run())


# -- which peers there are ----------------------------------------------------------


def test_a_router_lists_its_workers() -> None:
    async def workers(request: web.Request) -> web.Response:
        healthy = [{"url": f"http://10.0.0.{i}:1", "is_healthy": i != 2} for i in (1, 2, 3)]
        return web.json_response({"workers": healthy, "total": 3})

    async def run() -> None:
        async with server(workers=workers) as url:
            roster = roster_of(f"router+{url}", None)
            assert await roster.urls() == ("http://10.0.0.1:1", "http://10.0.0.3:1")
        # Gone: what it said last.
        assert len(await roster.urls()) == 2

    asyncio.run(run())


@pytest.mark.parametrize("content", [b"[]", b"{}", b'{"workers": 3}', b'{"workers": [1]}', b"<p>"])
def test_a_router_that_talks_nonsense_has_no_workers(content: bytes) -> None:
    async def run() -> None:
        async with server(workers=answering(200, content)) as url:
            assert await OfRouter(url, None).urls() == ()

    asyncio.run(run())


@pytest.mark.parametrize(
    "address", ["", ",", "ftp://a:1", "host:1", "http://", "http://a:0", "http://a:x",
                "router+http://a:1,http://b:1", "router+", ",".join(["http://a:1"] * 65)],
)  # fmt: skip
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(PicConfigError):
        check_peers(address)


@pytest.mark.parametrize("address", ["http://a:1", "http://a:1, https://b", "router+http://r:3000"])
def test_what_is_one_is_taken(address: str) -> None:
    check_peers(address)
