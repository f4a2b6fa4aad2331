"""SGLang's ``triton`` backend with our rows beside it, interpreted, on a real server."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import CHECKS, TINY, serve
from families import FAMILIES
from linking import assemble, body, check_exact, check_linked, fresh_salt, ids_of

from sglang_pic.eval.serving import Server

pytestmark = pytest.mark.server


@pytest.fixture(scope="module", params=[16])
def interpreted(
    request: pytest.FixtureRequest, tiny_path: pathlib.Path, logs: pathlib.Path
) -> Iterator[tuple[Server, int]]:
    page = request.param
    args = ("--attention-backend=triton", f"--page-size={page}", "--chunked-prefill-size=64")
    with serve(
        tiny_path, logs / f"triton{page}.log", *TINY, *args, "--enable-mixed-chunk",
        env={**CHECKS, "TRITON_INTERPRET": "1"},
    ) as server:  # fmt: skip
        yield server, page


def test_it_links(interpreted: tuple[Server, int]) -> None:
    server, page = interpreted
    assert server.forest()["refusal"] is None
    parts = [ids_of(10, 40), ids_of(11, 33), ids_of(10, 40), ids_of(12, 1)]
    ids, segments = assemble([*(("segment", part) for part in parts), ("text", ids_of(13, 5))])
    for pic in ({}, {"mode": "relocate"}):
        answer = server.generate(**body(ids, segments, 4, fresh_salt(), seam=5, **pic))
        check_linked(answer, ids, segments, seam=5, page=page, n_new=4)
    exact = server.generate(**body(ids, segments, 3, fresh_salt(), require_exact=True))
    check_exact(exact, ids, 3)


def test_ordinary_and_linked_rows_share_batches(interpreted: tuple[Server, int]) -> None:
    """Also spans between rows, so that decode reads them once."""
    server, page = interpreted
    documents = [ids_of(20 + i, 36 + 5 * i) for i in range(3)]
    salt = fresh_salt()
    jobs = []
    for order in ((0, 1, 2), (2, 0, 1), (1, 2)):
        parts = [("segment", documents[i]) for i in order]
        ids, segments = assemble([*parts, ("text", ids_of(order[0], 7))])
        jobs += [(ids, segments, {}, salt), (ids, segments, {"link": False}, f"{salt}-alone")]
        jobs.append((ids, segments, {"require_exact": True}, f"{salt}-exact"))
    with ThreadPoolExecutor(len(jobs)) as pool:
        answers = list(
            pool.map(
                lambda job: server.generate(**body(job[0], job[1], 8, job[3], seam=5, **job[2])),
                jobs,
            )
        )
    for (ids, segments, pic, _), answer in zip(jobs, answers, strict=True):
        if pic:
            check_exact(answer, ids, 8)
        else:
            check_linked(answer, ids, segments, seam=5, page=page, n_new=8)


@pytest.mark.long
def test_windows_link(tmp_path: pathlib.Path, logs: pathlib.Path) -> None:
    """Gemma 3: tables of both kinds of layer, for links, chunks and rows that decode."""
    family = FAMILIES["gemma3"]
    args = ("--attention-backend=triton", "--page-size=16", "--chunked-prefill-size=64")
    with serve(
        family.save(tmp_path), logs / "triton_windows.log", *TINY, *args,
        env={**CHECKS, "TRITON_INTERPRET": "1"},
    ) as server:  # fmt: skip
        assert server.forest()["refusal"] is None
        parts = [ids_of(10, 40), ids_of(11, 70), ids_of(10, 40), ids_of(12, 1)]
        ids, segments = assemble([*(("segment", part) for part in parts), ("text", ids_of(13, 5))])
        for pic in ({}, {"mode": "relocate"}):
            answer = server.generate(**body(ids, segments, 4, fresh_salt(), seam=5, **pic))
            check_linked(answer, ids, segments, seam=5, page=16, n_new=4, of=family.model())
        # SGLang's own decode there sees one key less than the model's window holds.
        exact = server.generate(**body(ids, segments, 1, fresh_salt(), require_exact=True))
        check_exact(exact, ids, 1, of=family.model())
