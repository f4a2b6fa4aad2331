"""ASGI middleware: ``pic`` fields in, the exactness report out.

A request's JSON body is searched for fields of ours; one without is passed on as
it came. The others' are validated, taken out of the body (SGLang's own models never
see them) and kept in the request's ``Exchange``. What it is answered passes an
``AnswerSender`` on its way out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang_pic.config import PicConfig
from sglang_pic.errors import PicRequestError
from sglang_pic.server.exchange import carry
from sglang_pic.server.reading import take
from sglang_pic.server.sending import AnswerSender, refuse

# Our own routes read their bodies themselves.
_OWN = "/pic/"


class PicMiddleware:
    """Pure ASGI: runs in the endpoint's own context. Behind all other middleware, so
    that a body is read once its sender is known and after it was decompressed."""

    def __init__(self, app: Any):
        self._app = app
        self._defaults = PicConfig.from_env().link_defaults

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        path = _path(scope)
        if scope["type"] != "http" or path.startswith(_OWN) or not _has_json(scope):
            await self._app(scope, receive, send)
            return
        raw, complete = await _read(receive)
        if not complete:  # its client has left: SGLang reads the same and then that
            await self._app(scope, _replay(raw, receive, more=True), send)
            return
        try:
            body, exchange = take(path, raw, self._defaults, scope.get("app"))
        except PicRequestError as error:
            await refuse(send, path, error)
            return
        if body is not raw:
            scope = _with_length(scope, body)
        with carry(exchange, scope) as carrying:
            await self._app(carrying, _replay(body, receive), AnswerSender(send, path, exchange))


def _path(scope: Any) -> str:
    return scope.get("path", "").removeprefix(scope.get("root_path", ""))


def _has_json(scope: Any) -> bool:
    """Whether a request has a body that SGLang would read as JSON."""
    headers = {name.lower(): value for name, value in scope["headers"]}
    if b"transfer-encoding" not in headers and headers.get(b"content-length", b"0") == b"0":
        return False
    kind = headers.get(b"content-type", b"application/json").split(b";")[0].strip().lower()
    return kind.startswith(b"application/") and kind.endswith(b"json")


async def _read(receive: Callable[..., Any]) -> tuple[bytes, bool]:
    """The body, and whether it is all of it."""
    chunks: list[bytes] = []
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return b"".join(chunks), False
        chunks.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(chunks), True


def _replay(raw: bytes, receive: Callable[..., Any], *, more: bool = False) -> Callable[..., Any]:
    sent = False

    async def replay() -> Any:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": raw, "more_body": more}

    return replay


def _with_length(scope: Any, raw: bytes) -> Any:
    dropped = (b"content-length", b"transfer-encoding")
    headers = [(k, v) for k, v in scope["headers"] if k.lower() not in dropped]
    return {**scope, "headers": [*headers, (b"content-length", str(len(raw)).encode())]}
