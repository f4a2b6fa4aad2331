"""The compile context, on a server started by plain ``sglang serve``."""

from __future__ import annotations

import json
import pathlib
import sys
from collections.abc import Iterator

import pytest
from conftest import CHECKS, TINY, serve
from linking import assemble, body, check_linked, fresh_salt, ids_of

from sglang_pic.eval.serving import Server

pytestmark = pytest.mark.server

PAGE = 4
GIVEN = ids_of(500, 22)
CONTEXT = GIVEN[:20]  # whole pages of it


@pytest.fixture(scope="module")
def contextual(tiny_path: pathlib.Path, logs: pathlib.Path) -> Iterator[Server]:
    config = {"compile_context": GIVEN, "min_segment": 1, "cold": "link"}
    args = [arg for arg in TINY if not arg.startswith("--pic")]
    args += ["--radix-cache-backend=pic", f"--page-size={PAGE}"]
    env = {**CHECKS, "SGLANG_PIC_CONFIG": json.dumps(config)}
    command = (str(pathlib.Path(sys.executable).with_name("sglang")), "serve")
    with serve(tiny_path, logs / "context.log", *args, command=command, env=env) as server:
        yield server


def test_info_tells_the_settings(contextual: Server) -> None:
    info = contextual.get("/pic/info").json()
    assert info["config"]["compile_context"] == CONTEXT


@pytest.mark.parametrize("seam", [0, 3, 9])
@pytest.mark.parametrize("opening", [[], [5, 6], CONTEXT, ids_of(501, 33)])
def test_linking_behind_a_context(contextual: Server, seam: int, opening: list[int]) -> None:
    """Also where a segment's offset is negative, and where the context itself opens."""
    a, b = ids_of(502, 45), ids_of(503, 30)
    ids, segments = assemble(
        [("text", opening), ("segment", a), ("text", [8]), ("segment", b), ("text", [9])]
    )
    for _ in range(2):
        answer = contextual.generate(**body(ids, segments, 4, fresh_salt(), seam=seam))
        check_linked(answer, ids, segments, seam=seam, page=PAGE, n_new=4, context=CONTEXT)


def test_behind_the_context_itself_a_segment_is_exact(contextual: Server) -> None:
    ids, segments = assemble([("text", CONTEXT), ("segment", ids_of(504, 41)), ("text", [9])])
    report = contextual.generate(**body(ids, segments, 1, fresh_salt()))["meta_info"]["pic"]
    assert report["exactness"] == "exact"
    assert report["tokens_reused"] == 60
