"""Content-defined chunks of a prompt's tokens: cut where the last few tokens say so, and
nothing else does, so that a text is cut at the same places whatever stands before it.

A buzhash over a window of tokens, cut with the two masks of FastCDC (Xia et al., ATC 2016):
a stricter one before the average length, a looser one behind it.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

# Tokens that decide about a place, a power of two.
WINDOW = 16
# How many bits stricter, and looser, than the average length needs.
NORMAL = 2


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Of chunks, in tokens: the shortest but at a prompt's end, about the average (a power
    of two), the longest."""

    least: int = 64
    average: int = 128
    most: int = 512

    def __post_init__(self) -> None:
        if not WINDOW <= self.least < self.average < self.most:
            raise ValueError(f"{self}: must be at least {WINDOW}, and rise")
        if self.average & (self.average - 1):
            raise ValueError(f"{self}: the average must be a power of two")


LENGTHS = Lengths()


def chunks(ids: npt.ArrayLike, lengths: Lengths = LENGTHS) -> list[tuple[int, int]]:
    """Cut token ids.

    Args:
        ids: of shape ``[n]``, integers from 0.

    Returns:
        Token ranges ``[start, end)``, which cover all of them.
    """
    tokens = np.asarray(ids, dtype=np.uint64)
    n = len(tokens)
    bits = (lengths.average - lengths.least).bit_length()
    rolled = _rolled(tokens)
    # A chunk may end behind a token at which so many of the highest bits are zero.
    strict, loose = (
        np.flatnonzero(rolled >> np.uint64(64 - width) == 0) + 1
        for width in (bits + NORMAL, bits - NORMAL)
    )
    cut = []
    start = 0
    while start < n:
        end = _first(strict, start + lengths.least, start + lengths.average)
        if end is None:
            end = _first(loose, start + lengths.average, start + lengths.most)
        end = min(n, start + lengths.most if end is None else end)
        cut.append((start, end))
        start = end
    return cut


def _first(places: npt.NDArray[np.int64], least: int, most: int) -> int | None:
    """The first of sorted places in ``[least, most)``."""
    i = int(np.searchsorted(places, least))
    return int(places[i]) if i < len(places) and places[i] < most else None


def _rolled(tokens: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Buzhash of the window that ends at each token, in log2 of its width passes: what ends
    here of twice the width is what ends here of the width, and what ended so much before,
    turned by as many bits."""
    rolled = _scattered(tokens)
    width = 1
    while width < WINDOW:
        before = rolled[:-width] if len(rolled) > width else rolled[:0]
        rolled = rolled.copy()
        rolled[width:] ^= before << np.uint64(width) | before >> np.uint64(64 - width)
        width *= 2
    return rolled


def _scattered(tokens: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """64 bits for each token, as splitmix64 scatters them."""
    with np.errstate(over="ignore"):
        z = (tokens + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))
