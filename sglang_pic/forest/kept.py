"""What is carried beside pages: in one budget of bytes, and one order of eviction.

States of compiled segments, of turns and checkpoints (``linear.states``), and what an
encoder has made of documents (``forest.encoded``), by name. What goes is what saves least
for its bytes, in the same order as of pages (``forest.order``). A request holds what it uses
itself, so that nothing in use disappears; the budget counts what is held here.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from typing import Any, Protocol

from sglang_pic.errors import PicIntegrityError
from sglang_pic.forest.order import EvictionOrder

logger = logging.getLogger(__name__)


class Sized(Protocol):
    """Anything that is kept: whose it is, the bytes that it takes, and those that it counts
    for, which are alike on all tensor-parallel ranks."""

    @property
    def owner(self) -> tuple[str, ...]: ...

    @property
    def nbytes(self) -> int: ...

    @property
    def counted(self) -> int: ...


class Kept:
    """Things by name, within a budget.

    Args:
        budget: bytes.
        on_evict: told the name of what had to go.
        on_shortage: asked to ``release`` what was held back.
    """

    def __init__(
        self,
        budget: int,
        on_evict: Callable[[str], None] = lambda _: None,
        on_shortage: Callable[[], None] = lambda: None,
    ):
        self._on_evict = on_evict
        self._on_shortage = on_shortage
        self._things: dict[str, Any] = {}
        self._order: EvictionOrder[str] = EvictionOrder()
        self._pinned: set[str] = set()
        # What each group holds; kept, since clients pin, and all of it is read at every step.
        self._groups: dict[str, dict[str, None]] = {}
        self._bytes_of_group: Counter[str] = Counter()
        self.budget = budget
        self.nbytes = 0
        self.pinned_bytes = 0
        self.evicted = 0

    def get(self, name: str) -> Any:
        """What is kept under a name, whoever's it is; ``None`` if nothing is."""
        return self._things.get(name)

    def held(self, name: str, owner: tuple[str, ...]) -> Any:
        """What is kept under a name, if it is this owner's; else ``None``."""
        held = self._things.get(name)
        return held if held is not None and held.owner == owner else None

    def names(self, group: str) -> list[str]:
        """Of all of a group."""
        return list(self._groups.get(group, ()))

    def count(self, group: str) -> int:
        """How many a group holds."""
        return len(self._groups.get(group, ()))

    def use(self, name: str) -> None:
        """A request uses it."""
        if name in self._things:
            self._order.use(name)

    def put(
        self,
        name: str,
        thing: Sized,
        *,
        cost: float,
        group: str,
        uses: int = 1,
        offer: bool = True,
        evict: bool = True,
    ) -> bool:
        """Keep something, in the place of what is kept under its name.

        Args:
            cost: FLOPs that one use of it saves.
            group, uses: its kind of thing, and as in ``EvictionOrder.add``.
            offer: it may go at once, or from ``release`` on.
            evict: others may go for it.

        Returns:
            Whether it fits; if not, what was held under its name stays as it was.
        """
        pinned = name in self._pinned
        held = self._things.get(name)
        more = thing.counted - (held.counted if held is not None else 0)
        if not evict and self.nbytes + more > self.budget:
            return False
        if held is not None:
            # What it replaces must not go to make room for it, and stays if none is.
            self._pin(name, on=True)
        fits = self._make_room(more)
        if not pinned:
            self._pin(name, on=False)
        if not fits:
            logger.warning(
                "sglang_pic: a %s of %d bytes beside pages does not fit and is not kept",
                group,
                thing.counted,
            )
            if held is not None and not pinned:
                self._order.offer(name)
            return False
        self.drop(name)
        self._things[name] = thing
        self.nbytes += thing.counted
        self._groups.setdefault(group, {})[name] = None
        self._bytes_of_group[group] += thing.counted
        self._order.add(name, group, cost=cost, nbytes=thing.counted, uses=uses)
        if pinned:
            self._pin(name, on=True)
        elif offer:
            self._order.offer(name)
        return True

    def hold_back(self, name: str) -> None:
        """It may go from ``release`` on."""
        self._order.withdraw(name)

    def release(self, name: str) -> None:
        """What was held back may go."""
        self._order.offer(name)

    def _make_room(self, nbytes: int) -> bool:
        if nbytes > self.budget - self.pinned_bytes:
            return False
        while self.nbytes + nbytes > self.budget:
            victim = self._order.park()
            if victim is None:
                self._on_shortage()
                victim = self._order.park()
            if victim is None:
                return False
            if victim in self._pinned:
                continue
            self._forget(victim)
            self._order.evicted(victim)
            self.evicted += 1
            self._on_evict(victim)
        return True

    def appraise(self, name: str, cost: float) -> None:
        """It is known what all uses to come of it save, in FLOPs."""
        if name in self._things:
            self._order.appraise(name, cost)

    def price(self, nbytes: int) -> float:
        """FLOPs that making room for so much costs: what goes for it would have saved."""
        if self.nbytes + nbytes <= self.budget:
            return 0.0
        return self._order.least() * nbytes

    def pin(self, name: str) -> None:
        """Keep it, if it is here, until ``unpin``."""
        if name in self._things:
            self._pin(name, on=True)

    def unpin(self, name: str) -> None:
        """It may go again."""
        self._pin(name, on=False)
        self._order.offer(name)

    def _pin(self, name: str, *, on: bool) -> None:
        if on and name not in self._pinned:
            self._pinned.add(name)
            self.pinned_bytes += self.nbytes_of(name)
        elif not on and name in self._pinned:
            self._pinned.remove(name)
            self.pinned_bytes -= self.nbytes_of(name)

    def drop(self, name: str) -> None:
        """Forget it, if it is here."""
        if name in self._things:
            self._forget(name)
            self._order.remove(name)

    def _forget(self, name: str) -> None:
        self._pin(name, on=False)
        nbytes = self._things.pop(name).counted
        self.nbytes -= nbytes
        entry = self._order.get(name)
        assert entry is not None
        del self._groups[entry.group][name]
        self._bytes_of_group[entry.group] -= nbytes

    def clear(self) -> None:
        self._things.clear()
        self._order.clear()
        self._pinned.clear()
        self._groups.clear()
        self._bytes_of_group.clear()
        self.nbytes = self.pinned_bytes = 0

    def nbytes_of(self, name: str) -> int:
        """Bytes that what is kept under a name counts for."""
        thing = self._things.get(name)
        return thing.counted if thing is not None else 0

    def bytes_of_group(self, group: str) -> int:
        """Bytes held for all of a group."""
        return self._bytes_of_group[group]

    @property
    def packed_bytes(self) -> int:
        """Bytes that all of it takes, at most ``nbytes``. O(n)."""
        return sum(one.nbytes for one in self._things.values())

    def check(self) -> None:
        """Raise ``PicIntegrityError`` unless sums, order and budget hold."""
        if set(self._order) != set(self._things) or not self._pinned <= set(self._things):
            raise PicIntegrityError("what is kept and its eviction order differ")
        if self.nbytes != sum(one.counted for one in self._things.values()):
            raise PicIntegrityError("the bytes of what is kept do not add up")
        if self.pinned_bytes != sum(map(self.nbytes_of, self._pinned)):
            raise PicIntegrityError("the bytes of what is pinned do not add up")
        if sorted(self._things) != sorted(name for one in self._groups.values() for name in one):
            raise PicIntegrityError("what is kept and its groups differ")
        for group, names in self._groups.items():
            if self._bytes_of_group[group] != sum(map(self.nbytes_of, names)):
                raise PicIntegrityError(f"the bytes of {group} do not add up")
        if self.nbytes > self.budget:
            raise PicIntegrityError(f"{self.nbytes} bytes are kept, more than {self.budget}")
