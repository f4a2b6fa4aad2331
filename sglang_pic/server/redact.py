"""No secret is in an answer about the server, whoever asks.

SGLang shows its flags in several of them, keys and passwords among them. What is a secret
is told by its name, wherever it stands, and once known by its value, wherever that stands
(a command line, JSON within a text).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

import orjson

from sglang_pic.server.access import carries_prompt
from sglang_pic.server.tenants import current

HIDDEN = "<redacted>"
_NAME = re.compile(
    r"(^|[_-])(key|token|secret|password|passwd|passphrase|credential)s?(_[a-z])?$"
    r"|(api|access|secret|private|auth|account)[_-]?(key|token)s?$",
    re.IGNORECASE,
)
_LOGIN = re.compile(r"(?<=://)[^/@\s]+(?=@)")
# A variable of the environment that is shorter says nothing, or is guessed at once.
_SHORTEST_VARIABLE = 8


def _nested(text: str) -> Any:
    """What a text holds that is JSON itself; ``None`` if it is not."""
    if not text.lstrip().startswith(("{", "[")):
        return None
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return None


def _named(value: Any, name: str = "") -> Iterator[str]:
    """Every text that stands under a secret's name."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _named(inner, str(key))
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _named(inner, name)
    elif isinstance(value, str) and value:
        if _NAME.search(name):
            yield value
        yield from (found for login in _LOGIN.findall(value) for found in login.split(":")[1:])
        if (inner := _nested(value)) is not None:
            yield from _named(inner)


class Secrets:
    """The secrets of one server.

    Args:
        values: those that are known; more are told by their names.
    """

    def __init__(self, values: Iterable[str]):
        known = sorted(set(values), key=len, reverse=True)
        # A short one only by itself: it may be part of any word.
        words = (re.escape(v) if len(v) > 7 else rf"(?<!\w){re.escape(v)}(?!\w)" for v in known)
        self._values = re.compile("|".join(words)) if known else None

    @classmethod
    def of(cls, flags: Mapping[str, Any], values: Iterable[str] = ()) -> Secrets:
        """Those among SGLang's flags and in the environment, and further ones."""
        variables = (v for v in _named(dict(os.environ)) if len(v) >= _SHORTEST_VARIABLE)
        return cls([*_named(flags), *variables, *values])

    def hide(self, value: Any, name: str = "") -> Any:
        """The same value without them."""
        if isinstance(value, dict):
            return {key: self.hide(inner, str(key)) for key, inner in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.hide(inner, name) for inner in value]
        if not isinstance(value, str):
            return value
        if value and _NAME.search(name):
            return HIDDEN
        inner = _nested(value)
        if inner is not None and (shown := self.hide(inner)) != inner:
            value = orjson.dumps(shown).decode()
        return self.in_text(_LOGIN.sub(HIDDEN, value))

    def in_text(self, text: str) -> str:
        """The same text without those that are known."""
        return self._values.sub(HIDDEN, text) if self._values is not None else text

    def in_body(self, body: bytes, *, tenant: bool) -> bytes:
        """An answer without them; for a tenant also without where files lie."""
        try:
            content = orjson.loads(body)
        except orjson.JSONDecodeError:
            return self.in_text(body.decode(errors="surrogateescape")).encode(
                errors="surrogateescape"
            )
        shown = self.hide(content)
        if tenant:
            shown = _without_paths(shown)
        return orjson.dumps(shown) if shown != content else body


def _without_paths(value: Any) -> Any:
    """Of every absolute path only its last part."""
    if isinstance(value, dict):
        return {key: _without_paths(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_paths(inner) for inner in value]
    if isinstance(value, str) and value.startswith("/"):
        return PurePosixPath(value).name
    return value


class RedactMiddleware:
    """Pure ASGI, around everything but requests to a model."""

    def __init__(self, app: Any, secrets: Secrets):
        self._app = app
        self._secrets = secrets

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and not carries_prompt(scope):
            send = _Sender(send, self._secrets)
        await self._app(scope, receive, send)


class _Sender:
    """Holds an answer in text until it is whole."""

    def __init__(self, send: Any, secrets: Secrets):
        self._send = send
        self._secrets = secrets
        self._start: Any = None
        self._body = b""

    async def __call__(self, message: Any) -> None:
        if message["type"] == "http.response.start" and _is_text(message):
            self._start = message
        elif message["type"] != "http.response.body" or self._start is None:
            await self._send(message)
        else:
            self._body += message.get("body", b"")
            if not message.get("more_body", False):
                await self._send_whole()

    async def _send_whole(self) -> None:
        start, body = self._start, self._body
        shown = self._secrets.in_body(body, tenant=current.get() is not None)
        if shown != body:
            headers = [(k, v) for k, v in start["headers"] if k.lower() != b"content-length"]
            start = {**start, "headers": [*headers, (b"content-length", b"%d" % len(shown))]}
        await self._send(start)
        await self._send({"type": "http.response.body", "body": shown})


def _is_text(start: Any) -> bool:
    kind = {name.lower(): value for name, value in start["headers"]}.get(b"content-type", b"")
    return kind.startswith((b"application/json", b"text/")) and b"event-stream" not in kind
