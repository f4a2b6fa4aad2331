"""Cuts in characters as cuts in tokens, by the rule ``whole``: the tokens are the prompt's
own, and one that lies across an edge belongs to no segment."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from sglang_pic.find.base import Cut


def token_cuts(offsets: npt.ArrayLike, cuts: Sequence[Cut]) -> list[Cut]:
    """The tokens that lie entirely inside of each cut.

    Args:
        offsets: of shape ``[n, 2]``, the characters ``[start, end)`` of each token, none for
            a token that no text stands for.
        cuts: in characters.

    Returns:
        As many, in tokens; empty where no token lies inside.
    """
    places = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
    of_text = np.flatnonzero(places[:, 1] > places[:, 0])
    starts, ends = places[of_text, 0], places[of_text, 1]
    first = np.searchsorted(starts, [cut.start for cut in cuts], side="left")
    behind = np.searchsorted(ends, [cut.end for cut in cuts], side="right")
    made = []
    for cut, i, j in zip(cuts, first.tolist(), behind.tolist(), strict=True):
        inside = (int(of_text[i]), int(of_text[j - 1]) + 1) if i < j else (0, 0)
        made.append(Cut(*inside, cut.rule))
    return made
