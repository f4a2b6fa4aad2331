"""The last reports, for clients that drop what they do not know of an answer."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from typing import Any

import orjson

# Salts are a client's to choose where no keys are mapped to them, so all are bounded too.
MOST_OF_TENANT, BYTES_OF_TENANT = 512, 8 << 20
MOST, BYTES = 4096, 64 << 20

_Key = tuple[str, str]


@dataclasses.dataclass
class _Held:
    reports: int = 0
    bytes: int = 0

    def add(self, count: int, size: int) -> None:
        self.reports += count
        self.bytes += size


class Reports:
    """Reports by tenant and id, the oldest forgotten first.

    Args:
        most_of_tenant, bytes_of_tenant: what one tenant may hold.
        most, bytes_: the same of all.
    """

    def __init__(
        self,
        *,
        most_of_tenant: int = MOST_OF_TENANT,
        bytes_of_tenant: int = BYTES_OF_TENANT,
        most: int = MOST,
        bytes_: int = BYTES,
    ):
        self._bound = _Held(most, bytes_)
        self._bound_of_tenant = _Held(most_of_tenant, bytes_of_tenant)
        self._held = _Held()
        self._held_by: dict[str, _Held] = {}
        self._by_tenant: dict[str, OrderedDict[str, None]] = {}
        self._reports: OrderedDict[_Key, bytes] = OrderedDict()

    def keep(self, salt: str | None, id: str, report: Any) -> None:
        """Keep the report of an answer, in place of an older one of that id."""
        tenant = salt or ""
        self._forget(tenant, id)
        made = orjson.dumps(report)
        size = len(made) + len(id) + len(tenant)
        if _exceeds(_Held(1, size), self._bound_of_tenant):
            return
        self._reports[tenant, id] = made
        self._by_tenant.setdefault(tenant, OrderedDict())[id] = None
        held = self._held_by.setdefault(tenant, _Held())
        held.add(1, size)
        self._held.add(1, size)
        while _exceeds(held, self._bound_of_tenant):
            self._forget(tenant, next(iter(self._by_tenant[tenant])))
        while _exceeds(self._held, self._bound):
            self._forget(*next(iter(self._reports)))

    def find(self, salt: str | None, id: str) -> Any:
        """The report of a tenant's answer; ``None`` if there is none, or no longer."""
        made = self._reports.get((salt or "", id))
        return None if made is None else orjson.loads(made)

    def _forget(self, tenant: str, id: str) -> None:
        made = self._reports.pop((tenant, id), None)
        if made is None:
            return
        size = len(made) + len(id) + len(tenant)
        self._held.add(-1, -size)
        self._held_by[tenant].add(-1, -size)
        del self._by_tenant[tenant][id]
        if not self._by_tenant[tenant]:
            del self._by_tenant[tenant], self._held_by[tenant]


def _exceeds(held: _Held, bound: _Held) -> bool:
    return held.reports > bound.reports or held.bytes > bound.bytes


last_reports = Reports()
