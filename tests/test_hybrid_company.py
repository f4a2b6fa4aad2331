"""A hybrid's segments in company, offline: the means are of what they say."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from sglang_pic.eval import pareto
from sglang_pic.eval.hybrid_company import (
    NOTHING,
    TODAY,
    Asked,
    Compiler,
    Prompt,
    combine,
    of_passages,
    run,
    score,
)
from sglang_pic.eval.models.hybrid import model as parts
from sglang_pic.eval.models.hybrid.evaluate import load
from sglang_pic.eval.models.text_hybrid.corpus import VOCABULARY
from sglang_pic.eval.models.text_hybrid.model import configuration, forward
from sglang_pic.eval.models.text_hybrid.train import twice
from sglang_pic.eval.models.text_hybrid.weights import text_hybrid_path
from sglang_pic.eval.multihop import own_examples
from sglang_pic.eval.oracle.company import first_order
from sglang_pic.eval.text_quality import prepare

SEAMS = (0, NOTHING, 16)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    made = parts.new_model(4, configuration(4)).eval()
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if "o_proj" in name or "out_proj" in name:
                weight.mul_(6)  # so that what stands elsewhere decides
    return made


def prompt(segments: int, length: int = 24, seed: int = 0) -> Prompt:
    rng = np.random.default_rng(seed)

    def draw(n: int) -> list[int]:
        return rng.integers(0, VOCABULARY, n).tolist()

    members = [draw(length) for _ in range(segments)]
    return Prompt(draw(7), members, draw(5), draw(4), [draw(length) for _ in range(3)])


@torch.no_grad()
def test_training_forward_is_that_of_the_library(model):
    ids = torch.randint(VOCABULARY, (2, 128))
    torch.testing.assert_close(forward(model, ids), model(ids).logits, atol=2e-4, rtol=1e-4)


@torch.no_grad()
def test_segments_compiled_where_they_stand_link_exactly(model):
    one = prompt(4)
    asked = Asked(model, one)
    in_place = Compiler(model, one, SEAMS).together(one.segments)
    for seam, held in zip(SEAMS, in_place, strict=True):
        assert asked.linked(held, seam).kl < 1e-6
    alone = Compiler(model, one, SEAMS).alone()
    assert all(asked.linked(h, s).kl > 1e-4 for h, s in zip(alone, SEAMS, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("members", [2, 3, 5])
def test_a_company_is_the_mean_of_two_ordinary_prefills(model, members):
    """Held in the prompt's order by a prompt that has its first order, and by one in reverse."""
    drawn = prompt(members)
    forth = dataclasses.replace(drawn, segments=first_order(drawn.segments))
    back = dataclasses.replace(drawn, segments=forth.segments[::-1])
    both, once = Compiler(model, forth, SEAMS).groups(members, np.random.default_rng(0))
    exact, other = (Compiler(model, one, SEAMS).together(one.segments) for one in (forth, back))
    for i in range(len(SEAMS)):
        flipped = combine(lambda xs: xs[0].flip(0), [other[i]])
        for found, expected in ((once[i], [exact[i]]), (both[i], [exact[i], flipped])):
            wanted = combine(lambda xs: sum(xs) / len(xs), expected)
            combine(lambda xs: torch.testing.assert_close(*xs) or xs[0], [found, wanted])


@torch.no_grad()
def test_all_but_a_last_one_is_shared_out(model):
    """A group of one goes to the group before it; every segment is held in its place."""
    one = prompt(7)
    groups = Compiler(model, one, (NOTHING,)).groups(3, np.random.default_rng(0))
    alone = Compiler(model, one, (NOTHING,)).alone(one.opening)[0]
    for held in groups:
        # The first layer's keys know nothing of company: they say whose they are.
        torch.testing.assert_close(held[0][0].tail, alone[0].tail)


def test_report(model, tmp_path):
    prompts = [prompt(4, 40, seed) for seed in range(2)]
    kept = tmp_path / "kept.jsonl"
    settled = {"model": "random", "text": "none"}
    outcome = run(model, prompts, settled, quick=True, path=kept)
    again = run(model, prompts, settled, quick=True, path=kept)
    assert outcome.rows == again.rows
    rows = {row["method"]: row for row in outcome.rows}
    assert rows["the prompt's own order, nothing"]["kl"] < 1e-6
    assert rows[TODAY]["ratio"] == 1
    assert rows["no passages"]["share"] == 0
    made = score(model, prompts[0], True, np.random.default_rng([0, 0]))
    assert made["all, nothing"].kl == pytest.approx(rows["all, nothing"]["kl_by_prompt"][0])


@torch.no_grad()
def test_layers_twice_over_say_what_they_said(model):
    """Nothing, if the upper ones have nothing to say."""
    made = twice(model, 0.0).eval()
    ids = torch.randint(VOCABULARY, (1, 64))
    assert len(made.model.layers) == 2 * len(model.model.layers)
    torch.testing.assert_close(forward(made, ids), forward(model, ids))


def test_shipped_weights_link_better_in_company():
    """The other hybrid that ships links exactly; of this one it can be asked."""
    path = text_hybrid_path()
    made = of_passages(Tokenizer.from_file(str(path / "tokenizer.json")), 1, 0)
    shipped = load(path)
    scores = score(shipped, made[0], True, np.random.default_rng(0))
    worth = scores["no passages"].kl
    assert worth > 0.01
    assert scores["the prompt's own order, nothing"].kl < 1e-5
    assert 1e-5 < scores["all, nothing"].kl < scores["alone, nothing"].kl < worth


def test_the_front_of_a_hybrid_is_of_segments_compiled_alone():
    methods = pareto.methods_of(text_hybrid_path(), False)
    assert {method.compiled for method in methods} == {pareto.ALONE, *pareto.GROUPS}
    widths = {method.pic["company_seam"] for method in methods if method.compiled in pareto.GROUPS}
    assert widths == {0}
    assert pareto.TODAY in {method.label for method in methods}
    some = pareto.methods_of(text_hybrid_path(), False, ["all, nothing"])
    assert [method.label for method in some] == [pareto.TODAY, "all, nothing"]
    with pytest.raises(ValueError, match="guests, seam 16"):
        pareto.methods_of(text_hybrid_path(), False, ["guests, seam 16"])


def test_a_model_without_chat_is_asked_in_plain_text():
    tokenizer = AutoTokenizer.from_pretrained(text_hybrid_path())
    (example,) = own_examples()[:1]
    asked = prepare(tokenizer, example)
    assert "<|im_start|>" not in tokenizer.decode(asked.ids)
    for one, document in zip(asked.segments, example.documents, strict=True):
        assert tokenizer.decode(asked.ids[one["start"] : one["end"]]) == document.document
