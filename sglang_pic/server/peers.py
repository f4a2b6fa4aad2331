"""Cold prompts compiled by several servers at once (HYPIC's parallel compiles).

What neither this server nor the store holds is dealt out among this server and its peers. A
peer writes what it has compiled into the store, where it is read like anything else. A peer
that is slow, gone, busy or of another model costs its segments a compile here.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import Awaitable, Callable, Sequence

from sglang_pic.metrics.front import counts
from sglang_pic.server.fetching import FromStore
from sglang_pic.server.items import CompileItem
from sglang_pic.server.peer import FAILED, Peer
from sglang_pic.server.roster import MOST_PEERS, Roster
from sglang_pic.server.sources import COMPILED_THERE, COMPUTED, PEER, STORE, Source, deal
from sglang_pic.store.base import ABSENT

logger = logging.getLogger(__name__)

# Compiled by a peer, and not in the store under the name that it should have here.
OTHER_VALUE = "peer_wrote_another_value"


class FromPeers:
    """Gets segments from the store, and has peers compile what is not there.

    Args:
        store: that all of them share.
        roster: who they are.
        own: this server's name, by which it knows itself among them.
        waiting: tokens that wait to be computed here.
        key: the operator's, that peers ask for, or ``None``.
        timeout_s: how long a peer may take for a segment.
        tenant_of: the salt of a client, of a namespace.
        context: tokens of the compile context.
    """

    has_store = True

    def __init__(
        self,
        store: FromStore[CompileItem],
        roster: Roster,
        own: str,
        waiting: Callable[[], Awaitable[int]],
        key: str | None,
        timeout_s: float,
        tenant_of: Callable[[str], str],
        context: int,
    ):
        self._store = store
        self._roster = roster
        self._own = own
        self._waiting = waiting
        self._key = key
        self._timeout_s = timeout_s
        self._tenant_of = tenant_of
        self._context = context
        self._peers: dict[str, Peer] = {}
        # As far as known: tokens that wait at each worker, this server first.
        self._loads: list[int] = [0]
        # Asked for in this turn of the loop.
        self._asked: list[tuple[int, asyncio.Future[Peer | None]]] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def known(self, items: Sequence[CompileItem]) -> list[bool]:
        _, known = await asyncio.gather(self._helpers(), self._store.known(items))
        return known

    def computed(self, tokens: int, seconds: float) -> None:
        self._store.computed(tokens, seconds)

    def busiest(self, lengths: Sequence[int]) -> int:
        workers = deal(lengths, self._loads, self._moving(lengths))
        shares = [0] * len(self._loads)
        for length, worker in zip(lengths, workers, strict=True):
            shares[worker] += length
        return max(shares)

    async def fetch(self, item: CompileItem, *, no_logs: bool = False) -> Source:
        source = await self._store.fetch(item)
        if source.kind != COMPUTED or source.reason != ABSENT or item.here:
            return source
        peer = await self._whose(len(item.ids))
        if peer is None:
            return source
        start = time.monotonic()
        why = await self._from(peer, item, no_logs=no_logs)
        counts.observe_peer(peer.url, isinstance(why, Source))
        seconds = source.seconds + time.monotonic() - start
        if isinstance(why, Source):
            return dataclasses.replace(why, seconds=seconds)
        return Source(COMPUTED, why, seconds)

    async def _from(self, peer: Peer, item: CompileItem, *, no_logs: bool) -> Source | str:
        """What a peer has compiled, once it is held here, or why it is not."""
        try:
            salt = self._tenant_of(item.salt or "") or None
            ids = item.ids[self._context :]
            why = await peer.compile(ids, salt=salt, seam=item.seams[0], no_logs=no_logs)
            if why is not None:
                return why
            got = await self._store.read(item, always=True)
        except Exception as error:
            logger.warning("sglang_pic: the peer %s was not asked: %r", peer.url, error)
            return FAILED
        if got.kind == STORE:
            peer.worked()
            return dataclasses.replace(got, kind=PEER, reason=COMPILED_THERE)
        if got.kind != COMPUTED:
            return got
        if got.reason == ABSENT:
            peer.failed("writes values that are none here: is its model, version, setting or "
                        "store another?")  # fmt: skip
            return OTHER_VALUE
        return got.reason

    async def _whose(self, tokens: int) -> Peer | None:
        """Who compiles a segment of so many tokens; ``None`` for this server."""
        loop = asyncio.get_running_loop()
        if not self._asked:
            # Behind all that wake in this turn.
            loop.call_soon(self._start)
        future: asyncio.Future[Peer | None] = loop.create_future()
        self._asked.append((tokens, future))
        return await future

    def _start(self) -> None:
        asked, self._asked = self._asked, []
        task = asyncio.get_running_loop().create_task(self._deal(asked))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _deal(self, asked: Sequence[tuple[int, asyncio.Future[Peer | None]]]) -> None:
        whose: list[Peer | None] = [None] * len(asked)
        try:
            peers = await self._helpers()
            lengths = [tokens for tokens, _ in asked]
            for i, worker in enumerate(deal(lengths, self._loads, self._moving(lengths))):
                if worker:
                    whose[i] = peers[worker - 1]
                    peers[worker - 1].load += lengths[i]
        except Exception as error:
            logger.warning("sglang_pic: nothing was dealt out among peers: %r", error)
        finally:
            for (_, future), peer in zip(asked, whose, strict=True):
                if not future.done():
                    future.set_result(peer)

    def _moving(self, lengths: Sequence[int]) -> float:
        """A value is written and read."""
        return 2 * self._store.moving(max(lengths, default=0))

    async def _helpers(self) -> list[Peer]:
        """Peers that tell their load, and what waits at each from now on."""
        urls = list(dict.fromkeys(url.rstrip("/") for url in await self._roster.urls()))
        self._peers = {
            url: self._peers.get(url) or Peer(url, self._key, self._timeout_s)
            for url in urls[:MOST_PEERS]
        }
        peers = list(self._peers.values())
        await asyncio.gather(*(peer.look() for peer in peers))
        helpers = [
            peer
            for peer in peers
            if peer.is_known and peer.server != self._own and not peer.back_off.is_on
        ]
        self._loads = [await self._waiting(), *(peer.load for peer in helpers)]
        return helpers
