"""Pins: segments that stay until they are unpinned.

A pin is a lock on the segment's path, as a running request would hold, so that
SGLang's own counts know of it. How long it lasts is decided by the front, once
for all ranks (``server.pins``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from sglang_pic.forest.budget import Budgets, Need


@dataclasses.dataclass(frozen=True)
class Pin:
    """One pinned segment: whose, what it holds, and how to let go of it."""

    salt: str
    need: Need
    release: Callable[[], None]


class Pins:
    """All pins of one server, within their quotas."""

    def __init__(self, budgets: Budgets):
        self._budgets = budgets
        self._pins: dict[str, Pin] = {}

    def __len__(self) -> int:
        return len(self._pins)

    def __contains__(self, segment: object) -> bool:
        return segment in self._pins

    def add(self, segment: str, salt: str, need: Need, hold: Callable[[], Any]) -> None:
        """Pin a segment; nothing where it is pinned.

        Args:
            hold: takes the lock and returns how to give it back; called only if
                the quotas allow it.

        Raises:
            PicRefused: 507, a quota does not.
        """
        if segment not in self._pins:
            self._budgets.check_pin(need, self.held(salt), self.held())
            self._pins[segment] = Pin(salt, need, hold())

    def remove(self, segment: str) -> None:
        """Unpin a segment; nothing where it is not pinned."""
        pin = self._pins.pop(segment, None)
        if pin is not None:
            pin.release()

    def clear(self) -> None:
        """The trees were emptied, their locks with them."""
        self._pins.clear()

    def held(self, salt: str | None = None) -> Need:
        """Pinned bytes of one namespace, or of all. Pages that two pinned segments
        share count twice."""
        total = Need(0, 0)
        for pin in self._pins.values():
            if salt in (None, pin.salt):
                total += pin.need
        return total
