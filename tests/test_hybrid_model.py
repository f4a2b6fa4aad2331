"""The trained hybrid: its language, its forward passes, its shipped weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sglang_pic.eval.models.hybrid import task
from sglang_pic.eval.models.hybrid.batches import IGNORED, Rung, in_a_row, questions_alone
from sglang_pic.eval.models.hybrid.block import Layout, linked
from sglang_pic.eval.models.hybrid.evaluate import evaluate, held_out, load
from sglang_pic.eval.models.hybrid.model import (
    Memory,
    Writes,
    ask,
    forward,
    new_model,
    recur,
)
from sglang_pic.eval.models.hybrid.train import kl
from sglang_pic.eval.models.hybrid.weights import hybrid_path
from sglang_pic.kernels.operators import gated_delta

SHAPES = [(1, 32), (2, 32), (4, 48), (8, 48), (8, 128)]
CODE, OWNER, NOTE = ("code of", "owner of", "note")


def examples(segments: int, length: int, count: int = 30) -> list[task.Example]:
    rng = task.generator(stream=segments * length)
    return [task.example(rng, segments, length, questions=100) for _ in range(count)]


def statements(tokens: list[int]) -> Iterator[tuple[str, str, list[str]]]:
    """What a text says: relation, subject, words; found by pattern alone."""
    words = task.decode(tokens).split()
    for at, word in enumerate(words):
        if word in ("code", "owner") and words[at + 1 : at + 2] == ["of"] and "?" not in words:
            end = words.index(";", at) if ";" in words[at:] else None
            if end is not None and words[at + 3] == "is":
                yield f"{word} of", words[at + 2], words[at + 4 : end]
        if word == "note" and ";" in words[at:]:
            end = words.index(";", at)
            yield NOTE, words[at + 1], words[at + 2 : end]


def solve(context: list[int], prompt: list[int]) -> list[int]:
    """The answer by rules: the last statement about a subject holds."""
    said = {(relation, subject): words for relation, subject, words in statements(context)}
    asked = task.decode(prompt).split()
    if asked[1] == "copy":
        return task.encode(" ".join(said[NOTE, asked[3]]))
    if asked[3] == "owner":
        (owner,) = said[OWNER, asked[5]]
        return task.encode(" ".join([owner, "is", *said[CODE, owner]]))
    return task.encode(" ".join(said[CODE, asked[3]]))


@pytest.mark.parametrize(("segments", "length"), SHAPES)
def test_segments_have_their_length_and_questions_their_answer(segments, length):
    seen = set()
    for example in examples(segments, length):
        assert [len(segment) for segment in example.segments] == [length] * segments
        assert example.prefix == list(task.PREFIX)
        for question in example.questions:
            assert solve(example.context(), question.prompt) == question.answer
            seen.add(question.category)
    assert seen == (set(task.CATEGORIES) if segments > 1 else {"single", "copy"})


def test_categories_are_what_they_say():
    for example in examples(4, 48):
        alone = [list(statements(segment)) for segment in example.segments]

        def stating(relation: str, subject: str, alone=alone) -> list[int]:
            return [
                index
                for index, said in enumerate(alone)
                if any(statement[:2] == (relation, subject) for statement in said)
            ]

        for question in example.questions:
            subject = task.WORDS[question.prompt[-1 if question.category == "copy" else -2]]
            where = stating(CODE, subject)
            if question.category == "single":
                assert len(where) == 1
            elif question.category == "update":
                assert len(where) == 2
            elif question.category == "seam":
                assert not where
            elif question.category == "twohop":
                owner = task.WORDS[question.answer[0]]
                assert stating(OWNER, subject) != stating(CODE, owner)
            else:
                assert len(stating(NOTE, subject)) == 1


def test_a_seed_gives_the_same_examples_and_held_out_ones_are_others():
    first, again = (
        [task.example(task.generator(stream=s), 2, 32) for s in range(50)] for _ in "ab"
    )
    assert first == again
    others = [task.example(task.generator(held_out=True, stream=s), 2, 32) for s in range(50)]
    assert not {tuple(e.context()) for e in first} & {tuple(e.context()) for e in others}


def test_words_and_ids():
    text = "code of alice is v03 v17 ;"
    assert task.decode(task.encode(text)) == text
    assert len(set(task.WORDS)) == task.VOCABULARY
    with pytest.raises(ValueError, match="no example"):
        task.example(np.random.default_rng(0), 2, 16)


def test_forward_is_that_of_transformers():
    model = new_model(seed=3).eval()
    ids = torch.randint(0, task.VOCABULARY, (2, 75), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(forward(model, ids), model(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("tokens", [1, 5, 16, 40, 64, 70])
def test_recurrence_and_its_gradient_are_those_of_the_equation(tokens):
    torch.manual_seed(tokens)
    rows, heads, dk, dv = 2, 3, 8, 6
    unit = torch.nn.functional.normalize
    q = unit(torch.randn(rows, tokens, heads, dk), dim=-1).double().requires_grad_()
    k = unit(torch.randn(rows, tokens, heads, dk), dim=-1).double().requires_grad_()
    v = torch.randn(rows, tokens, heads, dv).double().requires_grad_()
    g = (-torch.rand(rows, tokens, heads)).double().requires_grad_()
    beta = torch.rand(rows, tokens, heads).double().requires_grad_()
    state = torch.randn(rows, heads, dk, dv).double().requires_grad_()
    out, end = recur(q, Writes(k, v, g, beta), state)
    inputs = (q, k, v, g, beta, state)
    by_row = [gated_delta.recurrent(*(x[row] for x in inputs)) for row in range(rows)]
    expected, expected_end = (torch.stack(found) for found in zip(*by_row, strict=True))
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(end, expected_end)
    ours = torch.autograd.grad(out.square().sum() + end.sum(), inputs)
    theirs = torch.autograd.grad(expected.square().sum() + expected_end.sum(), inputs)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_asking_behind_a_memory_is_asking_behind_its_context():
    model = new_model(seed=2)
    drawn = examples(2, 32, count=2)
    contexts = torch.tensor([example.context() for example in drawn])
    questions, owner = questions_alone(drawn)
    layout = Layout(task.PREFIX_LENGTH, 2, 32, 4, contexts.shape[1])
    whole = torch.cat([contexts[owner], questions.ids], 1)
    where = torch.zeros_like(whole, dtype=torch.bool)
    where[:, contexts.shape[1] :] = True
    nowhere = torch.zeros_like(contexts, dtype=torch.bool)
    full: list[Memory] = []
    composed: list[Memory] = []
    with torch.no_grad():
        forward(model, contexts, nowhere, full)
        linked(model, contexts, layout, nowhere, keep=composed)
        for memories, expected in (
            (full, forward(model, whole, where)),
            (composed, linked(model, whole, replace(layout, tokens=whole.shape[1]), where)),
        ):
            answer = ask(model, questions.ids, memories, owner, contexts.shape[1])
            torch.testing.assert_close(answer.flatten(0, 1), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("seam", [4, 8, 31])
def test_a_segment_that_opens_the_prompt_links_exactly(seam):
    model = new_model(seed=1)
    ids = torch.randint(0, task.VOCABULARY, (2, 32 + 9))
    where = torch.zeros_like(ids, dtype=torch.bool)
    where[:, 32:] = True
    with torch.no_grad():
        answer = linked(model, ids, Layout(0, 1, 32, seam, ids.shape[1]), where)
        torch.testing.assert_close(answer, forward(model, ids, where), atol=1e-4, rtol=1e-4)


def test_linking_is_differentiable_and_nearer_than_wrong_operators():
    model = new_model(seed=1)
    batch = in_a_row(task.generator(), Rung(3, 32, 4, 2))
    where = batch.targets != IGNORED
    layout = Layout(task.PREFIX_LENGTH, 3, 32, 4, batch.ids.shape[1])
    full = forward(model, batch.ids, where)
    answers = {p: linked(model, batch.ids, layout, where, p) for p in ("compose", "add", "last")}
    away = {policy: kl(full, answer).mean().item() for policy, answer in answers.items()}
    assert away["compose"] < min(away["add"], away["last"])
    answers["compose"].logsumexp(-1).sum().backward()
    unused = {name for name, p in model.named_parameters() if p.grad is None}
    assert not unused


class TestWeights:
    def test_config_carries_the_pattern(self):
        config = json.loads((hybrid_path() / "config.json").read_text())
        assert config["architectures"] == ["Qwen3_5ForCausalLM"]
        assert config["full_attention_interval"] == 4
        assert config["layer_types"] == ["linear_attention"] * 3 + ["full_attention"]

    def test_text_in_text_out(self):
        model = AutoModelForCausalLM.from_pretrained(hybrid_path())
        tokenizer = AutoTokenizer.from_pretrained(hybrid_path())
        (example,) = held_out(2, 32, examples=1)
        right = 0
        for question in example.questions:
            text = task.decode(example.context() + question.prompt)
            encoded = tokenizer(text, return_tensors="pt")
            assert encoded.input_ids[0].tolist() == example.context() + question.prompt
            whole = model.generate(**encoded, max_new_tokens=8)[0, encoded.input_ids.shape[1] :]
            expected = task.decode(question.answer)
            right += tokenizer.decode(whole, skip_special_tokens=True) == expected
        assert right >= 0.8 * len(example.questions)

    def test_answers_held_out_questions_in_full_and_linked(self):
        model = load(hybrid_path())
        found = evaluate(model, 4, 48, examples=8)
        for method in ("full", "compose"):
            right = sum(found["exact"][method][c] * n for c, n in found["questions"].items())
            assert right / sum(found["questions"].values()) >= 0.9
        assert found["kl"]["compose"] < 0.01
