"""Values loaded by an operator's command, or at start, while the scheduler waits."""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from sglang_pic.errors import PicRefused
from sglang_pic.forest.consensus import Group
from sglang_pic.store.base import Problem, SegmentStore
from sglang_pic.store.value import BadValue

logger = logging.getLogger(__name__)

# How long such a command waits for one answer of the store.
ANSWER_S = 60.0
# Of a value whose length is not known.
MAX_VALUE = 4 << 30
LATE = "store_late"
NOT_THERE = "this rank's part is not there"
NO_ROOM = "it does not fit into what is free of the budgets"

T = TypeVar("T")
Saved = TypeVar("Saved")


@dataclasses.dataclass(frozen=True)
class Wanted:
    """A value to load: its name, ``None`` where this rank lacks it, the namespace it was
    looked for in, and the length of its path if that is known."""

    name: str | None
    salt: str
    tokens: int | None = None


@dataclasses.dataclass
class Loaded:
    """How many were loaded and were there before; of those that were not, the reason."""

    loaded: int = 0
    present: int = 0
    refused: list[dict[str, str]] = dataclasses.field(default_factory=list)


def within(seconds: float, call: Callable[[], T]) -> T | Problem:
    """What ``call`` returns, which raises nothing, unless it takes longer."""
    found: list[T] = []
    thread = threading.Thread(target=lambda: found.append(call()), daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0] if found else Problem(LATE, f"no answer in {seconds:g} s")


def read(
    store: SegmentStore,
    wanted: Wanted,
    most: Callable[[int], int],
    decode: Callable[[Any, str, str], Saved],
) -> Saved | str:
    """A value that this rank has, or why it cannot be used.

    Args:
        most: bytes of a value of so many tokens, at most.
        decode: what a value of a name and a namespace holds; raises ``BadValue``.
    """
    name = wanted.name
    assert name is not None
    limit = MAX_VALUE if wanted.tokens is None else most(wanted.tokens)
    value = within(ANSWER_S, lambda: store.get(name, limit))
    if isinstance(value, Problem):
        return str(value)
    try:
        return decode(value, name, wanted.salt)
    except BadValue as error:
        return str(error)
    except Exception as error:
        # The other ranks wait for what this one says.
        return f"it could not be read: {error!r}"


def everywhere(name: str) -> str:
    """The part of a value's name that is alike on all ranks."""
    return name.partition("-")[2]


def listed(store: SegmentStore, ranks: Group, group: str, salt: str) -> list[Wanted]:
    """What any rank has in the store under a group's names, in the same order on all.

    Raises:
        PicRefused: 409 of a store that lists nothing.
    """
    names = within(ANSWER_S, lambda: store.names(group))
    told = ranks.gather(names)
    problem = next((one for one in told if isinstance(one, Problem)), None)
    if problem is not None:
        raise PicRefused(409, f"the store cannot be listed: {problem}", "store")
    own = {everywhere(name): name for name in names} if isinstance(names, list) else {}
    parts = {everywhere(name) for of_rank in told if isinstance(of_rank, list) for name in of_rank}
    return [Wanted(own.get(part), salt) for part in sorted(parts)]


def load_all(
    ranks: Group,
    wanted: Sequence[Wanted],
    get: Callable[[Wanted], Saved | str],
    adopt: Callable[[Saved], tuple[bool, str | None]],
) -> Loaded:
    """Load values, in the same order on all ranks: by all of them, or by none.

    Args:
        get: a value, or why it cannot be used.
        adopt: take one over that all ranks have; whether it was held already, and why it
            cannot be, on all of them alike.
    """
    result = Loaded()
    for one in wanted:
        saved = get(one) if one.name is not None else NOT_THERE
        told = ranks.gather(saved if isinstance(saved, str) else None)
        problem = next((why for why in told if why is not None), None)
        if problem is None:
            assert not isinstance(saved, str)
            held, problem = adopt(saved)
            result.present += held and problem is None
            result.loaded += not held and problem is None
        if problem is not None:
            logger.warning("sglang_pic: %s is not loaded: %s", one.name, problem)
            result.refused.append({"file": one.name or "", "reason": problem})
    return result
