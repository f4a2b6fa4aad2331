"""Metrics: what is counted, what Prometheus is shown, and that documentation and
dashboard name nothing else."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import CHECKS, TINY, serve
from linking import assemble, body, fresh_salt, ids_of
from stats import MIB, rank_stats, report

from sglang_pic import cli
from sglang_pic.eval.serving import Server
from sglang_pic.metrics import front, prometheus
from sglang_pic.metrics.front import Counts
from sglang_pic.metrics.prometheus import Exporter
from sglang_pic.metrics.samples import FRONT_METRICS, METRICS, PREFIX, RANK_METRICS, Metric
from sglang_pic.server import answers, compiler
from sglang_pic.server.compiler import Compiler
from sglang_pic.server.items import CompileItem
from sglang_pic.server.queue import FairQueue

ROOT = Path(__file__).resolve().parent.parent
DASHBOARD = ROOT / "docs" / "grafana" / "sglang-pic.json"


# -- what is counted --------------------------------------------------------------


def test_reports_are_counted() -> None:
    counts = Counts()
    counts.observe(report())
    counts.observe(report())
    unlinked = {"exactness": "exact", "reason": "require_exact", "tokens_reused": 10}
    counts.observe(report(**unlinked, tokens_computed=110, segments=[]))
    assert counts.answers == {"composed": 2, "exact": 1}
    assert counts.unlinked == {"require_exact": 1}
    assert counts.segments == {"hit": 2, "not_compiled": 2}
    assert (counts.tokens_reused, counts.tokens_prefix, counts.tokens_computed) == (110, 30, 250)
    json.dumps(counts.to_json())


def test_seconds_saved_are_tokens_linked_less_tokens_compiled() -> None:
    counts = Counts()
    assert counts.seconds_saved == 0
    # 60 tokens of segments, 20 of a prompt's opening, a hundredth of a second each.
    counts.observe_compile([40, 20, 20], [True, True, False], 0.8, 4)
    assert counts.seconds_saved == pytest.approx(-0.60)
    for _ in range(3):
        counts.observe(report())
    assert counts.seconds_saved == pytest.approx((3 * 40 - 60) * 0.01)
    # All was there but its end: this tells nothing of what a token takes.
    counts.observe_compile([4, 1], [True, False], 5.0, 4)
    assert counts.seconds_saved == pytest.approx((3 * 40 - 64) * 0.01)
    assert (counts.compiles, counts.tokens_compiled) == (3, 85)


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counts:
    """Fresh counts, in every module that counts."""
    fresh = Counts()
    for module in (front, answers, compiler, prometheus):
        monkeypatch.setattr(module, "counts", fresh)
    return fresh


def test_each_answer_is_counted_once(counts: Counts) -> None:
    """However often its report passes: in every chunk, or in the first alone."""

    def chunk(**more: Any) -> dict[str, Any]:
        return {"meta_info": {"pic": [report()]}, **more}

    counted: set[int] = set()
    for out in (chunk(), chunk(), {"meta_info": {"finish_reason": {"type": "stop"}}}):
        answers.tidy(out, None, counted)
    assert counts.answers == {"composed": 1}
    # Several samples, streamed; then a batch at once.
    counted = set()
    for out in (chunk(index=0), chunk(index=1), chunk(index=0), chunk(index=1)):
        answers.tidy(out, None, counted, samples=2)
    assert counts.answers == {"composed": 3}
    answers.tidy([chunk(), chunk()], None, set(), samples=2)
    assert counts.answers == {"composed": 5}


def test_compiles_are_counted(counts: Counts) -> None:
    async def run() -> None:
        go = asyncio.Event()
        under_way: list[Any] = []
        error: Exception | None = None

        start = time.perf_counter()

        async def engine(sent: Any) -> Any:
            under_way.append(sent)
            await go.wait()
            if error is not None:
                raise error
            yield {"meta_info": {"prompt_tokens": 9, "cached_tokens": 2}}

        segments = [CompileItem((i,), "salt", None, None) for i in range(2)]
        opening = CompileItem((7,), None, None, None, segment=False)
        compiler = Compiler(engine, FairQueue(8, 8, 8))
        made = asyncio.create_task(compiler.compile([*segments, opening]))
        while len(under_way) < 3:
            await asyncio.sleep(0)
        await asyncio.sleep(0.02)
        assert counts.compiling == 3
        go.set()
        await made
        assert (counts.compiling, counts.compiles) == (0, 3)
        assert (counts.tokens_compiled, counts.tokens_opening) == (21, 7)
        # Side by side: their time counts once.
        assert 0.01 < counts.compile_seconds < time.perf_counter() - start
        error = RuntimeError("no memory")
        await compiler.compile(segments)
        assert (counts.compiling, counts.compiles, counts.compile_failures) == (0, 3, 2)

    asyncio.run(run())


# -- what Prometheus is shown -----------------------------------------------------


def shown(text: str | None = None) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Our samples, of a server's ``/metrics`` or of this process."""
    from prometheus_client import generate_latest
    from prometheus_client.parser import text_string_to_metric_families

    text = generate_latest().decode() if text is None else text
    return {
        (sample.name.removeprefix(PREFIX), frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith(PREFIX) and not sample.name.endswith("_created")
    }


def one(samples: dict[Any, float], name: str, **labels: str) -> float:
    """The value of the one sample of this name with these labels, and maybe others."""
    (value,) = (
        value for key, value in samples.items() if key[0] == name and labels.items() <= key[1]
    )
    return value


@pytest.fixture(scope="module")
def exporter() -> Exporter:
    return Exporter({"model_name": "m", "zone": "z"})


def test_counters_grow_by_what_is_new(exporter: Exporter) -> None:
    counts = Counts()
    for _ in range(3):
        counts.observe(report())
        exporter.show_front(counts.to_json())
    exporter.show_ranks([rank_stats(), rank_stats(refusal="why")])
    samples = shown()
    assert one(samples, "answers_total", exactness="composed", zone="z") == 3
    assert one(samples, "named_segments_total", reason="hit", model_name="m") == 3
    assert one(samples, "prompt_tokens_total", source="link") == 120
    assert one(samples, "prompt_tokens_total", source="prefix") == 30
    assert one(samples, "kv_bytes", kind="segment", dp_rank="1") == 40 * MIB
    assert one(samples, "linking", dp_rank="0") == 1
    assert one(samples, "linking", dp_rank="1") == 0
    before = one(samples, "refused_total", reason="admission", dp_rank="0")
    # The scheduler's counters were reset, and have counted two since.
    again = rank_stats(refused={"admission": 2, "budget": 1, "quota": 2})
    exporter.show_ranks([again])
    assert one(shown(), "refused_total", reason="admission", dp_rank="0") == before + 2


def test_polling_survives(
    exporter: Exporter,
    counts: Counts,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A scheduler that does not answer, or not in time, is told of once, and asked again."""
    answers: Iterator[Any] = iter([RuntimeError("busy"), 1.0, [rank_stats(segments=77)]])

    async def command(manager: Any, do: str) -> Any:
        assert do == "stats"
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, float):
            await asyncio.sleep(answer)
        return answer

    monkeypatch.setattr(prometheus, "command", command)
    monkeypatch.setattr(prometheus, "POLL_S", 0.01)
    monkeypatch.setattr(prometheus, "TIMEOUT_S", 0.05)

    async def run() -> None:
        task = asyncio.create_task(prometheus.poll(None, exporter))
        while one(shown(), "segments", dp_rank="0") != 77:
            await asyncio.sleep(0.01)
        task.cancel()

    with caplog.at_level(logging.WARNING):
        asyncio.run(asyncio.wait_for(run(), 10))
    assert counts.poll_failures >= 2
    assert len([r for r in caplog.records if "no new numbers" in r.message]) == 1


# -- documentation and dashboard --------------------------------------------------


def test_every_metric_finds_its_value() -> None:
    for metrics, numbers in ((FRONT_METRICS, Counts().to_json()), (RANK_METRICS, rank_stats())):
        for metric in metrics:
            assert metric.meaning.endswith(".")
            for labels, _ in metric.samples(numbers):
                assert set(labels) == ({metric.label} if metric.label else set())
    assert len({metric.name for metric in METRICS}) == len(METRICS)


def test_the_table_of_metrics_is_the_codes() -> None:
    page = (ROOT / "docs" / "using" / "metrics.md").read_text()
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in page.splitlines()
        if line.startswith(f"| `{PREFIX}")
    ]

    def row(metric: Metric) -> list[str]:
        label = "" if metric.label is None else f"`{metric.label}`"
        return [f"`{metric.name}`", label, metric.meaning]

    assert rows == [row(metric) for metric in METRICS]


def test_the_dashboard_asks_for_what_is_shown() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    panels = dashboard["panels"]
    ids = [panel["id"] for panel in panels]
    assert len(set(ids)) == len(ids)
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    labels = {metric.name: metric.label for metric in METRICS}
    common = {"model_name", "instance"}
    asked: set[str] = set()
    for panel in panels:
        assert panel["type"] == "row" or panel["targets"]
        for target in panel.get("targets", []):
            assert target["datasource"]["uid"] == "${datasource}"
            expression = target["expr"]
            assert set(re.findall(r"\$(\w+)", expression)) <= variables | {"__rate_interval"}
            for name, selector in re.findall(rf"({PREFIX}\w+)\{{([^}}]*)\}}", expression):
                asked.add(name)
                of_rank = {"dp_rank"} if name in {m.name for m in RANK_METRICS} else set()
                used = set(re.findall(r"(\w+)[=!]", selector))
                assert used <= common | of_rank | {labels[name]}, expression
            assert set(re.findall(rf"{PREFIX}\w+", expression)) <= asked
            assert expression.count("(") == expression.count(")")
            by = set(re.findall(r"by \((\w+)\)", expression))
            assert all(f"{{{{{name}}}}}" == target["legendFormat"] for name in by)
    assert asked == set(labels), asked ^ set(labels)
    places = [panel["gridPos"] for panel in panels]
    cells = [
        (x, y)
        for place in places
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert all(x < 24 for x, _ in cells)


# -- a real server ----------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(tiny_path: Path, logs: Path) -> Iterator[Server]:
    """A server with ``--enable-metrics``."""
    extra = ("--enable-metrics", "--extra-metric-labels", '{"zone": "z"}')
    with serve(tiny_path, logs / "metrics.log", *TINY, *extra, env=CHECKS) as server:
        yield server


def scraped(server: Server) -> dict[Any, float]:
    """Our samples once they are those of an idle server's ``/pic/stats``."""
    stats = server.get("/pic/stats").json()
    for _ in range(40):
        samples = shown(server.get("/metrics/").text)
        with contextlib.suppress(AssertionError, ValueError):
            check_shown(samples, FRONT_METRICS, stats["front"])
            for rank, numbers in enumerate(stats["ranks"]):
                check_shown(samples, RANK_METRICS, numbers, dp_rank=str(rank))
            return samples
        time.sleep(0.5)
    raise AssertionError(f"not {stats}: {samples}")


def check_shown(samples: Any, metrics: Any, numbers: dict[str, Any], **labels: str) -> None:
    for metric in metrics:
        for own, value in metric.samples(numbers):
            name = metric.name.removeprefix(PREFIX)
            assert one(samples, name, zone="z", **labels, **own) == pytest.approx(value)


@pytest.mark.server
def test_a_server_shows_what_its_reports_say(measured: Server) -> None:
    """Single, streamed, several samples, a batch, compiled ahead, not linked."""
    salt = fresh_salt()
    documents = [ids_of(300 + i, 90) for i in range(3)]
    parts = [("segment", document) for document in documents]
    prompt = assemble([("text", ids_of(310, 40)), *parts, ("text", [5])])
    other = assemble([*parts[::-1], ("text", [6])])
    plain = {"token_ids_logprob": None, "return_logprob": False}
    single = {**body(*prompt, 3, salt), **plain}
    reports = [measured.generate(**single)["meta_info"]["pic"]]
    # The opening text and the segments.
    compiled = reports[0]["tokens_compiled"]
    assert compiled == 40 + 3 * 90
    reports.append(measured.first_token(**single)[1]["meta_info"]["pic"])
    several = {**single, "sampling_params": {"max_new_tokens": 2, "n": 2}}
    reports += [answer["meta_info"]["pic"] for answer in measured.generate(**several)]
    second = body(*other, 2, salt)
    batch = {
        "input_ids": [prompt[0], other[0]],
        "pic": [single["pic"], second["pic"]],
        "cache_salt": [salt, salt],
        "sampling_params": {"max_new_tokens": 2},
    }
    reports += [answer["meta_info"]["pic"] for answer in measured.generate(**batch)]
    exact = {**single, "pic": {**single["pic"], "require_exact": True}}
    reports.append(measured.generate(**exact)["meta_info"]["pic"])
    made = measured.post("/pic/compile", {"input_ids": ids_of(320, 70), "cache_salt": salt})
    assert made.json()["segments"][0]["tokens_computed"] == 70
    # No segments, no report: not counted.
    measured.generate(**{key: value for key, value in single.items() if key != "pic"})

    samples = scraped(measured)
    expected = Counts()
    for one_report in reports:
        expected.observe(one_report)
    assert len(reports) == 7
    for exactness in ("exact", "composed"):
        count = expected.answers[exactness]
        assert one(samples, "answers_total", exactness=exactness) == count > 0
    assert one(samples, "unlinked_total", reason="require_exact") == 1
    for reason, count in expected.segments.items():
        assert one(samples, "named_segments_total", reason=reason) == count
    linked = expected.tokens_reused - expected.tokens_prefix
    assert one(samples, "prompt_tokens_total", source="link") == linked > 0
    assert one(samples, "prompt_tokens_total", source="prefix") == expected.tokens_prefix
    assert one(samples, "prompt_tokens_total", source="computed") == expected.tokens_computed
    # Several prompts and samples ask first what is there, and compile nothing.
    assert one(samples, "compiled_tokens_total") == compiled + 70
    assert one(samples, "compiles_total") == 5
    assert one(samples, "compile_queue") == 0
    assert one(samples, "linking", dp_rank="0") == 1
    assert one(samples, "segments", dp_rank="0") == 4
    # 2 layers, keys and values, 2 heads of 16 float32.
    assert one(samples, "kv_bytes", kind="segment", dp_rank="0") == (3 * 90 + 70) * 512
    assert one(samples, "poll_failures_total") == 0


@pytest.mark.server
def test_polls_are_no_requests_in_sglangs_metrics(measured: Server) -> None:
    """The scheduler is asked every few seconds; SGLang's own counters know nothing of it."""

    def requests_seen() -> list[str]:
        lines = measured.get("/metrics/").text.splitlines()
        names = ("sglang:num_requests_total", "sglang:num_aborted_requests_total")
        return sorted(line for line in lines if line.startswith(names))

    before = requests_seen()
    assert before
    time.sleep(prometheus.POLL_S * 2.5)
    assert requests_seen() == before


@pytest.mark.server
def test_top_draws_a_real_server(measured: Server, capsys: pytest.CaptureFixture[str]) -> None:
    salt = fresh_salt()
    (made,) = measured.post(
        "/pic/compile", {"input_ids": ids_of(330, 80), "cache_salt": salt}
    ).json()["segments"]
    cli.main(["top", "--once", "--url", measured.url, "--cache-salt", salt])
    out = capsys.readouterr().out
    assert made["id"] in out
    assert "KV" in out and "prompt tokens" in out
    assert "no new numbers" not in measured.log.read_text()
