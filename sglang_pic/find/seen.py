"""What recurs in one tenant's prompts.

A chunk recurs where it stands behind other tokens than before. What stands behind the very
tokens that it has stood behind is SGLang's prefix cache's to reuse, which is exact.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sglang_pic.find.base import Cut
from sglang_pic.find.sketch import Names, Sketch


class Named(NamedTuple):
    """Names of the cuts of a prompt.

    Attributes:
        chunks: of each, of its tokens.
        places: of each, of its tokens and all that stand before them.
    """

    chunks: Names
    places: Names


def named(ids: Sequence[int], cuts: Sequence[Cut], owner: bytes = b"") -> Named:
    """Name what stands in each of the cuts, in tokens.

    Args:
        owner: at most 16 bytes; the same tokens of another have another name.
    """
    tokens = np.asarray(ids, dtype=np.int32)
    raw = memoryview(tokens.tobytes())
    blank = hashlib.blake2b(digest_size=8, person=owner)
    chunks = []
    for a, b, _ in cuts:
        chunk = blank.copy()
        chunk.update(raw[4 * a : 4 * b])
        chunks.append(_name(chunk))
    places = {}
    before = blank.copy()
    at = 0
    for end in sorted({cut.end for cut in cuts}):
        before.update(raw[4 * at : 4 * end])
        places[end] = _name(before.copy())
        at = end
    return Named(
        np.array(chunks, dtype=np.uint64),
        np.array([places[cut.end] for cut in cuts], dtype=np.uint64),
    )


def _name(digest: hashlib.blake2b) -> int:
    # Zero stands for an empty place of a sketch.
    return int.from_bytes(digest.digest(), "little") or 1


class Seen:
    """One tenant's: some 0.9 MB, whatever it sends."""

    def __init__(self) -> None:
        self._chunks = Sketch()
        self._places = Sketch()

    @property
    def nbytes(self) -> int:
        return self._chunks.nbytes + self._places.nbytes

    def recurred(self, names: Named) -> npt.NDArray[np.int64]:
        """How often each chunk has been seen again, should it be seen here, but where it
        stood before; 0 for what is the prefix cache's."""
        known = self._places.times(names.places) > 0
        return np.where(known, 0, self._chunks.times(names.chunks))

    def saw(self, names: Named, *, ordinary: bool) -> None:
        """A prompt came.

        Args:
            ordinary: SGLang keeps all of it as a prefix. Of a linked one it does not.
        """
        new = self._places.times(names.places) == 0
        self._chunks.add(names.chunks[new])
        if ordinary:
            self._places.add(names.places)
