"""``Segments``: which segments there are.

Names, owners, tokens and uses of what was compiled, of every tenant, and which of it
waits for a link that is on its way. Where their pages are is ``pages``' matter, who
goes first is ``order``'s: nothing here knows a tensor.
"""

from __future__ import annotations

import dataclasses
from array import array
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

from cachetools import LRUCache

from sglang_pic.errors import PicIntegrityError
from sglang_pic.forest.keys import namespace, owner_of, segment_id

# Segments remembered that are held no longer: for what they had been used, and why a
# lookup does not find them.
MAX_FORMER = 4096
# Such a link that has not come after so many others will not come.
FRESH_TICKS = 256
# Compiled by name, a segment begins as if it had been used twice.
NAMED_USES = 2
_NO_TOKENS = array("q")


@dataclasses.dataclass
class SegmentRecord:
    """What is remembered of a compiled segment, held or not.

    Attributes:
        path: compile context plus segment; empty where its pages are gone, or what was
            compiled once would take memory for good.
        tokens: length of the segment.
        compiled, last_use: ticks of the logical clock, which advances with every
            compile and every link.
        node: node that ends its pages; ``None`` where they are gone.
        named: it was compiled by name, not for a link.
        hits: links that reused it.
    """

    id: str
    path: array
    extra_key: str | None
    salt: str
    tokens: int
    compiled: int
    last_use: int
    node: int | None
    named: bool = False
    hits: int = 0

    @property
    def owner(self) -> tuple[str, str]:
        """Whose it is (``keys.owner_of``)."""
        return owner_of(self.salt, self.extra_key)


class Segments:
    """Index over the compiled segments of every tenant.

    Args:
        context: compile context, a whole number of pages long.
        page: tokens per page.
        fresh_tokens: most tokens kept for links still on their way.
        on_release: told a segment that need wait for its link no longer.
    """

    def __init__(
        self,
        context: Sequence[int],
        page: int,
        fresh_tokens: int,
        on_release: Callable[[SegmentRecord], None],
    ):
        if len(context) % page:
            raise PicIntegrityError("the compile context is not a whole number of pages")
        self.context = array("q", context)
        self._space = namespace(context, None)
        self._page = page
        self._most_fresh = fresh_tokens
        self._on_release = on_release
        # As many as there are pages for.
        self._held: dict[str, SegmentRecord] = {}
        self._of_tenant: dict[str, dict[str, SegmentRecord]] = {}
        self._former: LRUCache[str, SegmentRecord] = LRUCache(MAX_FORMER)
        # Of a link that has not come yet: id -> tick, the earliest first.
        self._fresh: OrderedDict[str, int] = OrderedDict()
        self._fresh_held = 0
        self.clock = 0
        # Went before anyone used them a second time.
        self.on_probation_evicted = 0

    # -- names --------------------------------------------------------------------

    def namespace(self, tenant: str | None) -> str:
        """Where a tenant's segments live."""
        return self._space + (tenant or "")

    # -- a segment's life ---------------------------------------------------------

    def first_uses(self, name: str, *, named: bool, hits: int | None = None) -> int:
        """Uses that a segment begins with when it is compiled: ``hits`` of its former
        life, by default those that are remembered."""
        former = self._hits(name) if hits is None else hits
        return former + (NAMED_USES if named else 0)

    def _hits(self, name: str) -> int:
        record = self._get(name)
        return record.hits if record is not None else 0

    def _get(self, name: str) -> SegmentRecord | None:
        return self._held.get(name) or self._former.get(name)

    def add(
        self,
        path: array,
        extra_key: str | None,
        salt: str,
        node: int | None,
        *,
        named: bool = False,
        hits: int | None = None,
    ) -> SegmentRecord:
        """Record that a segment was compiled.

        Args:
            node: that ends its pages; ``None`` if it has no whole one.
            named: compiled by name: it may go whenever it is worth least. Otherwise
                a link has asked for it and is on its way.
            hits: of its former life; by default what is remembered of it.
        """
        name = segment_id(salt, extra_key, path[len(self.context) :])
        self.clock += 1
        hits = self._hits(name) if hits is None else hits
        tokens = len(path) - len(self.context)
        record = SegmentRecord(
            name, path, extra_key, salt, tokens, self.clock, self.clock, node, named, hits
        )
        was_fresh = name in self._fresh
        self.forget(name)
        if node is None:
            record.path = _NO_TOKENS
            self._former[name] = record
            return record
        self._held[name] = record
        self._of_tenant.setdefault(salt, {})[name] = record
        if not named:
            self._hold_back(record)
            self._release_old()
        elif was_fresh:
            self._on_release(record)
        return record

    def use(self, names: Collection[str]) -> list[SegmentRecord]:
        """Advance the clock by one link that reused these segments, which need wait for
        it no longer.

        Returns:
            Those that are held.
        """
        self.clock += 1
        held = []
        for name in names:
            record = self._get(name)
            if record is None:
                continue
            record.hits += 1
            record.last_use = self.clock
            if record.node is not None:
                held.append(record)
            self._release(name)
        self._release_old()
        return held

    def expect(self, names: Collection[str]) -> list[SegmentRecord]:
        """A link that uses these segments waits for others to be compiled.

        Returns:
            Those that are held back from now on, as if they had been compiled for it.
        """
        begun = []
        for name in names:
            record = self._held.get(name)
            if record is not None and name not in self._fresh:
                self._hold_back(record)
                begun.append(record)
        self._release_old()
        return begun

    def gone(self, name: str) -> SegmentRecord | None:
        """The last page of a segment is gone; its record, if it was held."""
        record = self._held.pop(name, None)
        if record is None:
            return None
        of_tenant = self._of_tenant[record.salt]
        del of_tenant[name]
        if not of_tenant:
            del self._of_tenant[record.salt]
        self._no_longer_fresh(record)
        record.node, record.path = None, _NO_TOKENS
        self._former[name] = record
        return record

    def evicted(self, name: str) -> None:
        """It went for want of memory."""
        record = self.gone(name)
        if record is not None:
            self.on_probation_evicted += record.hits <= 1 and not record.named

    def forget(self, name: str) -> None:
        """It is not remembered either."""
        self.gone(name)
        self._former.pop(name, None)

    def clear(self) -> None:
        """Everything was flushed."""
        self._held.clear()
        self._of_tenant.clear()
        self._former.clear()
        self._fresh.clear()
        self._fresh_held = 0

    # -- links on their way -----------------------------------------------------------

    def release_all(self) -> None:
        """Memory is needed: links on their way may find their segments gone."""
        for name in list(self._fresh):
            self._release(name)

    def _hold_back(self, record: SegmentRecord) -> None:
        self._fresh[record.id] = self.clock
        self._fresh_held += record.tokens

    def _no_longer_fresh(self, record: SegmentRecord) -> None:
        if self._fresh.pop(record.id, None) is not None:
            self._fresh_held -= record.tokens

    def _release(self, name: str) -> None:
        if name not in self._fresh:
            return
        record = self._held[name]
        self._no_longer_fresh(record)
        self._on_release(record)

    def _release_old(self) -> None:
        while self._fresh:
            name, tick = next(iter(self._fresh.items()))
            if self._fresh_held <= self._most_fresh and self.clock - tick <= FRESH_TICKS:
                break
            self._release(name)

    # -- looking at it ------------------------------------------------------------

    def find(self, name: str, owner: tuple[str, str]) -> SegmentRecord | None:
        """What is remembered of a segment, if it is this owner's."""
        record = self._get(name)
        return record if record is not None and record.owner == owner else None

    def record(self, name: str, tenant: str | None) -> SegmentRecord | None:
        """A held segment of this tenant, or ``None``: those of others do not exist."""
        return self._of_tenant.get(self.namespace(tenant), {}).get(name)

    def records(self, tenant: str | None) -> list[SegmentRecord]:
        """All held segments of this tenant, the last used first."""
        held = self._of_tenant.get(self.namespace(tenant), {})
        return sorted(held.values(), key=lambda record: -record.last_use)

    def holds(self, name: str, tenant: str | None) -> bool:
        """Whether this tenant has compiled a segment and its whole pages are held."""
        record = self._get(name)
        if record is None or record.salt != self.namespace(tenant):
            return False
        return record.node is not None or record.tokens < self._page

    def find_held(self, name: str) -> SegmentRecord | None:
        """A held segment of any tenant."""
        return self._held.get(name)

    def is_held(self, name: str) -> bool:
        """Whether a segment of any tenant is held."""
        return name in self._held

    @property
    def count(self) -> int:
        """Segments held, of all tenants."""
        return len(self._held)

    def compiled(self, name: str) -> int:
        """Tick at which a segment was compiled last, 0 where nobody remembers."""
        record = self._get(name)
        return record.compiled if record is not None else 0

    def all(self) -> Iterator[SegmentRecord]:
        """Everything that is remembered. O(n)."""
        return iter([*self._held.values(), *self._former.values()])

    def to_json(self, record: SegmentRecord) -> dict[str, Any]:
        """One segment, for the operator."""
        return {
            "id": record.id,
            "tokens": record.tokens,
            "hits": record.hits,
            "compiled": record.compiled,
            "last_use": record.last_use,
        }

    def check(self) -> None:
        """Raise ``PicIntegrityError`` unless what is counted adds up. O(n)."""
        of_tenants = {name: r for held in self._of_tenant.values() for name, r in held.items()}
        if of_tenants != self._held or any(r.node is None for r in self._held.values()):
            raise PicIntegrityError("what is held and what tenants hold differ")
        if self._held.keys() & self._former.keys():
            raise PicIntegrityError("a segment is held, and taken for gone")
        fresh = sum(self._held[name].tokens for name in self._fresh if name in self._held)
        if not self._held.keys() >= self._fresh.keys() or fresh != self._fresh_held:
            raise PicIntegrityError("segments that wait for their links do not add up")
