"""The soak's checks can fail, and its quick form does not."""

from __future__ import annotations

import dataclasses
import pathlib
import types
from typing import Any

import numpy as np
import pytest
from scipy import stats

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
from sglang_pic.eval.watch import Growth, Memory, Sight, Watch, growth, slope_of

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
    kv = {
        "budget": 10,
        "segment": segment,
        "company": 1,
        "turn": 2,
        "prefix": 0,
        "pinned": 0,
        "free": 1,
    }
    state = {"budget": 0, "segment": 0, "turn": 0, "pinned": 0}
    return Sight(s, {"front": Memory(MIB, 0), "scheduler": Memory(rss, 0)}, kv, state, 0)


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


def _failed(seen: Seen, watch: Watch, *grown: Growth, minutes: float = 20) -> list[str]:
    names = ("scheduler", "front")
    checks = soak.checks_of(seen, watch, dict(zip(names, grown, strict=False)), minutes)
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


def test_each_process_must_come_to_rest() -> None:
    flat, noisy = Growth(0, 0.01 * MIB), Growth(0.2 * MIB, 0.3 * MIB)
    bounded, leaking = Growth(0.05 * MIB, 0.01 * MIB), Growth(0.2 * MIB, 0.1 * MIB)
    for grown in (flat, noisy, bounded):
        assert _failed(*_good(), flat, grown, minutes=60) == []
    assert _failed(*_good(), flat, leaking, minutes=60) == ["memory flat"]
    assert _failed(*_good(), leaking, flat, minutes=60) == ["memory flat"]
    # A run that is not long enough to prove it: a loose bound.
    assert _failed(*_good(), flat, leaking) == []
    assert _failed(*_good(), flat, Growth(1.5 * MIB, 0.6 * MIB)) == ["memory flat"]
    assert _failed(*_good(), flat, Growth(50 * MIB, 5 * MIB), minutes=1) == []
    assert _failed(*_good(), flat, Growth(50 * MIB, 15 * MIB), minutes=1) == ["memory flat"]


def test_a_budget_exceeded_is_named() -> None:
    assert _sight(0).over_budget is None and _sight(0, segment=7).over_budget is None
    assert _sight(0, segment=9).over_budget == "kv: 12 bytes of 10"


def test_growth_is_that_of_the_last_half_and_of_each_process() -> None:
    noise = np.random.default_rng(0).integers(MIB, size=300)
    warm = [_sight(2 * i, 100 * MIB * i) for i in range(300)]
    flat = [_sight(600 + 2 * i, 1000 * MIB + int(noise[i])) for i in range(300)]
    found = growth([*warm, *flat])
    assert list(found) == ["front", "scheduler"]
    assert found["scheduler"].low < 0 < found["scheduler"].high < MIB / 2
    assert found["front"] == Growth(0, 0)
    grown = [1000 * MIB + int(noise[i]) + i * MIB // 10 for i in range(300)]
    leaking = [_sight(600 + 2 * i, grown[i]) for i in range(300)]
    assert growth([*warm, *leaking])["scheduler"].slope == pytest.approx(3 * MIB, rel=0.1)
    gone = [dataclasses.replace(flat[-1], processes={"front": Memory(MIB, 0)})]
    assert list(growth([*warm, *flat[:-1], *gone])) == ["front"]
    with pytest.raises(ValueError, match="too few"):
        growth(flat[:9])


def test_the_interval_knows_that_memory_resembles_itself() -> None:
    """A slowly wandering memory that does not grow is seldom called growing, and one that
    does is seen to."""
    rng = np.random.default_rng(1)
    minutes, wrong, naive, missed = np.arange(900) / 30, 0, 0, 0
    for _ in range(200):
        wandering = np.zeros(900)
        for i, step in enumerate(rng.normal(size=900)):
            wandering[i] = 0.98 * wandering[i - 1] + step
        found = slope_of(minutes, wandering)
        wrong += abs(found.slope) > found.width
        fit = stats.linregress(minutes, wandering)
        naive += abs(fit.slope) > 1.96 * fit.stderr
        grown = slope_of(minutes, wandering + minutes)
        missed += grown.low <= 0
    assert naive > 100
    assert wrong < 25
    assert missed < 40


# -- its quick form -------------------------------------------------------------------------


@pytest.mark.server
@pytest.mark.long
def test_quick_soak(tmp_path: pathlib.Path, logs: pathlib.Path) -> None:
    with soak.soaked(tiny_llama(tmp_path), logs / "soak.log") as server:
        outcome, checks = soak.run(server, range(16, 496), minutes=soak.QUICK_MINUTES)
    for table in outcome.tables:
        table.print()
    assert [(check.name, check.found) for check in checks if not check.ok] == []
    assert len(checks) == 11
    corpus, cache = outcome.config["corpus_tokens"], outcome.config["cache_tokens"]
    assert corpus >= 10 * cache
