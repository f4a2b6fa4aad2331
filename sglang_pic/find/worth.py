"""Which of the chunks that recur are worth it, and which of those that overlap are taken."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from sglang_pic.find.base import Cut

# What a token costs that is compiled when there is nothing else to do.
IDLE_PRICE = 0.5


def worth(
    times: npt.NDArray[np.int64], tokens: npt.NDArray[np.int64], seam: int, price: float
) -> npt.NDArray[np.bool_]:
    """Whether chunks are worth compiling: a chunk is expected to come again as often as it
    has, which saves what is behind its seam; compiling computes all of it, once.

    Args:
        times: how often each has come again.
        tokens: of each.
        seam: tokens at its head that every link computes.
        price: of a token that is compiled, in tokens that are saved.
    """
    return (times > 0) & (times * np.maximum(0, tokens - seam) >= price * tokens)


def apart(cuts: Sequence[Cut], eligible: npt.NDArray[np.bool_], seam: int, most: int) -> list[int]:
    """Indices of eligible cuts that do not overlap and together save the most tokens, in the
    order of the prompt.

    Args:
        cuts: longer than a seam where they are eligible.
        most: so many at most, the longest.
    """
    order = sorted(np.flatnonzero(eligible).tolist(), key=lambda i: cuts[i].end)
    ends = [cuts[i].end for i in order]
    # Of the first so many in this order: the most that is saved.
    saved = [0]
    before = []
    for n, i in enumerate(order):
        start, end, _ = cuts[i]
        before.append(bisect.bisect_right(ends, start, hi=n))
        saved.append(max(saved[n], saved[before[n]] + end - start - seam))
    chosen = []
    n = len(order)
    while n:
        if saved[n] == saved[n - 1]:
            n -= 1
        else:
            chosen.append(order[n - 1])
            n = before[n - 1]
    longest = sorted(chosen, key=lambda i: cuts[i].start - cuts[i].end)[:most]
    return sorted(longest, key=lambda i: cuts[i].start)
