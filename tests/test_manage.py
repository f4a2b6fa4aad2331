"""The management routes: what they take, refuse and answer, first against schedulers
made up here, then against a server."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import threading
import time
import types
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
import requests
import uvicorn
from fastapi import FastAPI
from linking import assemble, body, fresh_salt, ids_of
from sglang.srt.entrypoints import http_server
from sglang.srt.utils.auth import AuthLevel, _get_auth_level_from_app_and_scope, decide_request_auth

from sglang_pic import client
from sglang_pic.client import PicClient
from sglang_pic.config import PicConfig
from sglang_pic.errors import PicRefused
from sglang_pic.eval.serving import Server, free_port
from sglang_pic.request.tokenize import Rule
from sglang_pic.server import commands
from sglang_pic.server.compiler import COMPILED, FAILED, QUEUE_FULL, Compiler, Made
from sglang_pic.server.lending import Lending
from sglang_pic.server.pins import Pins
from sglang_pic.server.queue import FairQueue
from sglang_pic.server.routes import base, compile, explain, install, router, segments, watch
from sglang_pic.sglang_hooks import CACHE_BACKEND, install_http

ID, OTHER = "a" * 32, "b" * 32
RESERVED = "pic\x1fsomebody"


def card(id: str = ID, **values: Any) -> dict[str, Any]:
    made = {"id": id, "tokens": 40, "held": 40, "hits": 1, "compiled": 1, "last_use": 5}
    made |= {"kv_bytes": 400, "state_bytes": 0, "pinned": False, "value": 1.5}
    return made | values


# -- pins -----------------------------------------------------------------------------


class FakeTime:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 0.0
        self._wakes: list[tuple[float, asyncio.Future[None]]] = []

    async def sleep(self, seconds: float) -> None:
        waker: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._wakes.append((self.now + seconds, waker))
        await waker

    async def pass_(self, seconds: float) -> None:
        await settle()
        self.now += seconds
        for due, waker in self._wakes:
            if due <= self.now and not waker.done():
                waker.set_result(None)
        await settle()


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


class Log:
    """Pins and unpins in the order in which they were carried out."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []
        self.refuses = False

    async def unpin(self, id: str, salt: str | None) -> str:
        self.told.append(("unpin", id, salt))
        if self.refuses:
            raise PicRefused(404, "no such segment", "id")
        return "unpinned"

    async def pin(self) -> str:
        self.told.append(("pin",))
        if self.refuses:
            raise PicRefused(507, "no room", "id")
        return "pinned"


def timed(story: Callable[[Pins, FakeTime, Log], Awaitable[None]]) -> Log:
    """Run a story over pins in a made-up time; what it had done."""
    log = Log()

    async def run() -> None:
        clock = FakeTime()
        await story(Pins(log.unpin, clock.sleep), clock, log)

    asyncio.run(run())
    return log


def test_a_pin_ends_once() -> None:
    async def story(pins: Pins, clock: FakeTime, log: Log) -> None:
        assert await pins.pin(ID, "t", 10, log.pin) == "pinned"
        await clock.pass_(9)
        assert log.told == [("pin",)]
        await clock.pass_(1)
        await clock.pass_(100)

    assert timed(story).told == [("pin",), ("unpin", ID, "t")]


@pytest.mark.parametrize(("ttl_s", "ends"), [(20, 1), (None, 0)])
def test_a_new_pin_replaces_the_time_of_the_old(ttl_s: float | None, ends: int) -> None:
    async def story(pins: Pins, clock: FakeTime, log: Log) -> None:
        await pins.pin(ID, "t", 10, log.pin)
        await clock.pass_(9)
        await pins.pin(ID, "t", ttl_s, log.pin)
        await clock.pass_(19)
        assert log.told == [("pin",)] * 2
        await clock.pass_(1)

    assert timed(story).told[2:] == [("unpin", ID, "t")] * ends


def test_an_unpinned_pin_does_not_end_again() -> None:
    async def story(pins: Pins, clock: FakeTime, log: Log) -> None:
        await pins.pin(ID, None, 10, log.pin)
        assert await pins.unpin(ID, "") == "unpinned"
        await clock.pass_(10)

    assert timed(story).told == [("pin",), ("unpin", ID, "")]


def test_a_refused_pin_leaves_the_old_one_its_time() -> None:
    async def story(pins: Pins, clock: FakeTime, log: Log) -> None:
        await pins.pin(ID, "t", 10, log.pin)
        log.refuses = True
        with pytest.raises(PicRefused):
            await pins.pin(ID, "t", 99, log.pin)
        await clock.pass_(10)

    assert timed(story).told == [("pin",), ("pin",), ("unpin", ID, "t")]


def test_a_pin_that_comes_as_the_old_one_ends_stays() -> None:
    """The old one's time is up while the scheduler carries out the new pin."""

    async def story(pins: Pins, clock: FakeTime, log: Log) -> None:
        go = asyncio.Event()

        async def slow() -> str:
            await go.wait()
            return await log.pin()

        await pins.pin(ID, "t", 10, log.pin)
        again = asyncio.create_task(pins.pin(ID, "t", 10, slow))
        await clock.pass_(10)
        go.set()
        await again
        await clock.pass_(9)

    assert timed(story).told == [("pin",), ("pin",)]


def test_tenants_pins_are_apart_and_a_lost_one_ends_quietly() -> None:
    async def story(pins: Pins, clock: FakeTime, log: Log) -> None:
        await pins.pin(ID, "a", 10, log.pin)
        await pins.pin(ID, "b", 20, log.pin)
        await clock.pass_(10)
        log.refuses = True
        await clock.pass_(10)

    assert timed(story).told[2:] == [("unpin", ID, "a"), ("unpin", ID, "b")]


# -- commands to several ranks --------------------------------------------------------

REFUSED = {"refused": {"status": 404, "message": "no such segment", "field": "id"}}
IN_USE = {"refused": {"status": 409, "message": "in use", "field": "id"}}
STATS = {"refused": {"admission": 2}, "clock": 4}


@pytest.mark.parametrize(
    ("ranks", "answers"),
    [
        ([card()], [card()]),
        ([card(), REFUSED], [card()]),
        ([STATS, STATS], [STATS, STATS]),
        ([REFUSED, REFUSED], 404),
        ([card(), IN_USE], 409),
        ([REFUSED, IN_USE], 409),
    ],
)
def test_the_ranks_that_know_a_segment_answer(
    ranks: list[Any], answers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def send(manager: Any, obj: Any) -> Any:
        return ranks[obj.routed_dp_rank or 0]

    monkeypatch.setattr(commands, "_send", send)
    monkeypatch.setattr(commands, "get_parallel", lambda: types.SimpleNamespace(dp_size=len(ranks)))
    if isinstance(answers, int):
        with pytest.raises(PicRefused) as refused:
            asyncio.run(commands.command(None, "get", id=ID))
        assert refused.value.status == answers
    else:
        assert asyncio.run(commands.command(None, "get", id=ID)) == answers


# -- routes ---------------------------------------------------------------------------


class FakeSchedulers:
    """Answers commands as the schedulers would; one tenant, "us", has a segment."""

    def __init__(self) -> None:
        self.told: list[tuple[str, dict[str, Any]]] = []
        self.cards = [[card()]]  # by rank
        self.room = 1000
        self.keeps = True
        self.ready: list[str] = []
        # Of ``publish``: by rank and segment, what is told one question after another.
        self.fates: list[list[list[tuple[str, str | None]]]] = []
        self.begun: list[str] = []

    async def command(self, manager: Any, do: str, **fields: Any) -> list[Any]:
        self.told.append((do, fields))
        return [self._obey(rank, do, fields) for rank in range(len(self.cards))]

    def _obey(self, rank: int, do: str, fields: dict[str, Any]) -> Any:
        ours = fields.get("cache_salt") == "us"
        if do == "list":
            return {"segments": self.cards[rank] if ours else [], "documents": []}
        if do in ("get", "pin", "unpin", "delete"):
            found = [card for card in self.cards[rank] if card["id"] == fields["id"]]
            if not (found and ours):
                raise PicRefused(404, "no such segment", "id")
            if do == "delete":
                return {"id": fields["id"], "freed_tokens": 40}
            return {**found[0], "pinned": do == "pin"}
        if do == "flush":
            return {"segments": 2, "documents": 0, "freed_tokens": 80}
        if do == "reserve":
            if sum(fields["tokens"]) > self.room:
                raise PicRefused(507, "no room", "segments")
            return {}
        if do == "key":
            if fields["lora_path"] != "adapter":
                raise ValueError("Got LoRA adapter that has never been loaded")
            return {"extra_key": (fields["extra_key"] or "") + "-its-id"}
        if do == "name":
            return {"held": [one in self.ready for one in fields["segments"]]}
        if do == "publish":
            if fields["begin"]:
                self.begun = fields["segments"]
            # Only what is not settled is asked for again.
            asked = [self.fates[rank][self.begun.index(one)] for one in fields["segments"]]
            fates = [fate.pop(0) if len(fate) > 1 else fate[0] for fate in asked]
            return {"segments": [{"state": state, "reason": why} for state, why in fates]}
        if do == "held":
            return {"held": [self.keeps] * len(fields["segments"])}
        if do == "explain":
            return {
                "segments": [
                    {
                        **dataclasses.asdict(span),
                        "id": ID,
                        "hit": True,
                        "reason": "hit",
                        "tokens_reused": 8,
                        "tokens_computed": 2,
                        "company": 0,
                        "guests": 0,
                        "found": "marked",
                    }
                    for span in fields["link"].spans
                ],
                "exactness": "composed",
                "reason": None,
                "policy": "seam",
                "seam": 16,
                "mode": "share",
                "tokens_reused": 8 - rank,
                "tokens_computed": 2 + rank,
                "prefix_tokens": 0,
                "turn_tokens": 0,
                "tokens_to_compile": 0,
            }
        return {"on": False, "stages": {}} if do == "timer" else {"rank": rank}


class FakeFunnel:
    """Eight characters a token, a context of two tokens; compiles everything."""

    config = PicConfig(min_segment=4, store="somewhere")
    context = (1, 2)

    def __init__(self) -> None:
        self.compiled: list[Any] = []
        self.compiler = self
        self.wanted = self
        self.guards = self
        self.finding = types.SimpleNamespace(search=lambda *_, **__: None)
        self.resolver = FakeResolver(self.config.link_defaults)
        self.lending = Lending(None, Compiler(None, FairQueue(4, 4, 4)), 2)  # type: ignore[arg-type]

    async def compile(self, items: list[Any], caller: Any) -> list[Made]:
        self.compiled += items
        return [Made(COMPILED, len(item)) for item in items]

    def segment(
        self, ids: list[int], salt: Any, extra_key: Any, lora_path: Any, *, named: bool, **_: Any
    ) -> list[int]:
        assert named
        return ids

    def settled(self, ids: list[int], link: Any) -> Any:
        return ids, link


class FakeResolver:
    """Stands for the funnel's reading of prompts."""

    usual = Rule("pieces", "so it is")

    def __init__(self, defaults: Any):
        self._defaults = defaults

    def segment(self, text: str) -> list[int]:
        return [3] * (len(text) // 8)

    def one(self, text: str | None, ids: list[int] | None, pic: Any) -> Any:
        from sglang_pic.request.base import LinkRequest
        from sglang_pic.request.fields import parse_fields

        fields = parse_fields(pic, self._defaults)
        return ids or self.segment(text or ""), LinkRequest(fields.ranges, fields.options)


@dataclasses.dataclass(frozen=True)
class Front:
    """A server's front with nothing real behind it."""

    url: str
    schedulers: FakeSchedulers
    funnel: FakeFunnel
    manager: types.SimpleNamespace

    def send(self, method: str, path: str, **content: Any) -> requests.Response:
        return requests.request(method, self.url + path, timeout=10, **content)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    app = FastAPI()
    install(app)
    server = uvicorn.Server(uvicorn.Config(app, port=free_port(), log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.config.port}"
    server.should_exit = True
    thread.join()


@pytest.fixture
def front(url: str, monkeypatch: pytest.MonkeyPatch) -> Front:
    made = Front(
        url,
        FakeSchedulers(),
        FakeFunnel(),
        types.SimpleNamespace(
            tokenizer=object(),
            max_req_input_len=90,
            model_config=types.SimpleNamespace(context_len=100, vocab_size=64),
        ),
    )
    monkeypatch.setattr(base, "command", made.schedulers.command)
    monkeypatch.setattr(
        base, "get_global_state", lambda: types.SimpleNamespace(tokenizer_manager=made.manager)
    )
    for module in (compile, explain, watch):
        monkeypatch.setattr(module, "funnel_of", lambda manager: made.funnel)
    monkeypatch.setattr(segments, "pins", Pins(segments._unpin))
    return made


def test_a_segment_of_two_ranks_is_one(front: Front) -> None:
    ours = {"cache_salt": "us"}
    front.schedulers.cards = [
        [card(last_use=9, hits=3), card(OTHER, last_use=2)],
        [card(OTHER, last_use=11, pinned=True, held=20)],
    ]
    listed = front.send("GET", "/pic/segments", params=ours).json()["segments"]
    assert [(one["id"], one["ranks"]) for one in listed] == [(OTHER, 2), (ID, 1)]
    assert listed[0] == card(OTHER, last_use=11, hits=2, kv_bytes=800, pinned=True) | {"ranks": 2}
    freed = front.send("DELETE", f"/pic/segments/{OTHER}", params=ours).json()
    assert freed == {"id": OTHER, "freed_tokens": 80}
    flushed = front.send("POST", "/pic/flush", json=ours).json()
    assert flushed == {"segments": 4, "documents": 0, "freed_tokens": 160}
    prompt = {"input_ids": [5] * 10, "pic": {"segments": [{"start": 0, "end": 9}]}, **ours}
    assert front.send("POST", "/pic/explain", json=prompt).json()["tokens_reused"] == 7
    assert len(front.send("GET", "/pic/budgets").json()["ranks"]) == 2


def test_a_pin_ends_by_itself(front: Front) -> None:
    ours = {"cache_salt": "us"}
    assert front.send("POST", f"/pic/segments/{ID}/pin", json=ours).json()["pinned"]
    assert front.send("POST", f"/pic/segments/{ID}/pin", json={**ours, "ttl_s": 0.1}).ok
    for _ in range(100):
        if front.schedulers.told[-1][0] == "unpin":
            break
        time.sleep(0.02)
    told = [(do, fields["cache_salt"]) for do, fields in front.schedulers.told]
    assert told == [("pin", "us"), ("pin", "us"), ("unpin", "us")]


def test_another_tenants_segment_is_unknown(front: Front) -> None:
    for method, path in (
        ("GET", ""),
        ("DELETE", ""),
        ("POST", "/pin"),
        ("POST", "/unpin"),
    ):
        refused = front.send(method, f"/pic/segments/{ID}{path}")
        assert refused.status_code == 404
        assert refused.json()["error"] == {
            "message": "no such segment",
            "type": "NotFoundError",
            "param": "id",
            "code": 404,
        }


def test_what_cannot_fit_is_not_compiled(front: Front) -> None:
    sent = {"input_ids": [[3] * 40, [3] * 40], "cache_salt": "us", "extra_key": "lora"}
    assert front.send("POST", "/pic/compile", json=sent).ok
    reserved = {"tokens": [40, 40], "cache_salt": "us", "extra_key": "lora"}
    assert [do for do, _ in front.schedulers.told] == ["reserve", "name", "held"]
    assert front.schedulers.told[0] == ("reserve", reserved)
    assert len(front.funnel.compiled) == 2
    front.schedulers.room = 79
    refused = front.send("POST", "/pic/compile", json=sent)
    assert refused.status_code == refused.json()["error"]["code"] == 507
    assert refused.json()["error"]["type"] == "InsufficientStorageError"
    assert len(front.funnel.compiled) == 2
    # It fitted, and by the time that it was compiled no longer did.
    front.schedulers.room, front.schedulers.keeps = 80, False
    refused = front.send("POST", "/pic/compile", json=sent)
    assert refused.status_code == 507 and refused.json()["error"]["param"] == "segments[0]"


def test_what_is_held_is_not_compiled_again(front: Front) -> None:
    sent = {"input_ids": [[3] * 40, [4] * 41], "cache_salt": "us"}
    first = front.send("POST", "/pic/compile", json=sent).json()["segments"]
    front.schedulers.ready = [first[0]["id"]]
    again = front.send("POST", "/pic/compile", json=sent).json()["segments"]
    assert [one["tokens_computed"] for one in first + again] == [40, 41, 0, 41]
    assert front.funnel.compiled == [[3] * 40, [4] * 41, [4] * 41]
    # Of the seam width that links here have.
    named = [fields for do, fields in front.schedulers.told if do == "name"]
    assert all(fields["seam"] == front.funnel.config.seam for fields in named)


WRITING, WRITTEN = ("writing", None), ("written", None)
NOT = ("unwritten", "store_failed")
FATES: dict[str, tuple[list[Any], int]] = {
    "at once": ([[[WRITTEN], [WRITTEN]]], 200),
    "after a while": ([[[WRITING, WRITING, WRITTEN], [WRITING, WRITTEN]]], 200),
    "one is refused": ([[[WRITTEN], [WRITING, NOT]]], 507),
    "on one of two ranks": ([[[WRITTEN], [NOT]], [[NOT], [WRITTEN]]], 200),
    "on none of two": ([[[WRITTEN], [NOT]], [[WRITTEN], [NOT]]], 507),
    "never": ([[[WRITING], [WRITTEN]]], 504),
}


@pytest.mark.parametrize("case", FATES)
def test_what_is_published_is_in_the_store(
    case: str, front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compile, "PUBLISH_S", 0.3)
    front.schedulers.fates, status = FATES[case]
    front.schedulers.cards = [[] for _ in front.schedulers.fates]
    sent = {"input_ids": [[3] * 40, [4] * 41], "publish": True, "seam": 5, "no_logs": True}
    answer = front.send("POST", "/pic/compile", json=sent)
    assert answer.status_code == status, answer.text
    if status == 507:
        assert answer.json()["error"]["param"] == "segments[1]"
    assert next(fields for do, fields in front.schedulers.told if do == "name")["seam"] == 5
    # Nothing of it stays lent.
    with front.funnel.lending.lent(2):
        pass


def test_no_more_is_lent_than_half(front: Front) -> None:
    front.schedulers.fates = [[[WRITTEN]]]
    sent = {"input_ids": [3] * 40, "publish": True}
    with front.funnel.lending.lent(2):
        refused = front.send("POST", "/pic/compile", json=sent)
        assert refused.status_code == 503 and refused.json()["error"]["param"] == "publish"
        assert not front.funnel.compiled
        # What is for nobody else is compiled all the same.
        assert front.send("POST", "/pic/compile", json={"input_ids": [3] * 40}).ok
    assert front.send("POST", "/pic/compile", json=sent).ok


def test_without_a_store_nothing_is_compiled_to_be_published(front: Front) -> None:
    front.funnel.config = PicConfig(min_segment=4)  # type: ignore[misc]
    refused = front.send("POST", "/pic/compile", json={"input_ids": [3] * 40, "publish": True})
    assert refused.status_code == 409 and refused.json()["error"]["param"] == "publish"
    assert not front.funnel.compiled


@pytest.mark.parametrize("seam", [-1, 1 << 21, "4", 1.5])
def test_a_seam_that_is_none_is_refused(seam: Any, front: Front) -> None:
    refused = front.send("POST", "/pic/compile", json={"input_ids": [3] * 40, "seam": seam})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "seam"


def test_segments_are_named_and_foretold_with_their_adapter(front: Front) -> None:
    from sglang_pic.forest.keys import namespace, segment_id

    sent = {"input_ids": [3] * 40, "extra_key": "mine", "lora_path": "adapter"}
    (made,) = front.send("POST", "/pic/compile", json=sent).json()["segments"]
    space = namespace(front.funnel.context, None)
    assert made["id"] == segment_id(space, "mine-its-id", [3] * 40)
    refused = front.send("POST", "/pic/compile", json={**sent, "lora_path": "unknown"})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "lora_path"
    assert "never been loaded" in refused.json()["error"]["message"]
    asked = {"input_ids": [3] * 40, "lora_path": "adapter"}
    assert front.send("POST", "/pic/explain", json=asked).ok
    assert front.schedulers.told[-1][1]["lora_path"] == "adapter"


@pytest.mark.parametrize(
    ("made", "status"),
    [
        (Made(QUEUE_FULL), 503),
        (Made(FAILED, error=ValueError("too long")), 400),
        (Made(FAILED, error=RuntimeError("no memory")), 500),
    ],
)
def test_the_segment_that_was_not_compiled_is_named(front: Front, made: Made, status: int) -> None:
    async def compile(items: list[Any], caller: Any) -> list[Made]:
        assert caller.tenant == "us"
        return [Made(COMPILED, 40), made]

    front.funnel.compile = compile  # type: ignore[method-assign]
    sent = {"input_ids": [[3] * 40, [4] * 40], "cache_salt": "us"}
    refused = front.send("POST", "/pic/compile", json=sent)
    assert refused.status_code == status
    assert refused.json()["error"]["param"] == "segments[1]"


SEGMENT = f"/pic/segments/{ID}"
LONG = [3] * 98
BAD = [
    ("POST", "/pic/compile", {"text": ["x" * 40, 3]}, "text[1]"),
    ("POST", "/pic/compile", {"text": []}, "text"),
    ("POST", "/pic/compile", {"input_ids": [[3] * 5, LONG]}, "input_ids[1]"),
    ("POST", "/pic/compile", {"input_ids": [3, 3, 3, 64]}, "input_ids[0]"),
    ("POST", "/pic/compile", {"input_ids": [3, 3, -1, 3]}, "input_ids[0][2]"),
    ("POST", "/pic/compile", {"input_ids": [3, 3, True, 3]}, "input_ids[0][2]"),
    ("POST", "/pic/compile", {"input_ids": [[3] * 4, [3]]}, "input_ids[1]"),
    ("POST", "/pic/compile", {"input_ids": [[3] * 4] * 1025}, "input_ids"),
    ("POST", "/pic/compile", {"input_ids": [3] * 4, "extra_key": 4}, "extra_key"),
    ("POST", "/pic/explain", {}, "text"),
    ("POST", "/pic/explain", {"text": "x", "input_ids": [1]}, "text"),
    ("POST", "/pic/explain", {"text": ""}, "text"),
    ("POST", "/pic/explain", {"input_ids": []}, "input_ids"),
    ("POST", "/pic/explain", {"input_ids": [64]}, "input_ids"),
    ("POST", "/pic/explain", {"input_ids": [3] * 90}, "input_ids"),
    ("POST", "/pic/explain", {"input_ids": [3], "pic": [{}]}, "pic"),
    ("POST", "/pic/explain", {"input_ids": [3], "pic": {"seam": -1}}, "pic.seam"),
    ("POST", "/pic/explain", {"prompt": [3, -1]}, "prompt[1]"),
    ("POST", "/pic/explain", {"prompt": "x", "input_ids": [1]}, "text"),
    ("POST", "/pic/explain", {"prompt": "x" * 8, "pic": {"parts": ["x"]}}, "text"),
    ("POST", "/pic/explain", {"messages": "x"}, "messages"),
    ("POST", "/pic/explain", {"messages": [{"role": "x"}]}, "messages[0].role"),
    ("POST", SEGMENT + "/pin", {"ttl_s": 0}, "ttl_s"),
    ("POST", SEGMENT + "/pin", {"ttl_s": "9"}, "ttl_s"),
    ("POST", SEGMENT + "/pin", {"ttl_s": True}, "ttl_s"),
    ("POST", SEGMENT + "/pin", {"ttl_s": 1e12}, "ttl_s"),
    ("POST", SEGMENT + "/pin", {"ttl": 9}, "ttl"),
    ("POST", SEGMENT + "/pin", [], "body"),
    ("POST", SEGMENT + "/unpin", {"ttl_s": 9}, "ttl_s"),
    ("POST", "/pic/segments/A/pin", {}, "id"),
    ("DELETE", "/pic/segments/A", None, "id"),
    ("GET", "/pic/segments?salt=us", None, "salt"),
    ("POST", "/pic/flush", {"cache_salt": 3}, "cache_salt"),
    ("POST", "/pic/timer", {"on": "yes"}, "on"),
]


@pytest.mark.parametrize(("method", "path", "sent", "named"), BAD)
def test_bad_input_is_named(front: Front, method: str, path: str, sent: Any, named: str) -> None:
    refused = front.send(method, path, json=sent)
    assert refused.status_code == 400, refused.text
    error = refused.json()["error"]
    assert error["param"] == named and error["message"].startswith(f"{named}: ")
    assert error["type"] == "BadRequestError" and error["code"] == 400
    assert not [do for do, _ in front.schedulers.told if do not in ("reserve", "held")]
    assert not front.funnel.compiled


def test_a_body_that_is_no_json(front: Front) -> None:
    for raw in (b"{", b'{"on": \xff}', b"[" * 5000, b'{"on": "\\ud800"}'):
        refused = front.send(
            "POST", "/pic/timer", data=raw, headers={"content-type": "application/json"}
        )
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "body"
    refused = front.send("POST", "/pic/timer", data=b'{"on": true}')  # no type
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "body"


def test_a_reserved_salt_is_refused_everywhere(front: Front) -> None:
    """Whatever takes a salt, by the routes' own description of themselves."""
    described = front.send("GET", "/openapi.json").json()
    tried = 0
    for path, methods in described["paths"].items():
        for method, operation in methods.items():
            sent: dict[str, Any] = {}
            if any(one["name"] == "cache_salt" for one in operation.get("parameters", [])):
                sent["params"] = {"cache_salt": RESERVED}
            elif "requestBody" in operation and path not in ("/pic/timer", "/pic/linking"):
                sent["json"] = {"cache_salt": RESERVED}
            else:
                continue
            tried += 1
            refused = front.send(method.upper(), path.replace("{id}", ID), **sent)
            assert refused.status_code == 400, (method, path)
            assert refused.json()["error"]["param"] == "cache_salt"
    assert tried == 11
    assert not front.schedulers.told


def test_the_schema_says_what_is_taken_and_answered(front: Front) -> None:
    described = front.send("GET", "/openapi.json").json()
    assert set(described["paths"]) == {route.path for route in router.routes}
    models = described["components"]["schemas"]
    for path, methods in described["paths"].items():
        for operation in methods.values():
            assert set(operation["responses"]) == {"200", "default"}, path
            if "requestBody" in operation:
                schema = operation["requestBody"]["content"]["application/json"]["schema"]
                model = models[schema["$ref"].rpartition("/")[2]]
                # A request may be explained as it is.
                assert model["additionalProperties"] is (path == "/pic/explain")
    taken = models["CompileBody"]["properties"]["input_ids"]
    assert "array" in json.dumps(taken) and "string" not in json.dumps(taken)


# -- who may call ---------------------------------------------------------------------


def allowed(app: FastAPI, method: str, path: str, **keys: Any) -> bool:
    scope = {"type": "http", "path": path, "method": method, "headers": [], "root_path": ""}
    keys = {"api_key": None, "admin_api_key": None, "authorization_header": None, **keys}
    level = _get_auth_level_from_app_and_scope(app, scope)
    return decide_request_auth(method=method, path=path, auth_level=level, **keys).allowed


@pytest.mark.parametrize("route", router.routes, ids=lambda route: route.path)
def test_managing_takes_the_admins_key(route: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As SGLang finds the routes in its application once the hook has run."""
    app = FastAPI()
    monkeypatch.setattr(http_server, "app", app)
    install_http(types.SimpleNamespace(radix_cache_backend=CACHE_BACKEND, resolved_dict=dict))
    (method,) = route.methods
    call = (app, method, route.path.replace("{id}", ID))
    assert allowed(*call)
    key = {"api_key": "key", "admin_api_key": "admin"}
    assert not allowed(*call, api_key="key")
    assert allowed(*call, api_key="key", authorization_header="Bearer key")
    # What every client asks for first, and a client's own reports, are not the admin's alone.
    probe = route.path in ("/pic/info", "/pic/report/{id}")
    assert allowed(*call, admin_api_key="admin") == probe
    assert allowed(*call, **key, authorization_header="Bearer key") == probe
    assert allowed(*call, **key, authorization_header="Bearer admin") != probe
    assert (getattr(route.endpoint, "_auth_level", None) == AuthLevel.ADMIN_OPTIONAL) != probe


# -- the client -----------------------------------------------------------------------


def test_the_client_says_and_reads_what_the_routes_do(front: Front) -> None:
    us = PicClient(front.url + "/", cache_salt="us", api_key="key")
    assert us.segments() == [us.get(ID)] == [client.Segment(**card(), ranks=1)]
    assert us.pin(ID, ttl_s=60).pinned and not us.unpin(ID).pinned
    assert us.delete(ID) == 40
    assert us.flush() == client.Flushed(2, 80)
    (made,) = us.compile("x" * 80)
    assert (made.tokens, made.tokens_computed) == (10, 10)
    assert [one.tokens for one in us.compile(input_ids=[[3] * 4, [4] * 5])] == [4, 5]
    told = us.explain(pic={"parts": ["x" * 80, {"segment": "y" * 80}]})
    assert isinstance(told.segments[0], client.ExplainedSegment) and told.exactness == "composed"
    assert us.explain(input_ids=[1, 2, 3]).segments == []
    assert us.budgets() == us.forest() == [{"rank": 0}]
    assert us.stats()["ranks"] == [{"rank": 0}]
    salts = {fields["cache_salt"] for _, fields in front.schedulers.told if "cache_salt" in fields}
    assert salts == {"us"}


def test_the_clients_errors_say_status_and_field(front: Front) -> None:
    them = PicClient(front.url, cache_salt="them")
    with pytest.raises(client.NotFoundError) as missing:
        them.get(ID)
    assert (missing.value.status, missing.value.field) == (404, "id")
    with pytest.raises(client.BadRequestError) as bad:
        them.pin(ID, ttl_s=-1)
    assert (bad.value.status, bad.value.field) == (400, "ttl_s")
    front.schedulers.room = 0
    with pytest.raises(client.NoRoomError) as full:
        them.compile(input_ids=[3] * 9)
    assert full.value.field == "segments"
    with pytest.raises(client.PicServerError) as elsewhere:
        PicClient(front.url + "/v2", cache_salt="them").segments()
    assert (elsewhere.value.status, elsewhere.value.field) == (404, None)


# -- a server -------------------------------------------------------------------------


def of_tenant(server: Server) -> PicClient:
    return PicClient(server.url, cache_salt=fresh_salt())


@pytest.mark.server
def test_a_segments_life(page16: Server) -> None:
    us = of_tenant(page16)
    first, second = us.compile(input_ids=[ids_of(900, 100), ids_of(901, 70)])
    assert [one.id for one in us.segments()] == [second.id, first.id]
    seen = us.get(first.id)
    assert (seen.tokens, seen.held, seen.hits, seen.pinned) == (100, 96, 0, False)
    assert seen.kv_bytes == 96 * page16.forest()["bytes_per_token"]
    prompt, marks = assemble([("text", [1, 2]), ("segment", ids_of(900, 100)), ("text", [3])])
    salt = us._tenant["cache_salt"]
    page16.generate(**body(prompt, marks, 1, salt, seam=4))
    assert us.get(first.id).hits == 1 and us.segments()[0].id == first.id
    assert us.delete(first.id) == 96
    with pytest.raises(client.NotFoundError):
        us.get(first.id)
    assert us.flush().segments == 1
    assert us.segments() == []
    page16.forest()
    again = page16.generate(**body(prompt, marks, 1, salt, seam=4))["meta_info"]["pic"]
    assert again["tokens_compiled"] == 100 and again["segments"][0]["id"] == first.id


@pytest.mark.server
def test_a_pinned_segment_outlives_the_pressure(page1: Server) -> None:
    us, them = of_tenant(page1), of_tenant(page1)
    pinned, loose = us.compile(input_ids=[ids_of(910, 300), ids_of(911, 300)])
    assert us.pin(pinned.id).pinned
    with pytest.raises(client.ConflictError):
        us.delete(pinned.id)
    assert us.flush().segments == 1
    for i in range(14):
        them.compile(input_ids=ids_of(920 + i, 700))
    assert us.get(pinned.id).held == 300
    with pytest.raises(client.NotFoundError):
        us.get(loose.id)
    budgets = us.budgets()[0]
    assert budgets["kv"]["pinned"] >= us.get(pinned.id).kv_bytes
    us.unpin(pinned.id)
    assert us.delete(pinned.id) == 300


@pytest.mark.server
def test_a_pin_lasts_its_time(page1: Server) -> None:
    us = of_tenant(page1)
    (made,) = us.compile(input_ids=ids_of(940, 50))
    us.pin(made.id, ttl_s=3600)
    assert us.pin(made.id, ttl_s=0.5).pinned and us.get(made.id).pinned
    time.sleep(1)
    assert not us.get(made.id).pinned
    assert us.delete(made.id) == 50


@pytest.mark.server
def test_tenants_do_not_see_each_other(page1: Server) -> None:
    us, them = of_tenant(page1), of_tenant(page1)
    (made,) = us.compile(input_ids=ids_of(950, 50))
    assert them.segments() == []
    for call in (them.get, them.pin, them.unpin, them.delete):
        with pytest.raises(client.NotFoundError) as unknown:
            call(made.id)
        with pytest.raises(client.NotFoundError) as never:
            call("0" * 32)
        assert str(unknown.value) == str(never.value)
    assert them.flush().segments == 0
    assert us.get(made.id).held == 50


@pytest.mark.server
def test_a_compile_that_cannot_fit_is_refused(page1: Server) -> None:
    us = of_tenant(page1)
    us.compile(input_ids=ids_of(960, 40))
    segments = [ids_of(961 + i, 1000) for i in range(20)]
    before = page1.forest()["clock"]
    with pytest.raises(client.NoRoomError) as full:
        us.compile(input_ids=segments)
    assert full.value.field == "segments"
    assert page1.forest()["clock"] == before
    assert us.stats()["ranks"][0]["refused"]["budget"] > 0


@pytest.mark.server
def test_what_is_foretold_comes_true(page1: Server) -> None:
    """Cold, compiled and warm; and foretelling changes nothing."""
    us = of_tenant(page1)
    parts = [("segment", ids_of(970, 60)), ("segment", ids_of(971, 50))]
    prompt, marks = assemble([*parts, ("text", [3])])
    request = body(prompt, marks, 1, us._tenant["cache_salt"], seam=4)

    def told() -> client.Explanation:
        return us.explain(input_ids=prompt, pic=request["pic"])

    before = page1.forest()
    cold = told()
    assert told() == cold and page1.forest() == before
    assert (cold.tokens_to_compile, cold.tokens_reused) == (110, 0)
    assert {segment.reason for segment in cold.segments} == {"not_compiled"}
    us.compile(input_ids=ids_of(970, 60))
    assert told().tokens_to_compile == 50
    us.compile(input_ids=ids_of(971, 50))
    warm = dataclasses.asdict(told())
    assert warm.pop("tokens_to_compile") == 0 and warm.pop("cuts") == []
    assert us.get(warm["segments"][0]["id"]).hits == 0
    report = page1.generate(**request)["meta_info"]["pic"]
    assert {name: report[name] for name in warm} == warm
    exact = us.explain(input_ids=prompt, pic={**request["pic"], "require_exact": True})
    assert exact.reason == "require_exact"


@pytest.mark.server
@pytest.mark.parametrize("path", ["/pic/compile", "/pic/explain", "/generate"])
def test_a_server_without_tokenizer_refuses_text(page1: Server, path: str) -> None:
    sent = {"text": "A long enough text."} | ({"pic": {}} if path == "/generate" else {})
    refused = page1.post(path, sent)
    assert refused.status_code == 400 and "no tokenizer" in refused.text


@pytest.mark.server
def test_numbers_add_up(page1: Server) -> None:
    (stats,) = of_tenant(page1).stats()["ranks"]
    (budgets,) = of_tenant(page1).budgets()
    assert {name: stats[name] for name in budgets} == budgets
    kv = budgets["kv"]
    kinds = ("segment", "company", "turn", "prefix", "free")
    assert sum(kv[kind] for kind in kinds) == kv["capacity"]


@pytest.mark.server
def test_a_servers_openapi_document_holds_the_routes(page1: Server) -> None:
    described = page1.get("/openapi.json").json()["paths"]
    for route in router.routes:
        for method in route.methods:
            operation = described[route.path][method.lower()]
            assert operation["responses"]["200"]["content"]["application/json"]["schema"]
