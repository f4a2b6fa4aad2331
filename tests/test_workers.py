"""Several tokenizer workers: each is a front of its own, over one cache."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests
from conftest import CHECKS, TINY, serve
from linking import assemble, body, check_exact, check_linked, fresh_salt, ids_of

from sglang_pic.eval.serving import Server

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def server(tiny_path: pathlib.Path, logs: pathlib.Path) -> Iterator[Server]:
    with serve(tiny_path, logs / "workers.log", *TINY, "--tokenizer-worker-num=2", env=CHECKS) as s:
        yield s


def test_every_worker_links(server: Server) -> None:
    """A connection a request, so that both are asked."""
    documents = [ids_of(20 + i, 40 + 19 * i) for i in range(4)]
    salt = fresh_salt()
    prompts = []
    for i in range(24):
        parts = [("segment", documents[(i + j) % 4]) for j in range(4)]
        prompts.append(assemble([*parts, ("text", ids_of(i, 7))]))
    with ThreadPoolExecutor(6) as pool:
        answers = list(
            pool.map(lambda one: server.generate(**body(*one, 3, salt, seam=4)), prompts)
        )
    for (ids, segments), answer in zip(prompts, answers, strict=True):
        check_linked(answer, ids, segments, seam=4, page=1, n_new=3)
    plain = {"input_ids": prompts[0][0], "sampling_params": {"max_new_tokens": 1}}
    assert "pic" not in server.generate(**plain)["meta_info"]
    exact = server.generate(**body(*prompts[0], 3, fresh_salt(), require_exact=True))
    check_exact(exact, prompts[0][0], 3)


def test_every_worker_has_our_routes(server: Server) -> None:
    for _ in range(12):
        assert server.get("/pic/info").json()["version"]
        assert server.forest()["integrity"] == "ok"
        refused = server.post("/generate", {"input_ids": [1], "pic": {"seam": -1}})
        assert refused.status_code == 400 and "pic" in refused.text


def test_a_worker_obeys_nobody_else(server: Server) -> None:
    action = {"action_id": "0", "action_type": "pic.command", "action_version": "1", "payload": {}}
    hints = {"protocol_version": "1", "message_id": "x", "actions": [action]}
    for _ in range(6):
        answer = requests.post(
            server.url + "/generate", json={"input_ids": [1], "kv_hints": hints}, timeout=60
        )
        assert answer.status_code in (400, 403)
