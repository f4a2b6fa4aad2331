"""Evaluations of speed and memory: traffic, arithmetic, and each once on a small server.

No time is judged: what is checked is that figures are what they are said to be.
"""

from __future__ import annotations

import collections
import importlib
import itertools
import json
import pathlib
import random
import sys
from typing import Any

import numpy as np
import pytest

from sglang_pic.eval import (
    breakdown,
    checkpoints,
    found,
    found_chats,
    hybrid_quality,
    load,
    memory,
    report,
    scheduler_cost,
    soak,
    steady_state,
    text_quality,
    ttft,
    workloads,
)
from sglang_pic.eval.bench import Bench
from sglang_pic.eval.command import Outcome, new_figure
from sglang_pic.eval.models.hybrid.weights import hybrid_path
from sglang_pic.eval.models.smollm2 import ensure_model
from sglang_pic.eval.serving import Server
from sglang_pic.eval.tables import Table


@pytest.fixture
def pair(page1: Server, tiny_path: pathlib.Path) -> Bench:
    """Ours stands in for stock SGLang, which it is for a request without ``pic``."""
    return Bench(tiny_path, "tiny", page1, page1, range(16, 496), 4096, 8192)


# -- workloads ---------------------------------------------------------------------


@pytest.mark.parametrize("name", workloads.WORKLOADS)
def test_workloads_are_reproducible_and_reuse_segments(name: str) -> None:
    def make(seed: int) -> list[workloads.Prompt]:
        rng = random.Random(seed)
        return workloads.WORKLOADS[name](rng, lambda n: rng.choices(range(99), k=n), 30, 16)

    prompts = make(0)
    assert prompts == make(0) and prompts != make(1) and len(prompts) == 30
    uses = collections.Counter(tuple(s) for prompt in prompts for s in prompt.segments)
    assert max(uses.values()) > 3
    assert len({tuple(prompt.ids) for prompt in prompts}) == 30
    for prompt in prompts:
        assert len({tuple(segment) for segment in prompt.segments}) == len(prompt.segments)
        for segment, at in zip(prompt.segments, prompt.ranges, strict=True):
            assert prompt.ids[at["start"] : at["end"]] == segment
        assert prompt.ids[prompt.ranges[-1]["end"] :] == prompt.question


def test_an_edited_history_changes_in_the_middle() -> None:
    rng = random.Random(0)
    prompts = workloads.edited_history(rng, lambda n: rng.choices(range(999), k=n), 12, 16)
    for before, after in zip(prompts, prompts[3:], strict=False):
        changed = [a != b for a, b in zip(before.segments, after.segments, strict=True)]
        assert sum(changed) == 1 and not changed[0] and not changed[-1]


def test_popular_documents_are_drawn_more_often() -> None:
    rng = random.Random(0)
    items = [[i] for i in range(50)]
    drawn = collections.Counter(i for _ in range(500) for (i,) in workloads.draw(rng, items, 4))
    assert drawn[0] > 2 * drawn[4] > 4 * drawn[40]


def test_arrivals_are_poisson() -> None:
    times = load.arrivals(random.Random(0), 5000, 4.0)
    gaps = np.diff(times)
    assert times[0] == 0 and (gaps > 0).all()
    assert gaps.mean() == pytest.approx(0.25, rel=0.05)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.05)


# -- each on a small server --------------------------------------------------------


@pytest.mark.server
def test_ttft_counts_tokens(pair: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ttft, "QUICK", [(2, 32), (3, 40)])
    found = ttft.run(pair, quick=True, seam=4, repeats=1)
    rows = {(r["segments"], r["method"]): r for r in found.rows}
    total = 3 * 40 + workloads.QUESTION_TOKENS
    for method in ("stock", "unlinked"):
        assert rows[3, method]["tokens_computed"] == total
    for method in ("stock_prefix", "unlinked_prefix"):
        assert rows[3, method]["tokens_reused"] >= 120
    assert rows[3, "linked"]["tokens_computed"] <= 3 * 4 + workloads.QUESTION_TOKENS
    assert rows[3, "in_company"]["tokens_computed"] <= 3 + workloads.QUESTION_TOKENS
    # Compiled first: all of it, then the seams and the question once more.
    assert rows[3, "cold"]["tokens_computed"] >= 120 + workloads.QUESTION_TOKENS
    assert len(found.tables[0].rows) == 2 and found.figure is not None


@pytest.mark.server
def test_ttft_says_when_something_was_not_there(
    pair: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ttft, "QUICK", [(2, 32)])
    monkeypatch.setattr(ttft, "most_computed", lambda method, *point: 5)
    with pytest.raises(RuntimeError, match=r"computed \d+ tokens of 1 x 64, 5 at most"):
        ttft.run(pair, quick=True, seam=4, repeats=1)


@pytest.mark.server
def test_load_counts_and_bounds(pair: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (
        ("QUICK_RATES", (20.0,)),
        ("QUICK_REQUESTS", 6),
        ("QUICK_PAIRS", 3),
        ("SEGMENT_TOKENS", 40),
        ("TIMED", 2),
        ("LOST_PROMPT", 64),
    ):
        monkeypatch.setattr(load, name, value)
    found = load.run(pair, quick=True, seam=4)
    rows = {(r["workload"], r["method"]): r for r in found.rows}
    assert set(rows) == {
        *((w, m) for w in workloads.WORKLOADS for m in load.METHODS),
        ("no_reuse", "stock"),
        ("no_reuse", "ours"),
    }
    for row in found.rows:
        assert 0 < row["ttft_s"] <= row["latency_s"] and row["throughput"] > 0
    for workload in workloads.WORKLOADS:
        assert rows[workload, "stock_nocache"]["tokens_reused"] == 0
        assert rows[workload, "pic"]["tokens_compiled"] > 0
        computed = rows[workload, "pic"]["tokens_computed"]
        assert computed < rows[workload, "stock_nocache"]["tokens_computed"]
    cost = rows["no_reuse", "ours"]
    assert cost["ratio"] == pytest.approx(1, abs=0.9) and 0 < cost["hooks_us"] < 1e5
    assert not pair.ours.get("/pic/timer").json()["front"]["on"]
    assert [len(table.rows) for table in found.tables] == [12, 1]


@pytest.mark.server
def test_a_load_that_is_refused_says_so(pair: Bench) -> None:
    prompt = workloads.Prompt([], [1, 2, 3])
    body = {**load.body_of(prompt, "stock", "s", 0, 4), "pic": {"seam": -1}}
    with pytest.raises(RuntimeError, match=r"400.*pic.seam"):
        load.asyncio.run(load.drive(pair.ours, [body], [0.0]))


@pytest.mark.server
def test_steady_state_stays_within_the_cache(pair: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steady_state, "BATCHES", 10)
    monkeypatch.setattr(steady_state, "METHODS", ("unlinked", "pic"))
    found = steady_state.run(pair, quick=True, seam=4)
    assert [row["batch"] for row in found.rows] == [*range(10), *range(10)]
    assert found.config["documents"] == 4 * 8192 // 256
    assert found.config["tokens_held_at_the_end"] > pair.pool / 2
    linked = [row for row in found.rows if row["method"] == "pic"]
    plain = [row for row in found.rows if row["method"] == "unlinked"]
    for row in found.rows:
        saved = row["tokens_reused"] - row["tokens_compiled"]
        assert row["tokens_computed"] == row["tokens"] - saved
    assert steady_state.saved(linked[:1]) < 15 < steady_state.saved(linked[5:])
    assert steady_state.saved(plain) < steady_state.saved(linked)
    assert sum(row["tokens_compiled"] for row in linked) > pair.pool
    pair.ours.forest()  # raises if eviction hurt it


def test_a_trend_is_that_of_the_second_half() -> None:
    rows = [
        {"batch": i, "method": "pic", "tokens": 100, "tokens_computed": 90 if i < 20 else 100 - i}
        for i in range(40)
    ]
    slope, width = steady_state.trend(rows, "pic")
    assert slope == pytest.approx(1.0) and width == pytest.approx(0, abs=1e-6)


@pytest.mark.server
def test_memory_is_that_of_shared_pages(pair: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "QUICK_CONCURRENCY", (1, 6))
    monkeypatch.setattr(memory, "ANSWER_TOKENS", 200)
    found = memory.run(pair, quick=True, seam=4)
    rows = {(r["concurrency"], r["method"]): r for r in found.rows}
    shared = memory.DOCUMENTS * memory.DOCUMENT_TOKENS
    prompt = shared + memory.QUESTION_TOKENS
    assert rows[6, "copy_per_request"]["tokens"] == 6 * (prompt + 200)
    own = rows[6, "pic"]["tokens"] - shared
    least, most = memory.QUESTION_TOKENS, memory.DOCUMENTS * 4 + memory.QUESTION_TOKENS + 202
    assert 6 * least <= own <= 6 * most
    assert rows[6, "pic"]["kv_bytes"] < rows[6, "stock"]["kv_bytes"]
    assert rows[1, "pic"]["state_bytes"] == 0


def test_a_state_slot_is_as_large_as_sglangs() -> None:
    from transformers import AutoConfig

    # Three layers: four heads of 64 x 64, and three inputs of 768 channels.
    config = AutoConfig.from_pretrained(hybrid_path())
    assert memory.slot_bytes(config) == 3 * 4 * (4 * 64 * 64 + 3 * 768)


@pytest.mark.server
def test_growth_and_stages(smollm: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(breakdown, "QUICK_AXES", {"segments": (1, 3), "requests": (1, 2)})
    monkeypatch.setattr(breakdown, "POINT", {"segments": 2, "segment_tokens": 40, "requests": 1})
    monkeypatch.setattr(breakdown, "QUICK_REPEATS", 1)
    monkeypatch.setattr(breakdown, "STAGED", (2, 40))
    monkeypatch.setattr(breakdown, "STAGED_REQUESTS", 2)
    pair = Bench(ensure_model(), "smollm2", smollm, smollm, range(1500, 47000), 8192, 16384)
    found = breakdown.run(pair, quick=True)
    assert sum("value" in row for row in found.rows) == 2 * 2 * 2
    assert {(r["axis"], r["method"]) for r in found.rows if "slope_ms" in r} == {
        (axis, method) for axis in breakdown.QUICK_AXES for method in breakdown.METHODS
    }
    stages: dict[str, Any] = {row["stage"]: row for row in found.rows if "stage" in row}
    for name in ("tokenise", "match", "plan", "attention over spans", "mlp", "sample"):
        assert stages[name]["ms"] > 0, name
    whole = stages["time to first token"]["ms"]
    parts = [
        row["ms"] for row in found.rows if row.get("stage", breakdown.WHOLE) != breakdown.WHOLE
    ]
    assert sum(parts) == pytest.approx(whole)
    assert 0 < stages["elsewhere"]["ms"] < whole
    assert len(found.tables) == 2 and len(found.tables[0].rows) == 2


@pytest.mark.server
@pytest.mark.long
def test_what_is_found_without_marks(smollm: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(found, "QUICK_REQUESTS", 6)
    monkeypatch.setattr(found, "COSTS", 2)
    stuffed = {"stuffed": found.WORKLOADS["stuffed"]}
    monkeypatch.setattr(found, "WORKLOADS", stuffed)
    monkeypatch.setattr(found_chats, "DOCUMENTS", 7)  # of ten: most have come before
    pair = Bench(ensure_model(), "smollm2", smollm, smollm, range(1500, 47000), 8192, 16384)
    outcome = found.run(pair, quick=True)
    rows: dict[str, Any] = {row["method"]: row for row in outcome.rows if "reused" in row}
    assert list(rows) == list(found.METHODS)
    assert rows["stock"]["kl"] == 0 and rows["stock"]["segments"] == 0
    assert rows["structure"]["reused"] > 0.5 * rows["marked"]["reused"] > 0.2
    assert rows["content"]["segments"] > 0 and rows["structure"]["kl"] >= 0
    cost = outcome.rows[-1]
    assert cost["find_us"] > 0 and cost["find_of_ttft"] > 0 and cost["compiled"] == 0
    assert [len(table.rows) for table in outcome.tables] == [4, 1]


def test_what_eval_found_compares() -> None:
    """Workloads in both forms hold the same texts; of equal answers nothing diverges."""
    for name, make in found.WORKLOADS.items():
        chats = list(itertools.islice(make(random.Random(0)), 3))
        assert len({json.dumps(chat.plain) for chat in chats}) == 3
        for chat in chats:
            assert "pic_segment" not in json.dumps(chat.plain)
            assert json.dumps(chat.marked).count('"pic_segment": true') >= 2, name
    top = {"a": -0.1, "b": -3.0}
    assert found.divergence(top, top) == pytest.approx(0, abs=1e-9)
    assert found.divergence(top, {"b": -0.1}) > 1


# -- the report --------------------------------------------------------------------


def test_the_page_shows_what_was_run_and_nothing_else(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fine(_: Bench) -> Outcome:
        figure, _axes = new_figure()
        return Outcome({}, [{"a": 1}], [Table("numbers", ("a", "b"), [("x", "1")])], figure)

    def broken(_: Bench) -> Outcome:
        raise RuntimeError("on purpose")

    class Idle:
        def flush(self) -> None:
            pass

    parts = [
        report.Part("Fine", "python -m eval.fine --quick", fine, "fine"),
        report.Part("Broken", "python -m eval.broken --quick", broken, "broken"),
    ]
    done = report.run_all(parts, Idle())  # type: ignore[arg-type]
    assert "RuntimeError: on purpose" in capsys.readouterr().err
    report.write(done, tmp_path / "docs", tmp_path / "results")
    text = (tmp_path / "docs" / "results.md").read_text()
    assert "## Fine" in text and "python -m eval.fine --quick" in text and "| x | 1 |" in text
    assert "figures/fine.png" in text and "Broken" not in text
    assert (tmp_path / "docs" / "figures" / "fine.png").exists()
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["fine.json"]


class Parsed(Exception):
    """Raised where an evaluation, its command line read, would start servers."""


@pytest.mark.parametrize("part", report.PARTS, ids=lambda part: part.name)
def test_each_parts_command_is_one(part: report.Part, monkeypatch: pytest.MonkeyPatch) -> None:
    def bench(*_: Any, **__: Any) -> None:
        raise Parsed

    python, m, name, *flags = part.command.split()
    assert (python, m) == ("python", "-m") and "--quick" in flags
    module = importlib.import_module(f"sglang_pic.{name}")
    # What starts, or measures, behind the command line.
    starts = "measure" if part in report.ALONE else "bench"
    monkeypatch.setattr(module, starts, bench)
    monkeypatch.setattr(sys, "argv", [name, *flags])
    with pytest.raises(Parsed):
        module.main()
    monkeypatch.setattr(sys, "argv", [name, "--no-such-flag"])
    with pytest.raises(SystemExit):
        module.main()


def test_parts_have_names_of_their_own() -> None:
    parts = report.PARTS
    assert len({part.name for part in parts}) == len(parts) == len({p.title for p in parts})


@pytest.mark.parametrize(
    "module",
    [
        breakdown,
        checkpoints,
        found,
        hybrid_quality,
        load,
        memory,
        report,
        scheduler_cost,
        soak,
        steady_state,
        text_quality,
        ttft,
    ],
    ids=lambda module: module.__name__.rpartition(".")[2],
)
def test_every_evaluation_has_its_help(
    module: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["x", "--help"])
    with pytest.raises(SystemExit):
        module.main()
    shown = capsys.readouterr().out
    assert module.__doc__.splitlines()[0] in shown and "python -m eval." in shown
    if module is not report:
        assert all(flag in shown for flag in ("--quick", "--json", "--plot"))


def test_what_cannot_start_leaves_the_rest(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def bench(*_: Any, **__: Any) -> None:
        raise RuntimeError("no server today")

    monkeypatch.setattr(report, "bench", bench)
    assert report.run_on("smollm2", report.ON_SMOLLM2) == []
    assert "no server today" in capsys.readouterr().err


def test_the_schedulers_cost_is_measured_of_both() -> None:
    """At sizes small enough for a test: every kind of work is done, and told."""
    kinds = (
        (scheduler_cost.compile_beside, 64),
        (scheduler_cost.round_of, 2),
        (scheduler_cost.ordinary_match, 64),
        (scheduler_cost.many_segments, 4),
    )
    for method in (scheduler_cost.OURS, scheduler_cost.STOCK):
        for function, size in kinds:
            assert function(method, size) > 0
        assert all(ms > 0 for ms in scheduler_cost.matches_of(method, 2048))
