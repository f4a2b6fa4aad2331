"""The first request over new documents: exact at once, or compiled and linked."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_pic.link.policy import LinkOptions
from sglang_pic.request.base import OPENING, LinkRequest, TokenSpan
from sglang_pic.server.cold import Cold
from sglang_pic.server.items import CompileItem


class Compiler:
    """Notes what it is given; some of it is under way."""

    def __init__(self, *under_way: CompileItem):
        self.under_way = set(under_way)
        self.items: list[CompileItem] = []

    def is_under_way(self, item: CompileItem) -> bool:
        return item in self.under_way

    async def compile(self, items: Sequence[CompileItem], caller: Any) -> list[Any]:
        self.items += items
        return []


def cold_of(compiler: Compiler, *, allowed: bool = True) -> Cold:
    return Cold(compiler, allowed=allowed)  # type: ignore[arg-type]


def item(number: int, length: int) -> CompileItem:
    return CompileItem((number,) * length, "salt", None, None)


def prompt(opening: int, lengths: Sequence[int], question: int) -> tuple[list[int], LinkRequest]:
    at, spans = opening, []
    for length in lengths:
        spans.append(TokenSpan(at, at + length))
        at += length
    return [0] * (at + question), LinkRequest(tuple(spans), LinkOptions(seam=16))


def is_cheaper(
    cold: Cold, opening: int, lengths: Sequence[int], question: int, missing: Sequence[int]
) -> bool:
    ids, link = prompt(opening, lengths, question)
    items = [item(i, opening if i == OPENING else lengths[i]) for i in missing]
    return cold.is_cheaper(ids, link, missing, items)


@pytest.mark.parametrize(
    ("missing", "exact"),
    [
        ([OPENING, 0, 1, 2], True),
        ([0, 1, 2], True),
        # 200 to compile, 3 x 16 + 20 to link, of 320.
        ([0, 1], False),
        ([0], False),
        ([], False),
    ],
)
def test_what_takes_fewer_tokens_is_done(missing: list[int], exact: bool) -> None:
    assert is_cheaper(cold_of(Compiler()), 50, [100, 100, 100], 20, missing) == exact


@given(
    st.integers(0, 900),
    st.lists(st.integers(17, 300), min_size=1, max_size=6),
    st.integers(1, 90),
    st.data(),
)
def test_every_token_is_counted_once(
    opening: int, lengths: list[int], question: int, data: st.DataObject
) -> None:
    """A text in front of the segments that nobody has computed is so in any case."""
    missing = [i for i in range(len(lengths)) if data.draw(st.booleans())]
    known = is_cheaper(cold_of(Compiler()), opening, lengths, question, missing)
    new = is_cheaper(cold_of(Compiler()), opening, lengths, question, [OPENING, *missing])
    linked = sum(lengths[i] for i in missing) + 16 * len(lengths) + question
    assert new == known == (linked >= sum(lengths) + question)


@given(
    st.integers(0, 90), st.lists(st.integers(32, 300), min_size=1, max_size=6), st.integers(1, 90)
)
def test_of_all_new_documents_none_is_waited_for(
    opening: int, lengths: list[int], question: int
) -> None:
    assert is_cheaper(cold_of(Compiler()), opening, lengths, question, range(len(lengths)))


def test_a_server_may_always_link() -> None:
    cold = cold_of(Compiler(), allowed=False)
    assert not is_cheaper(cold, 0, [100], 20, [0])


def test_peers_are_waited_for_where_the_largest_share_is_sooner_done() -> None:
    def cold(busiest: Callable[[Sequence[int]], int]) -> Cold:
        return Cold(Compiler(), busiest, allowed=True)  # type: ignore[arg-type]

    asked = (50, [100, 100, 100], 20, [0, 1, 2])
    # 100 or 300 to compile, 3 x 16 + 20 to link, of 320.
    assert not is_cheaper(cold(max), *asked)
    assert is_cheaper(cold(sum), *asked)


def test_what_others_have_compiled_is_waited_for() -> None:
    cold = cold_of(Compiler(item(1, 100)))
    assert not is_cheaper(cold, 0, [100, 100], 20, [0, 1])


def test_behind_an_exact_answer_its_documents_are_compiled() -> None:
    async def go() -> None:
        compiler = Compiler()
        cold, caller = cold_of(compiler), object()
        items = [item(0, 100), item(1, 100)]
        with cold.answered(items, caller) as see:  # type: ignore[arg-type]
            see({"meta_info": {"finish_reason": None}})
            # Who comes now does not compute the same a second time.
            assert not is_cheaper(cold, 0, [100, 100], 20, [0, 1])
            assert is_cheaper(cold, 0, [90], 20, [0])
            await asyncio.sleep(0)
            assert compiler.items == []
            # The last output, behind which nobody may ask for more.
            see([{"meta_info": {"finish_reason": {"type": "stop"}}}])
            await asyncio.sleep(0)
            assert compiler.items == items
            see({"meta_info": {"finish_reason": {"type": "stop"}}})
        await asyncio.sleep(0)
        assert compiler.items == items
        assert is_cheaper(cold, 0, [100, 100], 20, [0, 1])
        # Whose client leaves has nothing compiled.
        for error in (GeneratorExit, ValueError):
            with pytest.raises(error), cold.answered(items, caller):  # type: ignore[arg-type]
                raise error
        with cold.answered(items, caller) as see:  # type: ignore[arg-type]
            see({"meta_info": {"finish_reason": {"type": "abort"}}})
        await asyncio.sleep(0)
        assert compiler.items == items and not cold._coming

    asyncio.run(go())
