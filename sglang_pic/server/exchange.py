"""What one HTTP request carries past SGLang's own request models.

SGLang's OpenAI endpoints have no field for a plug-in. The middleware and the
code around ``TokenizerManager.generate_request`` run in one asyncio context,
so a context variable connects them. Chat prompts are made in a worker thread
without that context; SGLang hands it the HTTP request, whose scope has the
exchange too.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from sglang_pic.errors import PicRequestError
from sglang_pic.find.base import Cut
from sglang_pic.request.base import TokenSpan
from sglang_pic.server.marks import Marks

_SCOPE = "sglang_pic.exchange"


@dataclasses.dataclass
class Exchange:
    """One request on its way through the server.

    Attributes:
        pic: the raw ``pic`` object, or a list of them for a batch; ``None`` of an
            ordinary request.
        marks: for chat, its marked texts.
        twin: makes chat messages with signs around the first so many of the marks
            (``Marks.written``), for endpoints whose body is not ``messages`` as the
            chat endpoint has them.
        find: the ``pic`` object of a chat request that names no segment.
        ids, spans: for chat, the prompt, once it is made.
        cuts: for chat, where ``ids`` may be cut.
        usage_chunk: whether a stream of OpenAI's ends with a chunk that tells usage.
        salt: the tenant, or a list of them for a batch, once it is known.
        reports: the exactness report of each answer by its index, as they come.
        refused: what ended the request behind its endpoint.
    """

    pic: Any = None
    marks: Marks | None = None
    twin: Callable[[int], Sequence[Any]] | None = None
    find: dict[str, Any] | None = None
    ids: list[int] | None = None
    spans: tuple[TokenSpan, ...] = ()
    cuts: Sequence[Cut] = ()
    usage_chunk: bool = False
    salt: Any = None
    reports: dict[int, Any] = dataclasses.field(default_factory=dict)
    refused: PicRequestError | None = None

    def salt_of(self, prompt: int) -> str | None:
        """The tenant of one of its prompts."""
        return self.salt[prompt] if isinstance(self.salt, list) else self.salt

    def report(self, answers: int) -> Any:
        """The report of the one answer; of several a list by index, ``None`` for one
        whose prompt has no segments."""
        if answers == 1:
            return self.reports.get(0)
        return [self.reports.get(index) for index in range(answers)]


@contextlib.contextmanager
def carry(exchange: Exchange, scope: Any = None) -> Iterator[Any]:
    """Make the exchange known to all code that serves the request, whose ASGI scope
    is to be the one that this gives."""
    token = current.set(exchange)
    try:
        yield {**(scope or {}), _SCOPE: exchange}
    finally:
        current.reset(token)


@contextlib.contextmanager
def noting(exchange: Exchange | None) -> Iterator[None]:
    """Note a refusal: SGLang, which answers it, keeps its words and not its field."""
    try:
        yield
    except PicRequestError as error:
        if exchange is not None:
            exchange.refused = error
        raise


@contextlib.contextmanager
def entered(raw_request: Any) -> Iterator[None]:
    """Make it known in a thread that has nothing but SGLang's HTTP request."""
    scope = getattr(raw_request, "scope", {})
    token = current.set(scope.get(_SCOPE, current.get()))
    try:
        yield
    finally:
        current.reset(token)


current: contextvars.ContextVar[Exchange | None] = contextvars.ContextVar(
    "sglang_pic_exchange", default=None
)
