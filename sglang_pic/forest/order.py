"""Who goes first when memory runs short.

GreedyDual-Size-Frequency (Cherkasova, HP Labs 98-69; Cao and Irani, USITS 1997):

    value = age + (uses - 1) * cost / bytes

``cost`` is what one use saves, in FLOPs; ``age`` is the highest value evicted so
far, so that what was once useful and is no longer asked for sinks below what
comes in new. ``uses - 1``: what was used once only has the value of its age. So
a stream of things seen once replaces itself and displaces nothing that was used
twice, which is the second-touch rule of TinyLFU's doorkeeper (arXiv 1512.00727)
without a filter of its own. Uses are capped as TinyLFU's counters are, or what
was hot once would stay for as long again.

Among equals the least recently used goes first. There is no clock but the calls
themselves: the same calls make the same decisions on every rank.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Collection, Hashable, Iterator
from typing import Generic, TypeVar

MAX_USES = 15

Key = TypeVar("Key", bound=Hashable)


@dataclasses.dataclass
class Entry:
    """One thing that can be evicted.

    Attributes:
        group: kind of thing; some memory is wanted from some groups only.
        cost: FLOPs that one use of it saves.
        nbytes: bytes that evicting it frees.
        uses: requests that used it, the one that made it included.
        value: see the module; never falls, unless it is appraised.
        last_use: tick of the order's clock.
    """

    group: str
    cost: float
    nbytes: int
    uses: int
    value: float
    last_use: int


class EvictionOrder(Generic[Key]):
    """A heap by value for each group. An entry is either a *candidate*, in its
    heap, or parked (in use, or with others that depend on it) until ``offer``
    makes it one.

    Every operation costs O(log n), counted over all of them: a value that rose
    since its entry was put into the heap is corrected when it comes up.
    """

    def __init__(self) -> None:
        self._entries: dict[Key, Entry] = {}
        self._heaps: dict[str, list[tuple[float, int, int, Key]]] = {}
        self._queued: dict[Key, int] = {}
        self._clock = 0
        self._pushes = 0
        self.age = 0.0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: Key) -> bool:
        return key in self._entries

    def __iter__(self) -> Iterator[Key]:
        return iter(self._entries)

    def get(self, key: Key) -> Entry | None:
        return self._entries.get(key)

    def uses(self, key: Key) -> int:
        """Uses counted of an entry.

        Raises:
            KeyError: it is not there.
        """
        return self._entries[key].uses

    def add(self, key: Key, group: str, *, cost: float, nbytes: int, uses: int = 1) -> Entry:
        """A new entry, parked.

        Raises:
            KeyError: it is there already.
        """
        if key in self._entries:
            raise KeyError(key)
        entry = Entry(group, cost, nbytes, min(uses, MAX_USES), self.age, self._tick())
        self._entries[key] = entry
        self._revalue(entry)
        return entry

    def resize(self, key: Key, *, cost: float, nbytes: int) -> None:
        """What it saves or holds has changed; its value does not fall by that."""
        entry = self._entries[key]
        entry.cost, entry.nbytes = cost, nbytes
        self._revalue(entry)

    def appraise(self, key: Key, cost: float) -> None:
        """It is known what all uses to come of it save; its value may fall by that."""
        entry = self._entries[key]
        entry.value = self.age + cost / max(1, entry.nbytes)
        entry.last_use = self._tick()
        if key in self._queued:
            self._push(key)

    def least(self) -> float:
        """What the candidate of least value is above its age, per byte; 0 without one."""
        tops = [top for group in self._heaps if (top := self._top(group)) is not None]
        return max(0.0, min(tops)[0] - self.age) if tops else 0.0

    def use(self, key: Key) -> None:
        """One more request used it."""
        entry = self._entries[key]
        entry.uses = min(entry.uses + 1, MAX_USES)
        entry.last_use = self._tick()
        self._revalue(entry)

    def offer(self, key: Key) -> None:
        """Make it a candidate; nothing where it is one, or is unknown."""
        if key in self._entries and key not in self._queued:
            self._push(key)

    def withdraw(self, key: Key) -> None:
        """It is no candidate until it is offered again."""
        self._queued.pop(key, None)

    def park(self, groups: Collection[str] | None = None) -> Key | None:
        """Take the candidate of least value out of its heap.

        Args:
            groups: whose candidates to choose from; all by default.

        Returns:
            Its key, or ``None`` if there is no candidate. The caller evicts it
            (``evicted``) or leaves it parked.
        """
        chosen = self._heaps.keys() if groups is None else groups
        tops = [top for group in chosen if (top := self._top(group)) is not None]
        if not tops:
            return None
        key = min(tops)[3]
        del self._queued[key]
        return key

    def _top(self, group: str) -> tuple[float, int, int, Key] | None:
        """The group's least candidate, as it stands in the heap."""
        heap = self._heaps.get(group, [])
        while heap:
            value, last_use, push, key = heap[0]
            if self._queued.get(key) == push:
                entry = self._entries[key]
                if (entry.value, entry.last_use) == (value, last_use):
                    return heap[0]
                self._push(key)
            heapq.heappop(heap)
        return None

    def evicted(self, key: Key) -> Entry:
        """It went for want of memory: what comes in from now on starts at its value."""
        entry = self.remove(key)
        self.age = max(self.age, entry.value)
        return entry

    def remove(self, key: Key) -> Entry:
        """It is gone for another reason.

        Raises:
            KeyError: it is not there.
        """
        self._queued.pop(key, None)
        entry = self._entries.pop(key)
        heap = self._heaps.get(entry.group, [])
        if len(heap) > 64 + 2 * len(self._queued):
            heap[:] = [one for one in heap if self._queued.get(one[3]) == one[2]]
            heapq.heapify(heap)
        return entry

    def clear(self) -> None:
        """Forget everything, the age included."""
        self.__init__()  # type: ignore[misc]

    def _tick(self) -> int:
        self._clock += 1
        return self._clock

    def _revalue(self, entry: Entry) -> None:
        gain = max(0, entry.uses - 1) * entry.cost / max(1, entry.nbytes)
        entry.value = max(entry.value, self.age + gain)

    def _push(self, key: Key) -> None:
        entry = self._entries[key]
        self._pushes += 1
        self._queued[key] = self._pushes
        heap = self._heaps.setdefault(entry.group, [])
        heapq.heappush(heap, (entry.value, entry.last_use, self._pushes, key))
