"""Training an encoder beside a frozen decoder, and judging it."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from sglang_pic.encoder import weights
from sglang_pic.encoder.weights import EncoderModules
from sglang_pic.eval.encoder import initial, quality, sources
from sglang_pic.eval.encoder.decoder import shape_of
from sglang_pic.eval.encoder.train import Training, parse
from sglang_pic.eval.models.dense.model import new_model
from sglang_pic.eval.models.hybrid import task
from sglang_pic.eval.models.tiny import tiny_llama_model
from sglang_pic.eval.multihop import load_examples


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A decoder that knows nothing, in the shape of the shipped one."""
    path = tmp_path_factory.mktemp("decoder")
    new_model(0).save_pretrained(path)
    return path


def training(decoder: pathlib.Path, out: pathlib.Path, *flags: str) -> Training:
    always = ["--model", str(decoder), "--out", str(out), "--minutes", "0.001"]
    return Training(parse([*always, *flags]))


@pytest.mark.parametrize("first", ["fresh", "decoder"])
def test_only_encoder_and_cross_blocks_are_trained(
    decoder: pathlib.Path, tmp_path: pathlib.Path, first: str
) -> None:
    run = training(decoder, tmp_path, "--first", first, "--distil", "1", "--masked", "0.1")
    frozen = {name: weight.clone() for name, weight in run.model.state_dict().items()}
    before = {name: weight.clone() for name, weight in run.modules.state_dict().items()}
    run.run()
    assert run.step >= 1
    for name, weight in run.model.state_dict().items():
        assert torch.equal(weight, frozen[name])
    moved = {n for n, w in run.modules.state_dict().items() if not torch.equal(w, before[n])}
    # An MLP whose last matrix starts at zero has no gradient but there, at first.
    waiting = {n for n in before if "cross" in n and ".mlp" in n and first == "decoder"}
    assert moved | waiting == {*before}
    assert set(run.running) >= {"loss", "kl", "masked", "single"}


def test_a_run_goes_on_from_its_checkpoint(decoder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    run = training(decoder, tmp_path)
    run.source.stage = 1
    run.run()
    again = training(decoder, tmp_path)
    assert (again.step, again.source.stage) == (run.step, 1)
    served = weights.load(tmp_path, shape_of(again.model))
    for name, weight in again.modules.state_dict().items():
        assert torch.equal(weight, run.modules.state_dict()[name])
        assert torch.equal(weight, served.state_dict()[name])


def test_batches_accumulate(decoder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    run = training(decoder, tmp_path, "--accumulate", "3")
    drawn: list[int] = []
    draw = run.source.draw

    def counted(rng: np.random.Generator) -> sources.Drawn:
        drawn.append(1)
        return draw(rng)

    run.source.draw = counted  # type: ignore[method-assign]
    run.run()
    assert len(drawn) == 3 * run.step


def test_the_curriculum_rises_when_a_rung_is_learnt() -> None:
    course = sources.Curriculum(0, highest=1)
    shares = {"single": 0.95, "loss": 3.0}
    assert not course.advance(shares, sources.AT_LEAST - 1)
    assert not course.advance({"single": 0.89}, 1000)
    assert course.advance(shares, sources.AT_LEAST)
    assert course.label == "1x32 single+copy"
    assert not course.advance({"single": 1.0, "copy": 0.5}, 1000)
    assert not course.advance({"single": 1.0, "copy": 1.0}, 1000)  # the highest


def test_rows_ask_what_their_rung_says() -> None:
    course = sources.Curriculum(3, highest=3)
    rng = task.generator(stream=5)
    for _ in range(8):
        rows, counts = course.draw(rng)
        asked = {one.category for row in rows for one in row.asked}
        assert asked <= {*sources.ALL} and all(row.asked for row in rows)
        if counts:
            assert len(rows) == 24 and {len(row.documents) for row in rows} == {2}


class Words:
    """A tokenizer of words, by their lengths."""

    pad_token_id, eos_token_id = 0, 3

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [4 + len(word) for word in text.split()]}


def test_texts_are_answered_once_by_the_frozen_model(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "questions.json"
    ctxs = [{"title": f"T{i}", "text": "word " * (i + 1)} for i in range(3)]
    item = {"question": "Which one?", "answers": ["word"], "ctxs": ctxs}
    path.write_text(json.dumps([item]))
    model: Any = tiny_llama_model()
    kept = tmp_path / "answers.jsonl"
    texts = sources.Texts(path, model, Words(), kept, pool=20, rows=4)
    rows, _ = texts.draw(np.random.default_rng(0))
    assert len(rows) == 4 and {len(row.documents) for row, _ in texts.unasked} == {1, 2, 3}
    for row in rows:
        (asked,) = row.asked
        ids = torch.tensor([[*row.before, *row.text, *asked.prompt, *asked.answer]])
        said = model(ids).logits[0].argmax(-1)[-len(asked.answer) - 1 : -1]
        assert said.tolist() == asked.answer
    lines = kept.read_text()
    again = sources.Texts(path, model, Words(), kept, pool=20, rows=4)
    assert again.draw(np.random.default_rng(0)).rows == rows
    assert kept.read_text() == lines
    assert len(load_examples(path, 60, None, 0)) == 1


def test_quality_is_right_about_closed_gates(decoder: pathlib.Path) -> None:
    model = new_model(0).eval().requires_grad_(False)
    model.set_attn_implementation("eager")
    run = training(decoder, decoder.parent / "closed")
    modules = EncoderModules(run.modules.config)
    initial.fresh(modules, 0.0)
    outcome = quality.run(model, modules.eval(), ["2x32"], 2)
    by_method = {m: [r for r in outcome.rows if r["method"] == m] for m in ("full", "encoded")}
    assert {row["exact_match"] for row in outcome.rows} == {0.0}  # it knows nothing
    assert [r["questions"] for r in by_method["full"]] == [
        r["questions"] for r in by_method["encoded"]
    ]
    # Two layers of keys and values where the decoder has four.
    assert by_method["full"][0]["kv_bytes"] == 2 * by_method["encoded"][0]["kv_bytes"]


def test_the_shipped_encoder_answers_what_a_set_of_documents_can() -> None:
    model = AutoModelForCausalLM.from_pretrained(
        quality.MODEL, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    modules = weights.load(quality.ENCODER, shape_of(model))
    rows = quality.run(model, modules, ["2x32"], 20).rows
    exact = {(row["method"], row["category"]): row["exact_match"] for row in rows}
    for category in ("single", "copy"):
        assert exact["encoded", category] >= 0.9 * exact["full", category] > 0.8
