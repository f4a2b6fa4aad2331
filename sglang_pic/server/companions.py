"""Which companies are worth a prefill in both orders, and when: the front decides.

Segments that came together in two prompts of one tenant, behind the same opening, are
computed in company (``forest.assembly``) when the server has nothing else to do; then what
was linked as compiled alone, among ``guests``. What was
made once and was not there when it was wanted again is made again at longer and longer
intervals.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import functools
import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from cachetools import LRUCache

from sglang_pic.errors import PicRefused
from sglang_pic.forest.keys import order_key
from sglang_pic.link.report import HIT, PREFIX
from sglang_pic.metrics.front import counts
from sglang_pic.request.base import LinkRequest, TokenSpan
from sglang_pic.request.internal import MAX_COMPANY_TOKENS, MAX_MEMBERS
from sglang_pic.server.cold import FIRST_TIME
from sglang_pic.server.compiler import COMPILED, FETCHED, SHARED, Caller, Compiler, Made
from sglang_pic.server.guests import NO_GUESTS, Guests, Inviting
from sglang_pic.server.idle import idle
from sglang_pic.server.items import CompileItem
from sglang_pic.server.recurring import MAX_SEGMENTS, Recurring

logger = logging.getLogger(__name__)

# Companies that wait for an idle moment; the oldest gives way.
MAX_WAITING = 64
# Companies whose making is remembered.
MAX_KNOWN = 8192


@dataclasses.dataclass(frozen=True)
class Kind:
    """What segments have in common that may be computed together."""

    space: str
    extra_key: str | None
    lora_path: str | None
    rank: int | None
    opening: tuple[int, ...]

    @functools.cached_property
    def key(self) -> bytes:
        """16 bytes that stand for it where many are remembered."""
        return _digest(self)


@dataclasses.dataclass(frozen=True)
class Company:
    """Segments to compute together, by their tokens, in the first of two orders, behind
    guests, of which nothing is kept."""

    kind: Kind
    members: tuple[tuple[int, ...], ...]
    guests: Guests = NO_GUESTS

    @property
    def key(self) -> bytes:
        """16 bytes that stand for it where many are remembered."""
        return _digest(
            self.kind.key,
            [order_key(member) for member in self.members],
            [order_key(guest) for guest in self.guests.texts],
        )

    def items(self, seams: tuple[int, ...] = ()) -> Iterator[CompileItem]:
        """Its prefills, for links of these seam widths: in both orders, or behind guests."""
        kind, guests = self.kind, self.guests.texts
        orders = [(*guests, *self.members)] if guests else [self.members, self.members[::-1]]
        for order in orders:
            ids, spans = list(kind.opening), []
            for one in order:
                spans.append(TokenSpan(len(ids), len(ids) + len(one)))
                ids += one
            yield CompileItem(
                tuple(ids),
                kind.space,
                kind.extra_key,
                kind.lora_path,
                seams=seams,
                rank=kind.rank,
                company=tuple(spans),
                guests=len(guests),
                shipped=self.guests.shipped,
            )


def _digest(*parts: object) -> bytes:
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).digest()


def companies_of(
    kind: Kind,
    members: Sequence[Sequence[int]],
    most_tokens: int,
    most_members: int = MAX_MEMBERS,
) -> list[Company]:
    """Companies of as many of these segments as one may have, each of two at least.

    Args:
        most_tokens: of one prefill.
    """
    made: list[Company] = []
    chosen: list[tuple[int, ...]] = []
    room = most_tokens - len(kind.opening)
    left = room
    for member in sorted(map(tuple, members), key=order_key):
        if len(chosen) == most_members or len(member) > left:
            made.append(Company(kind, tuple(chosen)))
            chosen, left = [], room
        if len(member) <= left:
            chosen.append(member)
            left -= len(member)
    made.append(Company(kind, tuple(chosen)))
    return [company for company in made if len(company.members) > 1]


def is_worth_making(served: Sequence[int]) -> bool:
    """Whether a company of segments that were served so is worth its two prefills: at
    least half of them had less than half of it for company.

    Args:
        served: of each of its segments the size of the company that it was served in; 0
            alone.
    """
    lacking = sum(2 * size < len(served) for size in served)
    return 2 * lacking >= len(served)


class Maker:
    """Has segments computed in company.

    Args:
        compiler: ``None`` on a server that makes no companies.
        most_tokens: of one prefill that the server takes.
        inviting: whom segments without company get for it.
        seam: width for which their links want linear states.
    """

    def __init__(
        self,
        compiler: Compiler | None,
        most_tokens: Callable[[], int],
        inviting: Inviting,
        seam: int,
    ):
        self._compiler = compiler
        self._most_tokens = most_tokens
        self.inviting = inviting
        self._seams = (seam,)

    @property
    def _most(self) -> int:
        return min(MAX_COMPANY_TOKENS, self._most_tokens())

    def companies_of(self, kind: Kind, members: Sequence[Sequence[int]]) -> list[Company]:
        """The companies that segments are to be put into."""
        return companies_of(kind, members, self._most)

    def among_guests(self, kind: Kind, member: Sequence[int]) -> Company | None:
        """A company of one segment and its guests, if it has any and there is room."""
        guests = self.inviting.of(kind.key, tuple(member))
        tokens = len(kind.opening) + sum(map(len, guests.texts)) + len(member)
        if not guests.texts or tokens > self._most:
            return None
        return Company(kind, (tuple(member),), guests)

    def check(self) -> Compiler:
        """What computes them.

        Raises:
            PicRefused: 409, this server makes none.
        """
        if self._compiler is None:
            raise PicRefused(409, "this server computes no segments in company", "company")
        return self._compiler

    async def make(self, company: Company, caller: Caller | None = None) -> list[Made]:
        """Compute a company, whoever waits for it.

        Returns:
            What became of each order; the second is not begun where the first has failed.

        Raises:
            PicRefused: 409, this server makes none.
        """
        compiler = self.check()
        made: list[Made] = []
        for item in company.items(self._seams):
            made += await compiler.compile([item], caller)
            if made[-1].outcome not in (COMPILED, FETCHED, SHARED):
                return made
        counts.companies += 1
        return made


class Companions(Protocol):
    """Decides which companies are made beside those that are asked for."""

    def saw(self, kind: Kind, ids: Sequence[int], link: LinkRequest, report: Any) -> None:
        """A prompt was linked, and this is its report."""
        ...


class WhenAsked:
    """None."""

    def saw(self, kind: Kind, ids: Sequence[int], link: LinkRequest, report: Any) -> None:
        pass


class WhenIdle:
    """What recurs, when there is nothing else to do.

    Args:
        shortest: tokens of the shortest segment that is held.
        is_idle: whether the server has nothing to do.
    """

    def __init__(self, maker: Maker, shortest: int, is_idle: Callable[[], bool]):
        self._maker = maker
        self._shortest = shortest
        self._is_idle = is_idle
        self._recurring = Recurring()
        # How often each has been wanted since it was tried last, and how often it must be
        # to be tried again.
        self._wanted: LRUCache[bytes, tuple[int, int]] = LRUCache(MAX_KNOWN)
        self._waiting: collections.OrderedDict[Company, None] = collections.OrderedDict()
        self._task: asyncio.Task[None] | None = None

    def saw(self, kind: Kind, ids: Sequence[int], link: LinkRequest, report: Any) -> None:
        """What of a prompt comes together again, and was not served in company, is to be."""
        if link.options.company == "off" or report["turn_tokens"]:
            return
        if report["reason"] not in (None, FIRST_TIME):
            return
        # What was served among guests has had no company of its own.
        served: dict[bytes, int] = {}
        alone: list[bytes] = []
        tokens: dict[bytes, tuple[int, ...]] = {}
        for span, one in zip(link.spans, report["segments"], strict=True):
            if one["reason"] == PREFIX or span.end - span.start < self._shortest:
                continue
            text = tuple(ids[span.start : span.end])
            self._maker.inviting.saw(kind.key, text)
            name = order_key(text)
            tokens[name] = text
            served[name] = 0 if one["guests"] else one["company"]
            if one["reason"] == HIT and not one["company"]:
                alone.append(name)
        groups = self._recurring.saw(kind.key, tokens)
        for group in groups:
            for company in self._maker.companies_of(kind, [tokens[name] for name in group]):
                if is_worth_making([served[order_key(one)] for one in company.members]):
                    self._want(company)
        grouped = frozenset().union(*groups)
        for name in alone if len(tokens) <= MAX_SEGMENTS else ():
            due = name not in grouped and len(self._waiting) < MAX_WAITING
            # Its guests are looked for when they are wanted, not at every request.
            if due and self._is_due(_digest(kind.key, name)):
                among = self._maker.among_guests(kind, tokens[name])
                if among is not None:
                    self._add(among)

    def _want(self, company: Company) -> None:
        if company not in self._waiting and self._is_due(company.key):
            self._add(company)

    def _is_due(self, key: bytes) -> bool:
        """What was tried before is tried again after it was wanted twice as often."""
        seen, until = self._wanted.get(key, (0, 1))
        is_due = seen + 1 >= until
        self._wanted[key] = (0, 2 * until) if is_due else (seen + 1, until)
        return is_due

    def _add(self, company: Company) -> None:
        self._waiting[company] = None
        if len(self._waiting) > MAX_WAITING:
            self._waiting.popitem(last=False)
        counts.companies_waiting = len(self._waiting)
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._work())

    async def _work(self) -> None:
        while self._waiting:
            await idle(self._is_idle)
            # Who has no company but guests comes last.
            company = min(self._waiting, key=lambda one: len(one.guests.texts))
            try:
                await self._maker.make(company)
            except Exception as error:
                logger.warning("sglang_pic: a company could not be made: %r", error)
            # Until now it was not to be wanted again.
            self._waiting.pop(company, None)
            counts.companies_waiting = len(self._waiting)
