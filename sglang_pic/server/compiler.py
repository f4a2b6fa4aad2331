"""Compile segments: ordinary internal requests whose prompt is one segment.

They are sent a few at a time, in the order of ``server.queue``; the rest wait here, so
that a request with a thousand segments neither fills SGLang's queue nor holds others up.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, NamedTuple

from sglang.srt.managers.io_struct import GenerateReqInput

from sglang_pic.metrics.front import counts
from sglang_pic.request.internal import compile_hints
from sglang_pic.server.fetching import Fetching, NoStore
from sglang_pic.server.items import CompileItem
from sglang_pic.server.queue import FairQueue
from sglang_pic.server.sources import COMPUTED, Source

logger = logging.getLogger(__name__)

Generate = Callable[[GenerateReqInput], AsyncIterator[Any]]

# What became of an item that a request asked for.
COMPILED = "compiled"
FETCHED = "fetched"
SHARED = "shared"
LATE = "late"
FAILED = "failed"
QUEUE_FULL = "queue_full"


@dataclasses.dataclass(frozen=True)
class Caller:
    """What of a request that waits for compiles decides when they are computed.

    Attributes:
        tenant: its salt.
        priority, routing_key: SGLang's.
        no_logs: its prompt must not be logged.
    """

    tenant: str | None = None
    priority: int | None = None
    routing_key: str | None = None
    no_logs: bool = False


@dataclasses.dataclass(frozen=True)
class Made:
    """What became of one item.

    Attributes:
        outcome: ``compiled`` for this request, or ``fetched`` from elsewhere; ``shared``:
            another request, or an earlier item of this one, has it computed or fetched;
            ``late``: still under way;
            ``failed``; ``queue_full``: its tenant has too many waiting.
        tokens: computed for it; 0 where it is not ``compiled``.
        error: what ended it.
        source: where it came from.
    """

    outcome: str
    tokens: int = 0
    error: BaseException | None = None
    source: Source = dataclasses.field(default=Source(), compare=False)


def compile_request(item: CompileItem, caller: Caller) -> GenerateReqInput:
    """The internal request that compiles it, scheduled as its caller."""
    return GenerateReqInput(
        input_ids=list(item.ids),
        sampling_params={"max_new_tokens": 0, "temperature": 0},
        cache_salt=item.salt or None,
        extra_key=item.extra_key,
        lora_path=item.lora_path,
        routed_dp_rank=item.rank,
        priority=caller.priority,
        routing_key=caller.routing_key,
        no_logs=caller.no_logs,
        kv_hints=compile_hints(
            item.seams,
            named=item.named,
            company=item.company,
            guests=item.guests,
            shipped=item.shipped,
        )
        if item.segment
        else None,
    )


class Got(NamedTuple):
    """An item that is held now: tokens that were computed for it, and where it came from."""

    tokens: int
    source: Source


@dataclasses.dataclass(eq=False)
class Job:
    """An item that is queued or under way, and who waits for it."""

    item: CompileItem
    tenant: str | None
    result: asyncio.Future[Got]
    callers: list[Caller]
    urgency: int
    sent: bool = False


class Compiler:
    """Compiles what is asked for, each item once however many requests wait.

    Args:
        generate: SGLang's own ``generate_request``, bound, unhooked.
        queue: in which order, how many at a time, and how many may wait.
        urgency: of a request's priority; the lowest goes first.
        page_size: SGLang's.
        fetching: what the store has is not computed.
    """

    def __init__(
        self,
        generate: Generate,
        queue: FairQueue[Job],
        urgency: Callable[[int | None], int] = lambda priority: 0,
        page_size: int = 1,
        fetching: Fetching | None = None,
    ):
        self._generate = generate
        self._queue = queue
        self._urgency = urgency
        self._page_size = page_size
        self._fetching = fetching or NoStore()
        self._jobs: dict[CompileItem, Job] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        # Until then the wall time of compiles is accounted for.
        self._timed = 0.0

    async def compile(
        self,
        items: Sequence[CompileItem],
        caller: Caller | None = None,
        *,
        timeout_s: float | None = None,
        limit_s: float | None = None,
    ) -> list[Made]:
        """Compile all items.

        What waits in the queue is as urgent as the most urgent request that waits for
        it; what has been sent stays as it was sent. What is not sent when the last
        request that waits for it leaves is dropped.

        Args:
            caller: for whom.
            timeout_s: from then on wait only for what is sooner compiled than
                computed anew, see ``_is_worth_waiting``.
            limit_s: the longest wait in all. What was sent is compiled all the same,
                for whoever asks next.
        """
        caller = caller or Caller()
        jobs, new = self._join(items, caller)
        waits = {job.result: job for job in jobs if job is not None}
        self._send()
        try:
            await self._wait(waits, caller, timeout_s, limit_s)
            late = sum(not wait.done() for wait in waits)
            made = []
            for job in jobs:
                made.append(_made(job, is_new=job in new))
                new.discard(job)
        finally:
            for job in waits.values():
                self._leave(job, caller)
            self._send()
        if late:
            counts.compile_timeouts += late
            logger.warning("sglang_pic: %d segments not compiled in time: not waited for", late)
        return made

    @property
    def tokens_waiting(self) -> int:
        """Of what SGLang has not been given yet."""
        return sum(len(job.item.ids) for job in self._jobs.values() if not job.sent)

    def is_under_way(self, item: CompileItem) -> bool:
        """Whether somebody waits for it already."""
        return item in self._jobs

    def _join(
        self, items: Sequence[CompileItem], caller: Caller
    ) -> tuple[list[Job | None], set[Job | None]]:
        """Wait for all items.

        Returns:
            The job of each, ``None`` where the queue is full; and those that nobody
            waited for before.
        """
        urgency = self._urgency(caller.priority)
        jobs: dict[CompileItem, Job | None] = {}
        absent = []
        for item in items:
            if item in jobs:
                continue
            job = jobs[item] = self._jobs.get(item)
            if job is not None:
                job.callers.append(caller)
                self._weigh(job)
            else:
                result = asyncio.get_running_loop().create_future()
                absent.append(Job(item, caller.tenant, result, [caller], urgency))
        new = self._queue.add(absent, caller.tenant, urgency) if absent else []
        for job in new:
            jobs[job.item] = self._jobs[job.item] = job
        counts.compiling += len(new)
        refused = len(absent) - len(new)
        if refused:
            counts.compiles_refused += refused
            logger.warning("sglang_pic: %d segments not compiled: the queue is full", refused)
        return [jobs[item] for item in items], set(new)

    def _leave(self, job: Job, caller: Caller) -> None:
        job.callers.remove(caller)
        if job.sent:
            return
        if job.callers:
            self._weigh(job)
            return
        self._queue.remove(job, job.tenant)
        self._end(job)

    def _weigh(self, job: Job) -> None:
        """What is not sent is as urgent as the most urgent that waits for it."""
        if not job.sent:
            job.urgency = min(self._urgency(caller.priority) for caller in job.callers)
            self._queue.move(job, job.tenant, job.urgency)

    def _end(self, job: Job) -> None:
        counts.compiling -= 1
        del self._jobs[job.item]
        job.result.cancel()

    async def _wait(
        self,
        waits: dict[asyncio.Future[Got], Job],
        caller: Caller,
        timeout_s: float | None,
        limit_s: float | None,
    ) -> None:
        if not waits:
            return
        start = time.monotonic()
        _, pending = await asyncio.wait(waits, timeout=timeout_s)
        while pending and self._is_worth_waiting([waits[wait] for wait in pending], caller):
            left = None if limit_s is None else limit_s - (time.monotonic() - start)
            if left is not None and left <= 0:
                return
            step = min(s for s in (left, timeout_s, 60.0) if s is not None)
            _, pending = await asyncio.wait(
                pending, timeout=step, return_when=asyncio.FIRST_COMPLETED
            )

    def _is_worth_waiting(self, pending: Sequence[Job], caller: Caller) -> bool:
        """Whether to wait for these rather than have their tokens computed anew.

        SGLang would compute them behind what has been sent already, so nothing is gained
        by not waiting for that, unless it was sent for someone less urgent. What has not
        been sent is waited for while no more tokens of others wait here than would be
        computed anew.
        """
        if any(job.sent and job.urgency > self._urgency(caller.priority) for job in pending):
            return False
        if all(job.sent for job in pending):
            return True
        anew = sum(len(job.item.ids) for job in pending)
        others = self.tokens_waiting - sum(len(job.item.ids) for job in pending if not job.sent)
        return others <= anew

    def _send(self) -> None:
        while (job := self._queue.take()) is not None:
            job.sent = True
            # A task of its own: a client that leaves must not take what others wait
            # for with it. It may begin when all have left.
            callers = tuple(job.callers)
            task = asyncio.get_running_loop().create_task(self._run(job, callers))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _run(self, job: Job, callers: Sequence[Caller]) -> None:
        item = job.item
        try:
            no_logs = any(caller.no_logs for caller in callers)
            source = await self._fetching.fetch(item, no_logs=no_logs)
            if source.kind == COMPUTED:
                got = await self._computed(job, callers, source, no_logs=no_logs)
            else:
                got = Got(0, source)
        except Exception as error:
            logger.warning("sglang_pic: compiling a segment failed: %s", error)
            counts.compile_failures += 1
            job.result.set_exception(error)
            # Consumed here: a client that left will not ask for it.
            job.result.exception()
        else:
            job.result.set_result(got)
            if item.segment and not item.company:
                counts.observe_source(*dataclasses.astuple(got.source))
        finally:
            self._end(job)
            self._queue.done(job.tenant)
            self._send()

    async def _computed(
        self, job: Job, callers: Sequence[Caller], why: Source, *, no_logs: bool
    ) -> Got:
        """Have SGLang compute it, since it came from nowhere else."""
        item = job.item
        start = time.perf_counter()
        first = min(callers, key=lambda caller: self._urgency(caller.priority))
        sent = compile_request(item, dataclasses.replace(first, no_logs=no_logs))
        output = await anext(self._generate(sent))
        meta = output["meta_info"]
        reason = meta.get("finish_reason")
        if isinstance(reason, dict) and reason.get("type") == "abort":
            raise RuntimeError(str(reason.get("message") or "aborted"))
        tokens = meta["prompt_tokens"] - meta["cached_tokens"]
        end = time.perf_counter()
        if tokens > self._page_size:
            self._fetching.computed(tokens, end - start)
        # What ran beside each other took its time once.
        seconds, self._timed = end - max(start, self._timed), end
        counts.observe_compile([tokens], [item.segment], seconds, self._page_size)
        return Got(tokens, dataclasses.replace(why, seconds=why.seconds + end - start))


def _made(job: Job | None, *, is_new: bool) -> Made:
    if job is None:
        return Made(QUEUE_FULL)
    if not job.result.done():
        return Made(LATE)
    if job.result.cancelled():
        return Made(FAILED, error=asyncio.CancelledError())
    error = job.result.exception()
    if error is not None:
        return Made(FAILED, error=error)
    tokens, source = job.result.result()
    if not is_new:
        return Made(SHARED, source=source)
    return Made(COMPILED if source.kind == COMPUTED else FETCHED, tokens, source=source)
