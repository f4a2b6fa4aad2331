"""Streams of prompts that share prefixes, replayed over ways of keeping states of them.

No server and no tokens: a stream says how far each request overlaps with what came before
it, a cache holds whole paths, the last used, and each policy decides behind which tokens of
a path a state is kept. What counts is how much of the overlap is gone on from, and how
many states are held for it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import random
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from sglang_pic.forest.order import EvictionOrder
from sglang_pic.forest.overlaps import End, Overlaps, Prompt
from sglang_pic.forest.placement import (
    Expected,
    Held,
    Place,
    passes_at,
    places,
    wanted,
    worth_keeping,
)
from sglang_pic.forest.steps import Steps

GRID = 64
TENANT = ("", "")
State = tuple[str, int]


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt of ``tokens``, answered with ``answer``, which begins with nested trunks: so
    many tokens of each, by the trunk's name. Earlier requests on a trunk had as many in
    common with it. Messages in it end at ``ends``."""

    trunks: tuple[tuple[str, int], ...]
    tokens: int
    answer: int = 0
    ends: tuple[int, ...] = ()

    @property
    def path(self) -> str:
        return self.trunks[-1][0]

    def trunk_of(self, depth: int) -> str:
        """Whose tokens end at this depth; behind all trunks, the path's."""
        return next((name for name, end in self.trunks if depth <= end), self.path)


# -- streams ------------------------------------------------------------------------------


def recorded(path: pathlib.Path) -> dict[str, list[Request]]:
    """Streams of a file of ``{name: [{"path", "tokens", "overlap"}]}``."""
    streams = json.loads(path.read_text(encoding="utf-8"))
    return {
        name: [Request(((str(one["path"]), one["overlap"]),), one["tokens"]) for one in stream]
        for name, stream in streams.items()
    }


def documents(draw: random.Random, count: int) -> Iterator[Request]:
    """Questions about documents that are asked for as Zipf has it."""
    sizes = [draw.randint(1000, 9000) for _ in range(60)]
    weights = [1 / (rank + 1) for rank in range(60)]
    for _ in range(count):
        (one,) = draw.choices(range(60), weights)
        yield Request(((f"doc{one}", sizes[one]),), sizes[one] + draw.randint(10, 200))


def branches(draw: random.Random, count: int) -> Iterator[Request]:
    """Users behind system messages that branch: company, then team."""
    for _ in range(count):
        company, team = draw.randrange(6), draw.randrange(5)
        base, own = 1500 + 300 * company, 400 + 150 * team
        trunks = ((f"c{company}", base), (f"c{company}t{team}", base + own))
        tokens = base + own + draw.randint(20, 400)
        yield Request(trunks, tokens, ends=(base + own, tokens))


def chats(draw: random.Random, count: int) -> Iterator[Request]:
    """Conversations that grow at their end alone, with what they were answered."""
    lengths: dict[int, int] = {}
    for _ in range(count):
        one = draw.randrange(24)
        shared = lengths.get(one, 0)
        tokens, answer = shared + draw.randint(100, 600), draw.randint(50, 300)
        lengths[one] = tokens + answer
        yield Request(((f"chat{one}", shared),), tokens, answer)


def drift(draw: random.Random, count: int) -> Iterator[Request]:
    """Documents and the length of questions change under way, and come back."""
    for i in range(count):
        era = i * 6 // count
        one = 15 * (era % 3) + draw.randrange(15)
        size = 2000 + 171 * one
        tail = draw.randint(20, 60) if era % 2 else draw.randint(600, 1200)
        yield Request(((f"doc{one}", size),), size + tail)


def assistants(draw: random.Random, count: int) -> Iterator[Request]:
    """System messages that come and go; what users say is a word or some pages."""
    for i in range(count):
        one = i // 25 + draw.randrange(6)
        size = 1500 + 370 * (one % 9)
        tokens = size + round(10 * 2 ** draw.uniform(0, 8))
        yield Request(((f"assistant{one}", size),), tokens, ends=(size, tokens))


SYNTHETIC = {
    "documents": documents,
    "branches": branches,
    "assistants": assistants,
    "chats": chats,
    "drift": drift,
}


# -- policies -----------------------------------------------------------------------------


class Policy(Protocol):
    """Which states are held."""

    @property
    def states(self) -> set[State]: ...

    def on_path(self, request: Request, path: Sequence[End], went_on: int) -> None:
        """A request has shared a path, and computes from ``went_on`` on."""
        ...

    def forget(self, state: State) -> None:
        """Nothing is held of that path any more."""
        ...


class Fixed:
    """So many states a path, by its length when it is first seen."""

    def __init__(self, rule: str, most: int):
        self.states: set[State] = set()
        self._rule, self._most = rule, most

    def on_path(self, request: Request, path: Sequence[End], went_on: int) -> None:
        if path:
            return
        n, most = request.tokens, self._most
        depths = {
            "none": [],
            "block": range(most, n, most),
            "balanced": [round((k + 1) * n / (most + 1)) for k in range(most)],
            "log": [round(n / 2**k) for k in range(most)],
        }[self._rule]
        for depth in depths:
            if depth >= GRID:
                at = depth // GRID * GRID
                self.states.add((request.trunk_of(at), at))

    def forget(self, state: State) -> None:
        self.states.discard(state)


class Histogram:
    """The paper's: the best M places by one histogram of overlaps over all paths."""

    def __init__(self, most: int):
        self.states: set[State] = set()
        self._most = most
        self._seen: list[int] = []
        self._depths: list[int] = []

    def on_path(self, request: Request, path: Sequence[End], went_on: int) -> None:
        self._seen.append(path[-1].depth if path else 0)
        if len(self._seen) % 16 == 1:
            self._depths = best_places(self._seen, self._most)
        for depth in self._depths:
            if went_on < depth < request.tokens:
                self.states.add((request.trunk_of(depth), depth))
        mine = [state for state in self.states if state[0] == request.path]
        self.states -= {state for state in mine if state[1] not in self._depths}

    def forget(self, state: State) -> None:
        self.states.discard(state)


def best_places(overlaps: Sequence[int], most: int) -> list[int]:
    """At most so many places on the grid that spare most of these overlaps: the paper's
    F_m(j) = max_{i < j} F_{m-1}(i) + (j - i) Q(j), as it stands."""
    depths = sorted({depth // GRID * GRID for depth in overlaps if depth >= GRID})
    at = np.array([0, *depths], dtype=float)
    q = np.array([sum(one >= depth for one in overlaps) for depth in at], dtype=float)
    best = np.full(len(at), -np.inf)
    best[0] = 0.0
    chosen: list[list[int]] = [[] for _ in at]
    top: tuple[float, list[int]] = (0.0, [])
    for _ in range(min(most, len(depths))):
        spared = best[:, None] + (at[None] - at[:, None]) * q[None]
        spared[np.tril_indices(len(at))] = -np.inf
        before = spared.argmax(0)
        best = spared.max(0)
        chosen = [[*chosen[before[j]], int(at[j])] for j in range(len(at))]
        j = int(best.argmax())
        if best[j] > top[0]:
            top = (float(best[j]), chosen[j])
    return top[1]


class Latest:
    """As SGLang keeps them: where a request left a path and where it ended, the last used
    of them, so many in all."""

    def __init__(self, room: int):
        self._order: OrderedDict[State, None] = OrderedDict()
        self._room = room

    @property
    def states(self) -> set[State]:
        return set(self._order)

    def on_path(self, request: Request, path: Sequence[End], went_on: int) -> None:
        used = (request.trunk_of(went_on), went_on)
        if used in self._order:
            self._order.move_to_end(used)
        left = path[-1].depth // GRID * GRID if path else 0
        for depth in (left, request.tokens // GRID * GRID):
            if depth > went_on:
                self._order[(request.trunk_of(depth), depth)] = None
        while len(self._order) > self._room:
            self._order.popitem(last=False)

    def forget(self, state: State) -> None:
        self._order.pop(state, None)


class Sparse:
    """Ours: the parts that the server runs, over a memory of so many states."""

    def __init__(self, room: int):
        self.states: set[State] = set()
        self._room = room
        self._overlaps = Overlaps(GRID)
        self._steps = Steps()
        self._order: EvictionOrder[State] = EvictionOrder()
        self._ids: dict[State, int] = {}

    def on_path(self, request: Request, path: Sequence[End], went_on: int) -> None:
        shared = path[-1].depth if path else 0
        has_left = shared >= GRID
        prompt = Prompt(request.tokens, request.ends)
        self._overlaps.note(TENANT, path, prompt, has_left=has_left)
        if not self._overlaps.is_left(TENANT):
            return
        expected = self._overlaps.expected(TENANT, path, prompt)
        mine = {name for name, _ in request.trunks}
        on_path = sorted(s for s in self.states if s[0] in mine and s[1] <= shared)
        before = self._value(on_path, expected)
        room = self._order.least() if len(self.states) >= self._room else 0.0
        held = Held({depth for _, depth in on_path}, 0, room)
        chosen: list[Place] = worth_keeping(places(expected, held, GRID, float))
        for place in wanted(chosen, held, range(went_on + 1, request.tokens)):
            state = (request.trunk_of(place.depth), place.depth)
            if state in self.states or not self._has_room():
                continue
            self.states.add(state)
            self._order.add(state, "state", cost=0.0, nbytes=1)
            self._order.offer(state)
            self._put(state, place.passes, before if before in self.states else None)
            before = state

    def _has_room(self) -> bool:
        if len(self.states) < self._room:
            return True
        victim = self._order.park()
        if victim is None:
            return False
        self._order.evicted(victim)
        self._drop(victim)
        return True

    def _value(self, on_path: Sequence[State], expected: Sequence[Expected]) -> State | None:
        before: State | None = None
        for state in sorted(on_path, key=lambda one: one[1]):
            self._put(state, passes_at(expected, state[1]), before)
            before = state
        return before

    def _put(self, state: State, passes: float, before: State | None) -> None:
        node = self._ids.setdefault(state, len(self._ids))
        front = self._ids[before] if before is not None else None
        self._appraise(self._steps.put(node, state[1], float(state[1]), passes, front))

    def _appraise(self, nodes: Sequence[int]) -> None:
        of = {self._ids[state]: state for state in self.states}
        for node in nodes:
            self._order.appraise(of[node], self._steps.cost(node))

    def _drop(self, state: State) -> None:
        self.states.discard(state)
        self._appraise(self._steps.drop(self._ids[state]))

    def forget(self, state: State) -> None:
        if state in self.states:
            self._order.remove(state)
            self._drop(state)


# -- replay -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Replayed:
    """Tokens over all requests behind the warm-up, and states held a path in the mean."""

    tokens: int
    overlap: int
    gone_on: int
    states: float
    paths: float

    def to_json(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.tokens,
            "overlap_tokens": self.overlap,
            "resumed_share": self.gone_on / self.overlap if self.overlap else math.nan,
            "recomputed_tokens": self.overlap - self.gone_on,
            "states_per_path": self.states,
            "paths": self.paths,
        }


def replay(stream: Sequence[Request], policy: Policy, paths: int, *, warm_up: int) -> Replayed:
    """One policy over one stream.

    Args:
        paths: the cache holds so many, with all trunks that they begin with.
        warm_up: requests that are not counted.

    The state behind the last answer of a path is there besides: SGLang keeps it, and
    whoever goes on from there needs no other.
    """
    cached: OrderedDict[str, Request] = OrderedDict()
    users: dict[str, int] = {}
    births: dict[str, int] = {}
    depths: dict[str, set[int]] = {}
    ended: dict[str, int] = {}
    ids: dict[tuple[str, int, int], int] = {}
    tokens = overlap = gone_on = 0
    states: list[float] = []
    held_paths: list[int] = []
    for i, request in enumerate(stream):
        alive = [(name, end) for name, end in request.trunks if users.get(name)]
        shared = alive[-1][1] if alive else 0
        for name, end in alive:
            depths.setdefault(name, set()).add(end)
        path, at = [], 0
        for name, end in alive:
            for depth in sorted(one for one in depths[name] if at < one <= end):
                path.append(End(ids.setdefault((name, depth, births[name]), len(ids)), depth))
            at = end
        mine = {name for name, _ in request.trunks}
        of_ours = [d for name, d in policy.states if name in mine and d <= shared]
        end = ended.get(request.path, 0)
        stock = end if end <= shared else 0
        went_on = max([*of_ours, stock], default=0)
        if i >= warm_up:
            tokens, overlap = tokens + request.tokens, overlap + shared
            gone_on += went_on
        if not stock or shared - stock >= GRID:
            policy.on_path(request, path, went_on)
        ended[request.path] = request.tokens + request.answer
        if request.path in cached:
            cached.move_to_end(request.path)
        else:
            for name, _ in request.trunks:
                if not users.get(name):
                    births[name] = i
                users[name] = users.get(name, 0) + 1
        cached[request.path] = request
        if len(cached) > paths:
            gone, last = cached.popitem(last=False)
            ended.pop(gone, None)
            for name, _ in last.trunks:
                users[name] -= 1
                if not users[name]:
                    depths.pop(name, None)
                    for state in [one for one in policy.states if one[0] == name]:
                        policy.forget(state)
        if i >= warm_up:
            states.append(len(policy.states))
            held_paths.append(len(cached))
    mean = sum(states) / len(states)
    held = sum(held_paths) / len(held_paths)
    return Replayed(tokens, overlap, gone_on, mean / held, held)
