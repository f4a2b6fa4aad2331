"""Chunks of found text that are compiled when there is nothing else to do."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Callable, Sequence

import numpy as np

from sglang_pic.find.sketch import Names
from sglang_pic.metrics.front import counts
from sglang_pic.server.compiler import COMPILED, FETCHED, SHARED, Caller, Compiler
from sglang_pic.server.idle import idle
from sglang_pic.server.items import CompileItem
from sglang_pic.server.queue import FairQueue

logger = logging.getLogger(__name__)

# Chunks of one tenant that wait, and tokens of all that do, some 36 bytes each.
MAX_WAITING, MAX_TOKENS = 256, 1 << 20


@dataclasses.dataclass(frozen=True)
class Chunk:
    """A chunk to compile.

    Attributes:
        item: what compiles it.
        rule: that has cut it.
        caller: whose prompt it stood in.
        name: as its tenant's finder has it.
        ready: is told the name when it is compiled.
    """

    item: CompileItem
    rule: str
    caller: Caller
    name: int
    ready: Callable[[Names], None]


class IdleCompiles:
    """Compiles chunks one by one, tenants in turn.

    Args:
        is_idle: whether the server has nothing to do.
    """

    def __init__(self, compiler: Compiler, is_idle: Callable[[], bool]):
        self._compiler = compiler
        self._is_idle = is_idle
        self._queue: FairQueue[CompileItem] = FairQueue(1, 1, MAX_WAITING)
        self._chunks: dict[CompileItem, Chunk] = {}
        self._tokens = 0
        self._task: asyncio.Task[None] | None = None

    def want(self, chunks: Sequence[Chunk]) -> None:
        """Compile these chunks of one tenant, as far as there is room for them to wait."""
        room = MAX_TOKENS - self._tokens
        new: dict[CompileItem, Chunk] = {}
        for one in chunks:
            if one.item not in self._chunks and len(one.item.ids) <= room:
                room -= len(one.item.ids)
                new[one.item] = one
        if not new:
            return
        for item in self._queue.add(new, chunks[0].caller.tenant, 0):
            self._chunks[item] = new[item]
            self._tokens += len(item.ids)
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._work())

    async def _work(self) -> None:
        while len(self._queue):
            await idle(self._is_idle)
            item = self._queue.take()
            assert item is not None
            chunk = self._chunks[item]
            try:
                (made,) = await self._compiler.compile([item], chunk.caller)
                if made.outcome in (COMPILED, FETCHED, SHARED):
                    chunk.ready(np.array([chunk.name], dtype=np.uint64))
                    counts.observe_found_compile(chunk.rule)
            except Exception as error:
                logger.warning("sglang_pic: a found segment could not be compiled: %r", error)
            del self._chunks[item]
            self._tokens -= len(item.ids)
            self._queue.done(chunk.caller.tenant)
