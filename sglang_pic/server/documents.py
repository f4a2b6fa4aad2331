"""The life of a prompt whose documents a trained encoder reads.

They are not in its row: they are read from the store, or encoded, first, a few at a time,
and the row's tokens see what is kept of them. Nothing could take their place, so a prompt
whose documents find no room is refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Protocol

from sglang.srt.managers.io_struct import GenerateReqInput

from sglang_pic.config import PicConfig
from sglang_pic.encoder.config import EncoderConfig
from sglang_pic.encoder.limits import ENCODE_TOKENS, fits
from sglang_pic.errors import PicRefused, PicRequestError
from sglang_pic.forest.keys import document_id
from sglang_pic.link.policy import ENCODE, LinkOptions
from sglang_pic.link.report import EMPTY, ENCODED, MISSING, LinkReport, SegmentReport
from sglang_pic.metrics.front import counts
from sglang_pic.request.hints import NO_LONGER
from sglang_pic.request.internal import EncodedRequest
from sglang_pic.server.answers import handed_back, samples_of
from sglang_pic.server.asking import Generate
from sglang_pic.server.compiler import COMPILED, FETCHED, Caller, Made
from sglang_pic.server.encoded_canary import EncodedCanary
from sglang_pic.server.guards import Guards
from sglang_pic.server.items import DocumentItem
from sglang_pic.server.life import Prompt
from sglang_pic.server.queue import FairQueue
from sglang_pic.server.send import set_encoded
from sglang_pic.server.sources import COMPUTED, Source
from sglang_pic.server.verdict import FAILED, Once
from sglang_pic.server.waited import Waited
from sglang_pic.server.waiting import EndedError, Stay, Waiting, ended
from sglang_pic.server.wanted import caller_of

logger = logging.getLogger(__name__)

NO_ENCODER = "this server has no encoder: --pic-encoder"
FAILED_CANARY = "the encoder failed its canary"
# Between two tries of a prompt whose documents find no room.
PAUSE_S = 0.2

Send = Callable[..., Coroutine[Any, Any, list[Any]]]


class Fetches(Protocol):
    """Gets documents from a store (``server.fetching``), if there is one."""

    has_store: bool

    async def fetch(self, item: DocumentItem) -> Source:
        """Where one comes from: it is held now, unless it is to be encoded."""
        ...

    def computed(self, tokens: int, seconds: float) -> None:
        """Documents of so many tokens were encoded in so long."""
        ...


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
    """Documents of one prompt that are queued or under way.

    Attributes:
        lease: under which they are kept for it.
        held: names of its others, which the scheduler holds.
        documents: those to be encoded, each once.
        named: they are asked for by name, and no prompt comes.
        sent: how many of them have been.
        result: whether all of the prompt's are kept.
    """

    lease: str
    tenant: str | None
    held: list[str]
    documents: list[tuple[int, ...]]
    result: asyncio.Future[bool]
    named: bool = False
    sent: int = 0

    def piece(self, documents: Sequence[tuple[int, ...]]) -> dict[str, Any]:
        """Some of them, as the command has them (``commands.Lease``)."""
        return {
            "id": self.lease,
            "tenant": self.tenant,
            "held": self.held,
            "lengths": [len(ids) for ids in documents],
            "named": self.named,
        }


Piece = tuple[Job, list[tuple[int, ...]]]


class Encoder:
    """Has documents encoded, in batches one behind the other: a step of the scheduler runs
    one at most.

    Args:
        send: ``server.commands.command``, bound.
        encoded: told tokens and seconds of a batch.
        queue: in which order, and how many prompts may wait.
        max_tokens: of the longest document.
        longest: tokens of the longest prompt that SGLang takes.
    """

    def __init__(
        self,
        send: Send,
        queue: FairQueue[Job],
        max_tokens: int,
        longest: Callable[[], int],
        encoded: Callable[[int, float], None] = lambda tokens, seconds: None,
    ):
        self._send = send
        self._encoded = encoded
        self._queue = queue
        self._max_tokens = max_tokens
        self._longest = longest
        # Begun, or the next to begin.
        self._ahead: Job | None = None
        self._running: asyncio.Task[None] | None = None

    @property
    def max_tokens(self) -> int:
        """Tokens of the longest document that can be encoded."""
        return min(self._max_tokens, ENCODE_TOKENS, self._longest())

    async def encode(
        self,
        lease: str,
        tenant: str | None,
        urgency: int,
        held: Sequence[str],
        documents: Sequence[tuple[int, ...]],
        *,
        named: bool = False,
    ) -> bool | None:
        """Encode some of a prompt's documents, and keep all of them until it comes.

        Args:
            lease: names the prompt.
            held: names of its other documents.
            named: no prompt comes, they are asked for by name: nothing is kept for it.

        Returns:
            Whether they are kept; if not, none is. ``None`` where too many prompts of the
            tenant wait.

        Raises:
            PicRefused: as the command does.
        """
        if not documents:
            return True
        result = asyncio.get_running_loop().create_future()
        job = Job(lease, tenant, list(held), list(dict.fromkeys(documents)), result, named)
        if not self._queue.add([job], tenant, urgency):
            return None
        if self._running is None:
            self._running = asyncio.get_running_loop().create_task(self._run())
        return await asyncio.shield(result)

    async def send(self, pieces: Sequence[Piece]) -> list[bool]:
        """Have these encoded now, in one go; which of their prompts' documents are kept.

        Raises:
            PicRefused: as the command does.
        """
        documents = [one for _, some in pieces for one in some]
        (told,) = await self._send(
            "encode",
            ids=[token for ids in documents for token in ids],
            leases=[job.piece(some) for job, some in pieces],
            now=time.monotonic(),
        )
        return told["kept"]

    async def _run(self) -> None:
        while pieces := self._batch():
            start = time.monotonic()
            try:
                told = await self.send(pieces)
            except Exception as error:
                for job, _ in pieces:
                    self._end(job)
                    job.result.set_exception(error)
                    # Consumed here: a client that left will not ask for it.
                    job.result.exception()
                continue
            lengths = [len(ids) for _, some in pieces for ids in some]
            counts.observe_encode(lengths)
            self._encoded(sum(lengths), time.monotonic() - start)
            for (job, some), kept in zip(pieces, told, strict=True):
                job.sent += len(some)
                if not kept or job.sent == len(job.documents):
                    self._end(job)
                    job.result.set_result(kept)
        self._running = None

    def _end(self, job: Job) -> None:
        if self._ahead is job:
            self._ahead = None
        self._queue.done(job.tenant)

    def _batch(self) -> list[Piece]:
        """What is encoded next, in one go; of its prompts the last may have more."""
        pieces: list[Piece] = []
        lengths: list[int] = []
        while (job := self._ahead or self._queue.take()) is not None:
            some = []
            for ids in job.documents[job.sent :]:
                more = [*lengths, len(ids)]
                if lengths and not (fits(more, self._max_tokens) and sum(more) <= self._longest()):
                    break
                lengths = more
                some.append(ids)
            if some:
                pieces.append((job, some))
            self._ahead = None
            if job.sent + len(some) < len(job.documents):
                self._ahead = job
                break
        return pieces


class Documents(Protocol):
    """Prompts with encoded documents of one tokenizer manager."""

    async def settle(self) -> None:
        """Wait until it is known whether the encoder may be served."""
        ...

    def check(self, prompt: Prompt) -> None:
        """Raise ``PicRequestError`` for one that cannot be answered."""
        ...

    def check_documents(self, documents: Mapping[str, Sequence[int]], field: str) -> None:
        """Raise ``PicRequestError`` for documents that cannot be held at once.

        Args:
            documents: token ids, not empty, by the fields that they came in.
            field: that all of them came in.
        """
        ...

    async def make(self, documents: Sequence[tuple[int, ...]], caller: Caller) -> list[int] | None:
        """Have documents ahead of prompts, as asked for by name, as far as there is room.

        Returns:
            Tokens that were encoded for each; ``None`` where too many of the tenant wait.

        Raises:
            PicRefused: 503, the encoder must not be served; else as the command does.
        """
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

    async def settle(self) -> None:
        pass

    def check(self, prompt: Prompt) -> None:
        raise PicRequestError("pic.mode", NO_ENCODER)

    def check_documents(self, documents: Mapping[str, Sequence[int]], field: str) -> None:
        raise PicRequestError("mode", NO_ENCODER)

    async def make(self, documents: Sequence[tuple[int, ...]], caller: Caller) -> list[int] | None:
        raise PicRequestError("mode", NO_ENCODER)

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
        fetching: what the store has is not encoded.
        guards: of the server.
    """

    def __init__(
        self,
        manager: Any,
        config: PicConfig,
        waiting: Waiting,
        urgency: Callable[[int | None], int],
        queue: FairQueue[Job],
        send: Send,
        fetching: Fetches,
        guards: Guards,
    ):
        assert config.encoder is not None
        self._fetching = fetching
        self._manager = manager
        self._limit_s = config.compile_limit_s
        self._budget = config.state_mib << 20
        self._waiting = waiting
        self._urgency = urgency
        self._config = EncoderConfig.load(Path(config.encoder))
        self._encoder = Encoder(
            send,
            queue,
            self._config.max_tokens,
            lambda: manager.max_req_input_len - 1,
            fetching.computed,
        )
        canary = EncodedCanary(
            self._encode_uncounted,
            guards.generate,
            guards.flush,
            lambda: manager.model_config.vocab_size,
            lambda: (self._encoder.max_tokens, manager.max_req_input_len),
        )
        self._canary = Once(
            "the canary of documents",
            canary.checks,
            config.canary_timeout_s,
            lambda why: logger.error(
                "sglang_pic: encoded documents are refused: %s: %s", FAILED_CANARY, why
            ),
        )

    async def _encode_uncounted(
        self, lease: str, tenant: str, documents: Sequence[tuple[int, ...]]
    ) -> bool:
        """Have documents of ours encoded, which are nobody's."""
        result = asyncio.get_running_loop().create_future()
        job = Job(lease, tenant, [], list(documents), result)
        (kept,) = await self._encoder.send([(job, job.documents)])
        return kept

    @property
    def _refusal(self) -> str | None:
        """Why no document is served, or ``None``."""
        verdict = self._canary.verdict
        return f"{FAILED_CANARY}: {verdict.why}" if verdict.result == FAILED else None

    async def settle(self) -> None:
        await self._canary.settle()

    def check(self, prompt: Prompt) -> None:
        made = cut(prompt)
        if not made.row:
            raise PicRequestError("pic.segments", "a prompt needs text beside its documents")
        self.check_documents(
            {f"pic.segments[{i}]": ids for i, ids in made.documents}, "pic.segments"
        )

    def check_documents(self, documents: Mapping[str, Sequence[int]], field: str) -> None:
        longest, vocabulary = self._encoder.max_tokens, self._manager.model_config.vocab_size
        for one, ids in documents.items():
            if len(ids) > longest:
                problem = f"{len(ids)} tokens are too long for the encoder, at most {longest}"
                raise PicRequestError(one, problem)
            if not 0 <= min(ids) <= max(ids) < vocabulary:
                raise PicRequestError(one, f"token ids are from 0 to {vocabulary - 1}")
        item, ranks = self._manager.model_config.dtype.itemsize, self._manager.server_args.tp_size
        each = self._config.bytes_per_token(item, ranks)
        need = each * sum(len(ids) for ids in {tuple(ids) for ids in documents.values()})
        if need > self._budget:
            raise PicRequestError(
                field,
                f"encoded documents of {need} bytes, this server may hold {self._budget}: "
                "--pic-state-mib",
            )

    async def make(self, documents: Sequence[tuple[int, ...]], caller: Caller) -> list[int] | None:
        if self._refusal is not None:
            raise PicRefused(HTTPStatus.SERVICE_UNAVAILABLE, self._refusal, "mode")
        tenant, urgency = caller.tenant, self._urgency(caller.priority)
        sources = await self._fetch(documents, tenant, named=True)
        absent = [ids for ids in documents if sources[ids].kind == COMPUTED]
        held = [document_id(tenant, ids) for ids in documents if sources[ids].kind != COMPUTED]
        lease = uuid.uuid4().hex
        kept = await self._encoder.encode(lease, tenant, urgency, held, absent, named=True)
        if kept is None:
            return None
        encoded = {ids: len(ids) for ids in absent}
        return [encoded.pop(ids, 0) for ids in documents]

    async def _fetch(
        self, documents: Sequence[tuple[int, ...]], tenant: str | None, *, named: bool
    ) -> dict[tuple[int, ...], Source]:
        """Where each of these comes from: it is held now, unless it is to be encoded."""
        distinct = list(dict.fromkeys(documents))
        fetches = (self._fetching.fetch(DocumentItem(ids, tenant, named)) for ids in distinct)
        sources = dict(zip(distinct, await asyncio.gather(*fetches), strict=True))
        for source in sources.values() if self._fetching.has_store else ():
            counts.observe_source(*dataclasses.astuple(source))
        return sources

    def to_json(self) -> dict[str, Any]:
        return {
            "max_tokens": self._encoder.max_tokens,
            "cross_layers": list(self._config.cross_layers),
            "canary": self._canary.verdict.to_json(),
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
        samples, lease = samples_of(obj), uuid.uuid4().hex
        asked = EncodedRequest(names, lease, strict=samples == 1)
        with self._waiting.stay(obj) as stay:
            outputs: AsyncGenerator[Any, None] | None = None
            missing: Sequence[int] = range(len(names))
            start = time.monotonic()
            told, sources = dict[int, Made](), dict[tuple[int, ...], Source]()
            try:
                if self._refusal is not None:
                    await self._end(stay, obj, request, self._refusal)
                if samples == 1:
                    outputs, missing = await self._ask(generate, obj, request, made.row, asked)
                while missing or outputs is None:
                    work = self._bring(obj, lease, made, names, missing, told, sources)
                    try:
                        kept = await self._waiting.until(stay, obj, request, work)
                    except PicRefused as error:
                        if error.status != HTTPStatus.SERVICE_UNAVAILABLE:
                            raise
                        await self._end(stay, obj, request, error.message)
                    seconds = time.monotonic() - start
                    waited[index] = Waited(tuple(told), tuple(told.values()), seconds)
                    if kept is None or seconds > self._limit_s:
                        await self._end(stay, obj, request, NO_LONGER)
                    elif not kept:
                        pause = asyncio.sleep(PAUSE_S)
                        await self._waiting.until(stay, obj, request, pause)
                        if samples == 1:
                            # What was held may have gone, what was missing may have come.
                            outputs, missing = await self._ask(
                                generate, obj, request, made.row, asked
                            )
                    elif samples > 1:
                        set_encoded(obj, made.row, asked)
                        outputs, missing = generate(self._manager, obj, request), ()
                    else:
                        outputs, missing = await self._ask(generate, obj, request, made.row, asked)
            except Exception as error:
                if samples > 1:
                    # Its endpoint looks for what SGLang would have made of it.
                    obj.normalize_batch_and_arguments()
                if isinstance(error, PicRefused):
                    raise PicRequestError(error.field, error.message) from error
                if not isinstance(error, EndedError):
                    raise
                outputs = ended(error, samples, stream=obj.stream)
                async for out in outputs:
                    yield out
                return
        async with contextlib.aclosing(outputs):
            async for out in outputs:
                for item in out if isinstance(out, list) else [out]:
                    meta = item.get("meta_info", {})
                    meta["pic"] = [report(prompt, names, meta.get("cached_tokens", 0)).to_json()]
                yield out

    async def _bring(
        self,
        obj: GenerateReqInput,
        lease: str,
        made: Cut,
        names: Sequence[str],
        missing: Sequence[int],
        told: dict[int, Made],
        sources: dict[tuple[int, ...], Source],
    ) -> bool | None:
        """Have what is missing of a prompt's documents, and keep all of them until it comes.

        Args:
            missing: of its documents that are not empty.
            told: what became of each so far, by the index of its segment; is added to.
            sources: of those that the store was asked for, once each; is added to.

        Returns:
            As ``Encoder.encode``.
        """
        caller = caller_of(obj)
        new = [made.documents[i] for i in missing if made.documents[i][1] not in sources]
        sources |= await self._fetch([ids for _, ids in new], caller.tenant, named=False)
        came = {ids for _, ids in new if sources[ids].kind != COMPUTED}
        told |= {at: Made(FETCHED, source=sources[ids]) for at, ids in new if ids in came}
        # Of several samples none comes back: for them all are kept.
        sent = [i for i in missing if samples_of(obj) > 1 or made.documents[i][1] not in came]
        held = [name for i, name in enumerate(names) if i not in {*sent}]
        documents = [made.documents[i][1] for i in sent]
        urgency = self._urgency(caller.priority)
        kept = await self._encoder.encode(lease, caller.tenant, urgency, held, documents)
        for at, ids in (made.documents[i] for i in sent) if kept else ():
            if ids not in came:
                # It may have come, and gone again.
                source = dataclasses.replace(sources[ids], kind=COMPUTED)
                told[at] = Made(COMPILED, len(ids), source=source)
        return kept

    async def _end(self, stay: Stay, obj: GenerateReqInput, request: Any, why: str) -> NoReturn:
        """Answer a request that waits with 503.

        Raises:
            EndedError: always.
        """
        await self._waiting.until(stay, obj, request, self._waiting.refuse(stay, why))
        raise AssertionError("a request goes on that has ended")

    async def _ask(
        self,
        generate: Generate,
        obj: GenerateReqInput,
        request: Any,
        row: list[int],
        asked: EncodedRequest,
    ) -> tuple[AsyncGenerator[Any, None], Sequence[int]]:
        """Outputs of the prompt, or which of its documents are to be encoded first."""
        set_encoded(obj, row, asked)
        return await handed_back(generate(self._manager, obj, request))


@dataclasses.dataclass(frozen=True)
class EncodedReport(LinkReport):
    """``tokens_outside``: of the prompt, in documents: they are not in the row."""

    tokens_outside: int = 0


def report(
    prompt: Prompt, names: Sequence[str], cached: int, held: Sequence[bool] | None = None
) -> EncodedReport:
    """What an answer says of itself.

    Args:
        names: of the segments that are not empty.
        cached: tokens of the row that SGLang had.
        held: which of those segments are held, foretold; all, of an answer.
    """
    ids, link = prompt
    left = zip(names, [True] * len(names) if held is None else held, strict=True)
    segments = []
    for span in link.spans:
        name, is_held = next(left) if span.start < span.end else (None, False)
        reason = EMPTY if name is None else ENCODED if is_held else MISSING
        segments.append(SegmentReport(span.start, span.end, name, is_held, reason, 0, 0))
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
        segments=tuple(segments),
        tokens_outside=outside,
    )
