"""The life of requests in the front, with nothing real behind it."""

from __future__ import annotations

import asyncio
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import stats
from sglang.srt.managers.io_struct import GenerateReqInput
from test_waiting import ABORTED, Manager

from sglang_pic.config import PicConfig
from sglang_pic.link.policy import LinkOptions
from sglang_pic.request.base import LinkRequest, TokenSpan
from sglang_pic.request.hints import MISSING
from sglang_pic.request.internal import read_internal
from sglang_pic.server import asking as asking_module
from sglang_pic.server import waiting as waiting_module
from sglang_pic.server.asking import Asking
from sglang_pic.server.cold import Cold
from sglang_pic.server.companions import WhenAsked
from sglang_pic.server.compiler import Compiler
from sglang_pic.server.fetching import NoStore
from sglang_pic.server.funnel import Funnel
from sglang_pic.server.guards import Guards
from sglang_pic.server.life import Lives
from sglang_pic.server.placing import OneRank
from sglang_pic.server.queue import FairQueue
from sglang_pic.server.sources import COMPUTED, STORE, Source
from sglang_pic.server.waiting import Waiting
from sglang_pic.server.wanted import Wanted


class Scheduler:
    """Holds what was compiled: a prompt's one segment, by its first token."""

    def __init__(self) -> None:
        self.held: set[int] = set()
        self.asked: list[tuple[str, int]] = []
        self.compiles: list[int] = []
        self.go = asyncio.Event()

    def missing(self, ids: list[int]) -> list[int]:
        return [] if ids[0] in self.held else [0]

    async def compile(self, obj: Any) -> Any:
        self.compiles.append(obj.input_ids[0])
        await self.go.wait()
        self.held.add(obj.input_ids[0])
        yield {"meta_info": {"prompt_tokens": len(obj.input_ids), "cached_tokens": 0}}

    async def generate(self, manager: Any, obj: Any, request: Any) -> Any:
        """As SGLang's, without ours around it."""
        obj.normalize_batch_and_arguments()
        samples = obj.parallel_sample_num
        one = obj if obj.is_single else obj[0]
        link = read_internal(one.kv_hints).link
        assert link is not None
        kind = "strict" if link.strict else link.off or "link"
        self.asked.append((kind, one.input_ids[0]))
        if link.strict and self.missing(one.input_ids):
            if obj.stream:
                reason = {"type": "abort", "message": f"{MISSING}[0]"}
                yield {"meta_info": {"finish_reason": reason}}
                return
            raise ValueError(f"{MISSING}[0]")
        outs = [self.out(f"{obj.rid}", i) for i in range(samples)]
        for out in outs:
            out["meta_info"]["finish_reason"] = {"type": "stop"}
        if obj.stream:
            for out in outs:
                yield out
        else:
            yield outs[0] if obj.is_single else outs

    def out(self, rid: str, index: int) -> dict[str, Any]:
        return {"index": index, "meta_info": {"id": rid, "pic": [stats.report()]}}

    async def command(self, manager: Any, do: str, *, ids: Any, **_: Any) -> Any:
        assert do == "missing"
        self.asked.append((do, ids[0]))
        return [{"missing": self.missing(ids)}]


@pytest.fixture(autouse=True)
def limits(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    made = types.SimpleNamespace(max_queued_requests=None, tokenizer_worker_num=1)
    for module in (waiting_module, "sglang.srt.managers.tokenizer_manager"):
        target = module if isinstance(module, str) else module.__name__
        monkeypatch.setattr(f"{target}.get_serving", lambda: made)
    monkeypatch.setattr(waiting_module, "get_schedule", lambda: made)
    yield


class Front:
    """A funnel of which only what compiles and what waits is real."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.scheduler = Scheduler()
        self.manager = Manager()
        made = self.funnel = object.__new__(Funnel)
        made._manager = self.manager
        made.config = PicConfig(min_segment=1)
        made.resolver = self  # type: ignore[assignment]
        guards = made.guards = object.__new__(Guards)
        guards._config, guards._is_hybrid = made.config, False
        guards.canary = guards.audit = self  # type: ignore[assignment]
        guards.gate = types.SimpleNamespace(reason=None)  # type: ignore[assignment]
        made.wanted = Wanted((), made.config)
        made.compiler = Compiler(self.scheduler.compile, FairQueue(8, 8, 8))
        made.waiting = Waiting(self.manager, lambda priority: 0)
        asking = Asking(self.manager, made.wanted)
        cold = Cold(made.compiler, allowed=False)
        parts = (made.wanted, asking, made.compiler, made.waiting, cold, WhenAsked(), OneRank())
        made.lives = Lives(self.manager, made.config, *parts, NoStore())
        monkeypatch.setattr(asking_module, "command", self.scheduler.command)

    def resolve(self, obj: Any, pic: Any, exchange: Any) -> list[tuple[list[int], LinkRequest]]:
        prompts = obj.input_ids if isinstance(obj.input_ids[0], list) else [obj.input_ids]
        link = LinkRequest((TokenSpan(0, 2),), LinkOptions(seam=0))
        return [(list(ids), link) for ids in prompts]

    async def settle(self) -> None:
        pass

    def consider(self, *_: Any) -> None:
        pass

    def abort(self, rid: str) -> None:
        self.manager.abort_request(rid)
        self.funnel.waiting.abort(rid, False)

    async def ask(self, ids: Any, **fields: Any) -> list[Any]:
        obj = GenerateReqInput(input_ids=ids, **fields)
        outputs = self.funnel.run(self.scheduler.generate, obj, None, {}, None)
        return [out async for out in outputs]


def run(
    monkeypatch: pytest.MonkeyPatch, test: Callable[[Front], Any], *, held: tuple[int, ...] = ()
) -> None:
    async def both() -> None:
        front = Front(monkeypatch)
        front.scheduler.held.update(held)
        await asyncio.wait_for(test(front), 20)
        assert not front.manager.rid_to_state and not front.funnel.waiting._stays

    asyncio.run(both())


def told(out: dict[str, Any]) -> tuple[int, int]:
    """Tokens compiled for it, and how many segments it waited for."""
    report = out["meta_info"]["pic"]
    return report["tokens_compiled"], len(report["waited_for"])


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_asks_by_its_link(monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    async def test(front: Front) -> None:
        front.scheduler.go.set()
        (cold,) = await front.ask([1, 2, 3], stream=stream)
        (warm,) = await front.ask([1, 2, 3], stream=stream)
        assert (told(cold), told(warm)) == ((2, 1), (0, 0))
        assert front.scheduler.asked == [("strict", 1), ("link", 1), ("strict", 1)]
        assert front.scheduler.compiles == [1]

    run(monkeypatch, test)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("samples", [1, 2])
def test_new_documents_are_compiled_behind_an_exact_answer(
    monkeypatch: pytest.MonkeyPatch, samples: int, stream: bool
) -> None:
    async def test(front: Front) -> None:
        front.funnel.lives._cold = Cold(front.funnel.compiler, allowed=True)
        params = {"n": samples, "max_new_tokens": 4}
        obj = GenerateReqInput(input_ids=[1, 2, 3], stream=stream, sampling_params=params)
        outputs = front.funnel.run(front.scheduler.generate, obj, None, {}, None)
        # As SGLang's endpoints do, which ask for no more than they need.
        outs = [await anext(outputs) for _ in range(samples if stream else 1)]
        each = outs if stream or samples == 1 else outs[0]
        assert [told(out) for out in each] == [(0, 0)] * samples
        assert [kind for kind, _ in front.scheduler.asked][1:] == ["first_time"]
        # Who comes next has what is under way, and links.
        after = asyncio.ensure_future(front.ask([1, 2, 3], sampling_params=params))
        await asyncio.sleep(0.02)
        assert front.scheduler.compiles == [1] and not after.done()
        front.scheduler.go.set()
        (answer,) = await after
        for out in answer if samples > 1 else [answer]:
            assert told(out) == (0, 1)
        assert front.scheduler.asked[-1] == ("link", 1)
        await outputs.aclose()
        # Whoever wants no token wants it compiled.
        (out,) = await front.ask([5, 2, 3], sampling_params={"max_new_tokens": 0})
        assert told(out) == (2, 1) and front.scheduler.asked[-1] == ("link", 5)

    run(monkeypatch, test)


class Held:
    """A store that has the prompts that begin with these tokens.

    Args:
        go: when it says so.
    """

    has_store = True

    def __init__(self, scheduler: Scheduler, *tokens: int):
        self._scheduler = scheduler
        self._tokens = tokens
        self.go = asyncio.Event()
        self.go.set()

    async def known(self, items: Any) -> list[bool]:
        await self.go.wait()
        return [item.ids[0] in self._tokens for item in items]

    async def fetch(self, item: Any, *, no_logs: bool = False) -> Source:
        if item.ids[0] not in self._tokens:
            return Source(COMPUTED, "not_in_store")
        self._scheduler.held.add(item.ids[0])
        return Source(STORE, "in_store", 0.5, 9)

    def computed(self, tokens: int, seconds: float) -> None:
        pass


def test_what_the_store_has_is_linked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(front: Front) -> None:
        front.funnel.lives._cold = Cold(front.funnel.compiler, allowed=True)
        store: Any = Held(front.scheduler, 1)
        front.funnel.lives._fetching = front.funnel.compiler._fetching = store
        front.scheduler.go.set()
        params = {"max_new_tokens": 4}
        (out,) = await front.ask([1, 2, 3], sampling_params=params)
        (waited,) = out["meta_info"]["pic"]["waited_for"]
        assert waited == {
            "segment": 0,
            "outcome": "fetched",
            "source": "store",
            "why": "in_store",
            "seconds": 0.5,
            "bytes": 9,
        }
        assert front.scheduler.asked[-1] == ("link", 1) and front.scheduler.compiles == []
        # What it has not is answered exactly, and compiled behind that.
        (out,) = await front.ask([2, 2, 3], sampling_params=params)
        assert told(out) == (0, 0) and front.scheduler.asked[-1] == ("first_time", 2)
        # Who is aborted while the store is asked is not sent.
        store.go.clear()
        asked = front.ask([3, 2, 3], rid="mine", sampling_params=params)
        task = asyncio.ensure_future(asked)
        await asyncio.sleep(0.02)
        front.abort("mine")
        (out,) = await task
        assert out["meta_info"]["finish_reason"]["message"] == ABORTED
        assert front.scheduler.asked[-1] == ("strict", 3)

    run(monkeypatch, test)


@pytest.mark.parametrize("stream", [False, True])
def test_samples_ask_once(monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    async def test(front: Front) -> None:
        front.scheduler.go.set()
        for expected in ((2, 1), (0, 0)):
            outs = await front.ask([1, 2, 3], stream=stream, sampling_params={"n": 3})
            samples = outs if stream else outs[0]
            assert [told(out) for out in samples] == [expected] * 3
        assert front.scheduler.asked == [("missing", 1), ("link", 1)] * 2
        assert front.scheduler.compiles == [1]

    run(monkeypatch, test)


def test_each_prompt_of_a_batch_asks_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [[7, 2, 3], [8, 2, 3], [9, 2, 3]]

    async def test(front: Front) -> None:
        front.scheduler.go.set()
        (outs,) = await front.ask(prompts)
        assert [told(out) for out in outs] == [(0, 0), (2, 1), (2, 1)]
        assert sorted(front.scheduler.compiles) == [8, 9]
        (outs,) = await front.ask([*prompts, [6, 2, 3]], sampling_params={"n": 2})
        assert [told(out) for out in outs] == [(0, 0)] * 6 + [(2, 1)] * 2
        assert sorted(front.scheduler.compiles) == [6, 8, 9]

    run(monkeypatch, test, held=(7,))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("samples", [1, 2])
def test_an_aborted_prompt_is_not_sent(
    monkeypatch: pytest.MonkeyPatch, samples: int, stream: bool
) -> None:
    async def test(front: Front) -> None:
        params = {"n": samples}
        asked = front.ask([1, 2, 3], rid="mine", stream=stream, sampling_params=params)
        task = asyncio.ensure_future(asked)
        await asyncio.sleep(0.02)
        front.abort("mine")
        outs = await task
        each = outs if stream or samples == 1 else outs[0]
        reasons = [out["meta_info"]["finish_reason"] for out in each]
        assert reasons == [{"type": "abort", "message": ABORTED}] * samples
        assert ("link", 1) not in front.scheduler.asked
        if stream and samples > 1:
            assert [out["index"] for out in each] == [0, 1]
        # What was sent serves the next one.
        front.scheduler.go.set()
        await asyncio.sleep(0.02)
        (out,) = await front.ask([1, 2, 3], rid="mine")
        assert front.scheduler.compiles == [1] and out["meta_info"]["id"] == "mine"

    run(monkeypatch, test)


def test_an_aborted_prompt_leaves_its_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(front: Front) -> None:
        task = asyncio.ensure_future(front.ask([[1, 2], [5, 2]], rid=["one", "two"]))
        await asyncio.sleep(0.02)
        front.abort("one")
        await asyncio.sleep(0.02)
        front.scheduler.go.set()
        ((one, two),) = await task
        assert one["meta_info"]["finish_reason"]["message"] == ABORTED
        assert two["meta_info"]["id"] == "two" and told(two) == (2, 1)
        assert ("link", 1) not in front.scheduler.asked

    run(monkeypatch, test)


def test_who_leaves_a_stream_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(front: Front) -> None:
        obj = GenerateReqInput(input_ids=[1, 2, 3], stream=True)
        outputs = front.funnel.run(front.scheduler.generate, obj, None, {}, None)
        task = asyncio.ensure_future(anext(outputs))
        await asyncio.sleep(0.02)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert not front.manager.rid_to_state

    run(monkeypatch, test)
