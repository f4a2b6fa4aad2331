"""Chunks of found text that are compiled when there is nothing else to do."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from sglang_pic.find.sketch import Names
from sglang_pic.metrics.front import counts
from sglang_pic.server.compiler import COMPILED, FETCHED, SHARED, Caller, Compiler
from sglang_pic.server.idle import idle
from sglang_pic.server.items import CompileItem
from sglang_pic.server.queue import FairQueue

logger = logging.getLogger(__name__)

# Tenants that wait, chunks of one of them, and tokens of all, some 36 bytes each: beyond these
# whoever has the most gives up what it added last.
MAX_TENANTS, MAX_WAITING, MAX_TOKENS = 64, 256, 1 << 20


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
        # Those that wait or are under way; of each tenant those that wait, in order.
        self._chunks: dict[CompileItem, Chunk] = {}
        self._waiting: dict[str | None, dict[CompileItem, None]] = {}
        self._tokens: Counter[str | None] = Counter()
        self._task: asyncio.Task[None] | None = None

    def want(self, chunks: Sequence[Chunk]) -> None:
        """Compile these chunks of one tenant, as far as there is room for them to wait."""
        new = {one.item: one for one in chunks if one.item not in self._chunks}
        if not new:
            return
        tenant = chunks[0].caller.tenant
        if tenant not in self._waiting and len(self._waiting) == MAX_TENANTS:
            return
        for item in self._queue.add(new, tenant, 0):
            self._chunks[item] = new[item]
            self._waiting.setdefault(tenant, {})[item] = None
            self._tokens[tenant] += len(item.ids)
        while self._tokens.total() > MAX_TOKENS:
            self._give_up()
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._work())

    def _give_up(self) -> None:
        tenant = max(self._tokens, key=self._tokens.__getitem__)
        last = next(reversed(self._waiting[tenant]))
        self._queue.remove(last, tenant)
        self._waits_no_more(last, tenant)
        del self._chunks[last]

    def _waits_no_more(self, item: CompileItem, tenant: str | None) -> None:
        self._tokens[tenant] -= len(item.ids)
        del self._waiting[tenant][item]
        if not self._waiting[tenant]:
            del self._waiting[tenant], self._tokens[tenant]

    async def _work(self) -> None:
        while len(self._queue):
            await idle(self._is_idle)
            item = self._queue.take()
            if item is None:
                continue  # the last one was given up
            chunk = self._chunks[item]
            tenant = chunk.caller.tenant
            self._waits_no_more(item, tenant)
            try:
                (made,) = await self._compiler.compile([item], chunk.caller)
                if made.outcome in (COMPILED, FETCHED, SHARED):
                    chunk.ready(np.array([chunk.name], dtype=np.uint64))
                    counts.observe_found_compile(chunk.rule)
            except Exception as error:
                logger.warning("sglang_pic: a found segment could not be compiled: %r", error)
            del self._chunks[item]
            self._queue.done(tenant)
