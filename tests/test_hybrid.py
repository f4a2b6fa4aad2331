"""Linked generation of hybrid models on real servers, against the oracle."""

from __future__ import annotations

import functools
import itertools
import pathlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import hybrid_oracle
import oracle
import pytest
from conftest import CHECKS, TINY, serve
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from linking import TOLERANCE, assemble, body, distributions, fresh_salt, ids_of
from tiny_models import tiny_hybrid, tiny_hybrid_model

from sglang_pic.eval.serving import Server

pytestmark = pytest.mark.server

CONTEXT = ids_of(99, 8)
KINDS = {"page1": "qwen3_5", "page16": "qwen3_next"}


@functools.cache
def model(kind: str) -> Any:
    return tiny_hybrid_model(kind)


@pytest.fixture(scope="module")
def hybrid1(tmp_path_factory: pytest.TempPathFactory, logs: pathlib.Path) -> Iterator[Server]:
    """Qwen3.5, page size 1, SGLang's states at the end of sequences."""
    path = tiny_hybrid(tmp_path_factory.mktemp("hybrid"), "qwen3_5")
    plain = ("--page-size=1", "--mamba-radix-cache-strategy=no_buffer")
    args = (*TINY, *plain, "--disable-overlap-schedule")
    with serve(path, logs / "hybrid1.log", *args, env=CHECKS) as server:
        yield server


@pytest.fixture(scope="module")
def hybrid16(tmp_path_factory: pytest.TempPathFactory, logs: pathlib.Path) -> Iterator[Server]:
    """Qwen3-Next, page size 16, short chunks, mixed chunks, overlap scheduling,
    SGLang's states on its grid of 64 tokens, requests retracted by force."""
    path = tiny_hybrid(tmp_path_factory.mktemp("hybrid"), "qwen3_next")
    hard = ("--page-size=16", "--chunked-prefill-size=64", "--enable-mixed-chunk")
    env = {**CHECKS, "SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "7"}
    with serve(path, logs / "hybrid16.log", *TINY, *hard, env=env) as server:
        yield server


@pytest.fixture(params=[1, 16])
def paged(request: pytest.FixtureRequest) -> tuple[Server, int]:
    """Each server with its page size."""
    return request.getfixturevalue(f"hybrid{request.param}"), request.param


def check_linked(
    answer: dict[str, Any],
    ids: list[int],
    segments: Sequence[tuple[int, int]],
    *,
    seam: int,
    page: int,
    policy: str = "seam",
    state: str = "compose",
) -> None:
    """The answer is the oracle's, and exactly the tokens of the formula were reused."""
    planned = oracle.layout(len(ids), segments, seam=seam, page=page, policy=policy, prompt_ids=ids)
    report = answer["meta_info"]["pic"]
    assert report["tokens_reused"] - report["prefix_tokens"] == planned.n_reused, report
    chosen = answer["output_ids"]
    expected = hybrid_oracle.linked_logprobs(
        model(KINDS[f"page{page}"]),
        ids,
        segments,
        seam=seam,
        page=page,
        policy=policy,
        state=state,
        forced=chosen,
    )
    worst = (distributions(answer) - expected).abs().max().item()
    assert worst < TOLERANCE, f"log-probabilities differ by {worst}"
    regret = expected.max(-1).values - expected[range(len(chosen)), chosen]
    assert regret.max() < TOLERANCE


def check_exact(answer: dict[str, Any], ids: list[int], page: int) -> None:
    """The answer is the plain model's."""
    expected = oracle.full_logprobs(
        model(KINDS[f"page{page}"]),
        ids,
        len(answer["output_ids"]),
        forced=answer["output_ids"],
    )
    assert (distributions(answer) - expected.full_logprobs).abs().max() < TOLERANCE


lengths = st.one_of(st.integers(1, 6), st.sampled_from([15, 16, 17, 31, 33, 64, 65, 90]))
part = st.tuples(st.sampled_from(["segment", "segment", "text"]), st.integers(0, 3), lengths)
layouts = st.lists(part, min_size=1, max_size=6)


@settings(
    max_examples=30,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
@given(
    parts=layouts,
    seam=st.sampled_from([0, 1, 3, 4, 16]),
    policy=st.sampled_from(["seam", "seam", "seam", "none", "full"]),
    state=st.sampled_from(["compose", "compose", "last"]),
)
def test_any_layout_matches_the_oracle(
    paged: tuple[Server, int],
    parts: list[tuple[str, int, int]],
    seam: int,
    policy: str,
    state: str,
) -> None:
    server, page = paged
    ids, segments = assemble([(kind, ids_of(seed, n)) for kind, seed, n in parts])
    salt = fresh_salt()
    pic = {"seam": seam, "policy": policy, "state": state}
    cold = server.generate(**body(ids, segments, 3, salt, **pic))
    warm = server.generate(**body(ids, segments, 3, salt, **pic))
    planned = oracle.layout(len(ids), segments, seam=seam, page=page, policy=policy, prompt_ids=ids)
    for answer in (cold, warm):
        if planned.n_reused:
            check_linked(answer, ids, segments, page=page, **pic)
        else:
            assert answer["meta_info"]["pic"]["exactness"] == "exact"
            check_exact(answer, ids, page)


def test_concurrent_requests_of_every_kind(paged: tuple[Server, int]) -> None:
    """Linked, compiling, relocated, unlinked and ordinary rows share batches."""
    server, page = paged
    documents = [ids_of(20 + i, 40 + 19 * i) for i in range(4)]
    salt = fresh_salt()
    jobs = []
    for order in itertools.islice(itertools.permutations(range(4)), 0, 24, 3):
        parts = [("segment", documents[i]) for i in order]
        ids, segments = assemble([*parts, ("text", ids_of(sum(order) + order[0], 7))])
        for pic in ({}, {"mode": "relocate"}, {"state": "last"}):
            jobs.append((ids, segments, pic, salt))
        jobs.append((ids, segments, {"link": False}, f"{salt}-unlinked"))
    with ThreadPoolExecutor(12) as pool:
        answers = list(
            pool.map(
                lambda job: server.generate(**body(job[0], job[1], 12, job[3], seam=5, **job[2])),
                jobs,
            )
        )
    for (ids, segments, pic, _), answer in zip(jobs, answers, strict=True):
        if pic.get("link") is False:
            check_exact(answer, ids, page)
        else:
            state = pic.get("state", "compose")
            check_linked(answer, ids, segments, seam=5, page=page, state=state)
    if page == 16:
        assert any(answer["meta_info"]["num_retractions"] for answer in answers)
