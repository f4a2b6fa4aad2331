"""The eviction order against one that sorts everything, and what it is for."""

from __future__ import annotations

import random

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from sglang_pic.forest.order import MAX_USES, EvictionOrder


class SortedModel(RuleBasedStateMachine):
    """The same rules over a plain dict, sorted whenever something must go."""

    @initialize()
    def begin(self) -> None:
        self.order: EvictionOrder[int] = EvictionOrder()
        self.model: dict[int, list[float]] = {}  # cost, bytes, uses, value, last use
        self.candidates: set[int] = set()
        self.age = 0.0
        self.clock = 0

    def _value(self, key: int) -> None:
        cost, nbytes, uses, value, _ = self.model[key]
        self.model[key][3] = max(value, self.age + max(0, uses - 1) * cost / nbytes)

    @rule(
        key=st.integers(0, 9),
        cost=st.integers(0, 50),
        nbytes=st.integers(1, 9),
        uses=st.integers(0, 20),
        offer=st.booleans(),
    )
    def add(self, key: int, cost: int, nbytes: int, uses: int, offer: bool) -> None:
        if key in self.model:
            return
        self.order.add(key, str(key % 2), cost=cost, nbytes=nbytes, uses=uses)
        self.clock += 1
        self.model[key] = [cost, nbytes, min(uses, MAX_USES), self.age, self.clock]
        self._value(key)
        if offer:
            self.offer(key)

    @rule(key=st.integers(0, 9))
    def withdraw(self, key: int) -> None:
        self.order.withdraw(key)
        self.candidates.discard(key)

    @rule(key=st.integers(0, 9))
    def use(self, key: int) -> None:
        if key in self.model:
            self.order.use(key)
            self.clock += 1
            self.model[key][2] = min(self.model[key][2] + 1, MAX_USES)
            self.model[key][4] = self.clock
            self._value(key)

    @rule(key=st.integers(0, 9), cost=st.integers(0, 50), nbytes=st.integers(1, 9))
    def resize(self, key: int, cost: int, nbytes: int) -> None:
        if key in self.model:
            self.order.resize(key, cost=cost, nbytes=nbytes)
            self.model[key][:2] = [cost, nbytes]
            self._value(key)

    @rule(key=st.integers(0, 9))
    def offer(self, key: int) -> None:
        self.order.offer(key)
        if key in self.model:
            self.candidates.add(key)

    @rule(key=st.integers(0, 9))
    def remove(self, key: int) -> None:
        if key in self.model:
            self.order.remove(key)
            del self.model[key]
            self.candidates.discard(key)

    @rule(evict=st.booleans(), parity=st.sampled_from([None, 0, 1]))
    def take(self, evict: bool, parity: int | None) -> None:
        found = self.order.park(None if parity is None else [str(parity)])
        among = [key for key in self.candidates if parity in (None, key % 2)]
        if not among:
            assert found is None
            return
        expected = min(among, key=lambda key: (self.model[key][3], self.model[key][4]))
        assert found == expected
        self.candidates.remove(expected)
        if evict:
            self.order.evicted(expected)
            self.age = max(self.age, self.model.pop(expected)[3])

    @invariant()
    def same(self) -> None:
        if hasattr(self, "order"):
            assert set(self.order) == set(self.model) and self.order.age == self.age


SortedModel.TestCase.settings = settings(max_examples=200, stateful_step_count=40)
TestSorted = SortedModel.TestCase


def _cached(order: EvictionOrder[str], key: str, room: int) -> bool:
    """Ask for a key of one byte; whether it was there."""
    if key in order:
        order.use(key)
        return True
    while len(order) >= room:
        victim = order.park()
        assert victim is not None
        order.evicted(victim)
    order.add(key, "any", cost=1.0, nbytes=1)
    order.offer(key)
    return False


def test_things_seen_once_displace_nothing_that_was_used_twice() -> None:
    order: EvictionOrder[str] = EvictionOrder()
    hot = [f"hot{i}" for i in range(9)]
    for _ in range(2):
        for key in hot:
            _cached(order, key, 10)
    for i in range(1000):
        assert not _cached(order, f"once{i}", 10)
    assert all(key in order for key in hot)


def test_what_was_hot_once_goes_when_others_are() -> None:
    order: EvictionOrder[str] = EvictionOrder()
    for _ in range(100):
        for i in range(10):
            _cached(order, f"old{i}", 10)
    hits = [_cached(order, f"new{i % 5}", 10) for i in range(400)]
    assert sum(hits[-100:]) == 100


def test_a_skewed_stream_beats_lru() -> None:
    draw = random.Random(0)
    keys = [f"k{int(draw.paretovariate(0.8))}" for _ in range(20000)]
    order: EvictionOrder[str] = EvictionOrder()
    ours = sum(_cached(order, key, 50) for key in keys)
    lru: dict[str, None] = {}
    theirs = 0
    for key in keys:
        theirs += key in lru
        lru.pop(key, None)
        lru[key] = None
        if len(lru) > 50:
            del lru[next(iter(lru))]
    assert ours > theirs


def test_of_two_of_equal_use_the_one_that_saves_more_a_byte_stays() -> None:
    order: EvictionOrder[str] = EvictionOrder()
    order.add("dear", "a", cost=100.0, nbytes=10, uses=2)
    order.add("cheap", "b", cost=100.0, nbytes=20, uses=2)
    order.offer("dear")
    order.offer("cheap")
    assert order.park() == "cheap"
