"""What comes together again, and what the front has made of it."""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import json
import pathlib
import random
import tracemalloc
from collections.abc import Sequence
from typing import Any

import pytest
from compiling import Compiler
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from sglang_pic.errors import PicRefused
from sglang_pic.eval.docstrings import load_docstrings
from sglang_pic.eval.models.smollm2 import ensure_model
from sglang_pic.eval.passages import load_passages
from sglang_pic.forest.keys import order_key
from sglang_pic.link.policy import LinkOptions
from sglang_pic.request.base import LinkRequest, TokenSpan
from sglang_pic.request.internal import MAX_COMPANY_TOKENS, MAX_MEMBERS
from sglang_pic.server import companions as module
from sglang_pic.server import idle
from sglang_pic.server.companions import Company, Kind, Maker, WhenIdle, companies_of
from sglang_pic.server.compiler import FAILED
from sglang_pic.server.guests import NO_GUESTS, Guests, Inviting, Nobody, Own, Shipped
from sglang_pic.server.recurring import (
    MAX_KINDS,
    MAX_NAMES,
    MAX_PROMPTS,
    MAX_SEGMENTS,
    Recurring,
)

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


def test_what_is_remembered_is_bounded() -> None:
    """Whatever clients send; a Python object for every name, so bytes and not numbers."""
    draw = random.Random(0)
    recurring = Recurring()
    tracemalloc.start()
    for i in range(MAX_KINDS + 20):
        for _ in range(40):
            recurring.saw(i, [draw.randbytes(16) for _ in range(MAX_SEGMENTS)])
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sum(map(len, recurring._kinds[MAX_KINDS])) <= MAX_NAMES
    assert held < 16 << 20


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


class Front:
    """A front that sees prompts of these segments."""

    def __init__(self, inviting: Inviting | None = None) -> None:
        self.compiler = Compiler()
        self.is_idle = True
        compiler: Any = self.compiler
        maker = Maker(compiler, lambda: 1000, inviting or Nobody(), 0)
        self.companions = WhenIdle(maker, 16, lambda: self.is_idle)

    def see(
        self, *members: Sequence[int], company: int = 0, guests: int = 0, turn: int = 0,
        reason: Any = None, why: str = "hit", rule: str = "subset",
    ) -> None:  # fmt: skip
        ids, spans = list(KIND.opening), []
        for member in members:
            spans.append(TokenSpan(len(ids), len(ids) + len(member)))
            ids += member
        segments = [{"reason": why, "company": company, "guests": guests} for _ in spans]
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
    monkeypatch.setattr(idle, "IDLE_POLL_S", 0.001)

    async def go() -> None:
        front = Front()
        front.is_idle = False
        front.see(A, B)
        front.see(A, B)
        assert await front.made() == []
        assert module.counts.companies_waiting == 1
        front.is_idle = True
        await asyncio.sleep(0.01)
        assert len(await front.made()) == 2
        assert module.counts.companies_waiting == 0
        monkeypatch.setattr(idle, "PATIENCE_S", 0.01)
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


# -- guests ---------------------------------------------------------------------------------


class Three:
    """Everybody's guests are the same."""

    texts = tuple(sorted(((7,) * 10, (8,) * 10, (9,) * 10), key=order_key))

    def saw(self, kind: bytes, text: tuple[int, ...]) -> None:
        pass

    def of(self, kind: bytes, text: tuple[int, ...]) -> Guests:
        return Guests(self.texts, shipped=True)


def test_what_was_linked_alone_is_computed_among_guests() -> None:
    async def go() -> None:
        front = Front(Three())
        front.see(A, B, why="not_compiled", reason="first_time")
        assert await front.made() == []
        # A and B come together again: they are company enough.
        front.see(A, B, C)
        pair = (TokenSpan(2, 22), TokenSpan(22, 42))
        among = (*(TokenSpan(at, at + 10) for at in (2, 12, 22)), TokenSpan(32, 52))
        assert await front.made() == [pair, pair, among]
        front.see(C, company=4, guests=3)
        assert await front.made() == []
        # Strangers are no company of its own.
        front.see(C, D, company=4, guests=3)
        front.see(C, D, company=4, guests=3)
        assert await front.made() == [pair, pair]

    asyncio.run(go())


def test_guests_are_looked_for_when_they_are_wanted() -> None:
    """A segment that goes on being linked alone costs its request next to nothing."""

    class Counting(Three):
        asked = 0

        def of(self, kind: bytes, text: tuple[int, ...]) -> Guests:
            self.asked += 1
            return super().of(kind, text)

    async def go() -> None:
        counting = Counting()
        front = Front(counting)
        for _ in range(30):
            front.see(A)
            await front.made()
        assert counting.asked == 4
        front.see(*((i, *range(30)) for i in range(MAX_SEGMENTS + 1)))
        assert counting.asked == 4

    asyncio.run(go())


def test_guests_stand_in_front() -> None:
    (item,) = Company(KIND, (A,), Guests((B, C), shipped=True)).items()
    assert item.ids == (1, 2, *B, *C, *A)
    assert item.guests == 2 and item.shipped
    assert len({Company(KIND, (A,), one).key for one in (NO_GUESTS, Three().of(b"", A))}) == 2


def test_there_is_room_for_guests_or_there_are_none() -> None:
    compiler: Any = Compiler()
    for most, fits in ((2 + 30 + 20, True), (2 + 30 + 19, False)):
        maker = Maker(compiler, lambda most=most: most, Three(), 0)  # type: ignore[misc]
        assert (maker.among_guests(KIND, A) is not None) == fits
    assert Maker(compiler, lambda: 1000, Nobody(), 0).among_guests(KIND, A) is None


def test_the_projects_guests_are_of_the_nearest_kind() -> None:
    tokenizer = AutoTokenizer.from_pretrained(ensure_model())
    shipped = Shipped(tokenizer)
    for kind, texts in shipped._kinds.items():
        assert len(texts) == 3
        for text in texts:
            assert shipped.nearest(text) == kind
            guests = shipped.of(b"", text)
            assert set(guests.texts) == set(texts) - {text} and guests.shipped
            assert list(guests.texts) == sorted(guests.texts, key=order_key)
    for passage in load_passages():
        assert shipped.nearest(tuple(tokenizer.encode(passage.document))) == "encyclopaedia"
    for one in load_docstrings(150)[::8]:
        assert shipped.nearest(tuple(tokenizer.encode(one.document))) != "dialogue"
    examples = {
        "documentation": pathlib.Path("docs/using/server.md").read_text()[:2000],
        "code": inspect.getsource(Maker),
        "schema": json.dumps({"name": "add", "parameters": {"type": "object", "properties": {}}}),
        "dialogue": "Ann: Where were you?\nBen: At home. I was ill.\nAnn: Are you well now?\n",
    }
    for kind, example in examples.items():
        assert shipped.nearest(tuple(tokenizer.encode(example))) == kind


def test_a_tenants_own_guests_are_fixed_once_and_its_own() -> None:
    own = Own(Three())
    for text in (A, A, (1,) * 600, B):
        own.saw(b"kind", text)
    assert own.of(b"kind", D).texts == Three.texts
    own.saw(b"kind", C)
    own.saw(b"kind", D)
    invited = own.of(b"kind", D)
    assert invited.texts == tuple(sorted((A, B, C), key=order_key)) and not invited.shipped
    assert set(own.of(b"kind", A).texts) == {B, C}
    assert own.of(b"other", D).texts == Three.texts


def test_a_server_that_makes_none_says_so() -> None:
    maker = Maker(None, lambda: 1000, Nobody(), 0)
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
        assert {len(key) for key in front.companions._wanted} == {16}
        assert [len(key) for key in front.companions._recurring._kinds] == [16]  # type: ignore

    asyncio.run(go())
    other = dataclasses.replace(KIND, rank=1)
    assert KIND.key != other.key != dataclasses.replace(KIND, opening=(1, 3)).key
    companies = [Company(KIND, (A, B)), Company(KIND, (A, C)), Company(other, (A, B))]
    assert len({company.key for company in companies}) == 3
