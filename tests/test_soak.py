"""The soak's checks can fail, and its quick form does not."""

from __future__ import annotations

import dataclasses
import pathlib
import random
import types
from typing import Any

import pytest

from sglang_pic.eval import soak
from sglang_pic.eval.models.tiny import tiny_llama
from sglang_pic.eval.recorded import (
    EXACT,
    LINKED,
    PINNED,
    TOLERANCE,
    Answer,
    Sample,
    deviation,
    is_comparable,
)
from sglang_pic.eval.storm import DEEDS, Seen
from sglang_pic.eval.watch import Growth, Sight, Watch, growth

MIB = 1 << 20
STEP = {7: -0.5, 8: -1.5, 9: -2.5}


def _answer(**changes: Any) -> Answer:
    plain = Answer((7, 8), (STEP, {8: -0.1, 7: -2.0, 9: -4.0}), ("hit", "hit"), 0, 0)
    return dataclasses.replace(plain, **changes)


def _sample(kind: str) -> Sample:
    return Sample(kind, {"pic": {}}, 16, _answer())


# -- answers against recorded ones ------------------------------------------------------


def test_the_same_answer_is_the_same() -> None:
    assert deviation(_answer(), _answer()) == 0
    moved = _answer(top=({7: -0.5 + 5e-5, 8: -1.5, 9: -2.5}, _answer().top[1]))
    assert deviation(_answer(), moved) == pytest.approx(5e-5)


@pytest.mark.parametrize(
    "wrong",
    [
        _answer(tokens=(9, 8)),
        _answer(tokens=(7, 1234)),
        _answer(tokens=(7,)),
        _answer(top=({7: -0.51, 8: -1.5, 9: -2.5}, _answer().top[1])),
        _answer(top=(STEP, {8: -0.1, 7: -2.0, 9: -4.1})),
    ],
)
def test_a_wrong_answer_is_seen(wrong: Answer) -> None:
    assert deviation(_answer(), wrong) > TOLERANCE
    for kind in (EXACT, LINKED, PINNED):
        seen = Seen()
        seen.check(_sample(kind), wrong)
        assert "wrong answer" in seen.problems[0] and seen.worst > TOLERANCE


def test_what_follows_a_near_tie_is_not_compared() -> None:
    tie = _answer(top=({7: -0.5, 8: -0.5 - 1e-5, 9: -2.5}, _answer().top[1]))
    other = _answer(tokens=(8, 9), top=(tie.top[0], {9: -9.0, 7: -9.5, 8: -9.9}))
    assert deviation(tie, other) < TOLERANCE
    assert deviation(_answer(), other) > TOLERANCE


def test_only_answers_of_the_same_plan_are_compared() -> None:
    linked, pinned, exact = _sample(LINKED), _sample(PINNED), _sample(EXACT)
    evicted = _answer(plan=("hit", "evicted"))
    assert not is_comparable(linked, evicted) and is_comparable(exact, evicted)
    assert not is_comparable(linked, _answer(retractions=1))
    assert is_comparable(pinned, _answer(retractions=1))
    # Text in front is exact either way; a longer prefix is not what was recorded.
    assert is_comparable(linked, _answer(prefix=16))
    assert not is_comparable(linked, _answer(prefix=32))
    seen = Seen()
    seen.check(linked, evicted)
    assert seen.passed[LINKED] == 1 and not seen.problems
    seen.check(pinned, evicted)
    assert "pinned" in seen.problems[0]


# -- what must hold -----------------------------------------------------------------------


def _sight(s: float, rss: int = 0, segment: int = 5) -> Sight:
    kv = {"budget": 10, "segment": segment, "turn": 2, "prefix": 0, "pinned": 0, "free": 1}
    state = {"budget": 0, "segment": 0, "turn": 0, "pinned": 0}
    return Sight(s, rss, kv, state, 0)


def _good() -> tuple[Seen, Watch]:
    seen = Seen()
    for deed in DEEDS:
        seen.answers[deed, "200"] += 1
    for kind in (EXACT, LINKED, PINNED):
        seen.compared[kind] = 3
    seen.retractions = 5
    watch = Watch(types.SimpleNamespace(url=""))  # type: ignore[arg-type]
    watch.sights, watch.forests = [_sight(i) for i in range(20)], 4
    return seen, watch


def _failed(seen: Seen, watch: Watch, grown: Growth | None = None) -> list[str]:
    checks = soak.checks_of(seen, watch, grown or Growth(0, 0), 2 * MIB)
    return [check.name for check in checks if not check.ok]


def test_a_good_run_passes_and_each_fault_fails_its_check() -> None:
    assert _failed(*_good()) == []
    seen, watch = _good()
    seen.note_problem("link: POST generate: 500")
    assert _failed(seen, watch) == ["every answer as expected"]
    seen, watch = _good()
    seen.worst = 0.02
    assert _failed(seen, watch) == ["answers as recorded"]
    seen, watch = _good()
    seen.compared[PINNED] = 0
    assert _failed(seen, watch) == ["answers as recorded"]
    seen, watch = _good()
    del seen.answers["abort", "200"]
    assert _failed(seen, watch) == ["every deed done"]
    seen, watch = _good()
    seen.retractions = 0
    assert _failed(seen, watch) == ["requests retracted"]
    seen, watch = _good()
    watch.problems.append("integrity: a KV slot has two owners")
    assert _failed(seen, watch) == ["integrity and budgets"]
    assert _failed(*_good(), Growth(1.5 * MIB, 0.6 * MIB)) == ["memory flat"]
    assert _failed(*_good(), Growth(1.5 * MIB, 0.4 * MIB)) == []


def test_a_budget_exceeded_is_named() -> None:
    assert _sight(0).over_budget is None and _sight(0, segment=8).over_budget is None
    assert _sight(0, segment=9).over_budget == "kv: 9 + 2 bytes of 10"


def test_growth_is_that_of_the_last_half() -> None:
    warm = [_sight(2 * i, 100 * MIB * i) for i in range(300)]
    draw = random.Random(0)
    flat = [_sight(600 + 2 * i, 1000 * MIB + draw.randrange(MIB)) for i in range(300)]
    found = growth([*warm, *flat])
    assert abs(found.slope) + found.width < MIB / 2
    leaking = [
        dataclasses.replace(sight, rss=sight.rss + int(sight.s / 60 * 3 * MIB)) for sight in flat
    ]
    found = growth([*warm, *leaking])
    assert found.slope == pytest.approx(3 * MIB, rel=0.1)
    with pytest.raises(ValueError, match="too few"):
        growth(flat[:5])


# -- its quick form -------------------------------------------------------------------------


@pytest.mark.server
def test_quick_soak(tmp_path: pathlib.Path, logs: pathlib.Path) -> None:
    with soak.soaked(tiny_llama(tmp_path), logs / "soak.log") as server:
        outcome, checks = soak.run(server, range(16, 496), quick=True, minutes=soak.QUICK_MINUTES)
    for table in outcome.tables:
        table.print()
    assert [(check.name, check.found) for check in checks if not check.ok] == []
    assert len(checks) == 11
    corpus, cache = outcome.config["corpus_tokens"], outcome.config["cache_tokens"]
    assert corpus >= 10 * cache
