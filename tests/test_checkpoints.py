"""Where states of ordinary prefixes are worth keeping: placement, counts, what dropping costs."""

from __future__ import annotations

import itertools
import pathlib
import random
from array import array
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from conftest import CHECKS, TINY, serve
from hypothesis import given
from hypothesis import strategies as st
from linking import ids_of
from tiny_models import tiny_hybrid, tiny_mamba2

from sglang_pic.eval import checkpoints
from sglang_pic.eval.replay import (
    SYNTHETIC,
    Fixed,
    Latest,
    Policy,
    Request,
    Sparse,
    best_places,
    replay,
)
from sglang_pic.eval.serving import Server
from sglang_pic.forest.order import EvictionOrder
from sglang_pic.forest.overlaps import (
    HALF_LIFE,
    MAX_LOOKED_AT,
    MAX_MESSAGES,
    End,
    Overlaps,
    Prompt,
)
from sglang_pic.forest.placement import (
    Expected,
    Held,
    Place,
    passes_at,
    places,
    wanted,
    worth_keeping,
)
from sglang_pic.forest.steps import MENDED, Steps

TENANT = ("", "")
numbers = st.floats(0, 8, allow_nan=False, width=16)


def value(chosen: Sequence[Place]) -> float:
    """What these states spare, prices paid: the sum of the paper, term by term."""
    spared, before = 0.0, 0.0
    for place in chosen:
        spared += (place.work - before) * place.passes - place.price
        before = place.work
    return spared


def recomputed(depths: Sequence[int], mass: dict[int, float], work: dict[int, float]) -> float:
    """Work of all requests from the deepest state at or before where each leaves."""
    return sum(
        share * (work[left] - work[max((c for c in depths if c <= left), default=0)])
        for left, share in mass.items()
    )


@st.composite
def paths(draw: st.DrawFn) -> list[Place]:
    depths = sorted(draw(st.sets(st.integers(1, 60), max_size=7)))
    passes = sorted(draw(st.lists(numbers, min_size=7, max_size=7)), reverse=True)
    steps = draw(st.lists(st.floats(0.125, 8, width=16), min_size=7, max_size=7))
    prices = draw(st.lists(st.one_of(st.just(0.0), numbers), min_size=7, max_size=7))
    works = list(itertools.accumulate(steps))
    return [Place(depth, works[i], passes[i], prices[i]) for i, depth in enumerate(depths)]


class TestPlacement:
    @given(paths())
    def test_no_choice_is_better(self, path: list[Place]) -> None:
        choices = itertools.chain.from_iterable(
            itertools.combinations(path, n) for n in range(len(path) + 1)
        )
        chosen = worth_keeping(path)
        assert value(chosen) == pytest.approx(max(map(value, choices)), abs=1e-9)
        assert chosen == [place for place in path if place in chosen]

    @given(paths(), st.data())
    def test_what_is_spared_is_not_recomputed(self, path: list[Place], data: st.DataObject) -> None:
        """The paper's identity: E[W(D)] - spared = E[W(D) - W(c(D))]."""
        work = {0: 0.0} | {place.depth: place.work for place in path}
        passes = [*(place.passes for place in path), 0.0]
        mass = {p.depth: passes[i] - passes[i + 1] for i, p in enumerate(path)}
        chosen = data.draw(st.lists(st.sampled_from(path), unique=True)) if path else []
        chosen.sort(key=lambda place: place.depth)
        spared = value([Place(p.depth, p.work, p.passes, 0.0) for p in chosen])
        everything = recomputed([], mass, work)
        assert everything - spared == pytest.approx(
            recomputed([p.depth for p in chosen], mass, work), abs=1e-9
        )

    @given(paths(), st.floats(0, 20, width=16), st.floats(0, 20, width=16))
    def test_dearer_memory_holds_no_more_states(
        self, path: list[Place], one: float, other: float
    ) -> None:
        def at(price: float) -> tuple[int, float]:
            chosen = worth_keeping([Place(p.depth, p.work, p.passes, price) for p in path])
            return len(chosen), value([Place(p.depth, p.work, p.passes, 0.0) for p in chosen])

        cheap, dear = at(min(one, other)), at(max(one, other))
        assert dear[1] <= cheap[1] + 1e-9
        if one != other and dear[1] < cheap[1] - 1e-9:
            assert dear[0] < cheap[0]

    def test_the_grid_is_in_front_of_where_a_path_is_left(self) -> None:
        found = places([Expected(130, 1.0), Expected(70, 2.0)], Held((), 0, 0.0), 64, float)
        assert [(place.depth, place.passes) for place in found] == [(64, 2.0), (128, 1.0)]

    def test_what_is_held_may_be_worth_moving(self) -> None:
        """Where memory is short a state that is held pays for its room as a new one does."""
        short = Held({960}, 0, 600.0)
        chosen = worth_keeping(places([Expected(1024, 1.0)], short, 64, float))
        assert [place.depth for place in chosen] == [960]
        chosen = worth_keeping(places([Expected(1024, 8.0)], short, 64, float))
        assert [place.depth for place in chosen] == [1024]
        assert wanted(chosen, short, range(2000)) == chosen
        assert wanted(chosen, short, range(1000)) == []

    def test_what_sglang_holds_is_not_kept_again(self) -> None:
        held = Held((), 128, 0.0)
        chosen = worth_keeping(places([Expected(130, 9.0)], held, 64, float))
        assert wanted(chosen, held, range(1000)) == []


class TestOverlaps:
    def test_a_document_is_left_by_its_questions(self) -> None:
        overlaps = Overlaps(64)
        overlaps.note(TENANT, [], Prompt(5040), has_left=False)
        assert not overlaps.is_left(TENANT)
        for _ in range(3):
            overlaps.note(TENANT, [End(1, 5000)], Prompt(5040), has_left=True)
        assert overlaps.is_left(TENANT)
        expected = overlaps.expected(TENANT, [End(1, 5000)], Prompt(5040))
        assert passes_at(expected, 5000) == pytest.approx(3, rel=0.05)
        # One nobody has left yet is likely to be left as the first one was.
        new = overlaps.expected(TENANT, [], Prompt(8040))
        assert {one.depth for one in new} == {8000}
        # One path was begun, and left: the next will be, once.
        assert passes_at(new, 8000) == pytest.approx(1)

    def test_who_goes_on_from_the_end_teaches_nothing(self) -> None:
        overlaps = Overlaps(64)
        for turn in range(1, 20):
            prompt = Prompt((turn + 1) * 300)
            overlaps.note(TENANT, [End(turn, turn * 300)], prompt, has_left=False)
        assert not overlaps.is_left(TENANT)
        expected = overlaps.expected(TENANT, [End(19, 5700)], Prompt(6000))
        assert all(one.depth <= 5700 for one in expected)

    @given(
        st.lists(st.integers(1, 2000), min_size=2, max_size=6),
        st.lists(st.integers(1, 2000), min_size=1, max_size=6),
        st.data(),
    )
    def test_a_message_is_left_at_its_end(
        self, learnt: list[int], asked: list[int], data: st.DataObject
    ) -> None:
        """However long what stands behind it is; else as far from the prompt's end."""
        of = [tuple(itertools.accumulate(lengths)) for lengths in (learnt, asked)]
        first, new = (Prompt(ends[-1], ends) for ends in of)
        behind = data.draw(st.integers(1, len(learnt) - 1))
        over = data.draw(st.integers(0, learnt[-behind] - 1))
        left = first.ends[-1 - behind] + over
        overlaps = Overlaps(64)
        overlaps.note(TENANT, [], first, has_left=False)
        overlaps.note(TENANT, [End(1, left)], first, has_left=True)
        expected = overlaps.expected(TENANT, [], new)
        if over < 64 and behind < len(asked):
            at = new.ends[-1 - behind]
        else:
            at = new.tokens - (first.tokens - left)
        assert [one.depth for one in expected] == ([at] if at >= 64 else [])

    @given(st.lists(st.integers(0, 9), max_size=200))
    def test_where_messages_end(self, ids: list[int]) -> None:
        found = Prompt.of(array("q", ids), {3, 7})
        assert found.tokens == len(ids)
        ends = [i + 1 for i, token in enumerate(ids) if token in (3, 7)]
        assert list(found.ends) == ends[-MAX_MESSAGES:]
        assert not Prompt.of(array("q", ids), ()).ends

    def test_of_a_long_prompt_the_last_part_is_looked_through(self) -> None:
        ids = array("q", [1] * 10 + [0] * MAX_LOOKED_AT)
        assert not Prompt.of(ids, {1}).ends
        ids[-1] = 1
        assert list(Prompt.of(ids, {1}).ends) == [len(ids)]

    def test_tenants_learn_nothing_of_each_other(self) -> None:
        overlaps = Overlaps(64)
        overlaps.note(TENANT, [], Prompt(540), has_left=False)
        overlaps.note(TENANT, [End(1, 500)], Prompt(540), has_left=True)
        assert overlaps.expected(("other", ""), [], Prompt(540)) == []
        assert not overlaps.is_left(("other", ""))

    def test_what_is_split_off_was_passed_as_often(self) -> None:
        overlaps = Overlaps(64)
        for _ in range(4):
            overlaps.note(TENANT, [End(7, 1000)], Prompt(1040), has_left=True)
        overlaps.note(TENANT, [End(8, 600)], Prompt(2000), has_left=True)
        expected = overlaps.expected(TENANT, [End(8, 600), End(7, 1000)], Prompt(1040))
        assert passes_at(expected, 600) >= passes_at(expected, 1000)

    def test_old_requests_count_less(self) -> None:
        overlaps = Overlaps(64)
        for _ in range(8):
            overlaps.note(TENANT, [End(1, 1000)], Prompt(1010), has_left=True)
        before = passes_at(overlaps.expected(TENANT, [End(1, 1000)], Prompt(1010)), 1000)
        for _ in range(HALF_LIFE):
            overlaps.note(TENANT, [End(2, 1000)], Prompt(1010), has_left=True)
        after = passes_at(overlaps.expected(TENANT, [End(1, 1000)], Prompt(1010)), 1000)
        assert after == pytest.approx(before / 2, rel=0.05)

    @given(
        st.lists(
            st.tuples(st.lists(st.integers(1, 40), max_size=5, unique=True), st.booleans()),
            max_size=20,
        )
    )
    def test_the_deeper_the_fewer(self, requests: list[tuple[list[int], bool]]) -> None:
        overlaps = Overlaps(4)
        for depths, has_left in requests:
            path = [End(depth, depth) for depth in sorted(depths)]
            overlaps.note(TENANT, path, Prompt(50), has_left=has_left)
            found = overlaps.expected(TENANT, path, Prompt(50))
            assert [one.depth for one in found] == sorted(
                (one.depth for one in found), reverse=True
            )
            passes = [one.passes for one in found]
            assert passes == sorted(passes)


class TestSteps:
    @given(
        st.lists(st.tuples(st.integers(0, 4), numbers), min_size=1, max_size=8),
        st.lists(st.integers(0, 7), max_size=4),
    )
    def test_what_dropping_costs(self, tree: list[tuple[int, float]], dropped: list[int]) -> None:
        """Against every request of the tree, each at its deepest state."""
        parents: dict[int, int | None] = {}
        depth: dict[int, int] = {}
        own: dict[int, float] = {}
        for node, (up, leaving) in enumerate(tree):
            parent = node - 1 - up if node - 1 - up >= 0 else None
            parents[node], own[node] = parent, leaving
            depth[node] = 10 + (depth[parent] if parent is not None else 0)
        passes = dict(own)
        for node in reversed(range(len(tree))):
            above = parents[node]
            if above is not None:
                passes[above] += passes[node]
        steps = Steps()
        # Put once, and passed again.
        for node in (*range(len(tree)), *reversed(range(len(tree)))):
            steps.put(node, depth[node], float(depth[node]), passes[node], parents[node])
        kept = set(range(len(tree)))

        def total(of: set[int]) -> float:
            def from_(node: int | None) -> int:
                while node is not None and node not in of:
                    node = parents[node]
                return 0 if node is None else depth[node]

            return sum(own[node] * (depth[node] - from_(node)) for node in own)

        for node in dropped:
            if node in kept:
                kept.discard(node)
                changed = steps.drop(node)
                assert set(changed) <= kept
            for one in kept:
                assert steps.cost(one) == pytest.approx(total(kept - {one}) - total(kept))

    def test_a_wide_branch_is_mended_in_part(self) -> None:
        steps = Steps()
        steps.put(0, 10, 10.0, 300.0, None)
        for node in range(1, 200):
            steps.put(node, 20, 20.0, 1.0, 0)
        assert len(steps.drop(0)) == MENDED
        for node in range(1, 200):
            steps.put(node, 20, 20.0, 1.0, None)
            assert steps.cost(node) == 20.0

    def test_passed_again_behind_another(self) -> None:
        steps = Steps()
        steps.put(1, 10, 10.0, 5.0, None)
        steps.put(2, 30, 30.0, 3.0, 1)
        assert steps.put(3, 20, 20.0, 4.0, 1) == [1, 3]
        steps.put(2, 30, 30.0, 3.0, 3)
        assert [steps.cost(node) for node in (1, 3, 2)] == [10.0, 10.0, 30.0]


class TestReplay:
    """What the replay of ``eval.checkpoints`` says, of streams whose answer is known."""

    @staticmethod
    def share(stream: Sequence[Request], policy: Policy, paths: int = 10) -> dict[str, Any]:
        return replay(stream, policy, paths, warm_up=20).to_json()

    def test_one_state_a_document_is_enough(self) -> None:
        draw = random.Random(0)
        asked = [draw.randrange(8) for _ in range(200)]
        stream = [
            Request(((f"d{one}", 640 * (one + 1)),), 640 * (one + 1) + draw.randint(100, 300))
            for one in asked
        ]
        ours = self.share(stream, Sparse(8))
        assert ours["resumed_share"] > 0.97 and ours["states_per_path"] <= 1
        assert self.share(stream, Fixed("none", 1))["resumed_share"] == 0
        latest = self.share(stream, Latest(8))
        assert latest["resumed_share"] < ours["resumed_share"] - 0.1

    def test_a_chat_needs_none(self) -> None:
        stream, shared = [], 0
        for _ in range(60):
            stream.append(Request((("chat", shared),), shared + 300, answer=100))
            shared += 400
        found = self.share(stream, Sparse(10))
        assert found["resumed_share"] == 1 and found["states_per_path"] == 0

    def test_all_ways_over_all_streams(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(checkpoints, "SYNTHETIC_REQUESTS", 130)
        monkeypatch.setattr(checkpoints, "CACHED", (5,))
        outcome = checkpoints.simulate(None)
        assert {row["stream"] for row in outcome.rows} == set(SYNTHETIC)
        assert [len(table.rows) for table in outcome.tables] == [len(SYNTHETIC)]
        for row in outcome.rows:
            assert 0 <= row["recomputed_tokens"] <= row["overlap_tokens"] < row["prompt_tokens"]
            assert row["states_per_path"] == 0 or row["policy"] != "none"

    def test_what_comes_back_is_new(self) -> None:
        """Each document is asked about twice, and gone before it comes again: whether the
        first question keeps a state is learnt from how often new ones were left."""
        stream = [Request(((f"d{one}", 320),), 400) for i in range(300) for one in (i % 12, i % 12)]
        found = self.share(stream, Sparse(4), paths=1)
        assert found["resumed_share"] > 0.9

    def test_no_memory_no_states(self) -> None:
        stream = [Request((("d", 640),), 700) for _ in range(40)]
        assert self.share(stream, Sparse(0))["recomputed_tokens"] == 640 * 20

    @given(
        st.lists(st.integers(0, 12).map(lambda n: 64 * n), min_size=1, max_size=12),
        st.integers(1, 12).map(lambda n: 64 * n),
    )
    def test_the_papers_places(self, overlaps: list[int], block: int) -> None:
        """No others of as many are better, blocks least of all; more are never worse."""

        def again(chosen: Sequence[int]) -> int:
            return sum(d - max((c for c in chosen if c <= d), default=0) for d in overlaps)

        found = []
        for most in range(4):
            choices = itertools.combinations(sorted({d for d in overlaps if d}), most)
            placed = best_places(overlaps, most)
            assert len(placed) <= most
            found.append(again(placed))
            assert found[-1] <= min(again(chosen) for chosen in (*choices, ()))
        assert found == sorted(found, reverse=True)
        blocks = range(block, max(overlaps) + 1, block)
        assert again(best_places(overlaps, len(blocks))) <= again(blocks)


class TestAppraisal:
    def test_a_value_may_fall(self) -> None:
        order: EvictionOrder[str] = EvictionOrder()
        for name in "ab":
            order.add(name, "state", cost=1.0, nbytes=1)
            order.offer(name)
        order.appraise("a", 10.0)
        order.appraise("b", 5.0)
        assert order.least() == 5.0
        order.appraise("a", 1.0)
        assert order.least() == 1.0
        assert order.park() == "a"
        order.evicted("a")
        assert order.least() == 4.0
        assert order.park() == "b"

    def test_nobody_may_go(self) -> None:
        order: EvictionOrder[str] = EvictionOrder()
        order.add("a", "state", cost=1.0, nbytes=1)
        assert order.least() == 0.0
        assert order.park() is None


# -- on servers -------------------------------------------------------------------------

NO_BUFFER = (
    "--page-size=1",
    "--mamba-radix-cache-strategy=no_buffer",
    "--disable-overlap-schedule",
)
# SGLang itself has room for few.
EXTRA_BUFFER = (
    "--mamba-radix-cache-strategy=extra_buffer",
    "--max-running-requests=4",
    "--max-mamba-cache-size=24",
)
RANKS = {
    **CHECKS,
    "SGLANG_CPU_OMP_THREADS_BIND": "0|1",
    "SGLANG_ENABLE_RANK_CONSENSUS_CHECKER": "1",
}
# Room for some 90 states of the tiny models.
SMALL = ("--pic-state-mib=1", "--max-total-tokens=60000")


def traffic(seed: int, count: int, documents: int) -> list[list[int]]:
    """Questions about documents, users behind prompts that branch, chats, loners."""
    draw = random.Random(seed)
    chats: dict[int, list[int]] = {}
    prompts = []
    for i in range(count):
        kind = draw.choice(["document", "document", "branch", "chat", "alone"])
        tail = ids_of(10_000 + i, draw.randint(2, 40))
        if kind == "document":
            one = draw.randrange(documents)
            prompts.append(ids_of(one, 150 + 37 * (one % 11)) + tail)
        elif kind == "branch":
            company, team = draw.randrange(3), draw.randrange(3)
            own = ids_of(300 + 10 * company + team, 100 + 30 * team)
            prompts.append(ids_of(200 + company, 130) + own + tail)
        elif kind == "chat":
            one = draw.randrange(4)
            chats[one] = [*chats.get(one, ids_of(400 + one, 90)), *tail]
            prompts.append(chats[one][:900])
        else:
            prompts.append(ids_of(20_000 + i, draw.randint(1, 300)))
    return prompts


def answers(server: Server, prompts: Sequence[list[int]]) -> list[list[int]]:
    def ask(ids: list[int]) -> list[int]:
        sampling = {"temperature": 0, "max_new_tokens": 6, "ignore_eos": True}
        answer: dict[str, Any] = server.generate(input_ids=ids, sampling_params=sampling)
        return list(answer["output_ids"])

    with ThreadPoolExecutor(6) as pool:
        return list(pool.map(ask, prompts))


@pytest.mark.server
@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("family", "flags"),
    [
        ("qwen3_5", NO_BUFFER),
        ("qwen3_next", (*EXTRA_BUFFER, "--page-size=16")),
        ("granite", NO_BUFFER),
        ("qwen3_5", (*NO_BUFFER, "--tp-size=2")),
    ],
    ids=["no_buffer", "extra_buffer", "mamba2", "two ranks"],
)
def test_a_thousand_answers_are_as_without(
    tmp_path: pathlib.Path, logs: pathlib.Path, family: str, flags: tuple[str, ...]
) -> None:
    """Greedily, in float32, six at a time, over more documents than there is room for."""
    make = tiny_mamba2 if family == "granite" else tiny_hybrid
    model = make(tmp_path, family)
    prompts = traffic(1, 1000, 120)
    found = {}
    for mode in ("auto", "off"):
        every = (*TINY, *SMALL, *flags, f"--pic-checkpoints={mode}")
        with serve(model, logs / f"checkpoints_{mode}.log", *every, env=RANKS) as server:
            found[mode] = answers(server, prompts)
            told = server.forest()
            assert told["integrity"] == "ok" and told["refusal"] is None
            held = server.get("/pic/stats").json()["ranks"][0]
            assert not held["faults"]
            if mode == "auto":
                print(told["checkpoints"], held["state"], held["evicted"])
                assert told["checkpoints"]["tokens_resumed"] > 2000
                assert held["state"]["checkpoint"] <= held["state"]["budget"] == 1 << 20
                # Half a state a rank: there is room for all.
                if "--page-size=1" in flags and "--tp-size=2" not in flags:
                    assert held["evicted"]["state"] > 0
    same = sum(one == other for one, other in zip(found["auto"], found["off"], strict=True))
    assert same == 1000
