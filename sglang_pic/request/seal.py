"""Whose actions the scheduler obeys: those of this server's own front.

Front and schedulers share a secret that nobody else is told. It is made once a
server, by the first of its processes, and handed down in the environment; where
schedulers run on several machines the operator sets it to one value on each.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets

ENV_NAME = "SGLANG_PIC_SECRET"
_MADE = "made-"


def ensure_secret() -> None:
    """Make the secret, unless a parent or the operator has set it."""
    os.environ.setdefault(ENV_NAME, _MADE + secrets.token_hex(32))


def is_made_here() -> bool:
    """Whether only processes of this machine can know the secret."""
    return os.environ.get(ENV_NAME, _MADE).startswith(_MADE)


def seal(action: str, body: str) -> str:
    """Code by which the scheduler knows that an action comes from the front:
    HMAC-SHA256 over its type and its body, in hexadecimal."""
    ensure_secret()
    key = os.environ[ENV_NAME].encode()
    return hmac.new(key, _bytes(f"{action}\0{body}"), hashlib.sha256).hexdigest()


def is_sealed(action: str, body: str, code: str) -> bool:
    """Whether this is the code of that action; takes as long for any wrong one."""
    return hmac.compare_digest(_bytes(seal(action, body)), _bytes(code))


def _bytes(text: str) -> bytes:
    # JSON can say half a character, and what a client wrote must not raise here.
    return text.encode("utf-8", "surrogatepass")
