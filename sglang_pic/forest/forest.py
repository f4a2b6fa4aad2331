"""``Forest``: the parts of one scheduler's cache, put together (``build``).

What concerns all of them and none in particular: integrity, numbers, flushes.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from sglang_pic.config import PicConfig
from sglang_pic.errors import PicIntegrityError
from sglang_pic.forest.arrivals import Arrivals
from sglang_pic.forest.asked import Asked
from sglang_pic.forest.assembly import Assembly
from sglang_pic.forest.budget import Budgets
from sglang_pic.forest.carried import Carried
from sglang_pic.forest.checkpoints import Checkpoints
from sglang_pic.forest.companies import Companies
from sglang_pic.forest.consensus import Consensus
from sglang_pic.forest.containment import Containment
from sglang_pic.forest.conversations import Conversations
from sglang_pic.forest.cost import PrefillCost
from sglang_pic.forest.documents import Documents, NoDocuments
from sglang_pic.forest.eviction import Eviction
from sglang_pic.forest.holder import Holder
from sglang_pic.forest.kept import Kept
from sglang_pic.forest.links import Links
from sglang_pic.forest.lookups import Lookups
from sglang_pic.forest.nodes import PREFIX, TURN, NodeIndex
from sglang_pic.forest.pages import NoPages, Pages
from sglang_pic.forest.pins import Pins
from sglang_pic.forest.relocation import Relocation
from sglang_pic.forest.segments import SegmentRecord, Segments
from sglang_pic.forest.stored import NotStored, Stored
from sglang_pic.forest.tier import Tier


@dataclasses.dataclass
class Forest:
    """One part an attribute.

    Attributes:
        cache: SGLang's tree cache, of which all this is a part.
        kept: what lies beside pages, and is ``carried`` by segments or ``encoded``.
        store: what is done for the store, where the operator has named one.
        encoded: documents that a trained encoder has read, where there is one.
    """

    cache: Any
    config: PicConfig
    cost: PrefillCost
    budgets: Budgets
    contained: Containment
    consensus: Consensus
    asked: Asked
    segments: Segments
    companies: Companies
    assembly: Assembly
    pages: Pages
    kept: Kept
    carried: Carried
    checkpoints: Checkpoints
    nodes: NodeIndex
    eviction: Eviction
    pins: Pins
    lookups: Lookups
    holder: Holder
    conversations: Conversations
    links: Links
    arrivals: Arrivals
    relocation: Relocation
    tier: Tier
    store: Stored = dataclasses.field(default_factory=NotStored)
    encoded: Documents = dataclasses.field(default_factory=NoDocuments)

    @property
    def refusal(self) -> str | None:
        """Why nothing is linked, or ``None``."""
        return self.contained.refusal

    @property
    def may_link(self) -> bool:
        """Whether a row may be linked: it was allowed to at start."""
        return not isinstance(self.pages, NoPages)

    @property
    def total_tokens(self) -> int:
        """Tokens whose pages are held, for anything."""
        return int(self.cache.full_evictable_size() + self.cache.full_protected_size())

    def free_rows(self, tenant: str | None) -> int:
        """Evict the ordinary prefixes and conversations of a tenant; with a host tier, the
        prefixes of all.

        Returns:
            Tokens freed.
        """
        freed = self.nodes.remove_all((tenant or None, tenant or ""), (PREFIX, TURN))
        return freed + self.tier.drop()

    def reset(self) -> None:
        """Everything was flushed."""
        self.segments.clear()
        self.companies.clear()
        self.assembly.clear()
        self.pins.clear()
        self.nodes.clear()
        self.carried.clear()
        self.checkpoints.clear()
        self.conversations.clear()
        self.store.clear()
        self.encoded.clear()
        self.kept.clear()
        self.pages.reset()

    def state(self) -> dict[str, Any]:
        """Everything that is held and what it costs, for the management API. O(n).

        Returns:
            ``{"clock", "page_size", "context_tokens", "segments": [{"id", "tokens",
            "held", "pages", "hits", "compiled", "last_use"}], "companies",
            "segment_tokens", "company_tokens", "prefix_tokens", "integrity", "refusal",
            ...}`` and what ``carried`` adds. ``segment_tokens`` counts distinct pages of
            segments compiled alone, ``prefix_tokens`` all that are no company's either;
            ``bytes_per_token`` is of KV over all layers; ``integrity`` is ``"ok"`` or
            what the check found.
        """
        try:
            self.check()
            integrity = "ok"
        except PicIntegrityError as error:
            integrity = str(error)
        page = self.cache.page_size
        segments, owned = [], []
        for record in self.segments.all():
            slots = self._slots(record)
            owned.append(slots)
            segments.append(
                {
                    **self.segments.to_json(record),
                    "held": int(slots.numel()),
                    "pages": (slots[::page] // page).tolist(),
                    **self.carried.to_json_of(record.id),
                }
            )
        distinct = torch.cat(owned).unique().numel() if owned else 0
        return {
            "clock": self.segments.clock,
            "page_size": page,
            "context_tokens": len(self.segments.context),
            "segments": segments,
            "companies": self.companies.to_json(),
            "segment_tokens": distinct,
            "company_tokens": self.companies.tokens,
            "prefix_tokens": self.total_tokens
            - distinct
            - self.companies.tokens
            - self.pages.reserved,
            "integrity": integrity,
            "refusal": self.refusal,
            "available_tokens": self.cache.token_to_kv_pool_allocator.available_size(),
            "protected_tokens": self.cache.protected_size(),
            "evictable_tokens": self.cache.evictable_size(),
            "bytes_per_token": self.cost.kv_bytes,
            "live_plans": self.links.live,
            "checkpoints": self.checkpoints.counts().to_json(),
            "encoded": self.encoded.to_json(),
            **self.carried.to_json(),
        }

    def _slots(self, record: SegmentRecord) -> torch.Tensor:
        """int64, of a segment's tokens; none where its pages are gone."""
        if record.node is None:
            return torch.empty(0, dtype=torch.int64)
        return self.holder.slots(record)[len(self.segments.context) :].cpu()

    def _check_pages(self, name: str, held: torch.Tensor, owned: set[int]) -> None:
        page = self.cache.page_size
        if held.numel() % page:
            raise PicIntegrityError(f"segment {name} holds a part of a page")
        starts = held[::page]
        expected = (starts[:, None] + torch.arange(page)).reshape(-1)
        if bool((starts % page).any()) or not torch.equal(held, expected):
            raise PicIntegrityError(f"segment {name} is not made of whole pages")
        if not owned.issuperset(held.tolist()):
            raise PicIntegrityError(f"segment {name} names pages the tree does not own")

    def check(self) -> None:
        """Raise ``PicIntegrityError`` unless every page has one owner, every segment's
        pages are whole and owned by their tree, what is recorded as held is, and budgets
        and sums hold. O(n)."""
        page = self.cache.page_size
        slots = self.pages.all_slots().cpu()
        owned = set(slots.tolist())
        if len(owned) != slots.numel():
            raise PicIntegrityError("a KV slot has two owners in the tree")
        self.segments.check()
        self.companies.check()
        for record in self.segments.all():
            held = self._slots(record)
            self._check_pages(record.id, held, owned)
            if record.node is not None and held.numel() < record.tokens // page * page:
                raise PicIntegrityError(f"segment {record.id} is taken for held and is not")
        for variant in self.companies.variants():
            if self.pages.holds(variant.node):
                held = self.pages.slots(variant.node, variant.tokens).cpu()
                self._check_pages(variant.name, held, owned)
        self.kept.check()
        self.encoded.check()
        if not self.may_link:
            return
        self.nodes.recount()
        self.nodes.check()
        kv = self.pages.tokens * self.cost.kv_bytes
        if kv > self.budgets.limit.kv:
            raise PicIntegrityError(f"KV of {kv} bytes exceeds {self.budgets.limit.kv}")
