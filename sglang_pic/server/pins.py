"""Pins that end by themselves. A restart drops pins and timers alike."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

logger = logging.getLogger(__name__)

Key = tuple[str, str | None]


class Pins:
    """Times the pins of segments.

    A pin and the end of an older one of the same segment never overlap, so what
    the scheduler was told last is what the timers say.

    Args:
        unpin: have a segment (id, tenant) unpinned.
        sleep: wait for a number of seconds.
    """

    def __init__(
        self,
        unpin: Callable[[str, str | None], Awaitable[Any]],
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ):
        self._unpin = unpin
        self._sleep = sleep
        self._timers: dict[Key, asyncio.Task[None]] = {}
        self._lock = asyncio.Lock()

    async def pin(
        self,
        id: str,
        salt: str | None,
        ttl_s: float | None,
        pin: Callable[[], Awaitable[Any]],
    ) -> Any:
        """Carry out ``pin``, whose result is returned, and end it after ``ttl_s``
        seconds; an older timer of this segment goes, unless ``pin`` fails."""
        key = (id, salt or None)
        async with self._lock:
            result = await pin()
            self._cancel(key)
            if ttl_s is not None:
                self._timers[key] = asyncio.create_task(self._expire(key, ttl_s))
        return result

    async def unpin(self, id: str, salt: str | None) -> Any:
        """Unpin now; returns what ``unpin`` does."""
        async with self._lock:
            result = await self._unpin(id, salt)
            self._cancel((id, salt or None))
        return result

    def _cancel(self, key: Key) -> None:
        timer = self._timers.pop(key, None)
        if timer is not None:
            timer.cancel()

    async def _expire(self, key: Key, ttl_s: float) -> None:
        await self._sleep(ttl_s)
        async with self._lock:
            del self._timers[key]
            try:
                await self._unpin(*key)
            except Exception as error:
                logger.warning("sglang_pic: the pin of %s did not end: %s", key[0], error)
