"""Requests that wait for compiles, in SGLang's own tokenizer manager, without a server."""

from __future__ import annotations

import asyncio
import types
from collections.abc import Callable, Coroutine
from typing import Any

import anyio
import pytest
from fastapi import HTTPException
from sglang.srt.disaggregation.utils import DisaggregationMode
from sglang.srt.environ import envs
from sglang.srt.managers.io_struct import GenerateReqInput
from sglang.srt.managers.tokenizer_manager import TokenizerManager

from sglang_pic.server import waiting as waiting_module
from sglang_pic.server.waiting import EndedError, Waiting


class Manager(TokenizerManager):
    """As much of SGLang's as requests that wait come upon; sends nothing."""

    def __init__(self) -> None:
        self.rid_to_state: dict[str, Any] = {}
        self.enable_trace = self.enable_lora = self.enable_metrics = False
        self.disaggregation_mode = DisaggregationMode.NULL
        self.incremental_streaming_output = False
        ignore = lambda *_, **__: None  # noqa: E731
        self.request_logger = types.SimpleNamespace(log_finished_request=ignore)
        exporter = types.SimpleNamespace(exporter_enabled=lambda: False)
        self.request_metrics_exporter_manager = exporter
        self._dispatch_to_scheduler = ignore

    def config_value(self, name: str) -> Any:
        return None


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    made = types.SimpleNamespace(max_queued_requests=None, tokenizer_worker_num=1)
    monkeypatch.setattr(waiting_module, "get_schedule", lambda: made)
    monkeypatch.setattr(waiting_module, "get_serving", lambda: made)
    monkeypatch.setattr(
        "sglang.srt.managers.tokenizer_manager.get_serving", lambda: made, raising=True
    )
    return made


class Front:
    """Requests that wait for ever, until something ends them."""

    def __init__(self) -> None:
        self.manager = Manager()
        self.waiting = Waiting(self.manager, lambda priority: priority or 0)

    def abort(self, rid: str = "", abort_all: bool = False) -> None:
        """What the hook makes of SGLang's function."""
        self.manager.abort_request(rid, abort_all)
        self.waiting.abort(rid, abort_all)

    async def ask(
        self,
        rid: str | None = None,
        work: Callable[[], Coroutine[Any, Any, Any]] | None = None,
        request: Any = None,
        before: Callable[[], None] = lambda: None,
        **fields: Any,
    ) -> Any:
        obj = GenerateReqInput(rid=rid, input_ids=[1], **fields)
        with self.waiting.stay(obj) as stay:
            before()
            made = (work or asyncio.Event().wait)()
            return await self.waiting.until(stay, obj, request, made)


def run(test: Callable[[Front], Coroutine[Any, Any, None]]) -> None:
    async def both() -> None:
        front = Front()
        await asyncio.wait_for(test(front), 20)
        assert not front.manager.rid_to_state and not front.waiting._stays

    asyncio.run(both())


async def outcome(task: Any) -> str:
    """How a request ended, in a word."""
    try:
        return f"made {await task}"
    except EndedError as error:
        return str(error.answer["meta_info"]["finish_reason"]["message"])
    except HTTPException as error:
        return f"{error.status_code} {error.detail}"


ABORTED = "Abort in waiting queue"


def test_what_is_done_goes_on(limits: Any) -> None:
    async def test(front: Front) -> None:
        async def work() -> int:
            assert list(front.manager.rid_to_state) == ["a"]
            return 7

        assert await outcome(front.ask("a", work)) == "made 7"

    run(test)


@pytest.mark.parametrize(
    ("abort", "ends"),
    [
        (("ab", False), {"ab", "abc"}),  # SGLang takes a known name for a beginning
        (("abc", False), {"abc"}),
        (("a", False), set()),  # nobody is called so
        (("", False), set()),
        (("", True), {"ab", "abc", "x"}),
    ],
)
def test_an_abort_ends_whom_it_means(abort: Any, ends: set[str], limits: Any) -> None:
    async def test(front: Front) -> None:
        go = asyncio.Event()
        tasks = {
            rid: asyncio.ensure_future(outcome(front.ask(rid, go.wait)))
            for rid in ("ab", "abc", "x")
        }
        await asyncio.sleep(0.01)
        front.abort(*abort)
        await asyncio.sleep(0.01)
        assert {rid for rid, task in tasks.items() if task.done()} == ends
        go.set()
        for rid, task in tasks.items():
            assert await task == (ABORTED if rid in ends else "made True")

    run(test)


def test_an_abort_that_comes_between_is_not_lost(limits: Any) -> None:
    """The link was handed back, and the wait has not begun: SGLang knows no such name."""

    async def test(front: Front) -> None:
        assert await outcome(front.ask("a", before=lambda: front.abort("a"))) == ABORTED

    run(test)


def test_a_name_in_use_is_refused(limits: Any) -> None:
    async def test(front: Front) -> None:
        go = asyncio.Event()
        first = asyncio.ensure_future(front.ask("a", go.wait))
        await asyncio.sleep(0.01)
        with pytest.raises(ValueError, match="Duplicate request ID"):
            await front.ask("a")
        go.set()
        assert await first

    run(test)


def test_who_waits_too_long_is_refused(limits: Any) -> None:
    async def test(front: Front) -> None:
        with envs.SGLANG_REQ_WAITING_TIMEOUT.override(0.05):
            assert await outcome(front.ask()) == "503 Request waiting timeout reached."

    run(test)


def test_no_more_wait_than_may_be_queued(limits: Any) -> None:
    limits.max_queued_requests = 2

    async def test(front: Front) -> None:
        one, two = (asyncio.ensure_future(outcome(front.ask(priority=9))) for _ in range(2))
        await asyncio.sleep(0.01)
        assert await outcome(front.ask(priority=9)) == "503 The request queue is full."
        urgent = asyncio.ensure_future(outcome(front.ask(priority=1)))
        assert await two == "503 The request is aborted by a higher priority request."
        assert not one.done() and not urgent.done()
        front.abort(abort_all=True)
        assert await one == await urgent == ABORTED

    run(test)


def test_a_client_that_has_left_is_not_served(limits: Any) -> None:
    async def test(front: Front) -> None:
        async def has_left() -> bool:
            return True

        async def work() -> int:
            return 7

        gone = types.SimpleNamespace(is_disconnected=has_left, headers={})
        with pytest.raises(ValueError, match="disconnected"):
            await front.ask(work=work, request=gone)

    run(test)


def test_who_is_cancelled_leaves_no_trace(limits: Any) -> None:
    async def test(front: Front) -> None:
        stopped = asyncio.Event()

        async def work() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                stopped.set()

        task = asyncio.ensure_future(front.ask("a", work))
        await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert stopped.is_set()

    run(test)


def test_a_stream_that_is_left_frees_its_rid(limits: Any) -> None:
    """An answer that is streamed ends in a scope of anyio's, which cancels again at
    every ``await``."""

    async def test(front: Front) -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(lambda: front.ask("a"))
            while "a" not in front.manager.rid_to_state:
                await asyncio.sleep(0)
            group.cancel_scope.cancel()
        assert not front.manager.rid_to_state

    run(test)
