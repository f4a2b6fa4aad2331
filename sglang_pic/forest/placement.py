"""Where on a path of tokens states are worth keeping.

Sparse Prefix Caching for Hybrid and Recurrent LLM Serving (arXiv 2605.05219). A request
that shares the first D tokens of a path goes on from the deepest state at or before D.
With states behind c_1 < c_2 < ..., W(c) the work of computing c tokens and
Q(c) = E[requests with D >= c], they spare

    sum_k (W(c_k) - W(c_{k-1})) Q(c_k),        c_0 = 0.

The paper asks for the best M of them. The best value of M states is concave in M, so a
price of one state finds them all, and needs no M:

    F(j) = max_{i < j} F(i) + (W(j) - W(i)) Q(j) - price(j).

For a given j these are lines of falling slope -W(i), asked at a Q(j) that never rises: an
upper envelope, O(n) for n depths.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence

# What a new state must be expected to spare, in tokens: reading it off is not free.
LEAST_SPARED = 64
# New states that one request reads off: each takes the kernels of the linear layers once
# more over a part of its prompt.
AT_ONCE = 2


@dataclasses.dataclass(frozen=True)
class Expected:
    """So many requests will share at least ``depth`` tokens of a prompt."""

    depth: int
    passes: float


def passes_at(expected: Sequence[Expected], depth: int) -> float:
    """Requests that will share at least so many tokens."""
    return max((one.passes for one in expected if one.depth >= depth), default=0.0)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a state could be kept.

    Attributes:
        depth: tokens in front of it.
        work: of computing them, in any unit.
        passes: requests expected that share at least so many.
        price: of keeping a state here, in the unit of ``work``.
    """

    depth: int
    work: float
    passes: float
    price: float


def worth_keeping(places: Sequence[Place]) -> list[Place]:
    """The places whose states together spare most, prices paid.

    Args:
        places: of rising ``depth`` and ``work``, and ``passes`` that never rise.
    """
    values = [0.0]
    works = [0.0]
    before = [0]
    # Lines that are the highest somewhere, in the order in which they are.
    hull: list[int] = []
    head = 0
    for j, place in enumerate(places, 1):
        i = j - 1
        while len(hull) - head >= 2 and _is_covered(values, works, hull[-2], hull[-1], i):
            hull.pop()
        hull.append(i)

        def at(line: int, passes: float = place.passes) -> float:
            return values[line] - works[line] * passes

        while len(hull) - head >= 2 and at(hull[head + 1]) >= at(hull[head]):
            head += 1
        best = hull[head]
        values.append(at(best) + place.work * place.passes - place.price)
        works.append(place.work)
        before.append(best)
    last = max(range(len(values)), key=values.__getitem__)
    chosen = []
    while last:
        chosen.append(places[last - 1])
        last = before[last]
    return chosen[::-1]


@dataclasses.dataclass(frozen=True)
class Held:
    """What there is on a path to go on from.

    Attributes:
        depths: of the states held.
        free: depth of one that takes no memory of ours; 0 for none.
        room: price of the memory of one of ours.
    """

    depths: Collection[int]
    free: int
    room: float


def places(
    expected: Sequence[Expected], held: Held, grid: int, work: Callable[[int], float]
) -> list[Place]:
    """Where on a path a state could be: on the grid in front of where it is left, and where
    one is.

    Args:
        work: of computing so many tokens.
    """
    new = held.room + work(LEAST_SPARED)
    prices = {one.depth // grid * grid: new for one in expected if one.depth >= grid}
    # To stay is not free where memory is short: what is held may have a better neighbour.
    prices |= dict.fromkeys(held.depths, held.room)
    if held.free:
        prices[held.free] = 0.0
    found = []
    deeper = sorted(expected, key=lambda one: one.depth)
    passes = 0.0
    for depth in sorted(prices, reverse=True):
        while deeper and deeper[-1].depth >= depth:
            passes = max(passes, deeper.pop().passes)
        found.append(Place(depth, work(depth), passes, prices[depth]))
    return found[::-1]


def wanted(chosen: Sequence[Place], held: Held, passed: range) -> list[Place]:
    """Of the places worth a state, the deepest few that a request passes and that have none.

    Args:
        passed: depths behind which the request computes tokens.
    """
    new = [
        place
        for place in chosen
        if place.depth in passed and place.depth not in held.depths and place.depth != held.free
    ]
    return new[-AT_ONCE:]


def _is_covered(
    values: Sequence[float], works: Sequence[float], first: int, middle: int, last: int
) -> bool:
    """Whether a line is nowhere above both of its neighbours: ``last`` overtakes ``first``
    where ``passes`` falls before ``middle`` does."""
    left = (values[last] - values[first]) * (works[middle] - works[first])
    return left >= (values[middle] - values[first]) * (works[last] - works[first])
