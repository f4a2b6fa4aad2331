"""The simulation of cold prompts: shares, times, the paper's points."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_pic.eval import cold, cold_simulated
from sglang_pic.eval.cold_simulated import PAPER, RULES, Costs

LENGTHS = st.lists(st.integers(1, 9000), min_size=1, max_size=40)


@given(LENGTHS, st.integers(1, 64))
def test_every_segment_is_compiled_once(lengths: list[int], workers: int) -> None:
    for deal in RULES.values():
        shares = deal(lengths, workers)
        assert len(shares) == workers
        assert sorted(i for share in shares for i in share) == list(range(len(lengths)))
    loads = [sum(lengths[i] for i in share) for share in cold_simulated.lpt(lengths, workers)]
    # No list of jobs is dealt worse by anybody who gives the idle one the next.
    assert max(loads) <= sum(lengths) / workers + max(lengths) * (1 - 1 / workers) + 1e-9


@given(LENGTHS, st.integers(1, 64))
def test_nobody_is_done_sooner_than_work_and_wire_allow(lengths: list[int], workers: int) -> None:
    costs = Costs(compile_us=50, token_bytes=1000, gb_s=1.0, link_ms=3.0)
    shares = cold_simulated.lpt(lengths, workers)
    ttft, compiled = cold_simulated.simulate(lengths, shares, costs)
    others = sum(lengths[i] for share in shares[1:] for i in share)
    assert ttft >= compiled + costs.link_ms - 1e-9
    assert ttft >= costs.move_ms(others) + costs.link_ms
    free, _ = cold_simulated.simulate(lengths, shares, Costs(50, 0, 1.0, 3.0))
    assert free == pytest.approx(compiled + 3.0) and free <= ttft + 1e-9
    alone, _ = cold_simulated.simulate(lengths, cold_simulated.lpt(lengths, 1), costs)
    assert alone == pytest.approx(costs.compile_ms(sum(lengths)) + 3.0)


def test_the_papers_times_are_met_within_a_fifth() -> None:
    costs = Costs(cold_simulated.fitted_us(), 131072, 25.0, 0.0)
    found = cold_simulated.run(costs, quick=False).rows
    equal = {row["workers"]: row for row in found if row["prompt"] == "equal"}
    for workers, ms in PAPER.items():
        assert equal[workers]["ttft_ms"] == pytest.approx(ms, rel=0.2)
    drawn = {
        (row["workers"], row["rule"]): row["ttft_ms"] for row in found if row["prompt"] == "drawn"
    }
    for workers in (2, 4, 8, 16):
        assert drawn[workers, "lpt"] < drawn[workers, "round_robin"]


def fetched(source: str, tokens: int, seconds: float, count: int = 4) -> list[dict[str, object]]:
    row = {"source": source, "tokens": tokens, "seconds": seconds}
    return [dict(row) for _ in range(count)]


@given(st.floats(0.001, 0.1), st.floats(1e-4, 1e-3), st.floats(1e-6, 5e-5))
def test_where_reading_is_sooner_is_where_the_lines_cross(
    begin: float, computed: float, read: float
) -> None:
    lengths = (32, 64, 128, 256, 512, 1024)
    rows = [
        row
        for n in lengths
        for row in (*fetched("computed", n, computed * n), *fetched("store", n, begin + read * n))
    ]
    at = begin / (computed - read)
    measured, foretold = cold.crossing(rows)
    if at < 2 * lengths[-1] - 1:
        assert foretold == pytest.approx(at, abs=1.01)
    if lengths[0] < at < lengths[-1]:
        assert measured == pytest.approx(at, rel=1e-6)
    elif at > lengths[-1]:
        assert measured is None
    else:
        assert measured == lengths[0]


def test_a_prompts_segments_lie_in_a_row() -> None:
    ids, spans = cold.prompt_of(random.Random(0), range(9), 3, 40)
    assert [(one["start"], one["end"]) for one in spans] == [(16, 56), (56, 96), (96, 136)]
    assert len(ids) == 136 + cold.QUESTION
