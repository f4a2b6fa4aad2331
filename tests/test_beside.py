"""Cross blocks in front of SGLang's decoder layers, and what is no encoder for a model."""

from __future__ import annotations

import pathlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from encoders import MAX_TOKENS, save_encoder
from safetensors.torch import load_file, save_file
from sglang.srt.layers.layer_boundary.residual import batch as residual
from sglang.srt.layers.layer_boundary.residual.add_norm import PLAIN_ADD
from torch import nn

from sglang_pic.config import PicConfig
from sglang_pic.encoder import weights
from sglang_pic.encoder.beside import BesideModel, Crossing
from sglang_pic.encoder.cross import CrossBlock
from sglang_pic.encoder.digest import digest_of
from sglang_pic.encoder.encoder import EncoderKV
from sglang_pic.encoder.step import Steps, make_step
from sglang_pic.errors import PicConfigError
from sglang_pic.eval.models.tiny import tiny_llama, tiny_llama_model
from sglang_pic.forest import build
from sglang_pic.launch_server import main


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tiny_llama(tmp_path_factory.mktemp("beside"))


@pytest.fixture
def encoder(tmp_path: pathlib.Path, model_path: pathlib.Path) -> pathlib.Path:
    return save_encoder(tmp_path / "encoder", model_path, tiny_llama_model().config)


class Served(nn.Module):
    """As much of SGLang's model as an encoder needs: layers that only tell what they get."""

    def __init__(self, hf: Any):
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(Layer() for _ in range(2))
        self.embedding = nn.Embedding.from_pretrained(hf.get_input_embeddings().weight.detach())

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding


class Layer(nn.Module):
    def forward(
        self, positions: Any, hidden_states: torch.Tensor, forward_batch: Any, more: Any = None
    ) -> torch.Tensor:
        return hidden_states


class ByName(nn.Module):
    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return hidden_states


def beside(model_path: pathlib.Path, encoder: pathlib.Path) -> tuple[Served, BesideModel]:
    hf = tiny_llama_model()
    model = Served(hf)
    return model, BesideModel(model, hf.config, str(encoder), str(model_path))


def stream(state: str, tokens: int) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """A batch, what a layer is given, and the residual stream that this stands for."""
    batch = SimpleNamespace(rids=["a", "b"], residual_stream=None)
    residual.start(batch)
    output = torch.randn(tokens, 64)
    if state == "initial":
        return batch, output, output.clone()
    if state == "written":
        residual.set_written(output, batch)
        return batch, output, output.clone()
    held = torch.randn(tokens, 64)
    batch.residual_stream.write(held)
    batch.residual_stream.record(output, PLAIN_ADD)
    return batch, output, output + held


@pytest.mark.parametrize("state", ["initial", "written", "pending"])
@pytest.mark.parametrize("by_name", [False, True])
def test_a_block_adds_to_rows_with_documents_alone(
    state: str, by_name: bool, model_path: pathlib.Path, encoder: pathlib.Path
) -> None:
    _, pic = beside(model_path, encoder)
    (kv,) = pic.encode([[1, 2, 3, 4, 5]])
    batch, output, before = stream(state, 7)
    step = make_step([None, {"d": kv}], [3, 4], "cpu")
    steps = Steps()
    steps.set(["a", "b"], step)
    block: CrossBlock = pic.modules.cross[1]
    layer = ByName() if by_name else Layer()
    layer.register_forward_pre_hook(Crossing(1, block, layer, steps), with_kwargs=True)
    kept = output.clone()
    with torch.no_grad():
        if by_name:
            made = layer(positions=None, hidden_states=output, forward_batch=batch, other=None)
        else:
            made = layer(None, output, batch, more=None)
        # It is the stream's own still.
        after = residual.snapshot(made, batch)
        expected = block(before[3:], lambda queries: step.attend(queries, 1))
    assert torch.equal(made[:3], kept[:3])
    torch.testing.assert_close(after[3:], expected, atol=1e-5, rtol=1e-5)
    assert (expected - before[3:]).abs().max() > 0.01


def test_a_batch_without_documents_is_left_alone(
    model_path: pathlib.Path, encoder: pathlib.Path
) -> None:
    model, _ = beside(model_path, encoder)
    batch, output, _ = stream("pending", 4)
    kept = output.clone()
    for layer in model.model.layers:
        assert layer(None, output, batch) is output
    assert torch.equal(output, kept)


def test_closed_gates_change_no_bit(tmp_path: pathlib.Path, model_path: pathlib.Path) -> None:
    closed = save_encoder(tmp_path, model_path, tiny_llama_model().config, gate=0.0)
    model, pic = beside(model_path, closed)
    (kv,) = pic.encode([[1, 2, 3]])
    batch, output, _ = stream("pending", 4)
    pic.steps.set(["a", "b"], make_step([{"d": kv}, {"d": kv}], [2, 2], "cpu"))
    kept = output.clone()
    with torch.no_grad():
        for layer in model.model.layers:
            assert torch.equal(layer(None, output, batch), kept)


def test_documents_are_encoded_apart(model_path: pathlib.Path, encoder: pathlib.Path) -> None:
    _, pic = beside(model_path, encoder)
    documents = [[1, 2, 3], list(range(40)), [7]]
    together = pic.encode(documents)
    for ids, kv in zip(documents, together, strict=True):
        (alone,) = pic.encode([ids])
        assert kv.k.shape == kv.v.shape == (2, len(ids), 2, 16)
        assert kv.k.is_contiguous() and kv.k.untyped_storage().size() == kv.k.nbytes
        for one, other in zip(kv, alone, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    assert isinstance(together[0], EncoderKV)
    assert pic.bytes_per_token == together[0].k[:, 0].nbytes * 2
    assert pic.config.max_tokens == MAX_TOKENS


def test_an_encoder_is_named_by_its_weights(encoder: pathlib.Path) -> None:
    before = digest_of(encoder)
    assert digest_of(encoder) == before
    tensors = load_file(encoder / weights.FILE)
    tensors["cross.0.mlp_gate"] += 1
    save_file(tensors, encoder / weights.FILE)
    assert digest_of(encoder) != before


# -- what ends a start ----------------------------------------------------------------


def broken(encoder: pathlib.Path, how: str) -> str:
    """Break it; what is said of that."""
    if how == "no files":
        (encoder / "encoder.json").unlink()
        return "cannot read"
    if how == "no weights":
        (encoder / weights.FILE).unlink()
        return "cannot read"
    tensors = load_file(encoder / weights.FILE)
    if how == "lacks":
        del tensors["cross.1.q_proj.weight"]
        said = "lacks cross.1.q_proj.weight"
    else:
        tensors["cross.1.q_proj.weight"] = torch.zeros(3, 3)
        said = "cross.1.q_proj.weight"
    save_file(tensors, encoder / weights.FILE)
    return said


@pytest.mark.parametrize("how", ["no files", "no weights", "lacks", "shape"])
def test_what_is_no_encoder_ends_the_start(
    how: str,
    model_path: pathlib.Path,
    encoder: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    said = broken(encoder, how)
    with pytest.raises(SystemExit):
        main(["--model-path", str(model_path), f"--pic-encoder={encoder}"])
    told = capsys.readouterr().err
    assert "--pic-encoder" in told and said in told
    with pytest.raises(PicConfigError, match=said.partition(" ")[0]):
        beside(model_path, encoder)


def test_another_models_encoder_ends_the_start(
    tmp_path: pathlib.Path, encoder: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tiny_llama(tmp_path, seed=1)
    with pytest.raises(SystemExit):
        main(["--model-path", str(other), f"--pic-encoder={encoder}"])
    assert "trained for another model, whose fingerprint is" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tp_size": 2, "enable_layernorm_sp": True}, "--enable-layernorm-sp"),
        ({"tp_size": 2, "moe_dense_tp_size": 1}, "--moe-dense-tp-size 1"),
        ({"dp_size": 2}, "data parallelism"),
        ({"speculative_algorithm": "NGRAM"}, "speculative decoding"),
        ({"enable_torch_compile": True}, "--enable-torch-compile"),
        ({"mla": True}, "latent attention"),
        ({"model": object()}, "object is not wired"),
    ],
)
def test_servers_that_cannot_have_one_do_not_start(change: dict[str, Any], said: str) -> None:
    args = {
        "tp_size": 1,
        "dp_size": 1,
        "speculative_algorithm": None,
        "enable_torch_compile": False,
        "enable_layernorm_sp": False,
        "moe_dense_tp_size": None,
    }
    change = dict(change)
    mla, model = change.pop("mla", False), change.pop("model", SimpleNamespace(pic=object()))
    ctx: Any = SimpleNamespace(server_args=SimpleNamespace(**args | change))
    runner = SimpleNamespace(model=model, use_mla_backend=mla)
    forest: Any = SimpleNamespace(config=PicConfig())
    with pytest.raises(PicConfigError, match=f"--pic-encoder: {said}"):
        build._encoded(ctx, runner, forest)
