"""Two of our servers behind SGLang's own router."""

from __future__ import annotations

import contextlib
import json
import pathlib
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
import requests
from conftest import CHECKS, serve
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from sglang_pic import cli, doctor
from sglang_pic.client import through_gateway
from sglang_pic.eval.models.smollm2 import ensure_model
from sglang_pic.eval.serving import Server, free_port
from sglang_pic.route import HEADER, NoWorkerError, choose

# Its command line does not offer this policy, the router behind it does.
START = """
import json, sys
from sglang_router.router import Router
from sglang_router.router_args import RouterArgs
Router.from_args(RouterArgs(**json.loads(sys.argv[1]))).start()
"""


@contextlib.contextmanager
def routing(log: pathlib.Path, urls: list[str]) -> Iterator[str]:
    """Address of a router before these workers, which it knows."""
    port = free_port()
    settings = {
        "host": "127.0.0.1",
        "port": port,
        "prometheus_port": free_port(),
        "worker_urls": urls,
        "policy": "consistent_hashing",
    }
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-c", START, json.dumps(settings)], stdout=out, stderr=out
        )
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            with contextlib.suppress(requests.RequestException, ValueError, KeyError):
                workers = requests.get(f"{url}/workers", timeout=5).json()["workers"]
                if len(workers) == len(urls) and all(one["is_healthy"] for one in workers):
                    break
            assert process.poll() is None, log.read_text()
            time.sleep(0.2)
        else:
            raise AssertionError(log.read_text())
        yield url
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A random small Llama that speaks SmolLM2's tokens."""
    path = tmp_path_factory.mktemp("chatty")
    tokenizer = AutoTokenizer.from_pretrained(ensure_model())
    tokenizer.save_pretrained(path)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return path


Pair = tuple[str, list[Server]]


@pytest.fixture(scope="module")
def pair(
    chatty: pathlib.Path, logs: pathlib.Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pair]:
    """A router and its two workers, which share a store and ask each other for compiles."""
    store = tmp_path_factory.mktemp("store")
    ports = [free_port(), free_port()]
    args = ("--max-total-tokens=8192", f"--pic-store={store}", "--pic-store-when=always")
    args = (*args, f"--pic-peers=http://127.0.0.1:{ports[0]},http://127.0.0.1:{ports[1]}")
    with contextlib.ExitStack() as stack:
        workers = [
            stack.enter_context(
                serve(chatty, logs / f"routed{i}.log", *args, env=CHECKS, port=ports[i])
            )
            for i in range(2)
        ]
        yield (
            stack.enter_context(routing(logs / "router.log", [one.url for one in workers])),
            workers,
        )


def chat(*documents: str, salt: str) -> dict[str, Any]:
    parts = [{"type": "text", "text": text, "pic_segment": True} for text in documents]
    return through_gateway(
        {
            "model": "default",
            "messages": [
                {"role": "user", "content": [*parts, {"type": "text", "text": "Which one?"}]}
            ],
            "cache_salt": salt,
            "max_tokens": 2,
            "temperature": 0,
        }
    )


def documents(count: int, name: str) -> list[str]:
    return [
        f"{name} {i}: " + f"the {name} of house {i} stands by the river. " * 12
        for i in range(count)
    ]


def ask(router: str, body: dict[str, Any], **headers: str) -> dict[str, Any]:
    response = requests.post(
        f"{router}/v1/chat/completions", json=body, headers=headers, timeout=120
    )
    assert response.status_code == 200, response.text
    report: dict[str, Any] = response.json()["usage"]["pic"]
    return report


@pytest.mark.server
def test_the_doctor_finds_that_it_links(pair: Pair, tmp_path: pathlib.Path) -> None:
    router, _ = pair
    cli.main(["doctor", router, "--json", str(tmp_path / "found.json")])
    told = json.loads((tmp_path / "found.json").read_text())["findings"]
    found = {one["about"]: one["state"] for one in told}
    assert found["chat, metadata"] == found["chat, chat_template_kwargs"] == doctor.GOOD
    assert found["chat, pic_segment in the messages"] == doctor.BAD


@pytest.mark.server
def test_a_worker_is_chosen_by_what_it_holds(pair: Pair) -> None:
    router, workers = pair
    order = requests.get(f"{router}/workers", timeout=5).json()["workers"]
    for name, worker in (("barn", workers[0]), ("mill", workers[1])):
        body = chat(*documents(3, name), salt=name)
        for _ in range(2):
            response = worker.post("/v1/chat/completions", body)
            assert response.status_code == 200, response.text
        time.sleep(0.5)
        choice = choose(router, body)
        assert choice.url == worker.url == order[choice.index]["url"]
        assert choice.reused > 0
        # The router takes it, and it has what it said.
        before = worker.get("/pic/stats").json()["front"]["answers"]
        report = ask(router, body, **choice.headers)
        assert report["tokens_compiled"] == 0 and report["tokens_reused"] >= choice.reused
        assert worker.get("/pic/stats").json()["front"]["answers"] != before


@pytest.mark.server
def test_a_cold_prompt_behind_the_router_is_compiled_by_both(pair: Pair) -> None:
    router, workers = pair
    before = lent(workers)
    report = ask(router, chat(*documents(4, "lighthouse"), salt="cold"), **{HEADER: "0"})
    sources = [one["source"] for one in report["waited_for"] if one["segment"] is not None]
    assert "peer" in sources and "computed" in sources
    assert lent(workers) - before == sources.count("peer")


def lent(workers: list[Server]) -> int:
    """Segments that they have compiled for each other."""
    return sum(one.get("/pic/stats").json()["front"]["lent"] for one in workers)


@pytest.mark.server
def test_salts_that_pass_the_router_keep_tenants_apart(pair: Pair) -> None:
    router, _ = pair
    shared = documents(2, "granary")
    for salt in ("tenant-a", "tenant-b"):
        report = ask(router, chat(*shared, salt=salt))
        assert report["reason"] == "first_time" or report["tokens_compiled"] > 0
    response = requests.post(
        f"{router}/v1/chat/completions", json={**chat(*shared, salt="x"), "metadata": {"pic": "{"}},
        timeout=60,
    )  # fmt: skip
    assert response.status_code == 400 and "metadata.pic" in response.text


def test_what_lists_no_workers_is_said(tmp_path: pathlib.Path) -> None:
    with pytest.raises(NoWorkerError):
        choose("http://127.0.0.1:9", {"text": "x"})
    body = tmp_path / "body.json"
    body.write_text("[1]")
    for address in ("http://127.0.0.1:9", "nonsense"):
        with pytest.raises(SystemExit, match="sglang-pic route"):
            cli.main(["route", address, "--file", str(body)])
    body.write_text('{"text": "x"}')
    with pytest.raises(SystemExit, match="sglang-pic route"):
        cli.main(["route", "http://127.0.0.1:9", "--file", str(body)])
