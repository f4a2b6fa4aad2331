"""Where a missing segment comes from: the store, a peer that compiles it, or a compile here.

Two functions decide, by what reading and computing took lately and by what waits where: of
the store ``source_of``, of peers ``deal``. The reason is in the request's report.
"""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Callable, Sequence

# Where it came from.
HELD, STORE, PEER, COMPUTED = "held", "store", "peer", "computed"
# Why it was computed, beside what the store says (``store.base``, ``store.value``).
NO_STORE = "no_store"
NO_SEGMENT = "no_segment"
ADAPTER = "adapter"
SOONER_COMPUTED = "sooner_computed"
BACK_OFF = "store_backs_off"
LATE = "store_late"
# Why it was read.
IN_STORE = "in_store"
COMPILED_THERE = "compiled_there"

# What a pace is learnt from: so many, not older.
KEPT, KEPT_S = 64, 60.0
# Failures in a row, and how long the store is left alone then, twice as long each time.
MOST_FAILURES, BACK_OFF_S, MOST_BACK_OFF_S = 3, 5.0, 80.0


@dataclasses.dataclass(frozen=True)
class Source:
    """Where one segment came from and why, the seconds that took and the bytes read."""

    kind: str = COMPUTED
    reason: str = NO_STORE
    seconds: float = 0.0
    nbytes: int = 0


class Pace:
    """Seconds that so many tokens take: a line through what was measured lately.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._seen: deque[tuple[float, int, float]] = deque(maxlen=KEPT)

    def see(self, tokens: int, seconds: float) -> None:
        """So many took so long."""
        self._seen.append((self._clock(), tokens, seconds))

    def seconds(self, tokens: int) -> float | None:
        """That so many would take; ``None`` where nothing was measured lately."""
        since = self._clock() - KEPT_S
        seen = [(n, s) for at, n, s in self._seen if at >= since]
        if not seen:
            return None
        mean_n = sum(n for n, _ in seen) / len(seen)
        mean_s = sum(s for _, s in seen) / len(seen)
        spread = sum((n - mean_n) ** 2 for n, _ in seen)
        slope = mean_s / mean_n if mean_n else 0.0
        if spread > 0:
            slope = sum((n - mean_n) * (s - mean_s) for n, s in seen) / spread
            # More tokens are never sooner done, nor none before they begin.
            slope = min(max(slope, 0.0), mean_s / mean_n)
        return mean_s + slope * (tokens - mean_n)


class BackOff:
    """Leaves a store, or a peer, alone that has failed several times in a row.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._failures = 0
        self._until = 0.0
        self._next = BACK_OFF_S

    def failed(self) -> bool:
        """It has not answered, or has not done what it should; whether it is left alone now
        for that."""
        self._failures += 1
        if self._failures < MOST_FAILURES:
            return False
        self._failures = 0
        self._until = self._clock() + self._next
        self._next = min(2 * self._next, MOST_BACK_OFF_S)
        return True

    def worked(self) -> None:
        """It has answered."""
        self._failures, self._next = 0, BACK_OFF_S

    @property
    def is_on(self) -> bool:
        """Whether it is left alone now."""
        return self._clock() < self._until


def source_of(
    tokens: int,
    *,
    refusal: str | None,
    backs_off: bool,
    always: bool,
    reading: Pace,
    computing: Pace,
) -> tuple[str, str]:
    """Where to get a segment of so many tokens that is not held, and why: from the store,
    unless it is known that computing it is sooner done.

    Args:
        refusal: why it cannot be read, if it cannot.
        backs_off: the store is left alone.
        always: it is read whatever that takes.
    """
    if refusal is not None:
        return COMPUTED, refusal
    if backs_off:
        return COMPUTED, BACK_OFF
    if always:
        return STORE, IN_STORE
    read, computed = reading.seconds(tokens), computing.seconds(tokens)
    if read is not None and computed is not None and computed < read:
        return COMPUTED, SOONER_COMPUTED
    return STORE, IN_STORE


def deal(lengths: Sequence[int], loads: Sequence[float], moving: float = 0.0) -> list[int]:
    """Who compiles each of some segments: longest first, each to whom would have it done
    soonest (LPT, as HYPIC deals a cold prompt).

    Args:
        lengths: tokens.
        loads: tokens that wait at each worker; the first is this server.
        moving: tokens computed in the time that the value of one token takes from any
            other worker to here.

    Returns:
        The worker of each segment.
    """
    ends, workers = list(loads), [0] * len(lengths)
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        away = lengths[i] * moving
        workers[i] = min(range(len(ends)), key=lambda at: (ends[at] + (away if at else 0.0), at))
        ends[workers[i]] += lengths[i]
    return workers
