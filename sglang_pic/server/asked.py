"""What this server asks of others over HTTP: an answer is a JSON object, or nothing."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import aiohttp

# Of an answer.
MOST_BYTES = 1 << 16


async def ask(
    method: str, url: str, key: str | None, timeout_s: float, **content: Any
) -> tuple[Mapping[str, Any], int | None]:
    """An answer's JSON object, empty if it is none, and its status: ``None`` if none came or
    it is no JSON, 504 if it did not come in time. Raises nothing.

    Args:
        key: the operator's, sent to this address alone, or ``None``.
        content: as ``aiohttp`` takes it.
    """
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    timeout = aiohttp.ClientTimeout(total=timeout_s)
    text = b""
    try:
        async with (
            aiohttp.ClientSession(timeout=timeout, headers=headers) as session,
            session.request(method, url, allow_redirects=False, **content) as response,
        ):
            async for part in response.content.iter_any():
                text += part
                if len(text) > MOST_BYTES:
                    return {}, None
        found = json.loads(text)
    except asyncio.TimeoutError:
        return {}, HTTPStatus.GATEWAY_TIMEOUT
    except (aiohttp.ClientError, OSError, ValueError, RecursionError):
        return {}, None
    return found if isinstance(found, dict) else {}, response.status
