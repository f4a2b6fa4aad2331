"""SGLang's ``triton`` backend with our rows beside it, interpreted, on a real server."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import tiny_models
from conftest import CHECKS, TINY, serve
from families import FAMILIES
from linking import (
    TOLERANCE,
    assemble,
    body,
    check_exact,
    check_linked,
    distributions,
    fresh_salt,
    ids_of,
)
from tiny_models import tiny_mla, tiny_mla_model

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
    check_shared_batches(server, page)


def check_shared_batches(server: Server, page: int, of: Any = None) -> None:
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
            check_exact(answer, ids, 8, of=of)
        else:
            check_linked(answer, ids, segments, seam=5, page=page, n_new=8, of=of)


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


@pytest.mark.long
def test_latent_attention_links(tmp_path: pathlib.Path, logs: pathlib.Path) -> None:
    """Links, chunks and rows that decode, absorbed; ordinary rows as SGLang computes them."""
    model, page = tiny_mla_model("deepseek_v2_wide"), 16
    args = ("--attention-backend=triton", f"--page-size={page}", "--chunked-prefill-size=64")
    with serve(
        tiny_mla(tmp_path, "deepseek_v2_wide"), logs / "triton_latent.log", *TINY, *args,
        "--enable-mixed-chunk", env={**CHECKS, "TRITON_INTERPRET": "1"},
    ) as server:  # fmt: skip
        assert server.forest()["refusal"] is None
        parts = [ids_of(10, 40), ids_of(11, 70), ids_of(10, 40), ids_of(12, 1)]
        ids, segments = assemble([*(("segment", part) for part in parts), ("text", ids_of(13, 5))])
        for pic in ({}, {"mode": "relocate"}):
            answer = server.generate(**body(ids, segments, 4, fresh_salt(), seam=5, **pic))
            check_linked(answer, ids, segments, seam=5, page=page, n_new=4, of=model)
        # Computed in row order, on our attention from the first token on, and by SGLang.
        for pic in ({"require_exact": True}, {"link": False}):
            exact = server.generate(**body(ids, segments, 3, fresh_salt(), **pic))
            check_exact(exact, ids, 3, of=model)
        check_shared_batches(server, page, of=model)


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "config", "model"),
    [
        ("kimi", tiny_models._KIMI, tiny_models.tiny_kimi_model),
        ("ling", tiny_models._BAILING, tiny_models.tiny_bailing_model),
    ],
)
def test_latent_attention_links_beside_linear_layers(
    name: str,
    config: dict[str, Any],
    model: Callable[[], Any],
    tmp_path: pathlib.Path,
    logs: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Their full layers alone are interpreted; of linear ones a CPU has torch forms."""
    for size, value in {"kv_lora_rank": 256, "qk_rope_head_dim": 32}.items():
        monkeypatch.setitem(config, size, value)
    family = dataclasses.replace(FAMILIES[name], model=model)
    args = ("--attention-backend=triton", "--page-size=16", "--chunked-prefill-size=64")
    with serve(
        family.save(tmp_path), logs / f"triton_{name}.log", *TINY, *args,
        "--mamba-radix-cache-strategy=extra_buffer", env={**CHECKS, "TRITON_INTERPRET": "1"},
    ) as server:  # fmt: skip
        assert server.forest()["refusal"] is None
        parts = [ids_of(10, 40), ids_of(11, 70), ids_of(10, 40), ids_of(12, 1)]
        ids, segments = assemble([*(("segment", part) for part in parts), ("text", ids_of(13, 5))])
        where: dict[str, Any] = {"seam": 5, "state": "compose"}
        for pic in ({}, {"mode": "relocate"}):
            answer = server.generate(**body(ids, segments, 4, fresh_salt(), **where, **pic))
            assert answer["meta_info"]["pic"]["tokens_reused"] > 90
            chosen = answer["output_ids"]
            expected = family.linked(ids, segments, page=16, forced=chosen, **where)
            assert (distributions(answer) - expected).abs().max() < TOLERANCE
        exact = server.generate(**body(ids, segments, 3, fresh_salt(), require_exact=True))
        plain = family.plain(ids, exact["output_ids"])
        assert (distributions(exact) - plain).abs().max() < TOLERANCE
