"""The life of a prompt whose documents a trained encoder reads.

They are not in its row: they are read from the store, or encoded, first, a few at a time,
and the row's tokens see what is kept of them. Nothing could take their place, so a prompt
whose documents find no room is refused.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from http import HTTPStatus
from typing import Any, NoReturn, Protocol

from sglang.srt.managers.io_struct import GenerateReqInput

from sglang_pic.errors import PicRefused
from sglang_pic.forest.keys import document_id
from sglang_pic.metrics.front import counts
from sglang_pic.request.hints import NO_LONGER
from sglang_pic.request.internal import EncodedRequest
from sglang_pic.server.answers import handed_back, samples_of
from sglang_pic.server.asking import Generate
from sglang_pic.server.compiler import COMPILED, FETCHED, Made
from sglang_pic.server.cut import Cut
from sglang_pic.server.encoding import Encoder
from sglang_pic.server.items import DocumentItem
from sglang_pic.server.send import set_encoded
from sglang_pic.server.sources import COMPUTED, Source
from sglang_pic.server.waited import Waited
from sglang_pic.server.waiting import Stay, Waiting
from sglang_pic.server.wanted import caller_of

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


async def sources_of(
    fetching: Fetches, documents: Sequence[tuple[int, ...]], tenant: str | None, *, named: bool
) -> dict[tuple[int, ...], Source]:
    """Where each of these comes from: it is held now, unless it is to be encoded."""
    distinct = list(dict.fromkeys(documents))
    fetches = (fetching.fetch(DocumentItem(ids, tenant, named)) for ids in distinct)
    sources = dict(zip(distinct, await asyncio.gather(*fetches), strict=True))
    for source in sources.values() if fetching.has_store else ():
        counts.observe_source(*dataclasses.astuple(source))
    return sources


@dataclasses.dataclass(frozen=True)
class Means:
    """What the lives of one server share.

    Attributes:
        manager: SGLang's.
        fetching: what the store has is not encoded.
        urgency: of a request's priority.
        limit_s: seconds that a prompt waits for its documents.
    """

    manager: Any
    encoder: Encoder
    fetching: Fetches
    waiting: Waiting
    urgency: Callable[[int | None], int]
    limit_s: float


class EncodedLife:
    """One prompt.

    Args:
        request: whose client may leave, or ``None``.
        made: the prompt, its documents taken out.
        stay: while it waits.
    """

    def __init__(
        self,
        means: Means,
        generate: Generate,
        obj: GenerateReqInput,
        request: Any,
        made: Cut,
        stay: Stay,
    ):
        self._means = means
        self._generate = generate
        self._obj = obj
        self._request = request
        self._made = made
        self._stay = stay
        tenant = obj.cache_salt or None
        self.names = tuple(document_id(tenant, ids) for _, ids in made.documents)
        self._lease = uuid.uuid4().hex
        self._one = samples_of(obj) == 1
        self._asked = EncodedRequest(self.names, self._lease, strict=self._one)
        # What became of each document so far, by the index of its segment; of those that the
        # store was asked for, once each, where they come from.
        self._told: dict[int, Made] = {}
        self._sources: dict[tuple[int, ...], Source] = {}

    async def outputs(self, told: Callable[[Waited], None]) -> AsyncGenerator[Any, None]:
        """The prompt's outputs, once all of its documents are there.

        Args:
            told: what it has waited for, whenever that is more.

        Raises:
            EndedError: it was aborted, or refused with 503.
            PicRefused: what its documents' command says.
        """
        start = time.monotonic()
        outputs: AsyncGenerator[Any, None] | None = None
        missing: Sequence[int] = range(len(self.names))
        if self._one:
            outputs, missing = await self._ask()
        while missing or outputs is None:
            kept = await self._brought(missing)
            seconds = time.monotonic() - start
            told(Waited(tuple(self._told), tuple(self._told.values()), seconds))
            if kept is None or seconds > self._means.limit_s:
                await self.end(NO_LONGER)
            if not kept:
                await self._until(asyncio.sleep(PAUSE_S))
            if self._one:
                # What was held may have gone, what was missing may have come.
                outputs, missing = await self._ask()
            elif kept:
                set_encoded(self._obj, self._made.row, self._asked)
                outputs, missing = self._generate(self._means.manager, self._obj, self._request), ()
        return outputs

    async def end(self, why: str) -> NoReturn:
        """Answer it with 503.

        Raises:
            EndedError: always.
        """
        await self._until(self._means.waiting.refuse(self._stay, why))
        raise AssertionError("a request goes on that has ended")

    async def _until(self, work: Coroutine[Any, Any, Any]) -> Any:
        return await self._means.waiting.until(self._stay, self._obj, self._request, work)

    async def _ask(self) -> tuple[AsyncGenerator[Any, None], Sequence[int]]:
        """Its outputs, or which of its documents are to be encoded first."""
        set_encoded(self._obj, self._made.row, self._asked)
        return await handed_back(self._generate(self._means.manager, self._obj, self._request))

    async def _brought(self, missing: Sequence[int]) -> bool | None:
        """As ``_bring``; what cannot be encoded now ends the request."""
        try:
            kept: bool | None = await self._until(self._bring(missing))
        except PicRefused as error:
            if error.status != HTTPStatus.SERVICE_UNAVAILABLE:
                raise
            await self.end(error.message)
        return kept

    async def _bring(self, missing: Sequence[int]) -> bool | None:
        """Have what is missing of its documents, and keep all of them until it comes.

        Args:
            missing: of its documents that are not empty.

        Returns:
            As ``Encoder.encode``.
        """
        caller, documents = caller_of(self._obj), self._made.documents
        new = [documents[i] for i in missing if documents[i][1] not in self._sources]
        found = await sources_of(
            self._means.fetching, [ids for _, ids in new], caller.tenant, named=False
        )
        self._sources |= found
        came = {ids for _, ids in new if found[ids].kind != COMPUTED}
        self._told |= {at: Made(FETCHED, source=found[ids]) for at, ids in new if ids in came}
        # Of several samples none comes back: for them all are kept.
        sent = [i for i in missing if not self._one or documents[i][1] not in came]
        held = [name for i, name in enumerate(self.names) if i not in {*sent}]
        urgency = self._means.urgency(caller.priority)
        kept = await self._means.encoder.encode(
            self._lease, caller.tenant, urgency, held, [documents[i][1] for i in sent]
        )
        for at, ids in (documents[i] for i in sent) if kept else ():
            if ids not in came:
                # It may have come, and gone again.
                source = dataclasses.replace(self._sources[ids], kind=COMPUTED)
                self._told[at] = Made(COMPILED, len(ids), source=source)
        return kept
