"""When there is time for what nobody waits for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

# An idle moment is waited for so long; then one thing at a time is done all the same.
PATIENCE_S = 10.0
IDLE_POLL_S = 0.05


async def idle(is_idle: Callable[[], bool]) -> None:
    """Wait for an idle moment, but not for ever.

    Args:
        is_idle: whether the server has nothing to do.
    """
    loop = asyncio.get_running_loop()
    until = loop.time() + PATIENCE_S
    while not is_idle() and loop.time() < until:
        await asyncio.sleep(IDLE_POLL_S)
