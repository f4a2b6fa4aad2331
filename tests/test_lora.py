"""Links of requests with adapters, on a CPU: each adapter is a model of its own."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import CHECKS, serve
from linking import VOCAB, assemble, body, check_exact, check_linked, fresh_salt, ids_of
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sglang_pic.adapt.lora import Adapter, Shape
from sglang_pic.eval.models.tiny import tiny_llama, tiny_llama_model
from sglang_pic.eval.serving import Server

pytestmark = pytest.mark.server

RANK, ALPHA = 4, 8
ADAPTERS = {"a": 1, "b": 2}
LEARNT = "learnt"
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")
DOCUMENT = "The ferry leaves from the stone pier at seven in the morning. "
CHAT = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


def deltas(seed: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A and B by the name of the module that they change."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, module in tiny_llama_model().named_modules():
        if name.rsplit(".", 1)[-1] in MODULES:
            out, into = module.weight.shape
            shapes = (RANK, into), (out, RANK)
            a, b = (torch.randn(shape, generator=generator) * 0.2 for shape in shapes)
            made[name] = a, b
    return made


def save_adapter(folder: pathlib.Path, seed: int) -> pathlib.Path:
    folder.mkdir()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": list(MODULES),
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = {}
    for name, (a, b) in deltas(seed).items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = a
        tensors[f"base_model.model.{name}.lora_B.weight"] = b
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def learnt() -> Adapter:
    """One of ``sglang_pic.adapt``, of all its layers."""
    adapter = Adapter(tiny_llama_model(), Shape(RANK, ALPHA))
    generator = torch.Generator().manual_seed(3)
    for _, b in adapter.factors.values():
        b.data.normal_(std=0.2, generator=generator)
    return adapter


def merged(adapter: str | None) -> Any:
    """The tiny model with an adapter's change in its weights."""
    model = tiny_llama_model()
    if adapter is None:
        return model
    changes = learnt().factors if adapter == LEARNT else deltas(ADAPTERS[adapter])
    with torch.no_grad():
        for name, (a, b) in changes.items():
            model.get_submodule(name).weight += ALPHA / RANK * b @ a
    return model


def save_tokenizer(folder: pathlib.Path) -> None:
    """One token a byte."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=CHAT)
    made.save_pretrained(folder)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, logs: pathlib.Path) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("lora")
    model = tiny_llama(folder)
    save_tokenizer(model)
    paths = [f"{name}={save_adapter(folder / name, seed)}" for name, seed in ADAPTERS.items()]
    learnt().save(folder / LEARNT, "tiny")
    paths.append(f"{LEARNT}={folder / LEARNT}")
    flags = ("--pic-min-segment=1", "--max-total-tokens=8192", "--served-model-name=tiny")
    flags += ("--pic-company-when=asked", "--pic-cold=link")
    # No backend is named: the default, which is made of Triton kernels, gives way.
    args = (*flags, "--enable-lora", "--lora-paths", *paths)
    with serve(model, logs / "lora.log", *args, env=CHECKS) as running:
        yield running


def test_every_adapter_links_as_its_own_model(server: Server) -> None:
    """In one namespace, over the same segments: nothing of one is used by another."""
    prompt = assemble(
        [("text", [7]), *(("segment", ids_of(700 + i, 60 + i)) for i in range(3)), ("text", [9])]
    )
    salt = fresh_salt()
    seen: dict[str, str | None] = {}
    for adapter in ("a", None, "b", LEARNT):
        model = merged(adapter)
        request = {**body(*prompt, 6, salt, seam=4), "lora_path": adapter}
        # The opening of one token counts: here no segment is too short.
        for compiled in (1 + 60 + 61 + 62, 0):
            answer = server.generate(**request)
            report = answer["meta_info"]["pic"]
            assert report["tokens_compiled"] == compiled
            check_linked(answer, *prompt, seam=4, page=1, n_new=6, of=model)
        for segment in report["segments"]:
            assert seen.setdefault(segment["id"], adapter) == adapter
        exact = {**body(*prompt, 6, salt, require_exact=True), "lora_path": adapter}
        check_exact(server.generate(**exact), prompt[0], 6, of=model)
        full = {**body(*prompt, 6, salt, policy="full"), "lora_path": adapter}
        check_exact(server.generate(**full), prompt[0], 6, of=model)
    assert len(seen) == 12
    server.forest()


def test_adapters_decode_together(server: Server) -> None:
    """Rows of both adapters and of none in one batch."""
    prompt = assemble([("text", [8]), ("segment", ids_of(710, 80)), ("text", [3])])
    adapters = ["a", "b", None, LEARNT]
    one = body(*prompt, 12, fresh_salt(), seam=4)
    count = len(adapters)
    batch = {
        **one,
        "input_ids": [prompt[0]] * count,
        "pic": [one["pic"]] * count,
        "cache_salt": [one["cache_salt"]] * count,
        "token_ids_logprob": [list(range(VOCAB))] * count,
        "lora_path": adapters,
    }
    for adapter, answer in zip(adapters, server.generate(**batch), strict=True):
        check_linked(answer, *prompt, seam=4, page=1, n_new=12, of=merged(adapter))


def test_adapters_over_the_openai_routes(server: Server) -> None:
    """The same text by completion, chat and ``/generate``; each adapter has its own."""
    greedy = {"temperature": 0, "max_tokens": 12}
    parts = ["Read.\n", {"segment": DOCUMENT}, "\nWhen?"]
    messages = [
        {"role": "user", "content": [{"type": "text", "text": DOCUMENT, "pic_segment": True}]},
        {"role": "user", "content": "When?"},
    ]
    said: dict[str, set[str]] = {"completion": set(), "chat": set()}
    for adapter in ADAPTERS:
        salt = fresh_salt()
        asked = {"model": f"tiny:{adapter}", "cache_salt": salt, **greedy}
        completed = server.post(
            "/v1/completions", {**asked, "prompt": "", "pic": {"parts": parts, "seam": 4}}
        ).json()
        assert "usage" in completed, completed
        assert completed["usage"]["pic"]["segments"][0]["reason"] == "hit", completed
        generated = server.generate(
            pic={"parts": parts, "seam": 4},
            cache_salt=salt,
            lora_path=adapter,
            sampling_params={"temperature": 0, "max_new_tokens": 12},
        )
        assert generated["meta_info"]["pic"]["tokens_compiled"] == 0
        assert completed["choices"][0]["text"] == generated["text"]
        said["completion"].add(generated["text"])
        answers = []
        # The exact one last: its prompt is a prefix for whoever comes behind it.
        for options in ({"seam": 4}, {"policy": "full"}, {"require_exact": True}):
            body = {**asked, "messages": messages, "pic": options}
            answers.append(server.post("/v1/chat/completions", body).json())
        linked, *others = answers
        assert linked["usage"]["pic"]["exactness"] == "composed", linked
        assert linked["usage"]["pic"]["segments"][0]["reason"] == "hit"
        full, exact = (answer["choices"][0]["message"]["content"] for answer in others)
        assert full == exact
        said["chat"].add(exact)
    assert len(said["completion"]) == len(said["chat"]) == 2
