"""Whose compile is next: tenants in turn; of one tenant's, the most urgent first,
and of those as urgent its requests in turn."""

from __future__ import annotations

import dataclasses
import heapq
import itertools
from collections import OrderedDict
from collections.abc import Hashable, Iterable
from typing import Generic, TypeVar

Item = TypeVar("Item", bound=Hashable)


@dataclasses.dataclass
class _Tenant(Generic[Item]):
    """What one tenant has waiting and under way.

    Attributes:
        heap: (urgency, turn, number, item), with entries that have been moved or
            removed among them.
        places: of what waits, the entry that counts.
        clock: turn of what was last taken: a request that comes begins with the next,
            so that it stands behind nobody's whole list, and nobody's end behind all
            that come later.
    """

    heap: list[tuple[int, int, int, Item]] = dataclasses.field(default_factory=list)
    places: dict[Item, tuple[int, int, int]] = dataclasses.field(default_factory=dict)
    clock: int = 0
    taken: int = 0


class FairQueue(Generic[Item]):
    """A bounded queue of items by tenant, some of which are under way.

    Args:
        most: items under way at a time.
        most_of_tenant: the same of one tenant.
        length: items of one tenant that may wait.
    """

    def __init__(self, most: int, most_of_tenant: int, length: int):
        self.most = most
        self._most_of_tenant = most_of_tenant
        self._length = length
        self._tenants: OrderedDict[str | None, _Tenant[Item]] = OrderedDict()
        self._taken = 0
        self._numbers = itertools.count()

    def add(self, items: Iterable[Item], tenant: str | None, urgency: int) -> list[Item]:
        """Queue the items of one request, none of them queued already.

        Args:
            urgency: the lowest goes first.

        Returns:
            Those for which there was room: the first ones.
        """
        queue = self._tenants.setdefault(tenant, _Tenant())
        room = max(0, self._length - len(queue.places))
        added = list(itertools.islice(items, room))
        for turn, item in enumerate(added, queue.clock + 1):
            self._place(queue, item, (urgency, turn, next(self._numbers)))
        self._forget(tenant)
        return added

    def _place(self, queue: _Tenant[Item], item: Item, place: tuple[int, int, int]) -> None:
        queue.places[item] = place
        heapq.heappush(queue.heap, (*place, item))

    def move(self, item: Item, tenant: str | None, urgency: int) -> None:
        """What waits is now this urgent."""
        queue = self._tenants[tenant]
        former, *rest = queue.places[item]
        if urgency != former:
            self._place(queue, item, (urgency, rest[0], rest[1]))

    def remove(self, item: Item, tenant: str | None) -> None:
        """Nobody waits for it any more."""
        del self._tenants[tenant].places[item]
        self._forget(tenant)

    def take(self) -> Item | None:
        """The next item to send, or ``None``: nothing waits that may be under way now."""
        if self._taken == self.most:
            return None
        most = self._most_of_tenant
        ready = [key for key, one in self._tenants.items() if one.places and one.taken < most]
        if not ready:
            return None
        queue = self._tenants[ready[0]]
        self._tenants.move_to_end(ready[0])
        while True:
            *place, item = heapq.heappop(queue.heap)
            if queue.places.get(item) == tuple(place):
                break
        del queue.places[item]
        queue.clock = max(queue.clock, place[1])
        queue.taken += 1
        self._taken += 1
        return item

    def done(self, tenant: str | None) -> None:
        """An item that was taken has ended."""
        self._tenants[tenant].taken -= 1
        self._taken -= 1
        self._forget(tenant)

    def _forget(self, tenant: str | None) -> None:
        queue = self._tenants[tenant]
        if not queue.places and not queue.taken:
            del self._tenants[tenant]
        elif len(queue.heap) > 2 * len(queue.places) + 64:
            queue.heap = [(*place, item) for item, place in queue.places.items()]
            heapq.heapify(queue.heap)

    def __len__(self) -> int:
        return sum(len(queue.places) for queue in self._tenants.values())
