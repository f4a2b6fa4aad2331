"""The life of a prompt whose documents a trained encoder reads.

They are not in its row: they are encoded first, a few at a time, and the row's tokens see
what is kept of them. Nothing could take their place, so a prompt whose documents find no
room is refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from fastapi import HTTPException
from sglang.srt.managers.io_struct import GenerateReqInput

from sglang_pic.config import PicConfig
from sglang_pic.encoder.config import EncoderConfig
from sglang_pic.encoder.limits import ENCODE_TOKENS, fits
from sglang_pic.errors import PicRefused, PicRequestError
from sglang_pic.forest.keys import document_id
from sglang_pic.link.policy import ENCODE, LinkOptions
from sglang_pic.link.report import EMPTY, ENCODED, LinkReport, SegmentReport
from sglang_pic.metrics.front import counts
from sglang_pic.request.internal import EncodedRequest
from sglang_pic.server.answers import handed_back, samples_of
from sglang_pic.server.asking import Generate
from sglang_pic.server.compiler import COMPILED, FAILED, SHARED, Made
from sglang_pic.server.life import Prompt
from sglang_pic.server.queue import FairQueue
from sglang_pic.server.send import set_encoded
from sglang_pic.server.waited import Waited
from sglang_pic.server.waiting import EndedError, Waiting, ended
from sglang_pic.server.wanted import caller_of

NO_ENCODER = "this server has no encoder: --pic-encoder"
# Between two tries of a prompt whose documents find no room.
PAUSE_S = 0.2

Send = Callable[..., Coroutine[Any, Any, list[Any]]]


class Cut(NamedTuple):
    """A prompt without its documents.

    Attributes:
        row: its other tokens.
        documents: of each segment that is not empty its index, and its tokens.
    """

    row: list[int]
    documents: list[tuple[int, tuple[int, ...]]]


def cut(prompt: Prompt) -> Cut:
    """Take the documents out of a prompt."""
    ids, link = prompt
    row, documents, at = [], [], 0
    for i, span in enumerate(link.spans):
        row += ids[at : span.start]
        at = span.end
        if span.start < span.end:
            documents.append((i, tuple(ids[span.start : span.end])))
    return Cut([*row, *ids[at:]], documents)


@dataclasses.dataclass(eq=False)
class Job:
    """A document that is queued or under way."""

    name: str
    tenant: str | None
    ids: tuple[int, ...]
    urgency: int
    result: asyncio.Future[bool]


class Encoder:
    """Has documents encoded, each once however many prompts wait, and in batches one
    behind the other: a step of the scheduler runs one at most.

    Args:
        send: ``server.commands.command``, bound.
        queue: in which order, and how many may wait.
        max_tokens: of the longest document.
        longest: tokens of the longest prompt that SGLang takes.
    """

    def __init__(
        self, send: Send, queue: FairQueue[Job], max_tokens: int, longest: Callable[[], int]
    ):
        self._send = send
        self._queue = queue
        self._max_tokens = max_tokens
        self._longest = longest
        self._jobs: dict[str, Job] = {}
        self._ahead: Job | None = None
        self._running: asyncio.Task[None] | None = None

    @property
    def max_tokens(self) -> int:
        """Tokens of the longest document that can be encoded."""
        return min(self._max_tokens, ENCODE_TOKENS, self._longest())

    async def encode(
        self, documents: Sequence[tuple[int, ...]], tenant: str | None, urgency: int
    ) -> list[Made]:
        """Encode these; those that find no room have ``failed``."""
        jobs, new = self._join(documents, tenant, urgency)
        if self._running is None:
            self._running = asyncio.get_running_loop().create_task(self._run())
        waits = {job.result for job in jobs if job is not None}
        if waits:
            await asyncio.wait(waits)
        made = []
        for job in jobs:
            if job is None or job.result.cancelled() or job.result.exception() is not None:
                error = None if job is None else job.result.exception()
                made.append(Made(FAILED, error=error or RuntimeError("too many wait")))
            elif not job.result.result():
                made.append(Made(FAILED, error=RuntimeError("no room")))
            elif job in new:
                new.discard(job)
                made.append(Made(COMPILED, len(job.ids)))
            else:
                made.append(Made(SHARED))
        return made

    def _join(
        self, documents: Sequence[tuple[int, ...]], tenant: str | None, urgency: int
    ) -> tuple[list[Job | None], set[Job]]:
        names = [document_id(tenant, ids) for ids in documents]
        fresh: dict[str, Job] = {}
        loop = asyncio.get_running_loop()
        for name, ids in zip(names, documents, strict=True):
            if name not in self._jobs and name not in fresh:
                fresh[name] = Job(name, tenant, ids, urgency, loop.create_future())
        added = self._queue.add(fresh.values(), tenant, urgency) if fresh else []
        self._jobs |= {job.name: job for job in added}
        return [self._jobs.get(name) for name in names], set(added)

    async def _run(self) -> None:
        while batch := self._batch():
            ids = [token for job in batch for token in job.ids]
            try:
                (told,) = await self._send(
                    "encode",
                    ids=ids,
                    lengths=[len(job.ids) for job in batch],
                    tenants=[job.tenant for job in batch],
                )
            except Exception as error:
                for job in batch:
                    job.result.set_exception(error)
                    # Consumed here: a client that left will not ask for it.
                    job.result.exception()
            else:
                counts.observe_encode([len(job.ids) for job in batch])
                for job, held in zip(batch, told["held"], strict=True):
                    job.result.set_result(held)
            for job in batch:
                del self._jobs[job.name]
                self._queue.done(job.tenant)
        self._running = None

    def _batch(self) -> list[Job]:
        """What is encoded next, in one go."""
        batch: list[Job] = []
        while (job := self._ahead or self._queue.take()) is not None:
            lengths = [len(one.ids) for one in (*batch, job)]
            if batch and not (fits(lengths, self._max_tokens) and sum(lengths) <= self._longest()):
                self._ahead = job
                break
            self._ahead = None
            batch.append(job)
        return batch


class Documents(Protocol):
    """Prompts with encoded documents of one tokenizer manager."""

    def check(self, prompt: Prompt) -> None:
        """Raise ``PicRequestError`` for one that cannot be answered."""
        ...

    def live(
        self,
        generate: Generate,
        obj: GenerateReqInput,
        request: Any,
        prompt: Prompt,
        waited: list[Waited],
        index: int,
    ) -> AsyncGenerator[Any, None]:
        """As ``Lives.live``."""
        ...

    def to_json(self) -> dict[str, Any] | None:
        """For clients; ``None`` without an encoder."""
        ...


class NoDocuments:
    """Of a server without an encoder."""

    def check(self, prompt: Prompt) -> None:
        raise PicRequestError("pic.mode", NO_ENCODER)

    async def live(
        self,
        generate: Generate,
        obj: GenerateReqInput,
        request: Any,
        prompt: Prompt,
        waited: list[Waited],
        index: int,
    ) -> AsyncGenerator[Any, None]:
        self.check(prompt)
        yield None

    def to_json(self) -> None:
        return None


class WithEncoder:
    """Of a server with one.

    Args:
        manager: SGLang's.
        queue: of documents.
        send: as of ``Encoder``.
    """

    def __init__(
        self,
        manager: Any,
        config: PicConfig,
        waiting: Waiting,
        urgency: Callable[[int | None], int],
        queue: FairQueue[Job],
        send: Send,
    ):
        assert config.encoder is not None
        self._manager = manager
        self._limit_s = config.compile_limit_s
        self._budget = config.state_mib << 20
        self._waiting = waiting
        self._urgency = urgency
        self._config = EncoderConfig.load(Path(config.encoder))
        self._encoder = Encoder(
            send, queue, self._config.max_tokens, lambda: manager.max_req_input_len - 1
        )

    def check(self, prompt: Prompt) -> None:
        made = cut(prompt)
        if not made.row:
            raise PicRequestError("pic.segments", "a prompt needs text beside its documents")
        longest, vocabulary = self._encoder.max_tokens, self._manager.model_config.vocab_size
        for i, ids in made.documents:
            field = f"pic.segments[{i}]"
            if len(ids) > longest:
                problem = f"{len(ids)} tokens are too long for the encoder, at most {longest}"
                raise PicRequestError(field, problem)
            if not 0 <= min(ids) <= max(ids) < vocabulary:
                raise PicRequestError(field, f"token ids are from 0 to {vocabulary - 1}")
        each = self._config.bytes_per_token(self._manager.model_config.dtype.itemsize)
        need = each * sum(len(ids) for ids in {ids for _, ids in made.documents})
        if need > self._budget:
            raise PicRequestError(
                "pic.segments",
                f"encoded documents of {need} bytes, this server may hold {self._budget}: "
                "--pic-state-mib",
            )

    def to_json(self) -> dict[str, Any]:
        return {
            "max_tokens": self._encoder.max_tokens,
            "cross_layers": list(self._config.cross_layers),
        }

    async def live(
        self,
        generate: Generate,
        obj: GenerateReqInput,
        request: Any,
        prompt: Prompt,
        waited: list[Waited],
        index: int,
    ) -> AsyncGenerator[Any, None]:
        made = cut(prompt)
        names = tuple(document_id(obj.cache_salt or None, ids) for _, ids in made.documents)
        samples = samples_of(obj)
        with self._waiting.stay(obj) as stay:
            outputs: AsyncGenerator[Any, None] | None = None
            missing: Sequence[int] = range(len(names))
            start = time.monotonic()
            told: dict[int, Made] = {}
            if samples == 1:
                outputs, missing = await self._ask(generate, obj, request, made.row, names)
            try:
                while missing or outputs is None:
                    work = self._encode(obj, [made.documents[i][1] for i in missing])
                    done = await self._waiting.until(stay, obj, request, work)
                    told |= {
                        made.documents[i][0]: one for i, one in zip(missing, done, strict=True)
                    }
                    waited[index] = Waited(
                        tuple(told), tuple(told.values()), time.monotonic() - start
                    )
                    if all(one.outcome != FAILED for one in done):
                        if samples > 1:
                            set_encoded(obj, made.row, EncodedRequest(names, strict=False))
                            outputs, missing = generate(self._manager, obj, request), ()
                            continue
                        outputs, missing = await self._ask(generate, obj, request, made.row, names)
                    if missing:
                        _give_up(done, time.monotonic() - start, self._limit_s)
                        await self._waiting.until(stay, obj, request, asyncio.sleep(PAUSE_S))
            except Exception as error:
                if samples > 1:
                    # Its endpoint looks for what SGLang would have made of it.
                    obj.normalize_batch_and_arguments()
                if not isinstance(error, EndedError):
                    raise
                outputs = ended(error, samples, stream=obj.stream)
        async with contextlib.aclosing(outputs):
            async for out in outputs:
                for item in out if isinstance(out, list) else [out]:
                    meta = item.get("meta_info", {})
                    meta["pic"] = [report(prompt, names, meta.get("cached_tokens", 0)).to_json()]
                yield out

    async def _encode(self, obj: GenerateReqInput, documents: Sequence[tuple[int, ...]]) -> Any:
        caller = caller_of(obj)
        return await self._encoder.encode(documents, caller.tenant, self._urgency(caller.priority))

    async def _ask(
        self,
        generate: Generate,
        obj: GenerateReqInput,
        request: Any,
        row: list[int],
        names: tuple[str, ...],
    ) -> tuple[AsyncGenerator[Any, None], Sequence[int]]:
        """Outputs of the prompt, or which of its documents are to be encoded first."""
        set_encoded(obj, row, EncodedRequest(names))
        return await handed_back(generate(self._manager, obj, request))


def _give_up(made: Sequence[Made], seconds: float, limit_s: float) -> None:
    """Raise what ends a prompt whose documents are not all held."""
    refused = next((one.error for one in made if isinstance(one.error, PicRefused)), None)
    if refused is not None:
        raise HTTPException(refused.status, f"{refused.field}: {refused.message}")
    if seconds > limit_s:
        raise HTTPException(
            HTTPStatus.SERVICE_UNAVAILABLE,
            "pic.segments: no room for all encoded documents at once, try again",
        )


@dataclasses.dataclass(frozen=True)
class EncodedReport(LinkReport):
    """``tokens_outside``: of the prompt, in documents: they are not in the row."""

    tokens_outside: int = 0


def report(prompt: Prompt, names: Sequence[str], cached: int) -> EncodedReport:
    """What an answer says of itself.

    Args:
        names: of the segments that are not empty.
        cached: tokens of the row that SGLang had.
    """
    ids, link = prompt
    left = iter(names)
    segments = tuple(
        SegmentReport(span.start, span.end, None, False, EMPTY, 0, 0)
        if span.start == span.end
        else SegmentReport(span.start, span.end, next(left), True, ENCODED, 0, 0)
        for span in link.spans
    )
    outside = sum(span.end - span.start for span in link.spans)
    options: LinkOptions = link.options
    return EncodedReport(
        exactness=ENCODED,
        reason=None,
        policy=options.policy,
        seam=options.seam,
        mode=ENCODE,
        tokens_reused=cached,
        tokens_computed=len(ids) - outside - cached,
        prefix_tokens=cached,
        turn_tokens=0,
        segments=segments,
        tokens_outside=outside,
    )
