"""``--pic-audit-rate``: how far are answers off? A sample is computed again in full.

Behind the answer, while no client waits: the next token behind the prompt, and
behind pieces of the answer, once linked as it was and once in full in a namespace
of its own, which is flushed afterwards.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import hashlib
import logging
import statistics
from collections.abc import Awaitable, Callable, Sequence

from sglang_pic.config import PicConfig
from sglang_pic.link.report import COMPOSED
from sglang_pic.metrics.front import counts
from sglang_pic.server.compare import Generate, Prompt, fresh_salt, in_full, linked
from sglang_pic.server.gate import AUDIT_FAILED, Gate

logger = logging.getLogger(__name__)

QUEUE = 16
# The bound is for the mean of so many audits.
WINDOW = 8
# Next tokens compared of one answer: behind the prompt, and within the answer.
POSITIONS = 4
IDLE_POLL_S = 0.2

Flush = Callable[[str], Awaitable[None]]


@dataclasses.dataclass(frozen=True)
class _Answer:
    prompt: Prompt
    ids: tuple[int, ...]


def is_chosen(number: int, rate: float) -> bool:
    """Whether the answer of this number is audited: the same ones in every run, a
    share of ``rate`` of all."""
    digest = hashlib.blake2b(number.to_bytes(8, "big"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < rate * 2**64


class Audit:
    """Audits composed answers, one after the other.

    Args:
        generate: runs one internal request and returns its last output.
        flush: forgets all that a namespace holds.
        is_idle: whether the server has no request.
        gate: closed above the bound, where the settings say so.
    """

    def __init__(
        self,
        generate: Generate,
        flush: Flush,
        is_idle: Callable[[], bool],
        config: PicConfig,
        gate: Gate,
    ):
        self._generate = generate
        self._flush = flush
        self._is_idle = is_idle
        self._config = config
        self._gate = gate
        self._seen = 0
        self._queue: collections.deque[_Answer] = collections.deque()
        self._window: collections.deque[float] = collections.deque(maxlen=WINDOW)
        self._task: asyncio.Task[None] | None = None

    def consider(self, prompt: Prompt, answer: Sequence[int]) -> None:
        """Audit this composed answer when there is time, if it is of the sample."""
        self._seen += 1
        if not is_chosen(self._seen, self._config.audit_rate):
            return
        self._queue.append(_Answer(prompt, tuple(answer)))
        if len(self._queue) > QUEUE:
            self._queue.popleft()
            counts.audit.dropped += 1
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._work())

    async def _work(self) -> None:
        while self._queue:
            await self._idle()
            answer = self._queue.popleft()
            try:
                await self._audit(answer)
            except Exception as error:
                counts.audit.dropped += 1
                logger.warning("sglang_pic: an answer could not be audited: %r", error)

    async def _idle(self) -> None:
        while not self._is_idle():
            await asyncio.sleep(IDLE_POLL_S)

    async def _audit(self, answer: _Answer) -> None:
        salt = fresh_salt("audit")
        kls, agreements = [], []
        try:
            for cut in _cuts(len(answer.ids)):
                ids = [*answer.prompt.ids, *answer.ids[:cut]]
                prompt = dataclasses.replace(answer.prompt, ids=ids)
                await self._idle()
                full = await in_full(self._generate, prompt, salt)
                again = await linked(self._generate, prompt, prompt.link.options, full.tokens)
                assert again.report is not None
                if again.report["exactness"] != COMPOSED:
                    # What served it has been evicted since.
                    counts.audit.dropped += 1
                    return
                kls.append(again.kl_from(full))
                agreements.append(again.likeliest == full.likeliest)
        finally:
            await self._flush(salt)
        kl = statistics.fmean(kls)
        counts.audit.observe(kl, all(agreements))
        self._judge(kl)

    def _judge(self, kl: float) -> None:
        self._window.append(kl)
        mean = statistics.fmean(self._window)
        if len(self._window) < WINDOW or mean <= self._config.audit_kl:
            return
        self._window.clear()
        found = (
            f"the last {WINDOW} audits are off by {mean:.3g} nats in the mean, "
            f"at most {self._config.audit_kl:.3g} is allowed"
        )
        if self._config.audit_action == "off":
            self._gate.close(AUDIT_FAILED, found)
        else:
            logger.warning("sglang_pic: %s", found)


def _cuts(length: int) -> list[int]:
    """After how many tokens of an answer to compare the next one."""
    return sorted({i * length // POSITIONS for i in range(POSITIONS)})
