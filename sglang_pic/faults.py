"""Faults of ours on the scheduler's thread: contained, counted, told.

The scheduler is SGLang's and everybody's: an error in what we add to it must not
end it. Each hook, and each method of the tree cache that SGLang calls, runs what is
ours in here; what it does then is its own to say.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable

logger = logging.getLogger(__name__)


class Faults:
    """What went wrong in this process.

    Attributes:
        counts: faults by the place they were contained in.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def note(self, place: str, rids: Iterable[str] = ()) -> None:
        """Count and log the exception that is being handled; ``rids`` names the
        requests it was about."""
        self.counts[place] += 1
        about = ", ".join(rids) or "no request"
        logger.exception("sglang_pic: fault in %s, contained; it was about %s", place, about)


faults = Faults()
