"""What one HTTP request carries past SGLang's own request models.

SGLang's OpenAI endpoints have no field for a plug-in. The middleware and the
code around ``TokenizerManager.generate_request`` run in one asyncio context,
so a context variable connects them. Chat templates are rendered in a worker
thread without that context; there the marks in the messages tell whose they are.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator
from typing import Any

from sglang_pic.request.base import TokenSpan
from sglang_pic.server.marks import ChatMarks, find_open


@dataclasses.dataclass
class Exchange:
    """One request on its way through the server.

    Attributes:
        pic: the raw ``pic`` object, or a list of them for a batch.
        marks: for chat, the marks that its text carries.
        ids, spans: for chat, the prompt as the template rendered it.
        report: the exactness report, once the first output is there.
    """

    pic: Any
    marks: ChatMarks | None = None
    ids: list[int] | None = None
    spans: tuple[TokenSpan, ...] = ()
    report: Any = None


_rendering: dict[str, Exchange] = {}


@contextlib.contextmanager
def carry(exchange: Exchange) -> Iterator[None]:
    """Make the exchange known to all code that serves the request."""
    token = current.set(exchange)
    marks = exchange.marks
    if marks is not None:
        _rendering[marks.open] = exchange
    try:
        yield
    finally:
        current.reset(token)
        if marks is not None:
            del _rendering[marks.open]


def of_messages(messages: Any) -> Exchange | None:
    """The exchange whose marks these chat messages carry."""
    found = find_open(messages) if _rendering else None
    return _rendering.get(found) if found is not None else None


current: contextvars.ContextVar[Exchange | None] = contextvars.ContextVar(
    "sglang_pic_exchange", default=None
)
