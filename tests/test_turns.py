"""Conversations on a real server: every turn against the oracle of a link that
computes all earlier turns anew."""

from __future__ import annotations

import random
from typing import Any

import pytest
from linking import assemble, body, check_exact, check_linked, fresh_salt, ids_of

from sglang_pic.eval.serving import Server

pytestmark = pytest.mark.server


@pytest.fixture(params=["page1", "page16"])
def paged(request: pytest.FixtureRequest) -> tuple[Server, int]:
    """Each server with its page size."""
    return request.getfixturevalue(request.param), int(request.param.removeprefix("page"))


def _reused(answer: dict[str, Any]) -> int:
    return answer["meta_info"]["pic"]["turn_tokens"]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("policy", ["seam", "none"])
def test_every_turn_matches_the_oracle(paged: tuple[Server, int], seed: int, policy: str) -> None:
    server, page = paged
    draw = random.Random(seed)
    salt = fresh_salt()
    opening = [("text", ids_of(900 + seed, draw.choice([0, 5, 33])))]
    documents = [("segment", ids_of(910 + i, draw.choice([40, 64, 90]))) for i in range(3)]
    ids, segments = assemble([*opening, *documents[:2], ("text", ids_of(920, 20))])
    options = {"seam": 4, "policy": policy, "turns": True}
    found = []
    for turn in range(4):
        answer = server.generate(**body(ids, segments, 6, salt, **options))
        check_linked(answer, ids, segments, seam=4, page=page, n_new=6, policy=policy)
        found.append(_reused(answer))
        ids = [*ids, *answer["output_ids"], *ids_of(930 + turn, draw.choice([1, 7, 21]))]
        if turn == 1:
            segments = [*segments, (len(ids), len(ids) + len(documents[2][1]))]
            ids = [*ids, *documents[2][1], *ids_of(940, 9)]
    assert found[0] == 0 and found[1] > 0 and found[1] <= found[2] < found[3]
    # Exact stays exact, and nobody else finds any of it.
    plain = server.generate(**body(ids, segments, 2, salt, require_exact=True))
    check_exact(plain, ids, 2)
    other = server.generate(**body(ids, segments, 2, fresh_salt(), turns=True))
    assert _reused(other) == 0
    assert server.forest()["live_plans"] == 0


def test_an_identical_prompt_stays_exact(paged: tuple[Server, int]) -> None:
    """Behind an opening segment all is as in the plain model, and so is the turn."""
    server, _ = paged
    salt = fresh_salt()
    ids, segments = assemble([("segment", ids_of(1, 40)), ("text", ids_of(3, 30))])
    found = []
    for _ in range(3):
        answer = server.generate(**body(ids, segments, 4, salt, turns=True))
        assert answer["meta_info"]["pic"]["exactness"] == "exact"
        check_exact(answer, ids, 4)
        found.append(_reused(answer))
    assert found[0] == 0 < found[1] == found[2]


def test_an_edited_turn_is_reused_up_to_the_edit(page1: Server) -> None:
    salt = fresh_salt()
    ids, segments = assemble(
        [("segment", ids_of(1, 40)), ("segment", ids_of(2, 40)), ("text", ids_of(3, 30))]
    )
    page1.generate(**body(ids, segments, 4, salt, turns=True))
    again = page1.generate(**body(ids, segments, 4, salt, turns=True))
    ids[-10] = (ids[-10] + 1) % 500
    edited = page1.generate(**body(ids, segments, 4, salt, turns=True))
    check_linked(edited, ids, segments, seam=16, page=1, n_new=4)
    assert _reused(edited) == _reused(again) - 9
    off = page1.generate(**body(ids, segments, 4, salt, turns=False))
    assert _reused(off) == 0
