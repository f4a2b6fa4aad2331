"""Links whose segments are not compiled: refused, late, or too long to be kept."""

from __future__ import annotations

import pathlib
import time
from collections.abc import Iterator
from concurrent import futures
from typing import Any

import faults
import pytest
import requests
from conftest import CHECKS, TINY, serve
from linking import TOLERANCE, assemble, body, check_exact, distributions, fresh_salt, ids_of

from sglang_pic.eval.serving import Server

pytestmark = pytest.mark.server

PATIENCE_S = 2
LIMITS = ("--pic-compile-timeout=1", f"--pic-compile-limit={PATIENCE_S}")
KEPT = 2048  # tokens of KV that one MiB holds in this model


@pytest.fixture(scope="module")
def server(
    tiny_path: pathlib.Path, logs: pathlib.Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    flags = (*TINY, *LIMITS, "--pic-kv-mib=1")
    fault = faults.environment(tmp_path_factory.mktemp("faults"), "compiles_fail_or_are_late")
    with serve(tiny_path, logs / "faults.log", *flags, env={**CHECKS, **fault}) as started:
        yield started


def _ask(server: Server, segment: list[int], salt: str) -> dict[str, Any]:
    """A prompt that no other begins like, over this segment and a compiled one."""
    sound = ids_of(7, 64)
    server.post("/pic/compile", {"input_ids": sound, "cache_salt": salt}).raise_for_status()
    prompt = assemble(
        [("text", ids_of(6, 9)), ("segment", segment), ("segment", sound), ("text", ids_of(2, 5))]
    )
    return server.generate(**body(*prompt, 3, salt, seam=4))


def _settle(server: Server) -> None:
    """Until nothing compiles."""
    for _ in range(100):
        if server.get("/pic/stats").json()["front"]["compiling"] == 0:
            return
        time.sleep(0.2)
    raise AssertionError("it compiles for ever")


def _waits(server: Server) -> dict[str, Any]:
    """A request whose segment is late, and that would generate for long."""
    prompt = assemble([("segment", [faults.LATE, *ids_of(14, 80)]), ("text", ids_of(2, 5))])
    sent = body(*prompt, 3000, fresh_salt(), seam=4)
    return {**sent, "token_ids_logprob": None, "return_logprob": False}


def _reasons(answer: dict[str, Any]) -> list[str]:
    return [segment["reason"] for segment in answer["meta_info"]["pic"]["segments"]]


def _exact(server: Server, segment: list[int], salt: str) -> None:
    """Alone, such a segment is computed: the answer is that of full recompute. What is
    compiled is the text that opens the prompt."""
    prompt = assemble([("text", ids_of(1, 9)), ("segment", segment), ("text", ids_of(2, 5))])
    answer = server.generate(**body(*prompt, 3, salt, seam=4))
    report = answer["meta_info"]["pic"]
    assert _reasons(answer) == ["not_compiled"]
    assert (report["exactness"], report["tokens_compiled"]) == ("exact", 9)
    full = server.generate(**body(*prompt, 3, fresh_salt(), require_exact=True))
    assert answer["output_ids"] == full["output_ids"]
    assert (distributions(answer) - distributions(full)).abs().max() < TOLERANCE
    check_exact(answer, prompt[0], 3)


def test_a_compile_that_fails_leaves_an_exact_answer(server: Server) -> None:
    salt, segment = fresh_salt(), [faults.NEVER, *ids_of(3, 80)]
    _exact(server, segment, salt)
    # What can be linked beside it is.
    answer = _ask(server, segment, salt)
    assert _reasons(answer) == ["not_compiled", "hit"]
    assert "never compiles" in server.log.read_text()
    assert server.get("/pic/stats").json()["front"]["compile_failures"] >= 2
    assert server.forest()["live_plans"] == 0


def test_a_late_compile_is_not_waited_for_and_serves_the_next(server: Server) -> None:
    salt, segment = fresh_salt(), [faults.LATE, *ids_of(4, 80)]
    start = time.monotonic()
    _exact(server, segment, salt)
    assert PATIENCE_S <= time.monotonic() - start < faults.LATE_S
    assert server.get("/pic/stats").json()["front"]["compile_timeouts"] == 1
    _settle(server)
    answer = _ask(server, segment, salt)
    assert _reasons(answer) == ["hit", "hit"]
    assert answer["meta_info"]["pic"]["tokens_compiled"] == 9  # the text that opens it


def test_a_report_says_what_was_waited_for(server: Server) -> None:
    salt = fresh_salt()
    segments = [[faults.NEVER, *ids_of(15, 40)], ids_of(16, 40), [faults.LATE, *ids_of(17, 40)]]
    prompt = assemble([("text", ids_of(1, 9)), *(("segment", one) for one in segments)])
    report = server.generate(**body(*prompt, 1, salt, seam=4))["meta_info"]["pic"]
    told = {one["segment"]: one["outcome"] for one in report["waited_for"]}
    assert told == {None: "compiled", 0: "failed", 1: "compiled", 2: "late"}
    assert PATIENCE_S <= report["waited_s"] < faults.LATE_S
    assert report["tokens_compiled"] == 9 + 40
    assert [one["reason"] for one in report["segments"]] == ["not_compiled", "hit", "not_compiled"]
    _settle(server)


# -- aborted, and left, while segments compile --------------------------------------------


def _in_another_thread(server: Server, sent: dict[str, Any]) -> futures.Future[requests.Response]:
    pool = futures.ThreadPoolExecutor(1)
    made = pool.submit(server.post, "/generate", sent)
    time.sleep(0.5)
    assert not made.done()
    return made


def _check_aborted(answer: dict[str, Any]) -> None:
    """Stock's answer for a request that was aborted in the scheduler's queue."""
    meta = answer["meta_info"]
    assert meta["finish_reason"] == {"type": "abort", "message": "Abort in waiting queue"}
    assert (meta["completion_tokens"], answer["output_ids"]) == (0, [])


@pytest.mark.parametrize("how", [{"rid": "mine"}, {"abort_all": True}])
def test_an_abort_ends_what_waits_for_a_compile(server: Server, how: dict[str, Any]) -> None:
    sent = {**_waits(server), "rid": "mine"}
    answer = _in_another_thread(server, sent)
    # As in the scheduler's queue, its name is taken.
    again = server.post("/generate", {"input_ids": [1, 2, 3], "rid": "mine"})
    assert again.status_code == 400 and "Duplicate request ID" in again.text
    start = time.monotonic()
    assert server.post("/abort_request", how).status_code == 200
    _check_aborted(answer.result().json())
    assert time.monotonic() - start < 1
    # And free again.
    assert server.generate(input_ids=[1, 2, 3], rid="mine")["meta_info"]["id"] == "mine"
    _settle(server)


def test_an_abort_ends_each_stream_and_sample(server: Server) -> None:
    sent = {**_waits(server), "rid": "mine"}
    several = {"sampling_params": {**sent["sampling_params"], "n": 2}}
    answer = _in_another_thread(server, {**sent, **several})
    assert server.post("/abort_request", {"rid": "mine"}).status_code == 200
    samples = answer.result().json()
    assert len(samples) == 2
    for one in samples:
        _check_aborted(one)
    answer = _in_another_thread(server, {**sent, **several, "stream": True})
    assert server.post("/abort_request", {"abort_all": True}).status_code == 200
    events = [line for line in answer.result().text.split("\n\n") if line.startswith("data: {")]
    assert len(events) == 2 and all('"type":"abort"' in event for event in events)
    _settle(server)


def test_an_abort_ends_one_prompt_of_a_batch(server: Server) -> None:
    waits, salt = _waits(server), fresh_salt()
    batch = {
        "input_ids": [waits["input_ids"], ids_of(18, 20)],
        "pic": [waits["pic"], None],
        "cache_salt": [waits["cache_salt"], salt],
        "rid": ["one", "two"],
        "sampling_params": {"max_new_tokens": 4, "temperature": 0, "ignore_eos": True},
    }
    answer = _in_another_thread(server, batch)
    assert server.post("/abort_request", {"rid": "one"}).status_code == 200
    one, two = answer.result().json()
    _check_aborted(one)
    assert two["meta_info"]["id"] == "two" and len(two["output_ids"]) == 4
    _settle(server)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_costs_no_prefill(server: Server, stream: bool) -> None:
    sent = {**_waits(server), "stream": stream, "rid": "left"}
    before = server.get("/pic/stats").json()["front"]["answers"]
    # A stream has begun by then: requests has another name for leaving it.
    left = (requests.exceptions.ReadTimeout, requests.exceptions.ConnectionError)
    with pytest.raises(left, match="Read timed out"):
        requests.post(server.url + "/generate", json=sent, timeout=0.5)
    _settle(server)
    time.sleep(1)
    assert server.get("/pic/stats").json()["front"]["answers"] == before
    assert server.forest()["live_plans"] == 0
    assert server.generate(input_ids=[1, 2, 3], rid="left")["meta_info"]["id"] == "left"


def test_a_segment_larger_than_the_budget_is_computed(server: Server) -> None:
    salt, segment = fresh_salt(), ids_of(5, KEPT + 300)
    prompt = assemble([("text", ids_of(1, 9)), ("segment", segment), ("text", ids_of(2, 5))])
    answer = server.generate(**body(*prompt, 3, salt, seam=4))
    report = answer["meta_info"]["pic"]
    assert (report["exactness"], _reasons(answer)) == ("exact", ["not_compiled"])
    check_exact(answer, prompt[0], 3)
    refused = server.post("/pic/compile", {"input_ids": segment, "cache_salt": salt})
    assert refused.status_code == 507, refused.text
