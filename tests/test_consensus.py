"""Ranks that decide alike: what they count, and what they compare."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from driver import Driver
from hypothesis import given
from hypothesis import strategies as st

from sglang_pic.config import PicConfig
from sglang_pic.forest.consensus import EVERY, AllRanks
from sglang_pic.forest.kept import Kept
from sglang_pic.kernels.operators.pair import Pair
from sglang_pic.linear.shape import LinearShape
from sglang_pic.linear.states import PackedStates

Event = tuple[str, str]
events = st.lists(
    st.tuples(st.sampled_from(["kept", "refused", "lost", "evicted"]), st.text(max_size=3))
)


class Ranks:
    """Several, each told its own events; their exchange is this list."""

    def __init__(self, count: int):
        self.digests = [0] * count
        self.differ: list[str] = []
        self.ranks = [AllRanks(self._gather_of(i), self.differ.append) for i in range(count)]

    def _gather_of(self, rank: int) -> Callable[[int], Sequence[int]]:
        def gather(value: int) -> Sequence[int]:
            assert 0 <= value < 2**63
            self.digests[rank] = value
            return self.digests

        return gather

    def compare(self) -> bool:
        """Whether they agree, as the last to be asked sees it."""
        for rank in self.ranks:
            for _ in range(EVERY):
                rank.arrived()
        self.differ.clear()
        for _ in range(EVERY):
            self.ranks[-1].arrived()
        return not self.differ


@given(events, events)
def test_ranks_agree_if_and_only_if_they_did_the_same(one: list[Event], other: list[Event]) -> None:
    ranks = Ranks(2)
    for rank, told in zip(ranks.ranks, (one, other), strict=True):
        for event in told:
            rank.note(*event)
    assert ranks.compare() == (one == other)


def test_they_are_compared_now_and_then() -> None:
    asked: list[int] = []
    rank = AllRanks(lambda value: asked.append(value) or [value], pytest.fail)  # type: ignore[func-returns-value]
    for _ in range(3 * EVERY - 1):
        rank.arrived()
    assert len(asked) == 2


def test_a_rank_that_differs_is_seen_and_nothing_links() -> None:
    driver = Driver(4, 512, PicConfig(min_segment=1, seam=4))
    consensus = AllRanks(lambda value: [value, value + 1], driver.forest.contained.distrust)
    consensus.note("kept", "a")
    for _ in range(EVERY):
        consensus.arrived()
    assert driver.forest.refusal is not None and "differ" in driver.forest.refusal
    part = list(range(100, 140))
    driver.compile(part)
    req = driver.link([*part, 7], [(0, 40)])
    assert driver.start(req)
    assert req.customized_info["pic"][0]["reason"] == driver.forest.refusal
    assert req.customized_info["pic"][0]["exactness"] == "exact"


SHAPE = LinearShape(layers=2, heads=3, dk=4, dv=5, channels=6, history=3, scalar=False)


@given(
    forgets=st.lists(st.booleans(), min_size=6, max_size=6),
    large=st.booleans(),
    widths=st.integers(0, 3),
    dtype=st.sampled_from(["float16", "float32"]),
)
def test_what_is_kept_counts_by_its_shape(
    forgets: list[bool], large: bool, widths: int, dtype: str
) -> None:
    kept = Kept(1 << 30)
    packed = PackedStates(PicConfig(state_dtype=dtype), kept, by_shape=SHAPE)
    operators = torch.eye(4).repeat(2, 3, 1, 1)
    operators[torch.tensor(forgets).view(2, 3)] = 0
    states = torch.full((2, 3, 4, 5), 1e9 if large else 1.0)
    pairs = {first: Pair(operators, states) for first in range(widths)}
    assert packed.add(
        "a", ("t",), core_end=8, conv_tail=torch.zeros(2, 6, 3), end=states, pairs=pairs
    )
    assert kept.nbytes == kept.nbytes_of("a") == SHAPE.state_nbytes(widths, 4)
    assert kept.packed_bytes <= kept.nbytes
    kept.check()
    kept.drop("a")
    assert kept.nbytes == 0
