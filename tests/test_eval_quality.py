"""Quality evaluations: what is asked, how answers are scored, and on a real server."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from sglang_pic.eval import hybrid_quality, multihop, pareto, recurrence, text_quality
from sglang_pic.eval.bench import Bench
from sglang_pic.eval.intervals import clustered, interval, ratio_interval, share_interval
from sglang_pic.eval.kept import Kept
from sglang_pic.eval.models.hybrid import task
from sglang_pic.eval.models.smollm2 import ensure_model
from sglang_pic.eval.passages import load_passages, prompt_pieces
from sglang_pic.eval.serving import Server
from sglang_pic.link.divergence import kl_with_remainder


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(ensure_model())


@pytest.mark.parametrize("listed", [1, 7, 64, 299])
@pytest.mark.parametrize("shift", [0.0, 0.1, 2.0])
def test_kl_is_that_of_the_lumped_distributions(listed: int, shift: float) -> None:
    rng = np.random.default_rng(listed)
    logits = rng.normal(size=300) * 3
    p, q = log_softmax(logits), log_softmax(logits + shift * rng.normal(size=300))
    top = np.argsort(-p)[:listed]
    rest = np.setdiff1d(np.arange(300), top)
    lumped = [np.append(np.exp(x[top]), np.exp(x[rest]).sum()) for x in (p, q)]
    expected = float(np.sum(lumped[0] * np.log(lumped[0] / lumped[1])))
    whole = float(np.sum(np.exp(p) * (p - q)))
    found = kl_with_remainder(p[top].tolist(), q[top].tolist())
    assert found == pytest.approx(expected, abs=1e-6)
    assert -1e-9 <= found <= whole + 1e-6


def test_kl_bears_a_list_that_leaves_nothing() -> None:
    """Rounded log-probabilities may sum to more than one."""
    p = [float(np.log(np.float32(0.6))) + 1e-7, float(np.log(np.float32(0.4))) + 1e-7]
    assert kl_with_remainder(p, p) == 0
    assert kl_with_remainder(p, [p[1], p[0]]) == pytest.approx(0.2 * np.log(1.5), 1e-4)


def test_tokens_are_those_of_the_pieces(tokenizer: Any) -> None:
    from sglang_pic.request.base import TokenSpan
    from sglang_pic.request.tokenize import encode_marked

    passages = load_passages()[:2]
    pieces = prompt_pieces(passages, "Where?")
    text, ranges = "", []
    for piece, marked in pieces:
        if marked:
            ranges.append(TokenSpan(len(text), len(text) + len(piece)))
        text += piece
    ids, spans = encode_marked(tokenizer, text, tuple(ranges), rule="pieces")
    example = multihop.Example(tuple(passages), "Where?", ("Paris",))
    asked = text_quality.prepare(tokenizer, example)
    assert asked.ids == ids
    assert [(s["start"], s["end"]) for s in asked.segments] == [(s.start, s.end) for s in spans]
    assert asked.gold == tokenizer("Paris", add_special_tokens=False)["input_ids"]


# -- multi-hop examples ------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "kept"),
    [(3, "two three four"), (4, "one two three four"), (100, "zero one two three four five")],
)
def test_a_cut_keeps_the_answer(words: int, kept: str) -> None:
    text = "zero one two three four five"
    assert multihop.cut(text, ("nothing", "Three"), words) == kept


def test_a_cut_without_an_answer_keeps_the_beginning() -> None:
    assert multihop.cut("zero one two three", ("nine",), 2) == "zero one"


def test_musique_is_read_cut_and_shuffled(tmp_path: pathlib.Path) -> None:
    items = [
        {
            "question": f"Q{i}?",
            "answers": ["word9", "w"],
            "ctxs": [{"title": "", "text": " ".join(f"word{j}" for j in range(50))}] * 12,
        }
        for i in range(3)
    ]
    path = tmp_path / "musique.json"
    path.write_text(json.dumps(items))
    examples = multihop.load_examples(path, 8, 2, 0)
    assert [one.question for one in examples] == ["Q0?", "Q1?"]
    for one in examples:
        assert len(one.documents) == multihop.DOCUMENTS
        assert all("word9" in d.text and len(d.text.split()) == 8 for d in one.documents)
    path.write_text('{"not": "a list of questions"}')
    with pytest.raises(ValueError, match="no list of question"):
        multihop.load_examples(path, 8, 2, 0)


def test_without_musique_our_own_passages_are_asked_about(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    examples = multihop.load_examples(tmp_path / "absent.json", 8, None, 0)
    assert "absent.json is not there" in capsys.readouterr().out
    assert len(examples) == sum(len(passage.questions) for passage in load_passages())
    for one in examples:
        assert len({document.title for document in one.documents}) == multihop.DOCUMENTS
        assert any(one.answers[0].lower() in d.document.lower() for d in one.documents)
    assert examples == multihop.load_examples(tmp_path / "absent.json", 8, None, 0)
    assert examples != multihop.load_examples(tmp_path / "absent.json", 8, None, 1)


def test_documentation_is_asked_about_by_name() -> None:
    examples = multihop.load_examples(multihop.DOCSTRINGS, 256, 5, 0, 8)
    for one in examples:
        titles = [document.title for document in one.documents]
        assert len(set(titles)) == 8
        assert sum(f"What is {title} for" in one.question for title in titles) == 1
        assert all(len(document.text.split()) == 256 for document in one.documents)
    with pytest.raises(ValueError, match="docstrings have 2000 words"):
        multihop.load_examples(multihop.DOCSTRINGS, 2000, None, 0)
    pair: Any = None  # no server is asked
    with pytest.raises(ValueError, match="without answers"):
        text_quality.run(pair, quick=True, data=multihop.DOCSTRINGS, count=2)
    source = multihop.source_of(multihop.DOCSTRINGS, 256)
    assert source.name.startswith("docstrings of Python")
    assert source.sha256 != multihop.source_of(multihop.DOCSTRINGS, 257).sha256


# -- scores ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "gold", "f1", "exact"),
    [
        ("The Tower.", "tower", 1.0, 1.0),
        ("a big tower", "tower", 2 / 3, 0.0),
        ("", "tower", 0.0, 0.0),
        ("tower tower", "tower", 2 / 3, 0.0),
        ("U.S.", "us", 1.0, 1.0),
    ],
)
def test_f1_and_exact_match(answer: str, gold: str, f1: float, exact: float) -> None:
    found = text_quality.best(answer, ["something else", gold])
    assert found == (pytest.approx(f1), exact)


def test_an_interval_holds_the_mean_and_is_the_same_twice() -> None:
    values = np.random.default_rng(0).normal(3.0, 1.0, size=200).tolist()
    low, high = interval(values)
    assert low < np.mean(values) < high and high - low == pytest.approx(4 / math.sqrt(200), rel=0.2)
    assert interval(values) == (low, high)
    narrow = interval(values, level=0.5)
    assert low < narrow[0] < narrow[1] < high
    assert interval([2.0, 2.0]) == (2.0, 2.0)
    with pytest.raises(ValueError, match="two values"):
        interval([2.0])


def test_clusters_are_drawn_whole() -> None:
    """Ten equal values a cluster are worth one; none at all are bounded, not certain."""
    ones = np.random.default_rng(0).integers(0, 2, size=40)
    low, high = clustered(10.0 * ones, [10] * 40)
    alone = interval(ones.astype(float))
    assert (low, high) == (pytest.approx(alone[0], abs=0.05), pytest.approx(alone[1], abs=0.05))
    low, high = clustered([0.0] * 40, [10] * 40)
    assert -low == high == pytest.approx(1 - 0.025 ** (1 / 400))
    assert clustered([3.0], [10]) == (-1.0, 1.0)


def test_a_share_is_within_its_bounds_and_never_certain() -> None:
    counts = [5] * 20
    low, high = share_interval(counts, counts)
    assert (low, high) == (pytest.approx(0.025 ** (1 / 100)), 1.0)
    low, high = share_interval([0] * 20, counts)
    assert (low, high) == (0.0, pytest.approx(1 - 0.025 ** (1 / 100)))
    low, high = share_interval([5] * 18 + [2, 4], counts)
    assert 0.85 < low < 0.96 < high <= 1.0
    assert share_interval([3], [4]) == (0.0, 1.0)


def fewer(*args: Any) -> list[multihop.Example]:
    """Examples of eight documents, the last of which is less than 15 % of them."""
    examples = multihop.load_examples(*args)
    return [dataclasses.replace(one, documents=one.documents[:8]) for one in examples]


@pytest.mark.server
@pytest.mark.long
def test_text_quality_is_right_about_itself_and_reproducible(
    smollm: Server, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ours stands in for stock SGLang, which it is for a request without ``pic``."""
    monkeypatch.setattr(text_quality, "ANSWER_TOKENS", 4)
    monkeypatch.setattr(text_quality, "load_examples", fewer)
    kept = [m for m in text_quality.METHODS if m.seam in (0, 4, 32)]
    monkeypatch.setattr(text_quality, "METHODS", kept)
    pair = Bench(ensure_model(), "smollm2", smollm, smollm, range(1500, 47000), 8192, 16384)
    once, twice = (
        text_quality.run(pair, quick=True, data=tmp_path / "absent", count=2, seed=3)
        for _ in range(2)
    )
    rows = {text_quality.label(row): row for row in once.rows}
    assert list(rows) == ["full", "prefix cache", "naive", "seam 4", "seam 32"]
    for name in ("full", "prefix cache"):
        assert rows[name]["kl"] < 1e-4 and rows[name]["top1"] == 1
        assert abs(rows[name]["gold_lost"]) < 1e-3
    assert rows["prefix cache"]["tokens_reused"] > 400 and rows["full"]["tokens_reused"] == 0
    assert rows["naive"]["kl"] > 1e-3
    assert rows["naive"]["tokens_computed"] < rows["seam 4"]["tokens_computed"]
    assert rows["seam 32"]["tokens_computed"] < rows["full"]["tokens_computed"] / 2
    for row, again in zip(once.rows, twice.rows, strict=True):
        assert row.keys() == again.keys()
        for name, value in row.items():
            assert again[name] == (
                pytest.approx(value, abs=1e-3) if type(value) is float else value
            )
    assert once.tables[0].rows and once.figure is not None


def test_a_ratio_is_of_pairs() -> None:
    base = np.random.default_rng(0).lognormal(size=100)
    low, high = ratio_interval((base / 2).tolist(), base.tolist())
    assert (low, high) == (pytest.approx(0.5), pytest.approx(0.5))
    assert ratio_interval([1.0, 2.0], [1.0, 2.0]) == (1.0, 1.0)
    other = np.random.default_rng(1).lognormal(size=100)
    low, high = ratio_interval(other.tolist(), base.tolist())
    assert low < other.mean() / base.mean() < high and high - low > 0.1
    with pytest.raises(ValueError, match="two values"):
        ratio_interval([1.0], [1.0])


@pytest.mark.server
def test_pareto_is_right_about_itself(
    smollm: Server, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ours stands in for stock SGLang, which it is for a request without ``pic``."""
    monkeypatch.setattr(pareto, "QUICK_ANSWER_TOKENS", 3)
    monkeypatch.setattr(pareto, "load_examples", fewer)
    pair = Bench(ensure_model(), "smollm2", smollm, smollm, range(1500, 47000), 8192, 16384)
    data, path = tmp_path / "absent", tmp_path / "kept.jsonl"
    outcome = pareto.run(pair, quick=True, data=data, count=2, seed=3, path=path)
    rows = {row["method"]: row for row in outcome.rows}
    kept = [method.label for method in pareto.METHODS if method.quick]
    assert list(rows) == [pareto.CONTROL, *kept]
    assert rows[pareto.CONTROL]["kl"] < 1e-4 and rows[pareto.CONTROL]["top1"] == 1
    assert rows[pareto.TODAY]["ratio"] == 1 and rows[pareto.TODAY]["kl"] > 1e-3
    # Nothing but the last token of each segment is computed.
    assert rows["all, nothing"]["share"] < 0.02 < rows[pareto.TODAY]["share"] < 0.25
    assert 0.1 < rows["all, graded 15%"]["share"] <= 0.15 + 1e-9
    assert rows["all, nothing"]["kl"] < rows["alone, seam 0"]["kl"]
    assert rows["guests, seam 16"]["share"] == rows[pareto.TODAY]["share"]
    assert rows["guests, seam 16"]["kl"] != rows[pareto.TODAY]["kl"]
    assert outcome.tables[0].rows and outcome.figure is not None
    monkeypatch.setattr(pareto, "score", None)
    again = pareto.run(pair, quick=True, data=data, count=2, seed=3, path=path)
    assert again.rows == outcome.rows


def test_a_run_that_was_cut_off_goes_on(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "new" / "kept.jsonl"
    first = Kept(path, {"seed": 0, "sizes": (1, 2)})
    assert first.get(0) is None
    first.put(0, {"kl": 0.5})
    first.put(2, [1, 2])
    with path.open("a") as file:
        file.write('{"number": 3, "ro')
    second = Kept(path, {"seed": 0, "sizes": (1, 2)})
    assert [second.get(i) for i in range(4)] == [{"kl": 0.5}, None, [1, 2], None]
    second.put(3, "whole")
    assert Kept(path, {"seed": 0, "sizes": (1, 2)}).get(3) == "whole"
    with pytest.raises(ValueError, match="another configuration"):
        Kept(path, {"seed": 1, "sizes": (1, 2)})
    path.write_text("[]\n[]\n")
    with pytest.raises(ValueError, match="no rows"):
        Kept(path, {"seed": 0})
    without = Kept(None, {})
    without.put(0, 1)
    assert without.get(0) == 1


# -- what recurs ---------------------------------------------------------------------


def test_what_recurs_is_served_from_then_on() -> None:
    server = recurrence.Simulated("subset", 10, 10_000)
    a, b, c, d = ((i, *range(50)) for i in range(4))
    assert server.ask([a, b, c]) == 0
    assert server.ask([c, a, d]) == 0
    assert server.ask([a, c]) == 1
    assert server.built == 2 * (51 + 51) and server.held == 2 * 51
    assert server.ask([a, b]) == 0
    tenant = recurrence.Simulated("tenant", 10, 10_000)
    for request in ([a, b, c], [a, b, c]):
        tenant.ask(request)
    assert tenant.ask([d, b]) == pytest.approx(0.5)


def test_companies_keep_to_their_budget() -> None:
    server = recurrence.Simulated("subset", 10, 250)
    pairs = [[(i, *range(50)), (100 + i, *range(50))] for i in range(5)]
    for pair in (*pairs, *pairs):
        server.ask(pair)
        assert server.held <= 250
    # The last made are there.
    assert server.ask(pairs[-1]) == 1 and server.ask(pairs[0]) == 0


def test_recurrence_tells_of_every_kind(tmp_path: pathlib.Path) -> None:
    recurrence_of = recurrence.run(quick=True, data=tmp_path / "absent")
    kinds = {(row["traffic"], row["rule"], row["most"]) for row in recurrence_of.rows}
    assert kinds == {(kind, *rule) for kind in recurrence.TRAFFIC for rule in recurrence.RULES}
    shares = {(r["traffic"], r["rule"], r["most"]): r["share"] for r in recurrence_of.rows}
    assert all(0 <= share <= 1 for share in shares.values())
    for kind in recurrence.TRAFFIC:
        assert shares[kind, "tenant", 10] >= shares[kind, "subset", 10]
    assert recurrence_of.tables[0].rows and recurrence_of.figure is not None


# -- the hybrid --------------------------------------------------------------------


class FakeHybrid:
    """Answers like a model whose next token follows from the prompt's last one; a
    linked request goes astray behind every token of ``astray``."""

    def __init__(self, astray: frozenset[int]):
        self.astray = astray
        self.requests = 0
        self.cached = 0

    def distribution(self, last: int, linked: bool) -> np.ndarray:
        logits = np.zeros(task.VOCABULARY)
        logits[(last + 1 + (linked and last in self.astray)) % task.VOCABULARY] = 5.0
        return logits - np.log(np.exp(logits).sum())

    def generate(self, **body: Any) -> list[dict[str, Any]]:
        assert body["token_ids_logprob"] == [hybrid_quality.VOCABULARY] * len(body["input_ids"])
        outputs = []
        for ids, sampling in zip(body["input_ids"], body["sampling_params"], strict=True):
            self.requests += 1
            chosen, rows, last = [], [], ids[-1]
            for _ in range(sampling["max_new_tokens"]):
                rows.append(self.distribution(last, "pic" in body))
                last = int(rows[-1].argmax())
                chosen.append(last)
            meta = {
                "output_token_ids_logprobs": [[(v, i, None) for i, v in enumerate(r)] for r in rows]
            }
            meta |= {"pic": {"tokens_reused": 2}} if "pic" in body else {}
            meta["cached_tokens"] = 2 if "pic" in body else self.cached
            outputs.append({"output_ids": chosen, "meta_info": meta})
        return outputs


def test_hybrid_quality_follows_the_reference() -> None:
    """Both distributions stand behind the same tokens; a method that leaves the
    reference's answer is asked again behind it, and only then."""
    questions = [
        hybrid_quality.Asked(
            "single", [1, 2, start], [], f"x{start}", "x1", [start + 1, start + 2, start + 3]
        )
        for start in (10, 40)
    ]
    server = FakeHybrid(astray=frozenset({11}))
    full = hybrid_quality.ask(server, hybrid_quality.FULL, questions, None)
    assert [said.answer for said in full] == [question.answer for question in questions]
    seam = next(method for method in hybrid_quality.METHODS if method.name == "seam")
    server.requests = 0
    linked = hybrid_quality.ask(server, seam, questions, full)
    assert server.requests == 3
    assert linked[0].answer == [11, 13, 14] and linked[1].answer == questions[1].answer
    np.testing.assert_allclose(linked[1].logprobs, full[1].logprobs)
    # Behind 10 and behind 12 it agrees; only behind 11 it does not.
    same = [np.allclose(a, b) for a, b in zip(full[0].logprobs, linked[0].logprobs, strict=True)]
    assert same == [True, False, True]
    rows = hybrid_quality.rows_of(seam, questions, full, linked)
    assert [(row["category"], row["questions"]) for row in rows] == [("all", 2), ("single", 2)]
    assert rows[0]["exact_match"] == 0.5 == rows[0]["loss"]
    assert rows[0]["tokens_reused"] == 2 and rows[0]["tokens_computed"] == 1
    # A reference that found something cached is none, a warm cache that did not neither.
    with pytest.raises(RuntimeError, match="2 of 2 reused nothing"):
        hybrid_quality.ask(server, hybrid_quality.PREFIX, questions, full)
    server.cached = 1
    assert hybrid_quality.ask(server, hybrid_quality.PREFIX, questions, full)
    with pytest.raises(RuntimeError, match="0 of 2 reused nothing"):
        hybrid_quality.ask(server, hybrid_quality.FULL, questions, None)
    assert rows[0]["kl"] > 0 and rows[0]["loss_low"] <= 0.5 <= rows[0]["loss_high"]


def test_hybrid_questions_are_held_out_and_reproducible() -> None:
    asked = hybrid_quality.make_questions(25, 4, 48)
    assert asked == hybrid_quality.make_questions(25, 4, 48)
    assert len(asked) == 25
    for one in asked:
        assert [r["end"] - r["start"] for r in one.segments] == [48] * 4
        assert one.segments[-1]["end"] < len(one.ids)
        assert one.answer and one.category in task.CATEGORIES
