"""Have documents encoded: commands to the scheduler, one behind the other.

What prompts lack waits here, in the order of ``server.queue``; each command takes as much of
it as a step of the scheduler may, and a prompt with more goes on with the next.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from sglang_pic.encoder.limits import ENCODE_TOKENS, fits
from sglang_pic.metrics.front import counts
from sglang_pic.server.queue import FairQueue

Send = Callable[..., Coroutine[Any, Any, list[Any]]]


@dataclasses.dataclass(eq=False)
class Job:
    """Documents of one prompt that are queued or under way.

    Attributes:
        lease: under which they are kept for it.
        held: names of its others, which the scheduler holds.
        documents: those to be encoded, each once.
        named: they are asked for by name, and no prompt comes.
        sent: how many of them have been.
        result: whether all of the prompt's are kept.
    """

    lease: str
    tenant: str | None
    held: list[str]
    documents: list[tuple[int, ...]]
    result: asyncio.Future[bool]
    named: bool = False
    sent: int = 0

    def piece(self, documents: Sequence[tuple[int, ...]]) -> dict[str, Any]:
        """Some of them, as the command has them (``commands.Lease``)."""
        return {
            "id": self.lease,
            "tenant": self.tenant,
            "held": self.held,
            "lengths": [len(ids) for ids in documents],
            "named": self.named,
        }


Piece = tuple[Job, list[tuple[int, ...]]]


class Encoder:
    """Has documents encoded, in batches one behind the other: a step of the scheduler runs
    one at most.

    Args:
        send: ``server.commands.command``, bound.
        encoded: told tokens and seconds of a batch.
        queue: in which order, and how many prompts may wait.
        max_tokens: of the longest document.
        longest: tokens of the longest prompt that SGLang takes.
    """

    def __init__(
        self,
        send: Send,
        queue: FairQueue[Job],
        max_tokens: int,
        longest: Callable[[], int],
        encoded: Callable[[int, float], None] = lambda tokens, seconds: None,
    ):
        self._send = send
        self._encoded = encoded
        self._queue = queue
        self._max_tokens = max_tokens
        self._longest = longest
        # Begun, or the next to begin.
        self._ahead: Job | None = None
        self._running: asyncio.Task[None] | None = None

    @property
    def max_tokens(self) -> int:
        """Tokens of the longest document that can be encoded."""
        return min(self._max_tokens, ENCODE_TOKENS, self._longest())

    async def encode(
        self,
        lease: str,
        tenant: str | None,
        urgency: int,
        held: Sequence[str],
        documents: Sequence[tuple[int, ...]],
        *,
        named: bool = False,
    ) -> bool | None:
        """Encode some of a prompt's documents, and keep all of them until it comes.

        Args:
            lease: names the prompt.
            held: names of its other documents.
            named: no prompt comes, they are asked for by name: nothing is kept for it.

        Returns:
            Whether they are kept; if not, none is. ``None`` where too many prompts of the
            tenant wait.

        Raises:
            PicRefused: as the command does.
        """
        if not documents:
            return True
        result = asyncio.get_running_loop().create_future()
        job = Job(lease, tenant, list(held), list(dict.fromkeys(documents)), result, named)
        if not self._queue.add([job], tenant, urgency):
            return None
        if self._running is None:
            self._running = asyncio.get_running_loop().create_task(self._run())
        return await asyncio.shield(result)

    async def encode_uncounted(
        self, lease: str, tenant: str, documents: Sequence[tuple[int, ...]]
    ) -> bool:
        """Have documents of ours encoded now, which are nobody's; whether they are kept."""
        result = asyncio.get_running_loop().create_future()
        job = Job(lease, tenant, [], list(documents), result)
        (kept,) = await self._send_now([(job, job.documents)])
        return kept

    async def _send_now(self, pieces: Sequence[Piece]) -> list[bool]:
        """Have these encoded now, in one go; which of their prompts' documents are kept.

        Raises:
            PicRefused: as the command does.
        """
        documents = [one for _, some in pieces for one in some]
        (told,) = await self._send(
            "encode",
            ids=[token for ids in documents for token in ids],
            leases=[job.piece(some) for job, some in pieces],
            now=time.monotonic(),
        )
        return told["kept"]

    async def _run(self) -> None:
        while pieces := self._batch():
            start = time.monotonic()
            try:
                told = await self._send_now(pieces)
            except Exception as error:
                for job, _ in pieces:
                    self._end(job)
                    job.result.set_exception(error)
                    # Consumed here: a client that left will not ask for it.
                    job.result.exception()
                continue
            lengths = [len(ids) for _, some in pieces for ids in some]
            counts.observe_encode(lengths)
            self._encoded(sum(lengths), time.monotonic() - start)
            for (job, some), kept in zip(pieces, told, strict=True):
                job.sent += len(some)
                if not kept or job.sent == len(job.documents):
                    self._end(job)
                    job.result.set_result(kept)
        self._running = None

    def _end(self, job: Job) -> None:
        if self._ahead is job:
            self._ahead = None
        self._queue.done(job.tenant)

    def _batch(self) -> list[Piece]:
        """What is encoded next, in one go; of its prompts the last may have more."""
        pieces: list[Piece] = []
        lengths: list[int] = []
        while (job := self._ahead or self._queue.take()) is not None:
            some = []
            for ids in job.documents[job.sent :]:
                more = [*lengths, len(ids)]
                if lengths and not (fits(more, self._max_tokens) and sum(more) <= self._longest()):
                    break
                lengths = more
                some.append(ids)
            if some:
                pieces.append((job, some))
            self._ahead = None
            if job.sent + len(some) < len(job.documents):
                self._ahead = job
                break
        return pieces
