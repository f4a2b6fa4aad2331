"""The simulation of cold prompts: shares, times, the paper's points."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_pic.eval import cold
from sglang_pic.eval.cold import PAPER, RULES, Costs

LENGTHS = st.lists(st.integers(1, 9000), min_size=1, max_size=40)


@given(LENGTHS, st.integers(1, 64))
def test_every_segment_is_compiled_once(lengths: list[int], workers: int) -> None:
    for deal in RULES.values():
        shares = deal(lengths, workers)
        assert len(shares) == workers
        assert sorted(i for share in shares for i in share) == list(range(len(lengths)))
    loads = [sum(lengths[i] for i in share) for share in cold.lpt(lengths, workers)]
    # No list of jobs is dealt worse by anybody who gives the idle one the next.
    assert max(loads) <= sum(lengths) / workers + max(lengths) * (1 - 1 / workers) + 1e-9


@given(LENGTHS, st.integers(1, 64))
def test_nobody_is_done_sooner_than_work_and_wire_allow(lengths: list[int], workers: int) -> None:
    costs = Costs(compile_us=50, token_bytes=1000, gb_s=1.0, link_ms=3.0)
    shares = cold.lpt(lengths, workers)
    ttft, compiled = cold.simulate(lengths, shares, costs)
    others = sum(lengths[i] for share in shares[1:] for i in share)
    assert ttft >= compiled + costs.link_ms - 1e-9
    assert ttft >= costs.move_ms(others) + costs.link_ms
    free, _ = cold.simulate(lengths, shares, Costs(50, 0, 1.0, 3.0))
    assert free == pytest.approx(compiled + 3.0) and free <= ttft + 1e-9
    alone, _ = cold.simulate(lengths, cold.lpt(lengths, 1), costs)
    assert alone == pytest.approx(costs.compile_ms(sum(lengths)) + 3.0)


def test_the_papers_times_are_met_within_a_fifth() -> None:
    costs = Costs(cold.fitted_us(), 131072, 25.0, 0.0)
    found = cold.run(costs, quick=False).rows
    equal = {row["workers"]: row for row in found if row["prompt"] == "equal"}
    for workers, ms in PAPER.items():
        assert equal[workers]["ttft_ms"] == pytest.approx(ms, rel=0.2)
    drawn = {
        (row["workers"], row["rule"]): row["ttft_ms"] for row in found if row["prompt"] == "drawn"
    }
    for workers in (2, 4, 8, 16):
        assert drawn[workers, "lpt"] < drawn[workers, "round_robin"]
