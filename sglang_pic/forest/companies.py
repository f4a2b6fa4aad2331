"""``Companies``: which segments were computed together, and who may use what is held.

A segment that is compiled alone lacks the company it will stand in. So segments that
recur together are computed together behind their prompt's opening, in two orders, and of
each a copy is kept that stands in any third (``assembly``): a *variant*. A company is a
set: what is kept of it is a function of its segments and the opening alone. A segment that
has no company of its own has *guests* in front of it, of which nothing is kept. Nothing
here knows a tensor.
"""

from __future__ import annotations

import dataclasses
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

from cachetools import LRUCache

from sglang_pic.errors import PicIntegrityError

# Companies that one segment is held in: all are looked at when a request is planned.
MAX_OF_SEGMENT = 8
MAX_VERSIONS = 8192
Owner = tuple[str, str]


@dataclasses.dataclass(frozen=True)
class Variant:
    """What is held of one segment of a company.

    Attributes:
        name: it is locked and used by.
        segment: its name, as compiled alone.
        company: the company's.
        size: segments of that, guests included.
        guests: those of them of which nothing is kept.
        space: namespace of its pages.
        tokens: held, whole pages.
        node: that ends them.
    """

    name: str
    segment: str
    company: str
    size: int
    guests: int
    space: str
    tokens: int
    node: int


@dataclasses.dataclass(frozen=True)
class Company:
    """Segments that were computed together.

    Attributes:
        owner: the tenant's namespace and the adapter.
        opening: token ids they were computed behind.
        members: names of the segments that are kept.
        seen: names of all its tenant's segments that have had a part in it: a guest is
            its tenant's, or nobody's.
        held: variants, by segment; of some the pages may be gone.
    """

    id: str
    owner: Owner
    opening: array
    members: frozenset[str]
    seen: frozenset[str]
    held: dict[str, Variant] = dataclasses.field(default_factory=dict)

    @property
    def guests(self) -> int:
        """In front of what is held, of which there is some."""
        return next(iter(self.held.values())).guests


class Companies:
    """Index over the companies of every tenant."""

    def __init__(self) -> None:
        self._companies: dict[str, Company] = {}
        self._variants: dict[str, Variant] = {}
        # Segment -> companies that hold it, the last used last.
        self._of_segment: dict[str, OrderedDict[str, None]] = {}
        # Companies by the name of a segment, held or not, and by their tenant's namespace.
        self._index: dict[str, set[str]] = {}
        self._versions: LRUCache[Owner, int] = LRUCache(MAX_VERSIONS)
        self._made = 0
        self.tokens = 0

    # -- a company's life ---------------------------------------------------------------

    def add(self, company: Company, variants: Sequence[Variant]) -> list[Variant]:
        """A company is held now.

        Returns:
            Variants of older ones that have to go: their segments are in too many.
        """
        self._companies[company.id] = company
        for key in (*company.seen, company.owner[0]):
            self._index.setdefault(key, set()).add(company.id)
        surplus = []
        for variant in variants:
            self._variants[variant.name] = company.held[variant.segment] = variant
            self.tokens += variant.tokens
            of = self._of_segment.setdefault(variant.segment, OrderedDict())
            of[company.id] = None
            if len(of) > MAX_OF_SEGMENT:
                surplus.append(self._companies[next(iter(of))].held[variant.segment])
        self._made += 1
        self._versions[company.owner] = self._made
        return surplus

    def use(self, name: str) -> Variant | None:
        """A link runs that reuses a variant; that, if it is one that is held."""
        variant = self._variants.get(name)
        if variant is not None:
            self._of_segment[variant.segment].move_to_end(variant.company)
        return variant

    def gone(self, name: str) -> None:
        """The last of a variant's pages went; the others of its company stay."""
        variant = self._variants.pop(name, None)
        if variant is None:
            return
        self.tokens -= variant.tokens
        company = self._companies[variant.company]
        del company.held[variant.segment]
        of = self._of_segment[variant.segment]
        del of[company.id]
        if not of:
            del self._of_segment[variant.segment]
        if not company.held:
            self._end(company)

    def _end(self, company: Company) -> None:
        del self._companies[company.id]
        for key in (*company.seen, company.owner[0]):
            self._index[key].discard(company.id)
            if not self._index[key]:
                del self._index[key]

    def clear(self) -> None:
        """Everything was flushed."""
        self._companies.clear()
        self._variants.clear()
        self._of_segment.clear()
        self._index.clear()
        self.tokens = 0

    # -- who may use it -------------------------------------------------------------------

    def cover(
        self, names: Sequence[str], owner: Owner, opening: array, rule: str
    ) -> dict[str, Variant]:
        """The variant that each of a prompt's segments is to be taken from, by segment: of
        the companies that may serve it, those with most of its segments first.

        Args:
            names: its segments.
            opening: its token ids in front of the first.
            rule: one of ``policy.COMPANIES``.
        """
        here = set(names)
        candidates = {one for name in here for one in self._of_segment.get(name, ())}
        found = []
        for one in candidates if rule != "off" else ():
            company = self._companies[one]
            is_ours = company.owner == owner and company.opening == opening
            if is_ours and (rule == "tenant" or company.seen <= here):
                found.append((company, company.held.keys() & here))
        found.sort(
            key=lambda pair: (-len(pair[1]), pair[0].guests, len(pair[0].members), pair[0].id)
        )
        chosen: dict[str, Variant] = {}
        for company, names_of in found:
            for name in names_of:
                chosen.setdefault(name, company.held[name])
        return chosen

    def version(self, owner: Owner) -> int:
        """Changes whenever a company of this owner is made."""
        return self._versions.get(owner, 0)

    # -- looking at it ----------------------------------------------------------------------

    @property
    def count(self) -> int:
        """Companies of which something is held."""
        return len(self._companies)

    def held(self, company: str) -> list[Variant]:
        """What is held of one."""
        known = self._companies.get(company)
        return list(known.held.values()) if known is not None else []

    def variant(self, name: str) -> Variant | None:
        """What is held under a variant's name."""
        return self._variants.get(name)

    def is_whole(self, company: str) -> bool:
        """Whether all of its segments are held."""
        known = self._companies.get(company)
        return known is not None and known.held.keys() == known.members

    def named_by(self, key: str) -> list[str]:
        """Companies that a segment of this name has had a part in, or of this tenant's
        namespace."""
        return list(self._index.get(key, ()))

    def variants(self) -> Iterator[Variant]:
        """Everything that is held. O(n)."""
        return iter(list(self._variants.values()))

    def to_json(self) -> list[dict[str, Any]]:
        """Every company. O(n)."""
        return [
            {
                "id": company.id,
                "opening_tokens": len(company.opening),
                "segments": sorted(company.members),
                "held": sorted(company.held),
                "guests": company.guests,
                "tokens": sum(variant.tokens for variant in company.held.values()),
                "orders": 1 if company.guests else 2,
            }
            for company in self._companies.values()
        ]

    def check(self) -> None:
        """Raise ``PicIntegrityError`` unless what is counted adds up. O(n)."""
        held = {v.name: v for c in self._companies.values() for v in c.held.values()}
        if held != self._variants:
            raise PicIntegrityError("the variants of companies and those known differ")
        of = {(v.segment, v.company) for v in held.values()}
        if of != {(name, one) for name, ones in self._of_segment.items() for one in ones}:
            raise PicIntegrityError("the companies of segments do not add up")
        index = {(k, c.id) for c in self._companies.values() for k in (*c.seen, c.owner[0])}
        if index != {(key, one) for key, ones in self._index.items() for one in ones}:
            raise PicIntegrityError("the index of companies does not add up")
        if sum(v.tokens for v in held.values()) != self.tokens:
            raise PicIntegrityError("the tokens of companies do not add up")
