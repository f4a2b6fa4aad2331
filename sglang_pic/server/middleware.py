"""ASGI middleware: ``pic`` fields in, the exactness report out.

Requests without a ``pic`` field are passed on unread. For the others the
fields are validated, taken out of the body (SGLang's own models never see
them) and kept in the request's ``Exchange``. ``/generate`` answers with the
report in ``meta_info.pic``; the OpenAI endpoints in ``usage.pic``, or, in a
stream whose client did not ask for usage, in ``pic`` of the last chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import orjson

from sglang_pic.config import PicConfig
from sglang_pic.errors import PicRequestError
from sglang_pic.request.fields import check_inside, parse_fields
from sglang_pic.server.exchange import Exchange, carry
from sglang_pic.server.marks import mark_messages

PROMPT_FIELD = {"/generate": "text", "/v1/completions": "prompt"}
CHAT = "/v1/chat/completions"
_DONE = b"[DONE]"


def read_request(path: str, body: dict[str, Any], defaults: Any) -> Exchange | None:
    """Take the ``pic`` fields out of a decoded body, in place.

    Raises:
        PicRequestError: naming the field at fault.
    """
    if path == CHAT:
        pic = body.pop("pic", None)
        if pic is not None and not isinstance(pic, dict):
            raise PicRequestError("pic", f"must be an object, got {pic!r:.80}")
        pic = dict(pic or {})
        if "parts" in pic:
            raise PicRequestError("pic.parts", "not in a chat request: mark its content parts")
        marks = mark_messages(body.get("messages"), pic.pop("segments", []))
        parse_fields(pic, defaults)
        if marks is None:
            return None  # an ordinary request
        if body.get("input_ids") is not None:
            raise PicRequestError("input_ids", "stands for the messages: they cannot be marked")
        return Exchange(pic, marks)
    if "pic" not in body:
        return None
    pic = body.pop("pic")
    field = PROMPT_FIELD[path]
    if isinstance(pic, list):
        for item in pic:
            if item is not None:
                parse_fields(item, defaults)
            if isinstance(item, dict) and "parts" in item:
                raise PicRequestError("pic.parts", "not in a batch: use 'segments'")
        return Exchange(pic)
    fields = parse_fields(pic, defaults)
    prompt = body.get(field) if body.get(field) is not None else body.get("input_ids")
    if fields.text is not None:
        if prompt:
            raise PicRequestError("pic.parts", f"replaces {field!r}; leave that out or empty")
        body[field] = fields.text
        pic = {key: value for key, value in pic.items() if key != "parts"}
        pic["segments"] = [{"start": span.start, "end": span.end} for span in fields.ranges]
    elif isinstance(prompt, str):
        check_inside(fields.ranges, len(prompt), "characters")
    elif isinstance(prompt, list) and prompt and isinstance(prompt[0], int):
        check_inside(fields.ranges, len(prompt), "tokens")
    return Exchange(pic)


def take(path: str, raw: bytes, defaults: Any) -> tuple[bytes, Exchange | None]:
    """A request's body without its ``pic`` fields, and these.

    Raises:
        PicRequestError: naming the field at fault.
    """
    if b'"pic' not in raw:
        return raw, None
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError:
        return raw, None  # SGLang's answer to invalid JSON is the right one
    if not isinstance(body, dict):
        return raw, None
    exchange = read_request(path, body, defaults)
    return orjson.dumps(body), exchange


class PicMiddleware:
    """Pure ASGI: runs in the endpoint's own context, streams untouched."""

    def __init__(self, app: Any):
        self._app = app
        self._defaults = PicConfig.from_env().link_defaults

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        path = scope.get("path")
        if scope["type"] != "http" or not (path == CHAT or path in PROMPT_FIELD):
            await self._app(scope, receive, send)
            return
        try:
            raw, exchange = take(path, await _read(receive), self._defaults)
        except PicRequestError as error:
            await _refuse(send, error)
            return
        replay = _replay(raw, receive)
        if exchange is None:
            await self._app(_with_length(scope, raw), replay, send)
            return
        with carry(exchange, _with_length(scope, raw)) as scope:
            out = send if path == "/generate" else _ReportSender(send, exchange)
            await self._app(scope, replay, out)


async def _read(receive: Callable[..., Any]) -> bytes:
    chunks: list[bytes] = []
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return b"".join(chunks)
        chunks.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(chunks)


def _replay(raw: bytes, receive: Callable[..., Any]) -> Callable[..., Any]:
    sent = False

    async def replay() -> Any:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": raw, "more_body": False}

    return replay


def _with_length(scope: Any, raw: bytes) -> Any:
    headers = [(k, v) for k, v in scope["headers"] if k.lower() != b"content-length"]
    return {**scope, "headers": [*headers, (b"content-length", str(len(raw)).encode())]}


async def _refuse(send: Any, error: PicRequestError) -> None:
    content = {
        "object": "error",
        "message": str(error),
        "type": "BadRequestError",
        "param": error.field,
        "code": 400,
    }
    body = orjson.dumps({**content, "error": content})
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
    ]
    await send({"type": "http.response.start", "status": 400, "headers": headers})
    await send({"type": "http.response.body", "body": body})


# What the event that is to carry the report looks like: an answer's end, or usage.
_MAY_BE_LAST = (b'"finish_reason":"', b'"usage":{')


class _ReportSender:
    """Adds the report to an OpenAI response on its way out.

    Of a stream, only an event that may be the last one is held back until the
    next one tells; every token leaves as soon as it comes.
    """

    def __init__(self, send: Any, exchange: Exchange):
        self._send = send
        self._exchange = exchange
        self._start: Any = None
        self._stream = False
        self._body = b""  # of JSON, or of a stream's event that is not complete
        self._held = b""

    async def __call__(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            headers = dict(message["headers"])
            self._stream = headers.get(b"content-type", b"").startswith(b"text/event-stream")
            self._start = message
            if self._stream:
                await self._send(message)
            return
        if message["type"] != "http.response.body":
            await self._send(message)
            return
        self._body += message.get("body", b"")
        more = message.get("more_body", False)
        if self._stream:
            out = self._events()
            if not more:
                out, self._held, self._body = out + self._held + self._body, b"", b""
            if out or not more:
                await self._send({"type": "http.response.body", "body": out, "more_body": more})
        elif not more:
            await self._send_json()

    async def _send_json(self) -> None:
        body = self._body
        if self._start["status"] == 200 and self._exchange.report is not None:
            content = orjson.loads(body)
            content.setdefault("usage", {})["pic"] = self._exchange.report
            body = orjson.dumps(content)
        headers = [(k, v) for k, v in self._start["headers"] if k != b"content-length"]
        headers.append((b"content-length", str(len(body)).encode()))
        await self._send({**self._start, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})

    def _events(self) -> bytes:
        """The complete events that may leave now."""
        *events, self._body = self._body.split(b"\n\n")
        out = b""
        for event in events:
            if event.endswith(_DONE):
                self._held = self._with_report(self._held)
            out, self._held = out + self._held, b""
            if any(mark in event for mark in _MAY_BE_LAST):
                self._held = event + b"\n\n"
            else:
                out += event + b"\n\n"
        return out

    def _with_report(self, event: bytes) -> bytes:
        data = event.removeprefix(b"data: ")
        if not data.startswith(b"{") or self._exchange.report is None:
            return event
        content = orjson.loads(data)
        holder = content.get("usage") or content
        holder["pic"] = self._exchange.report
        return b"data: " + orjson.dumps(content) + b"\n\n"
