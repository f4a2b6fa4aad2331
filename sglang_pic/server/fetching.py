"""Segments that the store has: asked for ahead, waited for, linked without a compile.

The scheduler's process reads them (``manage.coming``); here it is told to begin, and
asked until they have come. What is asked for in one turn of the loop goes in one command,
as far as one prompt may be long. Nothing here raises: what does not come is compiled.
Encoded documents are fetched alike (``stored``).
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import Awaitable, Callable, Hashable, Sequence
from typing import Any, Generic, Protocol

from cachetools import TTLCache

from sglang_pic.server.items import CompileItem
from sglang_pic.server.sources import (
    COMPUTED,
    HELD,
    IN_STORE,
    LATE,
    STORE,
    BackOff,
    Pace,
    Source,
    source_of,
)
from sglang_pic.server.stored import Item, Kind

logger = logging.getLogger(__name__)

# ``command`` of one server: its name, then its fields.
Command = Callable[..., Awaitable[list[Any]]]

# Between two questions, at first and at most.
FIRST_S, MOST_S = 0.002, 0.05
# What has come is remembered for who will ask for it: so many, so long.
MOST_EARLY, EARLY_S = 4096, 5.0
# Segments of one command.
MOST_OF_ONE = 128
# How long a request that may be answered exactly waits to learn what the store has.
KNOWN_S = 0.25


class Fetching(Protocol):
    """Gets segments from a store.

    ``has_store``: whether there is one.
    """

    has_store: bool

    async def known(self, items: Sequence[CompileItem]) -> list[bool]:
        """Which of these the store has, and will most likely give; those are read from now
        on. Waits only for a moment."""
        ...

    async def fetch(self, item: CompileItem, *, no_logs: bool = False) -> Source:
        """Where one comes from: it is held now, unless it is to be computed.

        Args:
            no_logs: its tokens must not be logged.
        """
        ...

    def computed(self, tokens: int, seconds: float) -> None:
        """A compile of so many tokens took so long."""
        ...

    def busiest(self, lengths: Sequence[int]) -> int:
        """Of segments of so many tokens, the tokens that whoever computes most would."""
        ...


class NoStore:
    """There is none."""

    has_store = False

    async def known(self, items: Sequence[Any]) -> list[bool]:
        return [False] * len(items)

    async def fetch(self, item: Any, *, no_logs: bool = False) -> Source:
        return Source()

    def computed(self, tokens: int, seconds: float) -> None:
        pass

    def busiest(self, lengths: Sequence[int]) -> int:
        return sum(lengths)


@dataclasses.dataclass(eq=False)
class _Coming(Generic[Item]):
    """One item that is read: who waits for it waits for ``known``, whether the store has
    it, or for ``source``, of which somebody has asked (``is_awaited``)."""

    item: Item
    name: str
    begun: float
    known: asyncio.Future[bool]
    source: asyncio.Future[Source]
    is_awaited: bool = False


class FromStore(Generic[Item]):
    """Asks one server's schedulers for items of one kind.

    Args:
        command: sends commands to them (``server.commands``), its manager bound.
        longest: tokens that one command's prompt may have.
        timeout_s: how long one is waited for.
        always: read what is there whatever that takes.
    """

    has_store = True

    def __init__(
        self,
        command: Command,
        kind: Kind[Item],
        longest: Callable[[], int],
        timeout_s: float,
        always: bool = False,
    ):
        self._kind = kind
        self._always = always
        self._command = command
        self._longest = longest
        self._timeout_s = timeout_s
        self._reading, self._computing = Pace(), Pace()
        self._back_off = BackOff()
        self._coming: dict[Item, _Coming[Item]] = {}
        # Came before anybody waited for it, and will be asked for in a moment.
        self._early: TTLCache[Item, Source] = TTLCache(MOST_EARLY, EARLY_S)
        # Asked for in this turn of the loop.
        self._asked: list[_Coming[Item]] = []
        self._tasks: set[asyncio.Task[None]] = set()

    def computed(self, tokens: int, seconds: float) -> None:
        self._computing.see(tokens, seconds)

    async def known(self, items: Sequence[Item]) -> list[bool]:
        coming = [self._begin(item, always=self._always) for item in items]
        waits = [one.known for one in coming if isinstance(one, _Coming)]
        if waits:
            await asyncio.wait(waits, timeout=KNOWN_S)
        return [
            isinstance(one, _Coming) and one.known.done() and one.known.result() for one in coming
        ]

    def busiest(self, lengths: Sequence[int]) -> int:
        return sum(lengths)

    def moving(self, tokens: int) -> float:
        """Tokens computed in the time that reading the value of one takes, of one of so
        many; 0 where that was not measured lately."""
        read, computed = self._reading.seconds(tokens), self._computing.seconds(tokens)
        return 0.0 if read is None or not computed else read / computed

    async def fetch(self, item: Item, *, no_logs: bool = False) -> Source:
        return await self.read(item, always=self._always)

    async def read(self, item: Item, *, always: bool) -> Source:
        """``fetch``.

        Args:
            always: read what is there whatever that takes.
        """
        early = self._early.pop(item, None)
        if early is not None:
            return early
        coming = self._begin(item, always=always)
        if isinstance(coming, _Coming):
            coming.is_awaited = True
            # Who leaves must not take it from the others.
            return await asyncio.shield(coming.source)
        return coming

    def _begin(self, item: Item, *, always: bool) -> _Coming[Item] | Source:
        """One that is on its way, or why it is not."""
        coming = self._coming.get(item)
        if coming is not None:
            return coming
        kind, reason = source_of(
            len(self._kind.tokens(item)),
            refusal=self._kind.refusal(item),
            backs_off=self._back_off.is_on,
            always=always,
            reading=self._reading,
            computing=self._computing,
        )
        if kind != STORE:
            return Source(kind, reason)
        name, loop = self._kind.name(item), asyncio.get_running_loop()
        coming = _Coming(item, name, time.monotonic(), loop.create_future(), loop.create_future())
        self._coming[item] = coming
        if not self._asked:
            loop.call_soon(self._send)
        self._asked.append(coming)
        return coming

    def _send(self) -> None:
        """Begin all that was asked for, in as few commands as may be."""
        asked, self._asked = self._asked, []
        groups: dict[Hashable, list[_Coming[Item]]] = {}
        for coming in asked:
            groups.setdefault(self._kind.alike(coming.item), []).append(coming)
        for alike in groups.values():
            batch: list[_Coming[Item]] = []
            tokens = 0
            for coming in alike:
                more = len(self._kind.tokens(coming.item))
                if batch and (tokens + more > self._longest() or len(batch) == MOST_OF_ONE):
                    self._start(batch)
                    batch, tokens = [], 0
                batch.append(coming)
                tokens += more
            self._start(batch)

    def _start(self, batch: list[_Coming[Item]]) -> None:
        task = asyncio.get_running_loop().create_task(self._run(batch))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, batch: Sequence[_Coming[Item]]) -> None:
        """Have one batch read, and settle each of it when it has come or will not."""
        where = self._kind.where(batch[0].item)
        paths = [self._kind.tokens(coming.item) for coming in batch]
        follow = {**self._kind.follow(), **where}
        left = {coming.name: coming for coming in batch}
        reason = LATE
        try:
            await self._command(
                **self._kind.begin(batch[0].item),
                ids=[token for path in paths for token in path],
                lengths=[len(path) for path in paths],
                **where,
            )
            await self._follow(left, follow)
        except Exception as error:
            logger.warning("sglang_pic: the store was not asked: %s", error)
            reason = "store_not_asked"
        finally:
            dropped = list(left)
            for coming in list(left.values()):
                self._settle(coming, Source(COMPUTED, reason, time.monotonic() - coming.begun))
        if dropped:
            # A slow store is as bad as none.
            self._back_off.failed()
            try:
                await self._command(**follow, segments=dropped, drop=True)
            except Exception as error:
                logger.warning("sglang_pic: what the store is late with was kept: %s", error)

    async def _follow(self, left: dict[str, _Coming[Item]], follow: dict[str, Any]) -> None:
        """Ask until all have come, or it is too late for the rest."""
        end = time.monotonic() + self._timeout_s
        pause = FIRST_S
        while left and time.monotonic() < end:
            await asyncio.sleep(pause)
            pause = min(MOST_S, 1.5 * pause)
            names = list(left)
            (told,) = await self._command(**follow, segments=names)
            for name, one in zip(names, told["segments"], strict=True):
                coming, state = left[name], one["state"]
                if state == "looking":
                    continue
                if not coming.known.done():
                    coming.known.set_result(state in ("coming", "here"))
                if state in ("here", "gone"):
                    del left[name]
                    self._settle(coming, self._source(coming, one))

    def _source(self, coming: _Coming[Item], one: dict[str, Any]) -> Source:
        seconds = time.monotonic() - coming.begun
        if one["state"] == "here":
            if one["reason"] is None:
                self._reading.see(len(self._kind.tokens(coming.item)), seconds)
            self._back_off.worked()
            if one["reason"] is not None:
                return Source(HELD, one["reason"], seconds)
            return Source(STORE, IN_STORE, seconds, one["bytes"])
        if one["reason"] in ("store_failed", "store_refused"):
            self._back_off.failed()
        elif one["reason"] == "not_in_store":
            self._back_off.worked()
        return Source(COMPUTED, one["reason"], seconds, one["bytes"])

    def _settle(self, coming: _Coming[Item], source: Source) -> None:
        del self._coming[coming.item]
        if not coming.known.done():
            coming.known.set_result(False)
        coming.source.set_result(source)
        if not coming.is_awaited:
            self._early[coming.item] = source
