"""The adapter's training: its linked forward by the oracle's, its steps, its files."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from sglang_pic.adapt.__main__ import load_model, main
from sglang_pic.adapt.data import AdaptError, Prompt, prompt_of, read_prompts
from sglang_pic.adapt.learning import (
    Drawn,
    Learning,
    Settings,
    answers_of,
    divergence,
    draw,
    linked,
    refer,
)
from sglang_pic.adapt.linked import Way, begin, check, compile_segments, cores_of, rows_of
from sglang_pic.adapt.lora import MODULES, PREFIX, WEIGHTS, Adapter, Shape
from sglang_pic.eval import adapter
from sglang_pic.eval.models.tiny import randomize, tiny_llama, tiny_llama_model
from sglang_pic.eval.oracle.company import company_logprobs
from sglang_pic.eval.oracle.dense import full_logprobs, linked_logprobs
from sglang_pic.link.policy import Graded, Seam

VOCAB = 512


class Letters:
    """One token a character."""

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return [ord(letter) % VOCAB for letter in text]


def tiny_qwen3_model() -> Any:
    """Random Qwen 3, which normalises keys before they are turned."""
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=4096,
        attn_implementation="eager",
    )
    return randomize(Qwen3ForCausalLM(config), 0)


@pytest.fixture(scope="module", params=[tiny_llama_model, tiny_qwen3_model], ids=["llama", "qwen3"])
def model(request: pytest.FixtureRequest) -> Any:
    made = request.param().requires_grad_(False)
    check(made)
    return made


def prompt_for(lengths: list[int], opening: int = 3, gap: int = 2, seed: int = 0) -> Prompt:
    rng = random.Random(seed)

    def ids(n: int) -> tuple[int, ...]:
        return tuple(rng.randrange(VOCAB) for _ in range(n))

    return Prompt(ids(opening), tuple(map(ids, lengths)), ids(gap), (ids(4), ids(7)))


def flat(prompt: Prompt, question: int) -> tuple[list[int], list[tuple[int, int]]]:
    """Its tokens with one question, and its segments' ranges."""
    ids, spans = list(prompt.opening), []
    for segment in prompt.segments:
        spans.append((len(ids), len(ids) + len(segment)))
        ids += [*segment, *prompt.gap]
    return [*ids, *prompt.questions[question]], spans


def along(
    model: Any, prompt: Prompt, way: Way, policy: Any, question: int, answer: list[int]
) -> Any:
    """What the linked forward says along an answer: float32 [answer, vocab]."""
    walk = begin(
        model, prompt, compile_segments(model, prompt, way), cores_of(prompt, policy, way.company)
    )
    asked = [*prompt.questions[question], *answer[:-1]]
    rows = rows_of(asked, range(prompt.length, prompt.length + len(asked)), 1)
    last = len(prompt.questions[question]) - 1
    return walk.compute(rows, torch.arange(last, len(asked))).log_softmax(-1)


@settings(max_examples=20, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=5),
    opening=st.integers(1, 5),
    gap=st.integers(0, 2),
    seam=st.integers(0, 6),
    seed=st.integers(0, 99),
)
def test_alone_it_is_the_dense_oracle(
    model: Any, lengths: list[int], opening: int, gap: int, seam: int, seed: int
) -> None:
    prompt = prompt_for(lengths, opening, gap, seed)
    ids, spans = flat(prompt, 1)
    wanted = linked_logprobs(model, ids, spans, seam=seam, page=1, n_new=4)
    way = Way(tuple((i,) for i in range(len(lengths))))
    with Adapter(model, Shape(4, 8)).on(model):
        found = along(model, prompt, way, Seam(seam), 1, wanted.tokens)
    assert torch.allclose(found, wanted.full_logprobs, atol=1e-4)


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 15), min_size=2, max_size=5),
    seam=st.integers(0, 5),
    guests=st.booleans(),
    seed=st.integers(0, 99),
)
def test_in_company_it_is_the_company_oracle(
    model: Any, lengths: list[int], seam: int, guests: bool, seed: int
) -> None:
    prompt = prompt_for(lengths, seed=seed)
    ids, spans = flat(prompt, 0)
    n = len(lengths)
    groups = [(i,) for i in range(n)] if guests else [tuple(range(n // 2)), tuple(range(n // 2, n))]
    groups = [group for group in groups if group]
    invited = ((5, 6, 7), (8, 9)) if guests else ()
    if not guests and any(len(group) < 2 for group in groups):
        groups = [tuple(range(n))]
    wanted = company_logprobs(model, ids, spans, groups, seam=seam, page=1, n_new=3, guests=invited)
    found = along(model, prompt, Way(tuple(groups), invited), Seam(seam, seam), 0, wanted.tokens)
    assert torch.allclose(found, wanted.full_logprobs, atol=1e-4)


def test_the_reference_is_full_recompute(model: Any) -> None:
    """Of several questions, which do not see each other."""
    prompt = prompt_for([9, 12, 5])
    answers = answers_of(model, prompt, 5)
    reference = refer(model, prompt, answers)
    told = reference.logprobs[reference.answered].split(5)
    for i in range(2):
        wanted = full_logprobs(model, flat(prompt, i)[0], 5)
        assert list(answers[i]) == wanted.tokens
        assert torch.allclose(told[i], wanted.full_logprobs, atol=1e-4)
    assert len(reference.logprobs) == 4 + 7 + 2 * 4
    nothing_reused = Way(((0,), (1,), (2,)))
    same = linked(model, prompt, nothing_reused, Graded(Seam(0), 1.0), reference)
    assert float(divergence(reference, same).max()) < 1e-5


def learning_in(
    folder: pathlib.Path, prompts: list[Prompt], steps: int = 30, **shape: int
) -> Learning:
    model = tiny_llama_model().requires_grad_(False)
    asked = Settings(steps=steps, rate=1e-2, warmup=2, answer=4, every=5)
    made = Adapter(model, Shape(**{"rank": 4, "alpha": 8, **shape}))
    return Learning(model, made, prompts, asked, folder, base="tiny", guests=((1, 2), (3, 4)))


@pytest.mark.parametrize("groups", [((0,), (1,), (2,)), ((0, 1, 2),)], ids=["alone", "company"])
def test_it_learns(tmp_path: pathlib.Path, groups: tuple[tuple[int, ...], ...]) -> None:
    """Of one prompt, linked in one way, to say what full recompute says."""
    prompt = prompt_for([8, 9, 10])
    learning = learning_in(tmp_path, [prompt])
    drawn = Drawn(0, prompt, Way(groups), Seam(0), "fixed")
    kl = [learning.learn(drawn)["kl"] for _ in range(25)]
    assert kl[-1] < 0.2 * kl[0], kl
    answers = answers_of(learning.model, prompt, 4)
    plain = answers_of(tiny_llama_model(), prompt, 4)
    assert answers == plain, "the model is as it was"


def test_a_run_that_was_cut_off_goes_on(tmp_path: pathlib.Path) -> None:
    prompts = [prompt_for([6, 7, 5, 4], seed=seed) for seed in range(3)]

    def curve(folder: pathlib.Path) -> list[Any]:
        lines = (folder / "curve.jsonl").read_text().splitlines()
        return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]

    learning_in(tmp_path / "whole", prompts, 12).run(5)
    cut = learning_in(tmp_path / "cut", prompts, 12)
    for _ in range(5):
        cut.advance()
    cut.keep()
    cut.advance()  # what no checkpoint holds is done again
    again = learning_in(tmp_path / "cut", prompts, 12)
    assert again.step == 5
    again.run(5)
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")
    assert len(curve(tmp_path / "cut")) == 12
    with pytest.raises(AdaptError, match="other settings"):
        learning_in(tmp_path / "cut", prompts, 12, rank=2)
    with pytest.raises(AdaptError, match="other settings"):
        learning_in(tmp_path / "cut", prompts[:2], 12)


def test_its_file_is_pefts(tmp_path: pathlib.Path, model: Any) -> None:
    """Merged into the weights as PEFT would, it says what it says itself."""
    learning = learning_in(tmp_path, [prompt_for([6, 5])], 3)
    learning.run(5)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / WEIGHTS)
    assert config["peft_type"] == "LORA" and set(config["target_modules"]) == set(MODULES)
    assert len(tensors) == 2 * len(MODULES) * 2
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    with torch.no_grad():
        with learning.adapter.on(learning.model):
            own = learning.model(input_ids=ids).logits
        read = Adapter.load(learning.model, tmp_path)
        with read.on(learning.model):
            assert torch.equal(learning.model(input_ids=ids).logits, own)
        plain = learning.model(input_ids=ids).logits
        for name in sorted({key.rsplit(".lora_", 1)[0] for key in tensors}):
            a, b = (tensors[f"{name}.lora_{letter}.weight"] for letter in "AB")
            layer = learning.model.get_submodule(name.removeprefix(PREFIX))
            layer.weight += config["lora_alpha"] / config["r"] * b @ a
        merged = learning.model(input_ids=ids).logits
    assert torch.allclose(merged, own, atol=1e-4)
    assert not torch.allclose(plain, own, atol=1e-3)


def test_a_file_of_another_model_is_refused(tmp_path: pathlib.Path, model: Any) -> None:
    Adapter(tiny_llama_model(layers=1), Shape(4, 8)).save(tmp_path, "tiny")
    with pytest.raises(AdaptError, match=r"no adapter of this model: see model\.layers\.1"):
        Adapter.load(model, tmp_path)
    Adapter(tiny_llama_model(layers=3), Shape(4, 8)).save(tmp_path, "tiny")
    with pytest.raises(AdaptError, match=r"it changes .*layers\.2"):
        Adapter.load(model, tmp_path)
    save_file({}, tmp_path / WEIGHTS)
    with pytest.raises(AdaptError, match="no adapter of this model"):
        Adapter.load(model, tmp_path)
    (tmp_path / WEIGHTS).write_bytes(b"nothing")
    with pytest.raises(AdaptError, match="holds no adapter"):
        Adapter.load(model, tmp_path)
    with pytest.raises(AdaptError, match="has no layers w1"):
        Adapter(model, dataclasses.replace(Shape(), modules=("w1",)))


def test_what_a_step_draws_can_be_linked() -> None:
    """Every segment stands in one group; all ways come."""
    seen = set()
    for seed in range(200):
        prompt = prompt_for([3, 4, 5, 6, 7][: seed % 5 + 1], seed=seed)
        drawn = draw([prompt], [(1, 2)], random.Random(seed))
        n = len(prompt.segments)
        assert sorted(i for group in drawn.way.groups for i in group) == list(range(n))
        assert sorted(drawn.prompt.segments) == sorted(prompt.segments)
        assert not (drawn.way.company and drawn.way.guests)
        if n > 1 and drawn.way.company:
            assert min(map(len, drawn.way.groups)) > 1
        seen.add(drawn.name.split(",")[0])
    assert seen == {"alone", "guests", "three", "all"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[]", "a prompt is a JSON object"),
        ("{", "Expecting property name"),
        ('{"question": "?"}', "'segments' must be texts"),
        ('{"segments": ["a", ""], "question": "?"}', "'segments' must be texts"),
        ('{"segments": ["a"], "question": []}', "'question' must be texts"),
        ('{"segments": ["a"], "question": 5}', "'question' must be texts"),
        ('{"segments": ["a"], "question": "?", "opening": 1}', "'opening' must be a text"),
        ('{"segments": ["a"], "question": "?", "answer": "!"}', "unknown fields: answer"),
        ('{"segments": ["a", "a"], "question": "?"}', "a segment stands in it twice"),
        (json.dumps({"segments": ["a" * 99], "question": "?"}), "100 tokens, of 50"),
    ],
)
def test_bad_lines_are_named(tmp_path: pathlib.Path, line: str, message: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"segments": ["one", "two"], "question": "?"}\n\n' + line + "\n")
    with pytest.raises(AdaptError, match=message) as raised:
        read_prompts(path, Letters(), 50)
    assert f"{path}:3: " in str(raised.value)


def test_an_empty_file_holds_no_prompt(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("\n")
    with pytest.raises(AdaptError, match="holds no prompt"):
        read_prompts(path, Letters(), 50)


def test_parts_are_tokenised_by_themselves() -> None:
    row = {"opening": "o", "segments": ["ab", "c"], "gap": "--", "question": ["x", "yz"]}
    prompt = prompt_of(row, Letters())
    assert list(map(len, prompt.questions)) == [1, 2]
    assert prompt.starts == [1, 5] and prompt.length == 8


def test_models_of_another_build_are_refused() -> None:
    model = tiny_llama_model()
    check(model)
    model.config.layer_types = ["sliding_attention", "full_attention"]
    with pytest.raises(AdaptError, match="sliding windows"):
        check(model)
    with pytest.raises(AdaptError, match="not built like Llama"):
        check(torch.nn.Linear(1, 1))
    turning = tiny_llama_model()
    turning.model.rotary_emb.forward = lambda x, position_ids: (
        torch.ones(1, position_ids.shape[1], 16) * position_ids[..., None],
        torch.zeros(1, position_ids.shape[1], 16),
    )
    with pytest.raises(AdaptError, match="do not turn"):
        check(turning)


def test_the_command(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Learns, goes on, and says what is wrong."""
    from test_lora import save_tokenizer

    folder = tiny_llama(tmp_path)
    save_tokenizer(folder)
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"segments": ["A pier.", "A boat."], "question": "Which?"}) + "\n")
    out = tmp_path / "adapter"
    args = [f"--model-path={folder}", f"--data={data}", f"--out={out}", "--rank=4", "--answer=3"]
    main([*args, "--steps=2"])
    assert "2 of 2 steps" in capsys.readouterr().out
    Adapter.load(load_model(str(folder), torch.float32), out)
    with pytest.raises(SystemExit, match="other settings"):
        main([*args, "--steps=3"])
    with pytest.raises(SystemExit, match="--rate must be above 0"):
        main([*args, "--rate=0"])
    with pytest.raises(SystemExit, match=r"adapt: .*no\.jsonl"):
        main([*args, f"--data={tmp_path / 'no.jsonl'}"])


def musique(folder: pathlib.Path) -> pathlib.Path:
    """52 questions over passages longer than a seam, some of which stand in two."""
    items = [
        {
            "question": f"Who is {i}?",
            "answers": ["x"],
            "ctxs": [
                {"title": "", "text": f"{letter * 30} {i + i % 2 * j}"}
                for j, letter in enumerate("abcde")
            ],
        }
        for i in range(52)
    ]
    items[51]["ctxs"][:2] = items[3]["ctxs"][:2]
    path = folder / "musique.json"
    path.write_text(json.dumps(items))
    return path


def test_nothing_is_learnt_from_what_is_asked(tmp_path: pathlib.Path) -> None:
    examples = adapter.read_musique(musique(tmp_path), adapter.WORDS)
    lines = adapter.lines_to_learn(examples, 40, 0)
    assert len(lines) == 40 and lines == adapter.lines_to_learn(examples, 40, 0)
    asked = {one.document for example in examples[:50] for one in example.documents}
    learnt = {segment for line in lines for segment in line["segments"]}
    assert len(learnt) > 5 and not learnt & asked
    for line in lines:
        assert len(prompt_of(line, Letters()).segments) == 3


def test_an_evaluation(tmp_path: pathlib.Path) -> None:
    """One that was cut off goes on, an adapter of zeros changes nothing, and what is
    computed in its place is what full recompute has."""
    from test_lora import save_tokenizer

    folder = tiny_llama(tmp_path)
    save_tokenizer(folder)
    zero = tmp_path / "adapter"
    Adapter(tiny_llama_model(), Shape(4, 8)).save(zero, "tiny")
    (zero / "curve.jsonl").write_text("{}\n" * 7)
    given: dict[str, Any] = {
        "count": 2, "data": musique(tmp_path), "answer": 3, "dtype": "float32",
        "path": tmp_path / "kept",
    }  # fmt: skip
    plain = adapter.run(str(folder), None, **given)
    assert len(plain.rows) == 13 and not any(row["adapter"] for row in plain.rows)
    control = next(row for row in plain.rows if row["method"] == adapter.CONTROL)
    assert control["kl"] < 1e-6 and control["top1"] == 1
    before = (tmp_path / "kept" / "without.jsonl").read_bytes()
    both = adapter.run(str(folder), zero, **given)
    assert (tmp_path / "kept" / "without.jsonl").read_bytes() == before
    assert both.config["steps"] == 7
    adapted = [row for row in both.rows if row["adapter"]]
    assert len(adapted) == 12
    for row in adapted:
        assert row["kl"] > 1e-6 and row["of_plain"] == pytest.approx(1, abs=1e-6)
    both.tables[0].print()
