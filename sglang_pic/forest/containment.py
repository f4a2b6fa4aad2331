"""Faults of ours inside methods of the cache that SGLang calls."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from sglang_pic.faults import faults

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

logger = logging.getLogger(__name__)

# A forest that has seen so many is trusted no more, whatever a check says of it: each
# check looks at all that is held.
MOST_FAULTS = 8


class Containment:
    """Ends a fault in the bookkeeping where it happens, and sees what it has left.

    Args:
        check: raises unless what is kept is sound. O(n), at most ``MOST_FAULTS`` times.
        refusal: why this server must not link at all, or ``None``.

    Attributes:
        refusal: why nothing is linked any more, or ``None``.
    """

    def __init__(self, check: Callable[[], None], refusal: str | None):
        self._check = check
        self.refusal = refusal
        self._faults = 0

    @contextlib.contextmanager
    def __call__(self, place: str, req: Req | None = None) -> Iterator[None]:
        try:
            yield
        except Exception:
            faults.note(place, [req.rid] if req is not None else ())
            self._faults += 1
            self._look()

    def _look(self) -> None:
        if self._faults > MOST_FAULTS:
            return
        if self._faults == MOST_FAULTS:
            self.distrust(f"{MOST_FAULTS} faults in the forest")
            return
        try:
            self._check()
        except Exception as error:
            self.distrust(f"a fault has left the forest corrupt: {error}")

    def distrust(self, why: str) -> None:
        """Link nothing from now on; what runs goes on, and every answer is exact."""
        if self.refusal is None:
            self.refusal = why
            logger.critical("sglang_pic links no more: %s", why)
