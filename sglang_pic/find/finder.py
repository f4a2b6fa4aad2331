"""What of one tenant's prompts is worth a segment: the chunks that recur, and of those the
ones that are compiled."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from sglang_pic.find.base import Cut
from sglang_pic.find.seen import Named, Seen, named
from sglang_pic.find.sketch import Names, Sketch
from sglang_pic.find.worth import IDLE_PRICE, apart, worth


@dataclasses.dataclass(frozen=True)
class Looked:
    """What was found in a prompt.

    Attributes:
        cuts: all that it may be cut into, in tokens.
        names: of each.
        times: how often each has come again.
        linked: indices of those to link, in the prompt's order, apart.
        wanted: indices of those to compile when there is nothing else to do.
    """

    cuts: Sequence[Cut]
    names: Named
    times: npt.NDArray[np.int64]
    linked: Sequence[int]
    wanted: Sequence[int]


class Finder:
    """One tenant's: some 1.4 MB, whatever it sends."""

    def __init__(self) -> None:
        self._seen = Seen()
        self._ready = Sketch()

    @property
    def nbytes(self) -> int:
        return self._seen.nbytes + self._ready.nbytes

    def look(
        self,
        ids: Sequence[int],
        cuts: Sequence[Cut],
        *,
        seam: int,
        most: int,
        owner: bytes = b"",
    ) -> Looked:
        """Find segments in a prompt; nothing is remembered of it.

        Args:
            cuts: of it, in tokens.
            seam: tokens at a segment's head that a link computes.
            most: segments at most.
            owner: which of the tenant's prompts it is one of, at most 16 bytes: nothing of
                one recurs in another's.
        """
        names = named(ids, cuts, owner)
        times = self._seen.recurred(names)
        if not times.any():
            return Looked(cuts, names, times, [], [])
        tokens = np.array([cut.end - cut.start for cut in cuts], dtype=np.int64)
        ready = (self._ready.times(names.chunks) > 0) & (times > 0) & (tokens > seam)
        linked = apart(cuts, ready | worth(times, tokens, seam, 1.0), seam, most)
        wanted = apart(cuts, ready | worth(times, tokens, seam, IDLE_PRICE), seam, most)
        left = set(linked)
        return Looked(
            cuts, names, times, linked, [i for i in wanted if i not in left and not ready[i]]
        )

    def came(self, looked: Looked, *, ordinary: bool) -> None:
        """Remember a prompt.

        Args:
            ordinary: nothing of it is linked, so that SGLang keeps it as a prefix.
        """
        self._seen.saw(looked.names, ordinary=ordinary)

    def compiled(self, chunks: Names) -> None:
        """Chunks of these names are compiled, or were just found to be."""
        self._ready.add(chunks)

    def is_ready(self, looked: Looked, index: int) -> bool:
        """Whether one of its cuts is compiled, as far as it is known."""
        return bool(self._ready.times(looked.names.chunks[[index]])[0])
