"""What a client gets: the answer with its report, or what is wrong with the request.

``/generate`` has its report in ``meta_info.pic`` (``server.answers``); the other
routes get it here. No event of a stream waits for another: which one is to carry
the report is seen from itself.

==================  =====================  =======================================
route               whole answer           stream
==================  =====================  =======================================
completions, chat   ``usage.pic``          ``usage.pic`` of the usage chunk; without
                                           one ``pic`` of each choice's last chunk
``/v1/messages``    ``usage.pic``          ``message.usage.pic`` of ``message_start``
``/v1/responses``   ``usage.pic``          ``response.usage.pic`` of the last event
==================  =====================  =======================================
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import orjson

from sglang_pic.errors import PicRequestError
from sglang_pic.server.exchange import Exchange
from sglang_pic.server.reading import CHATS, COMPLETIONS
from sglang_pic.server.reports import last_reports
from sglang_pic.server.shapes import MESSAGES, RESPONSES


def refusal(path: str, error: PicRequestError) -> bytes:
    """The body of the HTTP 400 that says what is wrong with a request."""
    if path in MESSAGES:
        named = {
            "type": "invalid_request_error",
            "message": str(error),
            "param": error.field,
        }
        return orjson.dumps({"type": "error", "error": named})
    content = {
        "object": "error",
        "message": str(error),
        "type": "BadRequestError",
        "param": error.field,
        "code": 400,
    }
    return orjson.dumps({**content, "error": content})


async def refuse(send: Any, path: str, error: PicRequestError) -> None:
    """Answer with HTTP 400."""
    start = {
        "type": "http.response.start",
        "status": 400,
        "headers": [(b"content-type", b"application/json")],
    }
    await _send_body(send, start, refusal(path, error))


async def _send_body(send: Any, start: Any, body: bytes) -> None:
    headers = [(k, v) for k, v in start["headers"] if k.lower() != b"content-length"]
    headers.append((b"content-length", str(len(body)).encode()))
    await send({**start, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class AnswerSender:
    """Adds report or refusal to one answer on its way out.

    What needs neither passes as it is: ordinary requests' answers, and all that
    SGLang refuses itself.
    """

    def __init__(self, send: Any, path: str, exchange: Exchange):
        self._send = send
        self._path = path
        self._exchange = exchange
        self._reporter = _REPORTERS[path](exchange) if path in _REPORTERS else None
        self._start: Any = None  # of an answer that leaves when it is complete
        self._stream = False
        self._body = b""  # of it, or of an event that is not complete

    async def __call__(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            headers = {k.lower(): v for k, v in message["headers"]}
            plain = b"content-encoding" not in headers
            kind = headers.get(b"content-type", b"")
            self._stream = plain and kind.startswith(b"text/event-stream")
            if plain and not self._stream and self._alters(message["status"]):
                self._start = message
            else:
                await self._send(message)
        elif message["type"] != "http.response.body":
            await self._send(message)
        elif self._start is not None:
            self._body += message.get("body", b"")
            if not message.get("more_body", False):
                await _send_body(self._send, self._start, self._whole())
        elif self._stream and (self._reports or self._exchange.refused is not None):
            await self._send_events(message)
        else:
            await self._send(message)

    @property
    def _reports(self) -> bool:
        return self._reporter is not None and self._exchange.pic is not None

    def _alters(self, status: int) -> bool:
        if self._exchange.refused is not None:
            return status == 400
        return status == 200 and self._reports and bool(self._exchange.reports)

    def _whole(self) -> bytes:
        if self._exchange.refused is not None:
            return refusal(self._path, self._exchange.refused)
        content = orjson.loads(self._body)
        assert self._reporter is not None
        self._reporter.complete(content)
        return orjson.dumps(content)

    async def _send_events(self, message: Any) -> None:
        more = message.get("more_body", False)
        *events, self._body = (self._body + message.get("body", b"")).split(b"\n\n")
        out = b"".join(self._event(event) + b"\n\n" for event in events)
        if not more:
            out, self._body = out + self._body, b""
        if out or not more:
            await self._send({"type": "http.response.body", "body": out, "more_body": more})

    def _event(self, event: bytes) -> bytes:
        refused = self._exchange.refused
        reporter = self._reporter
        if refused is None and not (reporter and any(sign in event for sign in reporter.signs)):
            return event
        head, found, data = event.rpartition(b"data: ")
        if not found or not data.startswith(b"{"):
            return event
        content = orjson.loads(data)
        if refused is not None:
            _name(content, refused)
        else:
            assert reporter is not None
            reporter.chunk(content)
        return head + found + orjson.dumps(content)


def _name(content: dict[str, Any], refused: PicRequestError) -> None:
    """Say in an event that tells an error which field it is about."""
    for holder in (content, content.get("response")):
        error = holder.get("error") if isinstance(holder, dict) else None
        if isinstance(error, dict):
            error["param"] = refused.field


# -- where each API has its report ----------------------------------------------------


def _add(holder: Any, key: str, report: Any) -> None:
    if isinstance(holder, dict):
        holder[key] = {**(holder.get(key) or {}), "pic": report}


class _OpenAI:
    """``/v1/completions`` and ``/v1/chat/completions``.

    Attributes:
        signs: of events that may carry a report.
    """

    # A choice's end; the chunk without choices that tells usage.
    signs = (b'"finish_reason":"', b'"choices":[]')

    def __init__(self, exchange: Exchange):
        self._exchange = exchange
        self._ended: set[int] = set()

    def complete(self, content: Any) -> None:
        if isinstance(content.get("choices"), list):
            _add(content, "usage", self._exchange.report(len(content["choices"])))

    def chunk(self, content: Any) -> None:
        choices = content.get("choices")
        if choices == [] and content.get("usage"):
            _add(content, "usage", self._exchange.report(len(self._ended)))
            return
        for choice in choices or []:
            index = choice.get("index")
            if choice.get("finish_reason") is None or index in self._ended:
                continue
            self._ended.add(index)
            if not self._exchange.usage_chunk and index in self._exchange.reports:
                content["pic"] = self._exchange.reports[index]


class _Anthropic:
    """``/v1/messages``, whose answers have an id that SGLang knows nowhere else."""

    signs = (b'"type":"message_start"',)

    def __init__(self, exchange: Exchange):
        self._exchange = exchange

    def complete(self, content: Any) -> None:
        report = self._exchange.report(1)
        if content.get("type") == "message" and report is not None:
            _add(content, "usage", report)
            last_reports.keep(self._exchange.salt_of(0), content["id"], report)

    def chunk(self, content: Any) -> None:
        if content.get("type") == "message_start":
            self.complete(content["message"])


class _Responses:
    """``/v1/responses``."""

    signs = tuple(b'"type":"response.%s"' % end for end in (b"completed", b"incomplete"))

    def __init__(self, exchange: Exchange):
        self._exchange = exchange

    def complete(self, content: Any) -> None:
        if content.get("usage") is not None:
            _add(content, "usage", self._exchange.report(1))

    def chunk(self, content: Any) -> None:
        if isinstance(content.get("response"), dict):
            self.complete(content["response"])


_REPORTERS: dict[str, Callable[[Exchange], Any]] = {
    COMPLETIONS: _OpenAI,
    RESPONSES: _Responses,
    **dict.fromkeys(CHATS, _OpenAI),
    **dict.fromkeys(MESSAGES, _Anthropic),
}
