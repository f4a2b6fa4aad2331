"""Which tenant an API key stands for, where the operator says so (``--pic-tenants``).

The salt that decides what a request can see is then set from the key in its
``Authorization`` header, and not by the client. Whoever has SGLang's admin key acts for
every tenant and names the salt. What either may ask is in ``access``, what a tenant's
request may carry in ``binding``.
"""

from __future__ import annotations

import contextvars
import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import orjson

from sglang_pic.errors import PicConfigError, PicRequestError
from sglang_pic.forest.keys import check_salt
from sglang_pic.server.access import refusal

MIN_KEY, MAX_KEY = 16, 512

current: contextvars.ContextVar[str | None] = contextvars.ContextVar(
    "sglang_pic_tenant", default=None
)
"""The salt of the tenant that asks; ``None`` for the operator, and for the server itself."""


def _digest(key: bytes) -> bytes:
    # Found by digest: how long a look-up takes tells nothing of the keys.
    return hashlib.sha256(key).digest()


def read_salts(path: str) -> dict[str, str]:
    """Salts by API key, from a JSON object.

    Raises:
        PicConfigError: the file is not one, or a key or a salt cannot be used.
    """
    try:
        text = pathlib.Path(path).read_text(encoding="utf-8")
        salts = json.loads(text, object_pairs_hook=_unique)
    except (OSError, ValueError) as error:
        raise PicConfigError(f"--pic-tenants: {error}") from error
    if not isinstance(salts, dict) or not salts:
        raise PicConfigError("--pic-tenants: must be a JSON object of salts by API key")
    for key, salt in salts.items():
        check_key(key)
        if not salt:
            raise PicConfigError("--pic-tenants: a salt must be a text, not empty")
        try:
            check_salt(salt, "a salt")
        except PicRequestError as error:
            raise PicConfigError(f"--pic-tenants: {error}") from error
    return salts


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("the same API key twice")
    return found


def check_key(key: str) -> None:
    """Raise ``PicConfigError`` for one that a header cannot carry or anyone can guess."""
    if not MIN_KEY <= len(key) <= MAX_KEY or not key.isascii() or not key.isprintable():
        raise PicConfigError(
            f"--pic-tenants: a key, the admin's too, must be {MIN_KEY} to {MAX_KEY} ASCII letters"
        )
    if " " in key:
        raise PicConfigError("--pic-tenants: a key must be without spaces")


def check_flags(server_args: Any) -> None:
    """Raise ``PicConfigError`` where SGLang's flags leave a way around the keys."""
    if not server_args.admin_api_key or server_args.api_key:
        raise PicConfigError("--pic-tenants needs --admin-api-key, and no --api-key beside it")
    check_key(server_args.admin_api_key)
    grpc = server_args.grpc_port is not None or server_args.grpc_mode or server_args.smg_grpc_mode
    if server_args.tokenizer_worker_num > 1 or grpc or os.environ.get("SGLANG_RUST_SERVER"):
        raise PicConfigError(
            "--pic-tenants works with one tokenizer worker, not over gRPC, and not with "
            "SGLANG_RUST_SERVER"
        )
    if server_args.enable_response_store:
        raise PicConfigError(
            "--pic-tenants: not with --enable-response-store: a stored response belongs to "
            "whoever knows its id, not to a tenant"
        )


@dataclasses.dataclass(frozen=True)
class Asker:
    """Who has a key: the tenant of a salt, or, without one, the operator."""

    salt: str | None = None


class Tenants:
    """Askers by API key.

    Args:
        salts: by key.
        admin_key: SGLang's.
    """

    def __init__(self, salts: Mapping[str, str], admin_key: str):
        self._askers = {_digest(key.encode()): Asker(salt) for key, salt in salts.items()}
        self._askers[_digest(admin_key.encode())] = Asker()

    @classmethod
    def read(cls, path: str, server_args: Any) -> Tenants:
        """From a JSON object of salts by key.

        Raises:
            PicConfigError: it cannot be used, or SGLang's flags leave a way around.
        """
        salts = read_salts(path)
        check_flags(server_args)
        if server_args.admin_api_key in salts:
            raise PicConfigError("--pic-tenants: the admin's key is no tenant's")
        return cls(salts, server_args.admin_api_key)

    def of(self, scope: Any) -> Asker | None:
        """Whose key a request has; nobody's if it has two, since proxies and servers
        differ in which of them counts."""
        sent = [value for name, value in scope["headers"] if name.lower() == b"authorization"]
        if len(sent) != 1:
            return None
        kind, _, key = sent[0].partition(b" ")
        return self._askers.get(_digest(key)) if kind.lower() == b"bearer" else None


class TenantMiddleware:
    """Pure ASGI, in front of everything: who asks, whether it may, and with which salt."""

    def __init__(self, app: Any, tenants: Tenants):
        self._app = app
        self._tenants = tenants

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        asker = self._tenants.of(scope)
        operator = asker is not None and asker.salt is None
        routes = scope["app"].router.routes
        refused = refusal(routes, scope, known=asker is not None, operator=operator)
        if refused is not None:
            await _refuse(scope, receive, send, *refused)
            return
        token = current.set(asker.salt if asker is not None else None)
        try:
            await self._app(scope, receive, send)
        finally:
            current.reset(token)


async def _refuse(scope: Any, receive: Any, send: Any, status: int, reason: str) -> None:
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.close", "code": 1008, "reason": reason})
        return
    body = orjson.dumps({"error": reason})
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        *([(b"www-authenticate", b"Bearer")] if status == 401 else []),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
