"""``Assembly``: a company was computed in one order, then in the other; what is kept.

Of each segment the mean of both: V, K turned back to the segment's own positions, and in
hybrids what its cores do to the linear layers.
It has then seen every other member once in front of it, and stands in a third order. The
first order waits as pages of its own for the second, which is on its way: they go
meanwhile when nothing else may. Behind guests one order is enough: all of them stand in
front.
"""

from __future__ import annotations

import dataclasses
from array import array
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch

from sglang_pic.errors import PicIntegrityError
from sglang_pic.forest.carried import Carried
from sglang_pic.forest.companies import Companies, Company, Owner, Variant
from sglang_pic.forest.consensus import Consensus
from sglang_pic.forest.eviction import LINKABLE, InOrder
from sglang_pic.forest.keys import company_id, company_space, order_key, segment_id
from sglang_pic.forest.nodes import SEGMENT, NodeIndex
from sglang_pic.forest.pages import Pages
from sglang_pic.forest.segments import NAMED_USES
from sglang_pic.link.policy import floor_to
from sglang_pic.request.internal import CompileRequest

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

# Companies whose first order waits for the second.
MAX_HALF = 4


class Copies(Protocol):
    """Copies pages within SGLang's pool (``attention.relocate.Relocator``)."""

    def copy(self, source: torch.Tensor, target: torch.Tensor, offsets: torch.Tensor) -> None:
        """K and V of int64 [n] slots, K turned by int64 [n] positions."""
        ...

    def average(self, target: torch.Tensor, other: torch.Tensor) -> None:
        """Leave in int64 slots the mean of theirs and others' K and V."""
        ...


@dataclasses.dataclass(frozen=True)
class _Half:
    """One order of a company: its owner, where its pages end, and under which names lies
    what it carries."""

    owner: Owner
    nodes: tuple[int, ...]
    names: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class _Member:
    """A segment within a row of its company: its tokens, those of its whole pages, and
    where it starts."""

    segment: str
    ids: array
    whole: array
    start: int


def _is_sorted(members: Sequence[_Member], *, back: bool = False) -> bool:
    keys = [order_key(member.ids) for member in members]
    return keys == sorted(keys, reverse=back)


def _free_now(allocator: Any) -> None:
    """While SGLang processes a batch's results, in which a prefill ends, it holds back
    what is freed: no room would be seen that was just made."""
    if allocator.free_group is not None:
        allocator.free_group_end()
        allocator.free_group_begin()


class Assembly(Protocol):
    """Keeps and removes what companies hold.

    ``refused``: orders that were computed and not kept.
    """

    refused: int

    def keep(self, req: Req, asked: CompileRequest) -> None:
        """A company's prefill is complete.

        Raises:
            PicIntegrityError: its segments are in neither order, or not distinct.
        """
        ...

    def use(self, names: Collection[str]) -> None:
        """A link runs that reuses these variants; other names are ignored."""
        ...

    def release(self) -> None:
        """Memory is needed: what waits for its second order may go."""
        ...

    def lost(self, name: str) -> None:
        """What was carried under this name went for want of memory."""
        ...

    def forget_segment(self, segment: str) -> int:
        """A segment was deleted: what has seen it goes too, as far as nothing runs on
        it; the tokens freed."""
        ...

    def forget_tenant(self, space: str) -> int:
        """A tenant was flushed; the tokens freed."""
        ...

    def clear(self) -> None:
        """Everything was flushed."""
        ...


class NoAssembly:
    """Of a server that makes no companies."""

    def __init__(self) -> None:
        self.refused = 0

    def keep(self, req: Req, asked: CompileRequest) -> None:
        self.refused += 1

    def use(self, names: Collection[str]) -> None:
        pass

    def release(self) -> None:
        pass

    def lost(self, name: str) -> None:
        pass

    def forget_segment(self, segment: str) -> int:
        return 0

    def forget_tenant(self, space: str) -> int:
        return 0

    def clear(self) -> None:
        pass


class BothOrders:
    """The mean of both orders, over one pool of pages.

    Args:
        copies: of its pages.
        rows: SGLang's table of request rows.
        allocator: SGLang's, of the pool's slots.
        evict: SGLang's eviction, of so many tokens.
    """

    def __init__(
        self,
        companies: Companies,
        pages: Pages,
        carried: Carried,
        nodes: NodeIndex,
        eviction: InOrder,
        copies: Copies,
        rows: torch.Tensor,
        allocator: Any,
        evict: Callable[[int], object],
        consensus: Consensus,
    ):
        self._companies = companies
        self._pages = pages
        self._carried = carried
        self._nodes = nodes
        self._eviction = eviction
        self._copies = copies
        self._rows = rows
        self._allocator = allocator
        self._evict = evict
        self._consensus = consensus
        self._halves: OrderedDict[str, _Half] = OrderedDict()
        self.refused = 0

    # -- compiles -----------------------------------------------------------------------

    def keep(self, req: Req, asked: CompileRequest) -> None:
        ids, spans = req.origin_input_ids, asked.company
        all_of_it = [self._member(req, ids[span.start : span.end], span.start) for span in spans]
        guests, members = all_of_it[: asked.guests], all_of_it[asked.guests :]
        if len({member.segment for member in all_of_it}) != len(all_of_it):
            raise PicIntegrityError("a company names a segment twice")
        is_first = _is_sorted(members) and _is_sorted(guests)
        if not is_first and (guests or not _is_sorted(members, back=True)):
            raise PicIntegrityError("a company was computed in an order of no meaning")
        opening, owner = ids[: spans[0].start], (req.cache_salt, req.extra_key or "")
        own = frozenset(member.segment for member in members)
        brought = frozenset(guest.segment for guest in guests)
        name = company_id(*owner, opening, own, brought)
        company = Company(name, owner, opening, own, own if asked.shipped else own | brought)
        if guests:
            kept = self._keep_only(req, company, members, len(guests))
        elif is_first:
            kept = self._keep_first(req, company, members)
        else:
            kept = self._keep_second(req, company, members)
        self._consensus.note("kept" if kept else "refused", req.rid)
        self.refused += not kept

    def _member(self, req: Req, ids: array, start: int) -> _Member:
        whole = ids[: floor_to(len(ids), self._pages.page_size)]
        return _Member(segment_id(req.cache_salt, req.extra_key, ids), ids, whole, start)

    def _keep_only(
        self, req: Req, company: Company, members: Sequence[_Member], guests: int
    ) -> bool:
        made = self._copied(req, members)
        if made is None:
            return False
        self._forget(company.id)
        names = self._names(req, company, members, whole=True)
        if not self._carry(req, company, names, made, offer=True):
            return False
        nodes = self._insert(req, company, members, made, whole=True)
        self._publish(req, company, members, guests, nodes)
        return True

    def _keep_first(self, req: Req, company: Company, members: Sequence[_Member]) -> bool:
        made = self._copied(req, members)
        if made is None:
            return False
        self._drop_half(company.id)
        names = self._names(req, company, members, whole=False)
        if not self._carry(req, company, names, made, offer=False):
            return False
        nodes = self._insert(req, company, members, made, whole=False)
        self._halves[company.id] = _Half(company.owner, tuple(nodes), tuple(names))
        while len(self._halves) > MAX_HALF:
            self._drop_half(next(iter(self._halves)))
        return True

    def _keep_second(self, req: Req, company: Company, members: Sequence[_Member]) -> bool:
        half = self._halves.get(company.id)
        if half is None:
            return False
        try:
            # Room for this order is not made of the other.
            locked = self._pages.lock(half.nodes)
        except KeyError:
            return False
        try:
            made = self._copied(req, members)
            if made is None:
                return False
            other = []
            for member in members:
                space = company_space(req.cache_salt, company.id, member.segment, whole=False)
                held, node = self._pages.find(member.whole, req.extra_key, space)
                other.append(self._pages.slots(node, held))
            fresh = torch.cat(made)
            try:
                self._copies.average(fresh, torch.cat(other))
            except BaseException:
                self._allocator.free(fresh)
                raise
        finally:
            self._pages.unlock(locked)
            for node in locked:
                self._nodes.unlocked(LINKABLE, node)
        self._forget(company.id)
        names = self._names(req, company, members, whole=True)
        others = self._names(req, company, members, whole=False)
        kept = self._carry(req, company, names, made, others=others, offer=True)
        self._drop_half(company.id)
        if not kept:
            return False
        nodes = self._insert(req, company, members, made, whole=True)
        self._publish(req, company, members, 0, nodes)
        return True

    def _carry(
        self,
        req: Req,
        company: Company,
        names: Sequence[str],
        made: Sequence[torch.Tensor],
        *,
        others: Sequence[str] = (),
        offer: bool,
    ) -> bool:
        """``Carried.keep_members``; what is not kept has no use for its pages."""
        kept = False
        try:
            kept = self._carried.keep_members(req, names, company.owner, others=others, offer=offer)
        finally:
            if not kept:
                self._allocator.free(torch.cat(list(made)))
        return kept

    def _names(
        self, req: Req, company: Company, members: Sequence[_Member], *, whole: bool
    ) -> list[str]:
        """Under which each member's pages, and what it carries, are known."""
        spaces = [
            company_space(req.cache_salt, company.id, member.segment, whole=whole)
            for member in members
        ]
        return [
            segment_id(space, req.extra_key, member.ids)
            for space, member in zip(spaces, members, strict=True)
        ]

    def _copied(self, req: Req, members: Sequence[_Member]) -> list[torch.Tensor] | None:
        """int64 slots of each member's whole pages, copied out of its company's row;
        ``None`` where there is no room."""
        counts = [len(member.whole) for member in members]
        wanted = sum(counts)
        if not self._eviction.make_room(wanted):
            return None
        _free_now(self._allocator)
        short = wanted - self._allocator.available_size()
        if short > 0:
            self._evict(short)
            _free_now(self._allocator)
        fresh = self._allocator.alloc(wanted)
        if fresh is None:
            return None
        fresh = fresh.to(torch.int64)
        row = self._rows[req.kv.req_pool_idx]
        places = [torch.arange(m.start, m.start + len(m.whole)) for m in members]
        offsets = torch.repeat_interleave(
            torch.tensor([-member.start for member in members]), torch.tensor(counts)
        )
        try:
            source = row[torch.cat(places).to(row.device)].to(torch.int64)
            self._copies.copy(source, fresh, offsets)
        except BaseException:
            self._allocator.free(fresh)
            raise
        return list(fresh.split(counts))

    def _insert(
        self,
        req: Req,
        company: Company,
        members: Sequence[_Member],
        made: Sequence[torch.Tensor],
        *,
        whole: bool,
    ) -> list[int]:
        nodes = []
        for member, slots in zip(members, made, strict=True):
            space = company_space(req.cache_salt, company.id, member.segment, whole=whole)
            node = self._pages.keep(member.whole, req.extra_key, space, slots)
            self._nodes.note(LINKABLE, node, SEGMENT, space, uses=NAMED_USES, offer=whole)
            nodes.append(node)
        return nodes

    def _publish(
        self,
        req: Req,
        company: Company,
        members: Sequence[_Member],
        guests: int,
        nodes: Sequence[int],
    ) -> None:
        variants = []
        names = self._names(req, company, members, whole=True)
        for member, name, node in zip(members, names, nodes, strict=True):
            space = company_space(req.cache_salt, company.id, member.segment, whole=True)
            size, tokens = guests + len(members), len(member.whole)
            variants.append(
                Variant(name, member.segment, company.id, size, guests, space, tokens, node)
            )
            self._nodes.end_segment(LINKABLE, node, name)
        for surplus in self._companies.add(company, variants):
            self._remove(surplus)

    # -- a variant's life ---------------------------------------------------------------

    def use(self, names: Collection[str]) -> None:
        for name in names:
            variant = self._companies.use(name)
            if variant is not None:
                self._nodes.use(LINKABLE, variant.node, SEGMENT, variant.space)

    def release(self) -> None:
        for half in self._halves.values():
            self._offer(half)

    def lost(self, name: str) -> None:
        variant = self._companies.variant(name)
        if variant is not None:
            self._remove(variant)
        for company in [one for one, half in self._halves.items() if name in half.names]:
            self._drop_half(company)

    def _offer(self, half: _Half) -> None:
        for node in half.nodes:
            self._nodes.release(LINKABLE, node)
        for name in half.names:
            self._carried.release(name)

    def _remove(self, variant: Variant) -> int:
        self._companies.gone(variant.name)
        self._carried.drop(variant.name)
        self._nodes.unend_segment(LINKABLE, variant.node, variant.name)
        return self._nodes.remove_path(LINKABLE, variant.node)

    def _forget(self, company: str) -> int:
        return sum(map(self._remove, self._companies.held(company)))

    def _drop_half(self, company: str) -> int:
        half = self._halves.pop(company, None)
        if half is None:
            return 0
        self._offer(half)
        for name in half.names:
            self._carried.drop(name)
        return sum(self._nodes.remove_path(LINKABLE, node) for node in half.nodes)

    def forget_segment(self, segment: str) -> int:
        return sum(map(self._forget, self._companies.named_by(segment)))

    def forget_tenant(self, space: str) -> int:
        halves = [name for name, half in self._halves.items() if half.owner[0] == space]
        freed = sum(map(self._drop_half, halves))
        return freed + sum(map(self._forget, self._companies.named_by(space)))

    def clear(self) -> None:
        self._halves.clear()
