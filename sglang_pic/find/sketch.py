"""How often names were seen, in memory of a fixed size; what was long ago counts for less.

A table of sets of a few places each, as a processor's cache has them: a name that finds its
set full replaces the one that counts least.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Names = npt.NDArray[np.uint64]

WAYS = 8
# What was seen so many additions ago counts for half; more often than this, for this.
HALF_LIFE, MOST = 256, 15


class Sketch:
    """Counts of 64-bit names.

    Args:
        size: names that it may hold, a multiple of ``WAYS``; 14 bytes each.
    """

    def __init__(self, size: int = 32768):
        self._sets = size // WAYS
        self._names = np.zeros((self._sets, WAYS), dtype=np.uint64)
        self._counts = np.zeros((self._sets, WAYS), dtype=np.uint16)
        self._last = np.zeros((self._sets, WAYS), dtype=np.uint32)
        self._clock = 0

    @property
    def nbytes(self) -> int:
        """What it holds, however much it has seen."""
        return self._names.nbytes + self._counts.nbytes + self._last.nbytes

    def times(self, names: Names) -> npt.NDArray[np.int64]:
        """How often each was seen, of late."""
        sets = self._set_of(names)
        here = self._names[sets] == names[:, None]
        return np.where(here, self._decayed(sets), 0).sum(axis=1)

    def add(self, names: Names) -> None:
        """All of them were seen once more, or for the first time."""
        self._clock += 1
        sets = self._set_of(names)
        while len(names):
            # Of those that share a set one at a time.
            _, first = np.unique(sets, return_index=True)
            self._add_apart(names[first], sets[first])
            names, sets = np.delete(names, first), np.delete(sets, first)

    def _add_apart(self, names: Names, sets: npt.NDArray[np.intp]) -> None:
        here = self._names[sets] == names[:, None]
        counts = self._decayed(sets)
        known = here.any(axis=1)
        # The one that counts least, of these the one seen longest ago.
        weight = counts * (1 << 32) + self._last[sets]
        ways = np.where(known, here.argmax(axis=1), weight.argmin(axis=1))
        before = np.where(known, counts[np.arange(len(sets)), ways], 0)
        self._names[sets, ways] = names
        self._counts[sets, ways] = np.minimum(before + 1, MOST)
        self._last[sets, ways] = self._clock

    def _decayed(self, sets: npt.NDArray[np.intp]) -> npt.NDArray[np.int64]:
        ages = (self._clock - self._last[sets].astype(np.int64)) // HALF_LIFE
        return self._counts[sets].astype(np.int64) >> np.minimum(ages, 62)

    def _set_of(self, names: Names) -> npt.NDArray[np.intp]:
        return (names % np.uint64(self._sets)).astype(np.intp)
