"""The encoder's modules against independent code, and files that are not what they say."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from sglang_pic.encoder import weights
from sglang_pic.encoder.config import (
    DecoderShape,
    EncoderConfig,
    decoder_shape,
    evenly,
    fingerprint,
)
from sglang_pic.encoder.cross import attend
from sglang_pic.encoder.weights import EncoderModules
from sglang_pic.errors import PicConfigError
from sglang_pic.eval.encoder import data, initial
from sglang_pic.eval.encoder.decoder import encode, looking, seen_by, shape_of
from sglang_pic.eval.models.tiny import tiny_llama, tiny_llama_model
from sglang_pic.eval.oracle.encoder import encoded_logprobs

VOCAB = 512
documents_of = st.lists(
    st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=24), min_size=1, max_size=5
)
row_of = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=12)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llama_model(layers=4).requires_grad_(False)


def config_for(model: Any, **changed: Any) -> EncoderConfig:
    sizes: dict[str, Any] = {
        "cross_layers": evenly(4, 2),
        "intermediate_size": 96,
        "rotary_dim": 8,
        "conv": 5,
        "max_tokens": 24,
    }
    return EncoderConfig(decoder=shape_of(model), **sizes | changed)


def random_modules(config: EncoderConfig, gate: float = 0.7) -> EncoderModules:
    torch.manual_seed(3)
    modules = EncoderModules(config)
    initial.fresh(modules, gate)
    for name, weight in modules.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(weight, std=0.5)
        if name.endswith("norm.weight"):
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    return modules.eval().requires_grad_(False)


@pytest.fixture(
    scope="module", params=[{}, {"conv": 0, "head_norm": False, "bias": True, "rotary_dim": 16}]
)
def trained(
    request: pytest.FixtureRequest, model: Any, tmp_path_factory: pytest.TempPathFactory
) -> tuple[EncoderModules, pathlib.Path]:
    directory = tmp_path_factory.mktemp("encoder")
    weights.save(random_modules(config_for(model, **request.param)), directory)
    return weights.load(directory, shape_of(model)), directory


def packed_logprobs(
    model: Any,
    modules: EncoderModules,
    rows: list[list[int]],
    documents: list[list[int]],
    owned: list[list[int]],
) -> list[Tensor]:
    """Of all rows at once, through the packed reference ``attend``."""
    kv = encode(model, modules, documents)
    starts = [sum(map(len, documents[:i])) for i in range(len(documents))]
    spans = [[(starts[d], len(documents[d])) for d in own] for own in owned]
    most = max(map(len, rows))
    ids = torch.tensor([row + [0] * (most - len(row)) for row in rows])
    reading = [r for r, own in enumerate(owned) if own]

    def hook(i: int) -> Any:
        def before(layer: Any, args: Any, kwargs: Any) -> Any:
            def read(q: Tensor) -> Tensor:
                out = attend(
                    q.flatten(0, 1),
                    kv.k[i],
                    kv.v[i],
                    [most] * len(reading),
                    [spans[r] for r in reading],
                )
                return out.view_as(q)

            x = args[0].clone()
            if reading:
                x[reading] = modules.cross[i](x[reading], read)
            return (x, *args[1:]), kwargs

        return before

    layers = model.get_decoder().layers
    handles = [
        layers[at].register_forward_pre_hook(hook(i), with_kwargs=True)
        for i, at in enumerate(modules.config.cross_layers)
    ]
    try:
        logits = model(ids, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    return [logits[r, : len(row)].log_softmax(-1) for r, row in enumerate(rows)]


@settings(max_examples=25)
@given(documents=documents_of, rows=st.lists(row_of, min_size=1, max_size=4), draw=st.data())
def test_rows_answer_as_the_oracle_does(
    model: Any,
    trained: tuple[EncoderModules, pathlib.Path],
    documents: list[list[int]],
    rows: list[list[int]],
    draw: st.DataObject,
) -> None:
    modules, directory = trained
    some = st.lists(st.integers(0, len(documents) - 1), unique=True)
    owned = [draw.draw(some) for _ in rows]
    packed = packed_logprobs(model, modules, rows, documents, owned)
    most = max(map(len, rows))
    ids = torch.tensor([row + [0] * (most - len(row)) for row in rows])
    kv = encode(model, modules, documents)
    with looking(model, modules, kv, seen_by(list(map(len, documents)), owned)):
        padded = model(ids, use_cache=False).logits.log_softmax(-1)
    for r, (row, own) in enumerate(zip(rows, owned, strict=True)):
        chosen = [documents[d] for d in own]
        forced = [*row[1:], 0]
        expected = encoded_logprobs(model, directory, row[:1], chosen, forced=forced)
        assert torch.allclose(packed[r], expected, atol=1e-4, rtol=0)
        assert torch.allclose(padded[r, : len(row)], expected, atol=1e-4, rtol=0)


@settings(max_examples=20)
@given(documents=documents_of, row=row_of, draw=st.data())
def test_the_order_of_documents_does_not_matter(
    model: Any,
    trained: tuple[EncoderModules, pathlib.Path],
    documents: list[list[int]],
    row: list[int],
    draw: st.DataObject,
) -> None:
    everyone = list(range(len(documents)))
    other = draw.draw(st.permutations(everyone))
    one, two = (
        packed_logprobs(model, trained[0], [row], documents, [own])[0] for own in (everyone, other)
    )
    assert torch.allclose(one, two, atol=1e-5, rtol=0)


@settings(max_examples=20)
@given(documents=documents_of)
def test_a_document_does_not_see_its_neighbours(
    model: Any, trained: tuple[EncoderModules, pathlib.Path], documents: list[list[int]]
) -> None:
    together = encode(model, trained[0], documents)
    alone = [encode(model, trained[0], [document]) for document in documents]
    for got, parts in zip(together, zip(*alone, strict=True), strict=True):
        assert torch.allclose(got, torch.cat(parts, 1), atol=1e-5, rtol=0)


def test_documents_matter(model: Any, trained: tuple[EncoderModules, pathlib.Path]) -> None:
    row, documents = [5, 6, 7], [[1, 2, 3], [1, 2, 4]]
    answers = [packed_logprobs(model, trained[0], [row], documents, [own])[0] for own in ([0], [1])]
    assert (answers[0] - answers[1]).abs().max() > 0.01


@settings(max_examples=10)
@given(documents=documents_of, row=row_of)
def test_closed_gates_leave_the_plain_model(
    model: Any, documents: list[list[int]], row: list[int]
) -> None:
    modules = random_modules(config_for(model), gate=0.0)
    plain = model(torch.tensor([row]), use_cache=False).logits[0].log_softmax(-1)
    everyone = [list(range(len(documents)))]
    assert torch.equal(packed_logprobs(model, modules, [row], documents, everyone)[0], plain)


def test_gates_are_closed_at_first(model: Any) -> None:
    for block in EncoderModules(config_for(model)).cross:
        assert block.attention_gate.item() == block.mlp_gate.item() == 0.0


@pytest.mark.parametrize("lengths", [[], [0, 3], [25], [2, 2]])
def test_lengths_that_do_not_fit_are_refused(model: Any, lengths: list[int]) -> None:
    modules = random_modules(config_for(model))
    with pytest.raises(ValueError, match="documents of"):
        modules.encoder(torch.zeros(max(3, sum(lengths[:1])), 64), lengths)


def test_first_weights_of_the_decoder_are_its_own() -> None:
    model = tiny_llama_model(layers=4)
    modules = EncoderModules(config_for(model, intermediate_size=128))
    assert len(initial.from_decoder(modules, model, 0.1)) == 2 * (4 + 4 + 3 + 4)
    before, behind = (model.model.layers[i] for i in (2, 3))
    layer = modules.encoder.layers[1]
    assert torch.equal(layer.attention.k_proj.weight, before.self_attn.k_proj.weight)
    assert torch.equal(layer.mlp.up_proj.weight, before.mlp.up_proj.weight)
    assert torch.equal(layer.k_proj.weight, behind.self_attn.k_proj.weight)
    assert torch.equal(modules.cross[1].q_proj.weight, behind.self_attn.q_proj.weight)


# Files


def test_a_decoder_is_known_by_its_files(tmp_path: pathlib.Path, model: Any) -> None:
    path = tiny_llama(tmp_path / "model")
    small = tiny_llama_model()
    assert decoder_shape(small.config, fingerprint(path)) == shape_of(small)
    assert shape_of(tiny_llama_model(seed=1)).fingerprint != fingerprint(path)
    with pytest.raises(PicConfigError, match="no embed_tokens"):
        fingerprint(tmp_path)


def test_files_hold_what_was_saved(model: Any, tmp_path: pathlib.Path) -> None:
    modules = random_modules(config_for(model))
    weights.save(modules, tmp_path)
    again = weights.load(tmp_path, shape_of(model))
    assert again.config == modules.config
    for name, weight in modules.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight)


def test_another_models_encoder_is_refused(model: Any, tmp_path: pathlib.Path) -> None:
    weights.save(random_modules(config_for(model)), tmp_path)
    other = shape_of(tiny_llama_model(seed=1, layers=4))
    with pytest.raises(PicConfigError, match="another model, whose fingerprint"):
        weights.load(tmp_path, other)
    with pytest.raises(PicConfigError, match="another model, whose layers is 4"):
        weights.load(tmp_path, shape_of(tiny_llama_model()))


@pytest.mark.parametrize("what", ["missing", "unknown", "shape", "dtype", "mixed", "torn", "none"])
def test_bad_weights_are_refused(model: Any, tmp_path: pathlib.Path, what: str) -> None:
    weights.save(random_modules(config_for(model)), tmp_path)
    path = tmp_path / weights.FILE
    tensors = load_file(path)
    name = "cross.0.q_proj.weight"
    if what == "missing":
        del tensors[name]
    elif what == "unknown":
        tensors["cross.9.q_proj.weight"] = tensors[name].clone()
    elif what == "shape":
        tensors[name] = tensors[name][1:].clone()
    elif what == "dtype":
        tensors = {key: value.double() for key, value in tensors.items()}
    elif what == "mixed":
        tensors[name] = tensors[name].bfloat16()
    save_file(tensors, path)
    if what == "torn":
        path.write_bytes(path.read_bytes()[:100])
    elif what == "none":
        path.unlink()
    found = {"torn": "cannot read", "none": "cannot read", "dtype": "float64", "mixed": "bfloat16"}
    with pytest.raises(PicConfigError, match=found.get(what, r"cross\.\d\.q_proj\.weight")):
        weights.load(tmp_path)


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"format": 2}, "format"),
        ({"cross_layers": [3, 1]}, "not increasing"),
        ({"cross_layers": [1, 4]}, "of 4 layers"),
        ({"rotary_dim": 18}, "rotary_dim"),
        ({"conv": 4}, "not odd"),
        ({"intermediate_size": "96"}, "intermediate_size"),
        ({"heads": 4}, "unexpected keyword"),
        ({"decoder": {}}, "bad configuration"),
    ],
)
def test_a_bad_configuration_is_refused(
    model: Any, tmp_path: pathlib.Path, changed: dict[str, Any], problem: str
) -> None:
    fields = config_for(model).to_json() | changed
    (tmp_path / "encoder.json").write_text(json.dumps(fields))
    with pytest.raises(PicConfigError, match=problem):
        EncoderConfig.load(tmp_path)
    with pytest.raises(PicConfigError, match="cannot read"):
        EncoderConfig.load(tmp_path / "nowhere")


def test_bytes_of_a_token() -> None:
    shape = DecoderShape(4096, 32, 32, 8, 128, 128256, "")
    config = EncoderConfig(shape, evenly(32, 8), 14336)
    assert config.cross_layers == (3, 7, 11, 15, 19, 23, 27, 31)
    assert config.bytes_per_token(2) * 4 == 2 * 32 * 8 * 128 * 2  # a quarter of the decoder's


# Rows to train on


def test_a_batch_asks_the_same_of_both_forms() -> None:
    rows = [
        data.Row([1], [[2, 3], [4]], [data.Asked("a", [5, 6], [7, 8]), data.Asked("b", [9], [7])]),
        data.Row([1], [[3]], [data.Asked("a", [5], [6])]),
    ]
    batch = data.batch_of(rows, pad=0)
    assert batch.full.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 9, 7], [1, 3, 5, 6, *[0] * 6]]
    assert batch.encoded.tolist() == [[1, 5, 6, 7, 8, 9, 7], [1, 5, 6, 0, 0, 0, 0]]
    for ids, where in ((batch.full, batch.full_where), (batch.encoded, batch.encoded_where)):
        assert ids.roll(-1, 1)[where].tolist() == batch.targets.tolist() == [7, 8, 7, 6]
    assert batch.documents == [[2, 3], [4], [3]] and batch.owned == [[0, 1], [2]]
    predicted = torch.tensor([7, 0, 7, 6])
    assert data.exact(batch, predicted) == {"a": (1, 2), "b": (1, 1)}
