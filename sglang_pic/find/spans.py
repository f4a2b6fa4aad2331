"""Cuts in characters as cuts in tokens, by the rule ``whole``: the tokens are the prompt's
own, and one that lies across an edge belongs to no segment.

Which tokens a text has at its edges depends on what stands around it: a full stop may be one
with the line's end behind it. So a text is cut down to what lies between its first space and
its last, in front of which tokenizers of all kinds begin a token.
"""

from __future__ import annotations

import bisect
import itertools
import re
from collections.abc import Sequence

import numpy as np

from sglang_pic.find.base import Cut

# Characters at each end of a text among which there is a space, or its edge stays.
EDGE = 48
_SPACE = re.compile(r" (?=\S)")


def settled(text: str, cut: Cut) -> Cut:
    """What of a cut in characters has the same tokens wherever it stands."""
    first = _SPACE.search(text, cut.start + 1, min(cut.start + EDGE, cut.end))
    start = first.start() if first is not None else cut.start
    near = max(start + 1, cut.end - EDGE)
    last = text[near : cut.end - 1].rfind(" ")
    end = near + last if last >= 0 else cut.end
    return Cut(start, end, cut.rule)


def token_cuts(offsets: Sequence[tuple[int, int]], cuts: Sequence[Cut]) -> list[Cut]:
    """The tokens that lie entirely inside of each cut.

    Args:
        offsets: the characters ``[start, end)`` of each token, none for a token that no text
            stands for.
        cuts: in characters.

    Returns:
        As many, in tokens; empty where no token lies inside.
    """
    if not cuts:
        return []
    # Not ``asarray``, which takes a list of pairs three times as long.
    flat = itertools.chain.from_iterable(offsets)
    places = np.fromiter(flat, np.int64, 2 * len(offsets)).reshape(-1, 2)
    of_text = np.flatnonzero(places[:, 1] > places[:, 0])
    starts, ends = places[of_text, 0], places[of_text, 1]
    first = np.searchsorted(starts, [cut.start for cut in cuts], side="left")
    behind = np.searchsorted(ends, [cut.end for cut in cuts], side="right")
    made = []
    for cut, i, j in zip(cuts, first.tolist(), behind.tolist(), strict=True):
        inside = (int(of_text[i]), int(of_text[j - 1]) + 1) if i < j else (0, 0)
        made.append(Cut(*inside, cut.rule))
    return made


def beside(cuts: Sequence[Cut], taken: Sequence[tuple[int, int]]) -> Sequence[Cut]:
    """The cuts that overlap none of these ranges, which are sorted and apart."""
    if not taken:
        return cuts
    ends = [end for _, end in taken]
    kept = []
    for cut in cuts:
        i = bisect.bisect_right(ends, cut.start)
        if i == len(taken) or cut.end <= taken[i][0]:
            kept.append(cut)
    return kept
