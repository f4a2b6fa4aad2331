"""The pure parts of the evaluations: figures, prompts, files. No server."""

from __future__ import annotations

import json
import pathlib
import random
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from sglang_pic.eval import demo, divergence, hybrid_quality, results, ttft
from sglang_pic.eval.models.hybrid import task
from sglang_pic.eval.models.smollm2 import ensure_model
from sglang_pic.eval.passages import OPENING, chat_messages, find, load_passages, prompt_pieces


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(ensure_model())


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


# -- divergence ---------------------------------------------------------------


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
    found = divergence.kl_with_remainder(p[top].tolist(), q[top].tolist())
    assert found == pytest.approx(expected, abs=1e-6)
    assert -1e-9 <= found <= whole + 1e-6


def test_kl_bears_a_list_that_leaves_nothing() -> None:
    """Rounded log-probabilities may sum to more than one."""
    p = [float(np.log(np.float32(0.6))) + 1e-7, float(np.log(np.float32(0.4))) + 1e-7]
    assert divergence.kl_with_remainder(p, p) == 0
    assert divergence.kl_with_remainder(p, [p[1], p[0]]) == pytest.approx(0.2 * np.log(1.5), 1e-4)


def test_tasks_ask_about_a_passage_that_is_there() -> None:
    passages = load_passages()
    tasks = list(divergence.make_tasks(passages, None, random.Random(0)))
    assert len(tasks) == sum(len(passage.questions) for passage in passages)
    for documents, question in tasks:
        assert len(documents) == len({one.title for one in documents}) == divergence.DOCUMENTS
        assert any(question in passage.questions for passage in documents)
    first = list(divergence.make_tasks(passages, len(passages), random.Random(0)))
    assert len({question.text for _, question in first}) == len(passages)
    assert first == tasks[: len(passages)]


# -- passages -----------------------------------------------------------------


def test_answers_stand_in_their_passage() -> None:
    passages = load_passages()
    assert len(passages) >= 12
    assert len({passage.title for passage in passages}) == len(passages)
    for passage in passages:
        assert len(passage.questions) == 2
        for question in passage.questions:
            assert question.answers
            for answer in question.answers:
                assert answer.lower() in passage.document.lower(), (passage.title, answer)
    assert find(passages, "Venice").title == "Venice"
    with pytest.raises(KeyError):
        find(passages, "Atlantis")


def test_passages_have_the_length_of_a_segment(tokenizer: Any) -> None:
    lengths = [len(tokenizer(passage.document)["input_ids"]) for passage in load_passages()]
    assert min(lengths) >= 90 and max(lengths) <= 160


def test_prompt_is_what_the_chat_template_makes(tokenizer: Any) -> None:
    """Of the messages, whose content parts SGLang joins by a space."""
    passages = load_passages()[:3]
    question = passages[0].questions[0].text
    messages = chat_messages(passages, question, mark=True)
    parts = messages[1]["content"]
    assert [part.get("pic_segment", False) for part in parts] == [False, True, True, True, False]
    assert chat_messages(passages, question, mark=False)[1]["content"] == [
        {"type": "text", "text": part["text"]} for part in parts
    ]
    messages[1]["content"] = " ".join(part["text"] for part in parts)
    pieces = prompt_pieces(passages, question)
    assert "".join(text for text, _ in pieces) == tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    assert [text for text, marked in pieces if marked] == [one.document for one in passages]
    assert pieces[0] == (OPENING, False)


def test_tokens_are_those_of_the_pieces(tokenizer: Any) -> None:
    from sglang_pic.request.base import TokenSpan
    from sglang_pic.request.tokenize import encode_marked

    pieces = prompt_pieces(load_passages()[:2], "Where?")
    text, ranges = "", []
    for piece, marked in pieces:
        if marked:
            ranges.append(TokenSpan(len(text), len(text) + len(piece)))
        text += piece
    ids, spans = encode_marked(tokenizer, text, tuple(ranges), rule="pieces")
    prompt = divergence.tokenize(tokenizer, pieces)
    assert prompt.ids == ids
    assert [(s["start"], s["end"]) for s in prompt.segments] == [(s.start, s.end) for s in spans]


def test_demo_shuffles_the_same_documents() -> None:
    passages = load_passages()
    tasks = demo.make_tasks(passages)
    assert len({tuple(one.title for one in documents) for documents, _ in tasks}) == len(tasks)
    assert len({frozenset(one.title for one in documents) for documents, _ in tasks}) == 1
    for documents, question in tasks:
        assert len(documents) == demo.DOCUMENTS
        assert any(question == one.text for passage in documents for one in passage.questions)


# -- files --------------------------------------------------------------------


def test_json_has_its_shape(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "new" / "result.json"
    rows = [{"method": "linked", "ttft_s": 0.5}]
    results.write_json(path, {"model": "m"}, rows)
    found = json.loads(path.read_text(encoding="utf-8"))
    assert list(found) == ["command", "versions", "machine", "config", "rows"]
    assert found["rows"] == rows and found["config"] == {"model": "m"}
    assert {"python", "sglang", "torch"} <= set(found["versions"])
    assert found["machine"]["cores"] >= 1


def assert_png(path: pathlib.Path) -> None:
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_ttft_plot_is_a_png(tmp_path: pathlib.Path) -> None:
    rows = [
        {
            "method": method,
            "segments": segments,
            "segment_tokens": length,
            "ttft_s": 0.1 * segments,
            "ttft_s_min": 0.05 * segments,
            "ttft_s_max": 0.2 * segments,
        }
        for method in ttft.METHODS
        for segments in (1, 4)
        for length in (64, 256)
    ]
    ttft.plot(rows, tmp_path / "plots" / "ttft.png")
    assert_png(tmp_path / "plots" / "ttft.png")


def test_divergence_plot_is_a_png(tmp_path: pathlib.Path) -> None:
    rows = [{"method": "full", "seam": 0, "context": False, "kl": 1e-12}]
    rows += [
        {"method": method.name, "seam": method.seam, "context": context, "kl": 0.1}
        for method in divergence.METHODS
        for context in (False, True)
    ]
    divergence.plot(rows, tmp_path / "divergence.png")
    assert_png(tmp_path / "divergence.png")


class FakeHybrid:
    """Answers like a model whose next token follows from the prompt's last one; a
    linked request goes astray behind every token of ``astray``."""

    def __init__(self, astray: frozenset[int]):
        self.astray = astray
        self.requests = 0

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
            outputs.append({"output_ids": chosen, "meta_info": meta})
        return outputs


def test_hybrid_quality_follows_the_reference() -> None:
    """Both distributions stand behind the same tokens; a method that leaves the
    reference's answer is asked again behind it, and only then."""
    questions = [
        hybrid_quality.Asked("single", [1, 2, start], [], "x", [start + 1, start + 2, start + 3])
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
    assert rows[0]["kl"] > 0 and rows[0]["loss_low"] <= 0.5 <= rows[0]["loss_high"]


def test_hybrid_questions_are_held_out_and_reproducible() -> None:
    asked = hybrid_quality.make_questions(25, 4, 48)
    assert asked == hybrid_quality.make_questions(25, 4, 48)
    assert len(asked) == 25
    for one in asked:
        assert [r["end"] - r["start"] for r in one.segments] == [48] * 4
        assert one.segments[-1]["end"] < len(one.ids)
        assert one.answer and one.category in task.CATEGORIES
