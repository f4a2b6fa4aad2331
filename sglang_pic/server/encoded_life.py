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
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any, NoReturn, Protocol

from sglang.srt.managers.io_struct import GenerateReqInput

from sglang_pic.config import PicConfig
from sglang_pic.encoder.config import EncoderConfig
from sglang_pic.errors import PicRefused, PicRequestError
from sglang_pic.forest.keys import document_id
from sglang_pic.link.encoded_report import make_encoded_report
from sglang_pic.metrics.front import counts
from sglang_pic.request.hints import NO_LONGER
from sglang_pic.request.internal import EncodedRequest
from sglang_pic.server.answers import handed_back, samples_of
from sglang_pic.server.asking import Generate
from sglang_pic.server.compiler import COMPILED, FETCHED, Caller, Made
from sglang_pic.server.cut import Cut, cut
from sglang_pic.server.encoded_canary import EncodedCanary
from sglang_pic.server.encoding import Encoder, Job, Send
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

FAILED_CANARY = "the encoder failed its canary"
# Between two tries of a prompt whose documents find no room.
PAUSE_S = 0.2


class Fetches(Protocol):
    """Gets documents from a store (``server.fetching``), if there is one."""

    has_store: bool

    async def fetch(self, item: DocumentItem) -> Source:
        """Where one comes from: it is held now, unless it is to be encoded."""
        ...

    def computed(self, tokens: int, seconds: float) -> None:
        """Documents of so many tokens were encoded in so long."""
        ...


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
            self._encoder.encode_uncounted,
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
        (ids, link), made = prompt, cut(prompt)
        names = tuple(document_id(obj.cache_salt or None, one) for _, one in made.documents)
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
                    cached = meta.get("cached_tokens", 0)
                    report = make_encoded_report(len(ids), link, names=names, cached=cached)
                    meta["pic"] = [report.to_json()]
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
