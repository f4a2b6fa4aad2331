"""Parts of the forest by themselves: each with what it is given, and no other part."""

from __future__ import annotations

from array import array
from typing import Any

import pytest
import torch
from driver import Driver
from hypothesis import given
from hypothesis import strategies as st

from sglang_pic.config import PicConfig
from sglang_pic.errors import PicIntegrityError
from sglang_pic.forest import segments as segments_module
from sglang_pic.forest.carried import Nothing, Path
from sglang_pic.forest.keys import owner_of, segment_id
from sglang_pic.forest.lookups import Lookup
from sglang_pic.forest.pages import Pages
from sglang_pic.forest.planner import Row, arrange
from sglang_pic.forest.segments import FRESH_TICKS, NAMED_USES, Segments
from sglang_pic.forest.turns import Chain, Turn
from sglang_pic.link.policy import LinkOptions
from sglang_pic.request.base import TokenSpan


def ids(first: int, count: int) -> array:
    return array("q", range(first, first + count))


# -- segments --------------------------------------------------------------------------


class Released(list[str]):
    def __call__(self, record: Any) -> None:
        self.append(record.id)


def made(page: int = 1, fresh: int = 100) -> tuple[Segments, Released]:
    released = Released()
    return Segments((), page, fresh, released), released


def add(segments: Segments, first: int, tokens: int = 10, **how: Any) -> str:
    space = segments.namespace(how.pop("tenant", None))
    record = segments.add(ids(first, tokens), None, space, how.pop("node", first), **how)
    segments.check()
    return record.id


def test_a_segment_is_its_tenants_alone() -> None:
    segments, _ = made()
    name = add(segments, 1, tenant="a")
    space = segments.namespace("a")
    assert segments.record(name, "a") is not None and segments.record(name, "b") is None
    assert segments.find(name, owner_of(space, None)) is not None
    assert segments.find(name, owner_of(segments.namespace("b"), None)) is None
    assert segments.find(name, owner_of(space, "adapter")) is None
    assert [r.id for r in segments.records("a")] == [name] and segments.records(None) == []


def test_what_waits_for_its_link_is_let_go() -> None:
    """By the link, by too many that wait, by too many links, and by a name."""
    segments, released = made(fresh=35)
    names = [add(segments, 100 * i) for i in range(3)]
    assert segments._fresh.keys() == set(names) and not released
    segments.use(names[1:2])
    assert released == [names[1]]
    add(segments, 300), add(segments, 400)
    assert released == [names[1], names[0]]
    for _ in range(FRESH_TICKS + 5):
        segments.use([])
    assert not segments._fresh.keys() & set(names)
    waiting = add(segments, 500)
    released.clear()
    assert add(segments, 500, named=True) == waiting
    assert released == [waiting] and waiting not in segments._fresh
    assert segments.first_uses(waiting, named=True) == NAMED_USES


@given(
    st.lists(
        st.tuples(
            st.sampled_from(
                ["add", "named", "empty", "use", "expect", "gone", "forget", "release"]
            ),
            st.integers(0, 5),
            st.sampled_from([None, "a"]),
        ),
        max_size=40,
    )
)
def test_counts_add_up_whatever_happens(steps: list[tuple[str, int, str | None]]) -> None:
    segments, _ = made(fresh=35)
    for what, n, tenant in steps:
        space = segments.namespace(tenant)
        name = segment_id(space, None, ids(100 * n, 10))
        if what in ("add", "named", "empty"):
            node = None if what == "empty" else n
            segments.add(ids(100 * n, 10), None, space, node, named=what == "named")
        elif what in ("use", "expect"):
            getattr(segments, what)([name, "unknown"])
        elif what == "release":
            segments.release_all()
        else:
            getattr(segments, what)(name)
        segments.check()
    held = [record for record in segments.all() if record.node is not None]
    assert segments.count == len(held)
    assert {r.id for t in (None, "a") for r in segments.records(t)} == {r.id for r in held}


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what is held as much as there are pages for; of what is gone, so many, and
    none of their tokens."""
    monkeypatch.setattr(segments_module, "MAX_FORMER", 8)
    segments, _ = made(fresh=10_000)
    names = [add(segments, 100 * i) for i in range(20)]
    assert segments.count == 20 and len(list(segments.all())) == 20
    for name in names[:15]:
        segments.gone(name)
    segments.check()
    left = list(segments.all())
    assert segments.count == 5 and len(left) == 5 + 8
    assert sum(len(record.path) for record in left) == 5 * 10


def test_a_context_is_whole_pages() -> None:
    with pytest.raises(PicIntegrityError):
        Segments((1, 2, 3), 4, 10, Released())


# -- pages -----------------------------------------------------------------------------


@pytest.fixture(params=[1, 4])
def pages(request: pytest.FixtureRequest) -> tuple[Pages, Any, int]:
    driver = Driver(request.param, 256, PicConfig())
    return Pages(driver.cache.params), driver.allocator, request.param


def keep(pages: Pages, allocator: Any, tokens: array, salt: str = "s") -> int:
    return pages.keep(tokens, None, salt, allocator.alloc(len(tokens)).to(torch.int64))


def test_pages_are_found_by_their_tokens(pages: Any) -> None:
    tree, allocator, page = pages
    free = allocator.available_size()
    path = ids(0, 16)
    node = keep(tree, allocator, path)
    for count in range(17):
        held, deepest = tree.find(path[:count], None, "s")
        assert held == count // page * page
        assert tree.slots(deepest, held).tolist() == tree.slots(node, 16)[:held].tolist()
    assert tree.find(path, None, "other")[0] == tree.find(path, "adapter", "s")[0] == 0
    other = array("q", [*path[:8], 99, *path[9:]])
    assert tree.find(other, None, "s")[0] == 8
    assert tree.tokens == 16 and allocator.available_size() == free - 16


def test_pages_that_begin_alike_are_held_once(pages: Any) -> None:
    tree, allocator, _ = pages
    free = allocator.available_size()
    first = keep(tree, allocator, ids(0, 16))
    keep(tree, allocator, ids(0, 8) + ids(50, 8))
    assert tree.tokens == 24 and allocator.available_size() == free - 24
    assert tree.holds(first)
    tree.check()


def test_what_is_locked_stays(pages: Any) -> None:
    tree, allocator, _ = pages
    first, second = keep(tree, allocator, ids(0, 16)), keep(tree, allocator, ids(100, 16))
    locked = tree.lock([first])
    assert (tree.protected, tree.evictable) == (16, 16)
    assert tree.evict(32, None) == 16
    assert tree.holds(first) and not tree.holds(second)
    with pytest.raises(KeyError):
        tree.lock([first, second])
    assert tree.protected == 16
    tree.unlock(locked)
    assert tree.evict(32, None) == 16 and tree.tokens == 0
    keep(tree, allocator, ids(0, 16))
    tree.reset()
    assert tree.tokens == 0 and tree.find(ids(0, 16), None, "s")[0] == 0
    node = keep(tree, allocator, ids(0, 16))
    assert tree.slots(node, 16).numel() == 16


# -- what is carried -------------------------------------------------------------------


def test_nothing_takes_no_room_and_keeps_all() -> None:
    nothing = Nothing()
    assert nothing.begin(None, [4], Path(7, 12)) == Path(7, 12)  # type: ignore[arg-type]
    assert nothing.of_core("s", ("a", ""), (0, 4), opening=False) == (None, None)
    assert nothing.budget == nothing.nbytes_of("s") == nothing.nbytes_of_kind("turn") == 0
    assert nothing.usable(Turn(("a",), ()), 5) == 5 and nothing.tensors("s") == {}


# -- the planner -----------------------------------------------------------------------


def row(tokens: int, spans: list[tuple[int, int]], **options: Any) -> Row:
    named = [TokenSpan(*span) for span in spans]
    return Row(ids(0, tokens), tokens - 1, named, LinkOptions(**options), 0, 1)


def found(length: int, slot: int) -> tuple[Lookup, torch.Tensor]:
    name = f"segment {slot}"
    looked = Lookup(name, name, slot, length, None, 0, core=(4, length - 1))
    return looked, torch.arange(slot, slot + length)


NOBODY = torch.empty(0, dtype=torch.int64)


def test_the_planner_reuses_what_it_is_given() -> None:
    looked, slots = zip(found(20, 100), found(20, 200), strict=True)
    asked = row(50, [(5, 25), (25, 45)], seam=4)
    plan = arrange(asked, looked, slots, NOBODY, [0], lambda *_: None)
    assert [core.segment for core in plan.cores] == ["segment 100", "segment 200"]
    assert plan.first == "segment 100" and plan.chain is None
    assert plan.plan.slots.tolist() == [*range(104, 119), *range(204, 219)]
    plan.plan.check(1)


def test_the_planner_takes_a_prefix_before_segments() -> None:
    looked, slots = zip(found(20, 100), found(20, 200), strict=True)
    asked = row(50, [(5, 25), (25, 45)], seam=4)
    prefix = torch.arange(300, 330)
    plan = arrange(asked, looked, slots, prefix, [30], lambda *_: None)
    assert plan.prefix == 30
    assert plan.plan.slots.tolist() == [*range(300, 330), *range(205, 219)]


def test_a_shorter_prefix_is_taken_for_a_turn_alone() -> None:
    looked, slots = zip(found(20, 100), strict=True)
    asked = row(60, [(25, 45)], seam=4)
    prefix = torch.arange(300, 320)
    turns: list[int] = []

    def chain_of(plan: Any, cores: Any) -> Chain | None:
        turns.append(plan.spans[0].n_tokens)
        if plan.spans[0].n_tokens == 20:
            return None
        return Chain(Turn(("a",), tuple(cores)), 2, (torch.arange(400, 414),), (9,), array("q"))

    plan = arrange(asked, looked, slots, prefix, [20, 10], chain_of)
    assert turns == [20, 10] and plan.prefix == 10 and plan.chain is not None
    assert plan.plan.reused == 10 + 15 + 14
    plan = arrange(asked, looked, slots, prefix, [20, 10], lambda *_: None)
    assert plan.prefix == 20


def test_the_planner_says_what_it_saw() -> None:
    looked = [None, Lookup("gone", "gone", 3, 0, "evicted", 0)]
    asked = row(50, [(0, 3), (25, 45)])
    plan = arrange(asked, looked, [None, NOBODY], NOBODY, [0], lambda *_: None)
    assert plan.cores == () and plan.plan.reused == 0
    assert [one.miss for one in plan.seen] == [None, "evicted"]
    assert [one.id for one in plan.seen] == [None, "gone"]
