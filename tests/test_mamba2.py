"""Linked generation of Mamba-2 hybrids on a real server, against the oracle."""

from __future__ import annotations

import functools
import itertools
import pathlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from conftest import CHECKS, TINY, serve
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from linking import TOLERANCE, assemble, body, distributions, fresh_salt, ids_of
from tiny_models import tiny_mamba2, tiny_mamba2_model

from sglang_pic.eval.oracle import dense, mamba2
from sglang_pic.eval.serving import Server

pytestmark = pytest.mark.server

KINDS = {1: "falcon_h1", 16: "granite"}
HARD = ("--page-size=16", "--chunked-prefill-size=64", "--enable-mixed-chunk")


@functools.cache
def model(page: int) -> Any:
    return tiny_mamba2_model(KINDS[page])


@pytest.fixture(scope="module")
def mamba1(tmp_path_factory: pytest.TempPathFactory, logs: pathlib.Path) -> Iterator[Server]:
    """Falcon-H1 (RoPE), page size 1, SGLang's states at the end of sequences."""
    path = tiny_mamba2(tmp_path_factory.mktemp("mamba2"), KINDS[1])
    plain = ("--page-size=1", "--mamba-radix-cache-strategy=no_buffer")
    args = (*TINY, *plain, "--disable-overlap-schedule")
    with serve(path, logs / "mamba1.log", *args, env=CHECKS) as server:
        yield server


@pytest.fixture(scope="module")
def mamba16(tmp_path_factory: pytest.TempPathFactory, logs: pathlib.Path) -> Iterator[Server]:
    """Granite 4 (no positions), page size 16, short chunks, mixed chunks, overlap
    scheduling, SGLang's states on its grid, requests retracted by force."""
    path = tiny_mamba2(tmp_path_factory.mktemp("mamba2"), KINDS[16])
    env = {**CHECKS, "SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "7"}
    args = (*TINY, *HARD, "--mamba-track-interval=64")
    with serve(path, logs / "mamba16.log", *args, env=env) as server:
        yield server


@pytest.fixture(params=[1, 16])
def paged(request: pytest.FixtureRequest) -> tuple[Server, int]:
    """Each server with its page size."""
    return request.getfixturevalue(f"mamba{request.param}"), request.param


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
    where = {"seam": seam, "page": page, "policy": policy}
    planned = dense.layout(len(ids), segments, whole=True, prompt_ids=ids, **where)
    report = answer["meta_info"]["pic"]
    reused = report["tokens_reused"] - report["prefix_tokens"] - report["turn_tokens"]
    assert reused == planned.n_reused, report
    chosen = answer["output_ids"]
    expected = mamba2.linked_logprobs(
        model(page), ids, segments, state=state, forced=chosen, **where
    )
    worst = (distributions(answer) - expected).abs().max().item()
    assert worst < TOLERANCE, f"log-probabilities differ by {worst}"
    regret = expected.max(-1).values - expected[range(len(chosen)), chosen]
    assert regret.max() < TOLERANCE


def check_exact(answer: dict[str, Any], ids: list[int], page: int) -> None:
    """The answer is the plain model's."""
    chosen = answer["output_ids"]
    expected = dense.full_logprobs(model(page), ids, len(chosen), forced=chosen)
    assert (distributions(answer) - expected.full_logprobs).abs().max() < TOLERANCE


lengths = st.one_of(st.integers(1, 6), st.sampled_from([15, 16, 17, 31, 33, 64, 65, 90, 150]))
part = st.tuples(st.sampled_from(["segment", "segment", "text"]), st.integers(0, 3), lengths)


@settings(
    max_examples=20,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
@given(
    parts=st.lists(part, min_size=1, max_size=6),
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
    pic: dict[str, Any] = {"seam": seam, "policy": policy, "state": state}
    planned = dense.layout(
        len(ids), segments, seam=seam, page=page, policy=policy, whole=True, prompt_ids=ids
    )
    for _ in ("compiles", "finds everything"):
        answer = server.generate(**body(ids, segments, 3, salt, **pic))
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
    for order in itertools.islice(itertools.permutations(range(4)), 0, 24, 5):
        parts = [("segment", documents[i]) for i in order]
        ids, segments = assemble([*parts, ("text", ids_of(sum(order) + order[0], 7))])
        compose: dict[str, Any] = {"state": "compose"}
        for pic in (compose, {**compose, "mode": "relocate"}, {"state": "last"}):
            jobs.append((ids, segments, pic, salt))
        jobs.append((ids, segments, {"link": False}, f"{salt}-unlinked"))
    with ThreadPoolExecutor(12) as pool:
        requests = [body(ids, spans, 12, salt, seam=5, **pic) for ids, spans, pic, salt in jobs]
        answers = list(pool.map(lambda request: server.generate(**request), requests))
    for (ids, segments, pic, _), answer in zip(jobs, answers, strict=True):
        if pic.get("link") is False:
            check_exact(answer, ids, page)
        else:
            check_linked(answer, ids, segments, seam=5, page=page, state=pic["state"])
    if page == 16:
        assert any(answer["meta_info"]["num_retractions"] for answer in answers)


def test_cores_shorter_than_the_convolution(mamba1: Server) -> None:
    """Behind one or two reused tokens the convolution still sees what stands before
    them, be it live, a prefix or another core."""
    for n, seam in itertools.product((1, 2, 3), (0, 1, 2)):
        segment = ("segment", ids_of(50 + n, seam + n + 1))
        parts = [("text", ids_of(51, 9)), segment, segment, ("text", ids_of(52, 3)), segment]
        ids, segments = assemble([*parts, ("text", [7])])
        salt = fresh_salt()
        for _ in ("compiles", "finds everything"):
            answer = mamba1.generate(**body(ids, segments, 3, salt, seam=seam, state="compose"))
            check_linked(answer, ids, segments, seam=seam, page=1)


def test_ordinary_requests_go_on_from_kept_states(paged: tuple[Server, int]) -> None:
    """States kept at chunk starts on and off a mixed batch's grid, and while decoding."""
    server, page = paged
    salt = fresh_salt()
    prompts = [ids_of(40 + i, 50 + 30 * i) for i in range(4)]
    for round_ in range(3):
        requests = [body(ids, [], 24, salt) for ids in prompts]
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda request: server.generate(**request), requests))
        for ids, answer in zip(prompts, answers, strict=True):
            check_exact(answer, ids, page)
        found = [answer["meta_info"]["cached_tokens"] for answer in answers]
        assert round_ == 0 or any(found), found
        prompts = [
            ids + answer["output_ids"] + ids_of(60 + i, 7)
            for i, (ids, answer) in enumerate(zip(prompts, answers, strict=True))
        ]


def test_operators_are_stored_as_scalars(mamba16: Server) -> None:
    ids, segments = assemble([("text", ids_of(80, 3)), ("segment", ids_of(81, 64))])
    answer = mamba16.generate(**body(ids + ids_of(82, 3), segments, 1, fresh_salt(), seam=4))
    (segment,) = answer["meta_info"]["pic"]["segments"]
    (held,) = [found for found in mamba16.forest()["segments"] if found["id"] == segment["id"]]
    layers, heads, dk, dv, channels, history = 2, 8, 16, 16, 160, 3
    numbers = layers * (heads * (2 * dk * dv + 1) + channels * history)
    assert held["state_bytes"] == 4 * numbers


def test_a_growing_segment_goes_on_from_the_shorter_one(paged: tuple[Server, int]) -> None:
    server, page = paged
    salt = fresh_salt()
    grown = ids_of(90, 80)
    for step, n in enumerate((0, 70)):
        grown = grown + ids_of(91 + step, n)
        made = server.post("/pic/compile", {"input_ids": grown, "cache_salt": salt}).json()
    assert made["segments"][0]["tokens_computed"] < 70 + 2 * page
    parts = [("text", ids_of(1, 20)), ("segment", grown), ("segment", ids_of(2, 64))]
    ids, segments = assemble([*parts, ("text", ids_of(3, 5))])
    pic: dict[str, Any] = {"state": "compose"}
    answer = server.generate(**body(ids, segments, 3, salt, **pic))
    check_linked(answer, ids, segments, seam=16, page=page, **pic)


def test_the_next_turn_goes_on_from_the_states_of_the_last(mamba1: Server) -> None:
    salt = fresh_salt()
    parts = [("segment", ids_of(70, 40)), ("segment", ids_of(71, 50)), ("text", ids_of(72, 11))]
    ids, segments = assemble(parts)
    reused = []
    for turn in range(3):
        pic: dict[str, Any] = {"state": "compose", "turns": True}
        answer = mamba1.generate(**body(ids, segments, 5, salt, seam=4, **pic))
        check_linked(answer, ids, segments, seam=4, page=1, state="compose")
        reused.append(answer["meta_info"]["pic"]["turn_tokens"])
        ids = [*ids, *answer["output_ids"], *ids_of(73 + turn, 9)]
    assert reused[0] == 0 and reused[0] < reused[1] < reused[2], reused
