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

from sglang_pic.request.base import TokenSpan
from sglang_pic.server.marks import Marks

_SCOPE = "sglang_pic.exchange"


@dataclasses.dataclass
class Exchange:
    """One request on its way through the server.

    Attributes:
        pic: the raw ``pic`` object, or a list of them for a batch.
        marks: for chat, its marked texts.
        twin: makes chat messages with signs around the first so many of the marks
            (``Marks.written``), for endpoints whose body is not ``messages`` as the
            chat endpoint has them.
        ids, spans: for chat, the prompt, once it is made.
        report: the exactness report, once the first output is there.
    """

    pic: Any
    marks: Marks | None = None
    twin: Callable[[int], Sequence[Any]] | None = None
    ids: list[int] | None = None
    spans: tuple[TokenSpan, ...] = ()
    report: Any = None


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
