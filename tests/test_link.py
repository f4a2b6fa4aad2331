"""Linked generation on a real server against the dense oracle."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from linking import assemble, body, check_exact, check_linked, fresh_salt, ids_of

from sglang_pic.eval.oracle import dense
from sglang_pic.eval.serving import Server

pytestmark = pytest.mark.server


@pytest.fixture(params=["page1", "page16"])
def paged(request: pytest.FixtureRequest) -> tuple[Server, int]:
    """Each server with its page size."""
    return request.getfixturevalue(request.param), int(request.param.removeprefix("page"))


lengths = st.one_of(st.integers(1, 6), st.sampled_from([15, 16, 17, 31, 32, 33, 48]))
part = st.tuples(st.sampled_from(["segment", "segment", "text"]), st.integers(0, 3), lengths)
layouts = st.lists(part, min_size=1, max_size=6)


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
@given(
    parts=layouts,
    seam=st.sampled_from([0, 1, 3, 4, 16, 64]),
    policy=st.sampled_from(["seam", "seam", "seam", "none", "full"]),
)
def test_any_layout_matches_the_oracle(
    paged: tuple[Server, int], parts: list[tuple[str, int, int]], seam: int, policy: str
) -> None:
    server, page = paged
    # The same seed and length is the same segment: repeats happen by design.
    ids, segments = assemble([(kind, ids_of(seed, n)) for kind, seed, n in parts])
    salt = fresh_salt()
    cold = server.generate(**body(ids, segments, 3, salt, seam=seam, policy=policy))
    warm = server.generate(**body(ids, segments, 3, salt, seam=seam, policy=policy))
    check = {"seam": seam, "page": page, "n_new": 3, "policy": policy}
    planned = dense.layout(len(ids), segments, seam=seam, page=page, policy=policy, prompt_ids=ids)
    if planned.n_reused or policy == "full":
        check_linked(cold, ids, segments, **check)
        check_linked(warm, ids, segments, **check)
    else:
        # Nothing to link: an ordinary request, exact, cached as a prefix.
        for answer in (cold, warm):
            assert answer["meta_info"]["pic"]["exactness"] == "exact"
            check_exact(answer, ids, 3)


def test_reuse_is_not_an_accident(paged: tuple[Server, int]) -> None:
    """A fixed layout reuses what the formula says, and the answer is composed."""
    server, page = paged
    a, b = ids_of(10, 100), ids_of(11, 77)
    ids, segments = assemble([("segment", a), ("text", [1, 2]), ("segment", b), ("text", [3])])
    answer = server.generate(**body(ids, segments, 4, fresh_salt(), seam=4))
    report = answer["meta_info"]["pic"]
    head = -(-4 // page) * page
    expected = len(a) // page * page + len(b) // page * page - head
    assert report["tokens_reused"] == expected > 0
    assert report["exactness"] == "composed"
    check_linked(answer, ids, segments, seam=4, page=page, n_new=4)


def test_concurrent_requests_of_every_kind(paged: tuple[Server, int]) -> None:
    """Linked, compiling, relocated, unlinked and ordinary rows share batches."""
    server, page = paged
    documents = [ids_of(20 + i, 40 + 9 * i) for i in range(4)]
    salt = fresh_salt()
    jobs = []
    for order in itertools.islice(itertools.permutations(range(4)), 0, 24, 3):
        parts = [("segment", documents[i]) for i in order]
        ids, segments = assemble([*parts, ("text", ids_of(sum(order) + order[0], 7))])
        for pic in ({}, {"mode": "relocate"}):
            jobs.append((ids, segments, pic, salt))
        # In a namespace of its own: as an ordinary prompt it would be the
        # linked ones' exact prefix.
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
            check_exact(answer, ids, 12)
        else:
            check_linked(answer, ids, segments, seam=5, page=page, n_new=12)
    if page == 16:
        # That server retracts by force: the plan was made anew, the answer held.
        assert any(answer["meta_info"]["num_retractions"] for answer in answers)


def test_long_decode(paged: tuple[Server, int]) -> None:
    server, page = paged
    ids, segments = assemble([("segment", ids_of(30, 33)), ("segment", ids_of(31, 50))])
    answer = server.generate(**body(ids, segments, 70, fresh_salt(), seam=2))
    check_linked(answer, ids, segments, seam=2, page=page, n_new=70)
