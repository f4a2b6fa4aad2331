"""Values on their way from the store: read ahead, then filled in piece by piece.

The front asks for them and comes again until they are here or will not come
(``server.fetching``). On the scheduler's thread nothing waits for the store; places are
reserved and filled, so many bytes a time. Of several tensor-parallel ranks all take a
value, or none does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Generic, Protocol, TypeVar

from sglang_pic.forest.consensus import Group
from sglang_pic.store.reading import Read, Reader, Want

# Filled in at one command.
FILL_BYTES = 64 << 20
# A value's head, and what it may take beyond what is usual.
SLACK = 1 << 20

# What has become of one.
LOOKING, COMING, HERE, GONE = "looking", "coming", "here", "gone"
# Another request brought it.
CAME_MEANWHILE = "came_meanwhile"
# Why it has not come.
NO_ROOM, UNKNOWN = "no_room", "not_asked_for"

Saved = TypeVar("Saved")


class Filling(Protocol):
    """The place that one value goes to."""

    @property
    def is_full(self) -> bool: ...

    def fill(self, most: int) -> int:
        """Fill some of it, about ``most`` bytes; how many."""
        ...

    def keep(self, *, named: bool) -> bool:
        """It is full, and is held from now on; whether there is room. Else it is given
        back."""
        ...

    def give_back(self) -> None:
        """It is not wanted any more."""
        ...


@dataclasses.dataclass
class _Coming:
    """One that is wanted."""

    want: Want
    named: bool
    filling: Filling | None = None


class Coming(Generic[Saved]):
    """What one scheduler reads of one kind, by the names that it is held under.

    Args:
        is_held: whether one is.
        place: where a value goes; nowhere, if there is no room.
        come: told the name of a value that has been filled in.
    """

    def __init__(
        self,
        reader: Reader[Saved],
        ranks: Group,
        is_held: Callable[[str], bool],
        place: Callable[[Saved], Filling | None],
        come: Callable[[str], None],
    ):
        self._reader = reader
        self._ranks = ranks
        self._is_held = is_held
        self._place = place
        self._come = come
        self._coming: dict[str, _Coming] = {}

    def __len__(self) -> int:
        return len(self._coming)

    def begin(self, wants: Sequence[tuple[str, Want]], *, named: bool) -> None:
        """Read these, by name, unless they are on their way."""
        begun = []
        for name, want in wants:
            coming = self._coming.get(name)
            if coming is not None and coming.want.name == want.name:
                coming.named |= named
                continue
            self.drop(name)
            self._coming[name] = _Coming(want, named)
            begun.append(want)
        self._reader.begin(begun)

    def look(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """Go on with these; what has become of each, alike on all ranks.

        Returns:
            ``{"state", "reason", "seconds", "bytes"}`` each.
        """
        told = self._ranks.gather([self._told(name) for name in names])
        left, found = FILL_BYTES, []
        for i, name in enumerate(names):
            states = [one[i] for one in told]
            worst = next((one for one in states if one["state"] == GONE), None)
            if worst is not None:
                self.drop(name)
                found.append(worst)
                continue
            state = max(states, key=lambda one: (-_ORDER[one["state"]], one["seconds"]))
            if state["state"] == HERE and state["reason"] is None:
                state = {**state, "bytes": sum(one["bytes"] for one in states)}
                if left > 0:
                    state, spent = self._take(name, state, left)
                    left -= spent
                else:
                    state = {**state, "state": COMING}
            found.append(state)
        return found

    def _told(self, name: str) -> dict[str, Any]:
        """What this rank knows of one; ``HERE``: its value is."""
        coming = self._coming.get(name)
        read = self._reader.find(coming.want.name) if coming is not None else None
        if read is None and self._is_held(name):
            return {"state": HERE, "reason": CAME_MEANWHILE, "seconds": 0.0, "bytes": 0}
        if read is None:
            return {"state": GONE, "reason": UNKNOWN, "seconds": 0.0, "bytes": 0}
        state, reason = _state_of(read)
        return {"state": state, "reason": reason, "seconds": read.seconds, "bytes": read.nbytes}

    def _take(self, name: str, state: dict[str, Any], most: int) -> tuple[dict[str, Any], int]:
        """Fill some of a value's place; what has become of it then, and bytes filled."""
        coming, spent = self._coming[name], 0
        if coming.filling is None:
            read = self._reader.find(coming.want.name)
            assert read is not None and read.saved is not None
            coming.filling = self._place(read.saved)
        filling = coming.filling
        if filling is None:
            self.drop(name)
            return {**state, "state": GONE, "reason": NO_ROOM}, 0
        if not filling.is_full:
            spent = filling.fill(most)
        if not filling.is_full:
            return {**state, "state": COMING}, spent
        coming.filling = None
        self._come(coming.want.name)
        if not filling.keep(named=coming.named):
            state = {**state, "state": GONE, "reason": NO_ROOM}
        self.drop(name)
        return state, spent

    def drop(self, name: str) -> None:
        """Nobody waits for it any more: nothing of it is kept."""
        coming = self._coming.pop(name, None)
        if coming is None:
            return
        self._reader.drop(coming.want.name)
        if coming.filling is not None:
            coming.filling.give_back()

    def drop_all(self) -> None:
        """``drop`` every one."""
        for name in list(self._coming):
            self.drop(name)

    def clear(self) -> None:
        """Everything was flushed, reserved places too."""
        self._coming.clear()
        self._reader.clear()


# Of several ranks the one that is behind tells.
_ORDER = {LOOKING: 0, COMING: 1, HERE: 2}


def _state_of(read: Read[Any]) -> tuple[str, str | None]:
    if not read.done:
        return (COMING if read.known else LOOKING), None
    if read.problem is not None:
        return GONE, read.problem.reason
    return HERE, None
