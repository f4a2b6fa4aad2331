"""What one HTTP request carries past SGLang's own request models.

SGLang's OpenAI endpoints have no field for a plug-in. The middleware and the
code around ``TokenizerManager.generate_request`` run in one asyncio context,
so a context variable connects them.
"""

from __future__ import annotations

import contextvars
import dataclasses
from typing import Any

from sglang_pic.request.base import TokenSpan
from sglang_pic.server.marks import ChatMarks


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


current: contextvars.ContextVar[Exchange | None] = contextvars.ContextVar(
    "sglang_pic_exchange", default=None
)
