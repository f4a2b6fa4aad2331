"""A hybrid's segments as values: one for each seam width, checked before they are held."""

from __future__ import annotations

from array import array
from typing import Any

import pytest
import torch

from sglang_pic.config import PicConfig
from sglang_pic.forest.cost import PrefillCost
from sglang_pic.forest.kept import Kept
from sglang_pic.kernels.operators.pair import Pair
from sglang_pic.linear.carried import LinearStates
from sglang_pic.linear.shape import LinearShape
from sglang_pic.manage.outgoing import by_head
from sglang_pic.store.value import BadValue, Codec, SavedSegment

OWNER = ("space", "")
PATH = array("q", range(100))
CODEC = Codec({"weights": "a"})


def states_of(scalar: bool) -> LinearStates:
    return LinearStates(
        PicConfig(state_mib=4),
        context=0,
        page=16,
        shape=LinearShape(2, 4, 16, 8, 6, 3, scalar),
        cost=PrefillCost(1.0, 1.0, 16),
        rows=None,
        device="cpu",
        is_exact=False,
        kept=Kept(4 << 20),
        by_shape=False,
        ending=lambda node, until: (),
        turn=lambda states, offset: states,
    )


def compiled(scalar: bool) -> LinearStates:
    """One that holds a segment for links of the seams 16 and 32."""
    torch.manual_seed(0)
    states = states_of(scalar)
    operators = torch.randn(2, 4) if scalar else torch.randn(2, 4, 16, 16)
    pair = Pair(operators, torch.randn(2, 4, 16, 8))
    tail, end = torch.randn(2, 6, 3), torch.randn(2, 4, 16, 8)
    for (head,) in (states.heads(100, 16), states.heads(100, 32)):
        states.states.add(
            "s", OWNER, core_end=96, conv_tail=tail, end=end, pairs={head: pair}, cost=1.0
        )
    return states


class Rows:
    """A request whose row's running states are read off by hand."""


def company_of(
    states: LinearStates, members: list[tuple[int, int]], seed: int, seams: tuple[int, ...] = (0,)
) -> Rows:
    req = Rows()
    states.begin_company(req, members, seams)  # type: ignore[arg-type]
    draw = torch.Generator().manual_seed(seed)
    for capture in states._captures[req]:  # type: ignore[index]
        capture.restart(torch.device("cpu"))
        for head, running in capture.running.items():
            capture.running[head] = torch.randn(running.shape, generator=draw)
        capture.conv_tail = torch.randn(2, 6, 3, generator=draw)
    return req


def pairs_of(states: LinearStates, req: Rows) -> list[Pair]:
    captures = states._captures[req]  # type: ignore[index]
    return [next(iter(capture.pairs().values())) for capture in captures if capture.heads]


MEMBERS = [(5, 105), (105, 155), (155, 160)]


@pytest.mark.parametrize("scalar", [False, True])
def test_of_a_company_the_mean_of_both_orders_is_kept(scalar: bool) -> None:
    states = states_of(scalar)
    forth = company_of(states, MEMBERS, 1)
    back = company_of(states, MEMBERS, 2)
    # The last is shorter than a page: it has no core.
    assert states.keep_members(forth, ["a", "b", "c"], OWNER, offer=False)  # type: ignore[arg-type]
    assert states.keep_members(  # type: ignore[arg-type]
        back, ["A", "B", "C"], OWNER, others=["a", "b", "c"], offer=True
    )
    for name, one, other in zip(
        "AB", pairs_of(states, forth), pairs_of(states, back), strict=False
    ):
        held = states.states.find(name, OWNER)
        assert held is not None and not held.end.numel()
        # In whole pages, the convolution's three tokens are computed again.
        mean = held.pairs[16].unpack()
        torch.testing.assert_close(mean.A, (one.A + other.A) / 2)
        torch.testing.assert_close(mean.B, (one.B + other.B) / 2)
    assert states.states.find("C", OWNER) is None
    states.states.kept.check()


def test_a_company_without_its_other_order_or_of_another_width_is_not_kept() -> None:
    states = states_of(False)
    forth, back = company_of(states, MEMBERS, 1), company_of(states, MEMBERS, 2, (17,))
    assert states.keep_members(forth, ["a", "b", "c"], OWNER, offer=True)  # type: ignore[arg-type]
    for others in (["a", "x", "c"], ["a", "b", "c"]):
        assert not states.keep_members(  # type: ignore[arg-type]
            back, ["A", "B", "C"], OWNER, others=others, offer=True
        )
        assert states.nbytes_of("A") == states.nbytes_of("B") == 0


def test_of_a_company_all_fit_or_none_is_kept() -> None:
    states = states_of(False)
    req = company_of(states, MEMBERS, 1)
    assert states.keep_members(req, ["a", "b", "c"], OWNER, offer=True)  # type: ignore[arg-type]
    each = states.nbytes_of("a")
    states.states.kept.clear()
    states.states.kept.budget = each + 10
    assert not states.keep_members(req, ["a", "b", "c"], OWNER, offer=False)  # type: ignore[arg-type]
    assert states.states.kept.nbytes == 0


def test_what_a_member_wrote_is_turned_back_to_positions_of_its_own() -> None:
    turns: list[int] = []
    states = states_of(True)
    states._turn = lambda one, offset: turns.append(offset) or one * 2
    req = company_of(states, MEMBERS, 1)
    assert states.keep_members(req, ["a", "b", "c"], OWNER, offer=True)  # type: ignore[arg-type]
    assert turns == [-5, -105]
    held = states.states.find("a", OWNER)
    assert held is not None
    torch.testing.assert_close(held.pairs[16].unpack().B, pairs_of(states, req)[0].B * 2)


def values_of(states: LinearStates) -> list[tuple[str, Any]]:
    found = []
    for head, tensors in by_head(states.tensors("s")):
        kept = {name: one.cpu() for name, one in tensors.items()}
        saved = SavedSegment(PATH, None, "space", 3, kept, states.core_end("s", OWNER), head)
        name = CODEC.name("space", PATH, head)
        found.append((name, CODEC.encode(name, saved)))
    return found


def adopt(states: LinearStates, saved: SavedSegment, name: str = "s") -> bool:
    states.check_saved(saved, 100)
    return states.adopt(name, saved, cost=1.0, uses=1, offer=True, evict=True)


@pytest.mark.parametrize("scalar", [False, True])
def test_states_come_back_seam_by_seam(scalar: bool) -> None:
    one, other = compiled(scalar), states_of(scalar)
    values = values_of(one)
    assert len({name for name, _ in values}) == 2
    for i, (name, value) in enumerate(values):
        # A store's memory may begin anywhere, and is not kept.
        moved = bytearray(len(value) + 1)
        moved[1:] = value.tobytes()
        saved = CODEC.decode(memoryview(moved)[1:], name, salt="space", path=PATH)
        assert adopt(other, saved)
        moved[:] = bytes(len(moved))
        held = other.states.find("s", OWNER)
        assert held is not None and len(held.pairs) == i + 1
        assert all(pair.places().any() for pair in held.pairs.values())
    for seam in (16, 32):
        core = (*one.heads(100, seam), 96)
        for opening in (False, True):
            (mine, _), (theirs, miss) = (
                states.of_core("s", OWNER, core, opening=opening) for states in (one, other)
            )
            assert miss is None and mine is not None and theirs is not None
            assert torch.equal(mine.conv_tail, theirs.conv_tail)
            if opening:
                assert torch.equal(mine.end, theirs.end)
            else:
                a, b = mine.pair.unpack(), theirs.pair.unpack()
                assert torch.equal(a.A, b.A) and torch.equal(a.B, b.B)
    other.states.kept.check()


@pytest.mark.parametrize("scalar", [False, True])
def test_states_of_other_shapes_are_refused(scalar: bool) -> None:
    states = states_of(scalar)
    name, value = values_of(compiled(scalar))[0]
    saved = CODEC.decode(value, name, salt="space")
    (head,) = saved.heads
    good = dict(saved.tensors)

    def refused(**changes: Any) -> None:
        made = {**vars(saved), "tensors": good, **changes}
        with pytest.raises(BadValue) as error:
            adopt(states, SavedSegment(**made))
        assert error.value.reason == "other_shape"

    refused(core_end=80)
    refused(core_end=None)
    refused(heads=())
    refused(heads=(head, head + 16))
    refused(tensors={**good, "more": torch.zeros(1)})
    for key, one in good.items():
        refused(tensors={other: t for other, t in good.items() if other != key})
        refused(tensors={**good, key: one[..., :-1]})
        refused(tensors={**good, key: one.to(torch.int32)})
    if not scalar:
        for kept in ([-1], [8], [3, 3]):
            of = torch.tensor(kept)
            operators = good[f"pair.{head}.operator"][: len(kept)]
            changed = {f"pair.{head}.kept": of, f"pair.{head}.operator": operators}
            refused(tensors={**good, **changed})
    assert states.nbytes_of("s") == 0
    assert adopt(states, saved)


def test_states_take_the_place_of_others_only_if_they_may() -> None:
    states, source = states_of(False), compiled(False)
    name, value = values_of(source)[0]
    saved = CODEC.decode(value, name, salt="space")
    states.states.kept.budget = 2 * source.nbytes_of("s") // 2 + 100
    assert adopt(states, saved, "first")
    kept = {**vars(saved)}
    again = SavedSegment(**kept)
    assert not states.adopt("second", again, cost=1.0, uses=1, offer=True, evict=False)
    assert states.adopt("second", again, cost=1.0, uses=1, offer=True, evict=True)
    assert states.nbytes_of("first") == 0
    states.states.kept.check()
