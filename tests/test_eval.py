"""What evaluations have in common: passages, tables, files. No server."""

from __future__ import annotations

import argparse
import json
import pathlib
from typing import Any

import pytest
from transformers import AutoTokenizer

from sglang_pic.eval import command, demo, results
from sglang_pic.eval.models.smollm2 import ensure_model
from sglang_pic.eval.passages import OPENING, chat_messages, find, load_passages, prompt_pieces
from sglang_pic.eval.tables import Table


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(ensure_model())


# -- passages -----------------------------------------------------------------


def test_answers_stand_in_their_passage() -> None:
    passages = load_passages()
    assert sum(len(passage.questions) for passage in passages) == 200
    assert len({passage.title for passage in passages}) == len(passages)
    for passage in passages:
        assert len({question.text for question in passage.questions}) >= 2
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


def test_an_outcome_is_delivered(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figure, axes = command.new_figure(2)
    axes[1].plot([1, 2], [3, 4])
    table = Table("a title", ("name", "value"), [("one", "1.5"), ("two", "2")], "a note")
    outcome = command.Outcome({"model": "m"}, [{"a": 1}], [table], figure)
    plot = tmp_path / "plots" / "x.png"
    args = argparse.Namespace(json=tmp_path / "x.json", plot=plot)
    command.deliver(outcome, args)
    printed = capsys.readouterr().out
    assert all(text in printed for text in ("a title", "name", "one", "1.5", "a note"))
    assert plot.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert json.loads((tmp_path / "x.json").read_text())["rows"] == [{"a": 1}]
    assert table.markdown() == (
        "**a title**\n\n| name | value |\n| --- | ---: |\n| one | 1.5 |\n| two | 2 |\n\na note\n"
    )
