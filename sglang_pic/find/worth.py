"""Which of the chunks that recur are worth it, and which of those that overlap are taken."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from sglang_pic.find.base import Cut

# What a token costs that is computed when there is nothing else to do.
IDLE_PRICE = 0.5


def worth(
    times: npt.NDArray[np.int64], tokens: npt.NDArray[np.int64], seam: int
) -> npt.NDArray[np.bool_]:
    """Whether chunks are worth compiling in idle time: a chunk is expected to come again as
    often as it has, which saves what is behind its seam; compiling computes all of it, once.

    Args:
        times: how often each has come again.
        tokens: of each.
        seam: tokens at its head that every link computes.
    """
    return times * np.maximum(0, tokens - seam) >= np.where(times, IDLE_PRICE * tokens, np.inf)


def apart(cuts: Sequence[Cut], eligible: Sequence[bool], most: int) -> list[int]:
    """Indices of eligible cuts that do not overlap, the longest first: one long segment has
    one seam. In the order of the prompt.

    Args:
        most: so many at most.
    """
    order = sorted(
        (i for i, good in enumerate(eligible) if good),
        key=lambda i: (cuts[i].start - cuts[i].end, cuts[i].start),
    )
    taken: list[tuple[int, int]] = []
    chosen: list[tuple[int, int]] = []
    for i in order:
        if len(chosen) == most:
            break
        start, end, _ = cuts[i]
        at = bisect.bisect_left(taken, (start, end))
        if (at and taken[at - 1][1] > start) or (at < len(taken) and taken[at][0] < end):
            continue
        taken.insert(at, (start, end))
        chosen.append((start, i))
    return [i for _, i in sorted(chosen)]
