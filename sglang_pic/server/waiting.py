"""Requests that wait in the front, as SGLang sees them: by their ``rid``.

While its segments compile a request is not with the scheduler. It is aborted, watched
for a client that leaves, refused and timed out here as it would be in the scheduler's
queue, and answered by SGLang's own code.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import dataclasses
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from http import HTTPStatus
from typing import Any, TypeVar

import anyio
from sglang.srt.environ import envs
from sglang.srt.managers.io_struct import AbortReq, GenerateReqInput
from sglang.srt.runtime_context import get_schedule, get_serving

Result = TypeVar("Result")

# SGLang's own words.
_FULL = "The request queue is full."
_OVERTAKEN = "The request is aborted by a higher priority request."
_TIMEOUT = "Request waiting timeout reached."


class EndedError(Exception):
    """The request ended while it waited.

    ``answer`` is its one output; of several samples that of each.
    """

    def __init__(self, answer: dict[str, Any]):
        super().__init__("ended while it waited")
        self.answer = answer


@dataclasses.dataclass(eq=False)
class Stay:
    """One request in the front.

    Attributes:
        rid: SGLang's name for it.
        urgency: the highest is refused first.
        aborted: an abort has come for it.
        waits: it is in SGLang's table under this name, by our hand.
    """

    rid: str
    urgency: int
    since: float
    aborted: bool = False
    waits: bool = False


class Waiting:
    """The requests of one tokenizer manager that are in the front.

    Args:
        manager: SGLang's.
        urgency: of a request's priority; the lowest goes first.
    """

    def __init__(self, manager: Any, urgency: Callable[[int | None], int]):
        self._manager = manager
        self._urgency = urgency
        self._stays: set[Stay] = set()

    @contextlib.contextmanager
    def stay(self, obj: GenerateReqInput) -> Iterator[Stay]:
        """Hear of aborts of this request, which is given a ``rid``, from now on."""
        if obj.rid is None:
            obj.rid = uuid.uuid4().hex
        rid = obj.rid[0] if isinstance(obj.rid, list) and obj.rid else obj.rid
        stay = Stay(str(rid), self._urgency(obj.priority), time.monotonic())
        self._stays.add(stay)
        try:
            yield stay
        finally:
            self._stays.discard(stay)

    def abort(self, rid: str, abort_all: bool) -> None:
        """After ``TokenizerManager.abort_request``: end those it means. SGLang takes a
        ``rid`` that it knows for the beginning of any."""
        known = rid in self._manager.rid_to_state or get_serving().tokenizer_worker_num > 1
        named = rid and (known or any(stay.rid == rid for stay in self._stays))
        for stay in list(self._stays):
            if abort_all or (named and stay.rid.startswith(rid)):
                stay.aborted = True
                self._end(stay)

    async def until(
        self,
        stay: Stay,
        obj: GenerateReqInput,
        request: Any,
        work: Coroutine[Any, Any, Result],
    ) -> Result:
        """Wait for ``work``.

        Args:
            request: whose client may leave, or ``None``.

        Raises:
            EndedError: the request was aborted.
            ValueError, HTTPException: as SGLang would: its client has left, too many
                wait, or it has waited too long; or its ``rid`` is in use.
        """
        try:
            own = _single(obj, stay.rid)
            self._manager._init_req_state(own, request)
        except BaseException:
            work.close()
            raise
        state = self._manager.rid_to_state[stay.rid]
        outputs = self._manager._wait_one_response(own, request)
        answer = asyncio.ensure_future(anext(outputs))
        working = asyncio.ensure_future(work)
        stay.waits = True
        limit_s = envs.SGLANG_REQ_WAITING_TIMEOUT.get()
        timer = None
        if limit_s > 0:
            left = limit_s - (time.monotonic() - stay.since)
            timer = asyncio.get_running_loop().call_later(left, self._end, stay, _TIMEOUT)
        try:
            self._refuse_one_too_many(stay)
            if stay.aborted:
                self._end(stay)
            await asyncio.wait({answer, working}, return_when=asyncio.FIRST_COMPLETED)
            if state.finished:
                await asyncio.wait({answer})
            if answer.done():
                raise EndedError(answer.result())
            # SGLang looks every few seconds: who left since costs no prefill either.
            if request is not None and not obj.background and await request.is_disconnected():
                raise ValueError(f"Request is disconnected from the client side. {stay.rid=}")
            return working.result()
        finally:
            if timer is not None:
                timer.cancel()
            for task in (answer, working):
                task.cancel()
            # Whose client left a stream is cancelled at each ``await`` anew.
            with anyio.CancelScope(shield=True):
                await asyncio.gather(answer, working, return_exceptions=True)
                await outputs.aclose()
            stay.waits = False
            if self._manager.rid_to_state.get(stay.rid) is state:
                del self._manager.rid_to_state[stay.rid]

    async def refuse(self, stay: Stay, message: str) -> None:
        """Work that ends its request: with 503 and these words."""
        self._end(stay, message)
        await asyncio.Event().wait()

    def _refuse_one_too_many(self, newest: Stay) -> None:
        """As ``--max-queued-requests`` does in the scheduler, of those that wait here."""
        limit = get_schedule().max_queued_requests
        waiting = [stay for stay in self._stays if stay.waits]
        if limit is not None and len(waiting) > limit:
            worst = max(waiting, key=lambda stay: (stay.urgency, stay.since))
            self._end(worst, _FULL if worst is newest else _OVERTAKEN)

    def _end(self, stay: Stay, message: str | None = None) -> None:
        """Answer what waits: as aborted, or with 503 and a message."""
        if not stay.waits or stay.rid not in self._manager.rid_to_state:
            return
        reason = message and {
            "type": "abort",
            "status_code": HTTPStatus.SERVICE_UNAVAILABLE,
            "message": message,
        }
        self._manager._handle_abort_req(
            AbortReq(rid=stay.rid, finished_reason=reason, abort_message=message)
        )


def _single(obj: GenerateReqInput, rid: str) -> GenerateReqInput:
    """The request as one of one sample. It has no adapter: none is acquired for it."""
    own = copy.copy(obj)
    own.__dict__.pop("_sub_obj_cache", None)
    own.rid, own.lora_path, own.lora_id, own.kv_hints = rid, None, None, None
    params = obj.sampling_params
    own.sampling_params = {**params, "n": 1} if isinstance(params, dict) else {}
    own.normalize_batch_and_arguments()
    return own


async def ended(error: EndedError, samples: int, *, stream: bool) -> AsyncGenerator[Any, None]:
    """The answer of a request that ended while it waited, in SGLang's form."""
    if samples == 1:
        yield error.answer
    elif stream:
        for index in range(samples):
            yield {**error.answer, "index": index}
    else:
        yield [dict(error.answer) for _ in range(samples)]
