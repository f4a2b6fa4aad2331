"""Links whose segments are not compiled: refused, late, or too long to be kept."""

from __future__ import annotations

import pathlib
import time
from collections.abc import Iterator
from typing import Any

import faults
import pytest
from conftest import CHECKS, TINY, serve
from linking import TOLERANCE, assemble, body, check_exact, distributions, fresh_salt, ids_of

from sglang_pic.eval.serving import Server

pytestmark = pytest.mark.server

PATIENCE_S = 2
KEPT = 2048  # tokens of KV that one MiB holds in this model


@pytest.fixture(scope="module")
def server(
    tiny_path: pathlib.Path, logs: pathlib.Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    flags = (*TINY, f"--pic-compile-timeout={PATIENCE_S}", "--pic-kv-mib=1")
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


def _reasons(answer: dict[str, Any]) -> list[str]:
    return [segment["reason"] for segment in answer["meta_info"]["pic"]["segments"]]


def _exact(server: Server, segment: list[int], salt: str) -> None:
    """Alone, such a segment is computed: the answer is that of full recompute."""
    prompt = assemble([("text", ids_of(1, 9)), ("segment", segment), ("text", ids_of(2, 5))])
    answer = server.generate(**body(*prompt, 3, salt, seam=4))
    report = answer["meta_info"]["pic"]
    assert _reasons(answer) == ["not_compiled"]
    assert (report["exactness"], report["tokens_compiled"]) == ("exact", 0)
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
    # The text that opens the prompt was in the same batch.
    assert server.get("/pic/stats").json()["front"]["compile_timeouts"] == 2
    for _ in range(100):
        if server.get("/pic/stats").json()["front"]["compiling"] == 0:
            break
        time.sleep(0.2)
    answer = _ask(server, segment, salt)
    assert _reasons(answer) == ["hit", "hit"]
    assert answer["meta_info"]["pic"]["tokens_compiled"] == 9  # the text that opens it


def test_a_segment_larger_than_the_budget_is_computed(server: Server) -> None:
    salt, segment = fresh_salt(), ids_of(5, KEPT + 300)
    prompt = assemble([("text", ids_of(1, 9)), ("segment", segment), ("text", ids_of(2, 5))])
    answer = server.generate(**body(*prompt, 3, salt, seam=4))
    report = answer["meta_info"]["pic"]
    assert (report["exactness"], _reasons(answer)) == ("exact", ["not_compiled"])
    check_exact(answer, prompt[0], 3)
    refused = server.post("/pic/compile", {"input_ids": segment, "cache_salt": salt})
    assert refused.status_code == 507, refused.text
