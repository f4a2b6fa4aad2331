"""What comes together again, and what the front has made of it."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_pic.errors import PicRefused
from sglang_pic.forest.keys import order_key
from sglang_pic.link.policy import LinkOptions
from sglang_pic.request.base import LinkRequest, TokenSpan
from sglang_pic.request.internal import MAX_COMPANY_TOKENS, MAX_MEMBERS
from sglang_pic.server import companions as module
from sglang_pic.server.companions import Company, Kind, Maker, WhenIdle, companies_of
from sglang_pic.server.compiler import COMPILED, FAILED, CompileItem, Made
from sglang_pic.server.recurring import MAX_PROMPTS, Recurring

KIND = Kind("space", None, None, None, (1, 2))
A, B, C, D = (tuple(range(at, at + 20)) for at in (100, 200, 300, 400))


def names(*letters: str) -> list[bytes]:
    return [letter.encode() for letter in letters]


# -- what recurs ------------------------------------------------------------------------


def test_what_two_prompts_share_recurs() -> None:
    recurring = Recurring()
    assert recurring.saw("kind", names("a", "b", "c")) == []
    assert recurring.saw("other", names("a", "b")) == []
    assert recurring.saw("kind", names("b", "a", "d")) == [frozenset(names("a", "b"))]
    assert recurring.saw("kind", names("x", "d")) == []
    # The largest first, and of what is left the next.
    found = recurring.saw("kind", names("a", "b", "c", "x", "d"))
    assert found == [frozenset(names("a", "b", "c")), frozenset(names("d", "x"))]


prompts = st.lists(
    st.lists(st.sampled_from("abcdefgh"), max_size=6).map(lambda one: names(*one)), max_size=30
)


@given(prompts)
def test_a_group_has_come_together_before(prompts: list[list[bytes]]) -> None:
    recurring = Recurring()
    for i, prompt in enumerate(prompts):
        groups = recurring.saw("kind", prompt)
        for group in groups:
            assert len(group) > 1 and group <= set(prompt)
            assert any(group <= set(earlier) for earlier in prompts[:i])
        assert sum(map(len, groups)) == len(frozenset().union(*groups))


def test_what_came_long_ago_is_forgotten() -> None:
    recurring = Recurring()
    recurring.saw("kind", names("a", "b"))
    for i in range(MAX_PROMPTS):
        recurring.saw("kind", [b"%d" % i, b"%d'" % i])
    assert recurring.saw("kind", names("a", "b")) == []


# -- what a company is ----------------------------------------------------------------------


@given(st.lists(st.integers(1, 3000), max_size=40), st.integers(0, 3000))
def test_companies_are_within_their_bounds(lengths: list[int], opening: int) -> None:
    kind = Kind("space", None, None, None, (7,) * opening)
    members = [[i] * length for i, length in enumerate(lengths)]
    made = companies_of(kind, members, MAX_COMPANY_TOKENS)
    for company in made:
        assert 2 <= len(company.members) <= MAX_MEMBERS
        assert all(len(item.ids) <= MAX_COMPANY_TOKENS for item in company.items())
        assert list(company.members) == sorted(company.members, key=order_key)
    put = [member for company in made for member in company.members]
    assert len(put) == len(set(put)) and set(put) <= set(map(tuple, members))
    assert made == companies_of(kind, members[::-1], MAX_COMPANY_TOKENS)


def test_its_two_prefills_are_each_others_reverse() -> None:
    first, second = Company(KIND, (A, B)).items()
    assert first.ids == (1, 2, *A, *B) and second.ids == (1, 2, *B, *A)
    assert first.company == second.company == (TokenSpan(2, 22), TokenSpan(22, 42))
    assert first.salt == "space" and first.segment


# -- when they are made ---------------------------------------------------------------------


class Compiler:
    """Notes what it is given."""

    def __init__(self) -> None:
        self.items: list[CompileItem] = []
        self.outcome = COMPILED

    async def compile(self, items: Sequence[CompileItem], caller: Any = None) -> list[Made]:
        self.items += items
        await asyncio.sleep(0)
        return [Made(self.outcome, len(item.ids)) for item in items]


class Front:
    """A front that sees prompts of these segments."""

    def __init__(self) -> None:
        self.compiler = Compiler()
        self.is_idle = True
        maker: Any = Maker(self.compiler, lambda: 1000)  # type: ignore[arg-type]
        self.companions = WhenIdle(maker, 16, lambda: self.is_idle)

    def see(
        self, *members: Sequence[int], company: int = 0, turn: int = 0, reason: Any = None,
        why: str = "hit", rule: str = "subset",
    ) -> None:  # fmt: skip
        ids, spans = list(KIND.opening), []
        for member in members:
            spans.append(TokenSpan(len(ids), len(ids) + len(member)))
            ids += member
        segments = [{"reason": why, "company": company} for _ in spans]
        report = {"reason": reason, "turn_tokens": turn, "segments": segments}
        link = LinkRequest(tuple(spans), LinkOptions(company=rule))
        self.companions.saw(KIND, ids, link, report)

    async def made(self) -> list[tuple[TokenSpan, ...]]:
        for _ in range(20):
            await asyncio.sleep(0)
        found, self.compiler.items = self.compiler.items, []
        return [item.company for item in found]


def test_what_recurs_is_made_once_and_not_while_it_serves() -> None:
    async def go() -> None:
        front = Front()
        front.see(A, B, C)
        assert await front.made() == []
        front.see(C, A, D)
        assert len(await front.made()) == 2
        front.see(A, C, company=2)
        assert await front.made() == []

    asyncio.run(go())


@pytest.mark.parametrize(
    "how",
    [{"company": 3}, {"turn": 5}, {"reason": "require_exact"}, {"why": "prefix"}, {"rule": "off"}],
)
def test_what_gains_nothing_is_not_made(how: dict[str, Any]) -> None:
    async def go() -> None:
        front = Front()
        for _ in range(4):
            front.see(A, B, C, **how)
        assert await front.made() == []

    asyncio.run(go())


def test_what_is_gone_again_is_made_at_longer_intervals() -> None:
    async def go() -> None:
        front, made = Front(), []
        for i in range(20):
            front.see(A, B)
            if await front.made():
                made.append(i)
        assert made == [1, 3, 7, 15]

    asyncio.run(go())


def test_a_company_waits_for_an_idle_moment_but_not_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "IDLE_POLL_S", 0.001)

    async def go() -> None:
        front = Front()
        front.is_idle = False
        front.see(A, B)
        front.see(A, B)
        assert await front.made() == []
        front.is_idle = True
        await asyncio.sleep(0.01)
        assert len(await front.made()) == 2
        monkeypatch.setattr(module, "PATIENCE_S", 0.01)
        front.is_idle = False
        front.see(C, D)
        front.see(C, D)
        await asyncio.sleep(0.05)
        assert len(await front.made()) == 2

    asyncio.run(go())


def test_few_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_WAITING", 2)

    async def go() -> None:
        front = Front()
        front.is_idle = False
        for pair in ((A, B), (C, D), (A, C), (B, D)):
            front.see(*pair)
            front.see(*pair)
        assert len(front.companions._waiting) == 2

    asyncio.run(go())


def test_the_second_order_is_not_begun_where_the_first_has_failed() -> None:
    async def go() -> None:
        front = Front()
        front.compiler.outcome = FAILED
        front.see(A, B)
        front.see(A, B)
        assert len(await front.made()) == 1

    asyncio.run(go())


def test_a_server_that_makes_none_says_so() -> None:
    maker = Maker(None, lambda: 1000)
    with pytest.raises(PicRefused) as refused:
        asyncio.run(maker.make(Company(KIND, (A, B))))
    assert refused.value.status == 409


def test_what_is_remembered_holds_no_tokens() -> None:
    """A front remembers thousands of companies; a token takes 36 bytes."""

    async def go() -> None:
        front = Front()
        front.is_idle = False
        for _ in range(2):
            front.see(A, B)
        assert [len(key) for key in front.companions._wanted] == [16]
        assert [len(key) for key in front.companions._recurring._kinds] == [16]  # type: ignore

    asyncio.run(go())
    other = dataclasses.replace(KIND, rank=1)
    assert KIND.key != other.key != dataclasses.replace(KIND, opening=(1, 3)).key
    companies = [Company(KIND, (A, B)), Company(KIND, (A, C)), Company(other, (A, B))]
    assert len({company.key for company in companies}) == 3
