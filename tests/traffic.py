"""Random traffic against a server, and the accounting behind it."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import requests
from linking import assemble, body, ids_of

from sglang_pic.eval.serving import Server


def wait_idle(server: Server) -> dict[str, Any]:
    """The forest once nothing runs any more."""
    for _ in range(100):
        state = server.forest()
        if state["protected_tokens"] == 0 and state["live_plans"] == 0:
            return state
        time.sleep(0.2)
    raise AssertionError(f"requests hold pages or plans for ever: {state}")


def _one_random_request(server: Server, rng: random.Random, i: int) -> None:
    parts = [
        (rng.choice(["segment", "segment", "text"]), ids_of(rng.randrange(12), rng.randint(1, 90)))
        for _ in range(rng.randint(1, 5))
    ]
    options = {"mode": rng.choice(["share", "share", "relocate"]), "seam": rng.choice([0, 4, 20])}
    request = body(*assemble(parts), rng.randint(1, 24), rng.choice(["a", "b"]), **options)
    request["rid"] = f"traffic-{i}"  # no word that is looked for in the log
    del request["token_ids_logprob"], request["return_logprob"]
    fate = rng.random()
    if fate < 0.1:
        # Disconnect before or while the answer comes.
        with contextlib.suppress(requests.RequestException):
            server.post("/generate", request, timeout=rng.uniform(0.01, 0.2))
    elif fate < 0.2:
        threading.Timer(
            rng.uniform(0, 0.2), server.post, ("/abort_request", {"rid": request["rid"]})
        ).start()
        server.post("/generate", request)
    elif fate < 0.25:
        with requests.post(
            server.url + "/generate", json={**request, "stream": True}, stream=True, timeout=60
        ) as response:
            next(response.iter_lines(), None)  # and leave
    else:
        server.generate(**request)


def check_no_leak(server: Server, count: int) -> None:
    """After ``count`` requests of every kind and fate every token is accounted for."""
    total = wait_idle(server)
    capacity = total["available_tokens"] + total["evictable_tokens"]
    rng = random.Random(5)
    seeds = [random.Random(rng.random()) for _ in range(count)]
    with ThreadPoolExecutor(12) as pool:
        list(pool.map(lambda job: _one_random_request(server, job[1], job[0]), enumerate(seeds)))
    end = wait_idle(server)
    assert end["available_tokens"] + end["evictable_tokens"] == capacity
    kinds = ("segment", "company", "prefix")
    assert sum(end[f"{kind}_tokens"] for kind in kinds) == end["evictable_tokens"]
    assert server.post("/flush_cache", {}).status_code == 200
    flushed = wait_idle(server)
    assert flushed["available_tokens"] == capacity
    assert flushed["segments"] == []
    assert "leak" not in server.log.read_text().lower()
