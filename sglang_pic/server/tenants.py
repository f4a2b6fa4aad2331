"""Which tenant an API key stands for, where the operator says so (``--pic-tenants``).

The salt that decides what a request can see is then set here, from the key in its
``Authorization`` header, and not by the client. Whoever has SGLang's admin key acts for
every tenant and names the salt; whoever has neither key can ask for nothing.
"""

from __future__ import annotations

import contextvars
import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import orjson

from sglang_pic.errors import PicConfigError, PicRequestError
from sglang_pic.forest.keys import is_reserved

_SAFE = ("GET", "HEAD", "OPTIONS")
_current: contextvars.ContextVar[str | None] = contextvars.ContextVar(
    "sglang_pic_tenant", default=None
)


def _digest(key: str) -> bytes:
    # Found by digest: how long a look-up takes tells nothing of the keys.
    return hashlib.sha256(key.encode()).digest()


def read_salts(path: str) -> dict[str, str]:
    """Salts by key, from a JSON object.

    Raises:
        PicConfigError: the file is not one.
    """
    try:
        salts = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PicConfigError(f"--pic-tenants: {error}") from error
    if not isinstance(salts, dict) or not salts:
        raise PicConfigError("--pic-tenants: must be a JSON object of salts by API key")
    for salt in salts.values():
        if not isinstance(salt, str) or not salt or is_reserved(salt):
            raise PicConfigError("--pic-tenants: a salt must be a text, not empty")
    return salts


class Tenants:
    """Salt by API key.

    Args:
        salts: by key.
        admin_key: SGLang's.
    """

    def __init__(self, salts: Mapping[str, str], admin_key: str):
        self._salts = {_digest(key): salt for key, salt in salts.items()}
        self._admin = _digest(admin_key)

    @classmethod
    def read(cls, path: str, server_args: Any) -> Tenants:
        """From a JSON object of salts by key.

        Raises:
            PicConfigError: the file is not one, or SGLang's own keys leave a way around.
        """
        salts = read_salts(path)
        if server_args.tokenizer_worker_num > 1 or server_args.grpc_port is not None:
            raise PicConfigError("--pic-tenants works with one tokenizer worker, and not over gRPC")
        admin_key = server_args.admin_api_key
        if not admin_key or server_args.api_key:
            raise PicConfigError("--pic-tenants needs --admin-api-key, and no --api-key beside it")
        if "" in salts or admin_key in salts:
            raise PicConfigError(
                "--pic-tenants: neither nobody's key nor the admin's is a tenant's"
            )
        return cls(salts, admin_key)

    def of(self, scope: Any) -> tuple[bool, str | None]:
        """Whether a request has a key, and the salt of the tenant's it is, if it is one."""
        for name, value in scope["headers"]:
            if name.lower() == b"authorization":
                kind, _, key = value.decode("latin-1").partition(" ")
                found = _digest(key.strip())
                if kind.lower() == "bearer" and (found == self._admin or found in self._salts):
                    return True, self._salts.get(found)
        return False, None


class TenantMiddleware:
    """Pure ASGI, in front of everything: no request but a safe one without a key."""

    def __init__(self, app: Any, tenants: Tenants):
        self._app = app
        self._tenants = tenants

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        known, salt = self._tenants.of(scope)
        if scope["type"] == "websocket" and not known:
            await receive()
            await send({"type": "websocket.close", "code": 1008})
            return
        if not known and scope["method"] not in _SAFE:
            await _unauthorized(send)
            return
        token = _current.set(salt)
        try:
            await self._app(scope, receive, send)
        finally:
            _current.reset(token)


async def _unauthorized(send: Any) -> None:
    body = orjson.dumps({"error": "Unauthorized"})
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"www-authenticate", b"Bearer"),
    ]
    await send({"type": "http.response.start", "status": 401, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def set_salt(obj: Any) -> None:
    """Give SGLang's request the salt of the tenant whose key it came with, if any.

    Raises:
        PicRequestError: it names another.
    """
    salt = _current.get()
    if salt is None:
        return
    asked = obj.cache_salt if isinstance(obj.cache_salt, list) else [obj.cache_salt]
    if any(one not in (None, salt) for one in asked):
        raise PicRequestError("cache_salt", "is the server's to set, from the API key")
    obj.cache_salt = salt
