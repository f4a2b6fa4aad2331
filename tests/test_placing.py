"""On which data-parallel rank a prompt with segments runs."""

from __future__ import annotations

import contextlib
import pathlib
from typing import Any

import pytest
from conftest import CHECKS, TINY, serve
from hypothesis import given
from hypothesis import strategies as st
from linking import assemble, body, check_linked, fresh_salt, ids_of
from sglang.srt.managers.io_struct import GenerateReqInput

from sglang_pic.link.policy import LinkOptions
from sglang_pic.request.base import LinkRequest, TokenSpan
from sglang_pic.server.placing import LeastWork, OneRank

A, B, C = (list(range(at, at + 40)) for at in (100, 200, 300))


def prompt_of(*parts: list[int]) -> tuple[list[int], LinkRequest]:
    ids, spans = [1, 2], []
    for part in parts:
        spans.append(TokenSpan(len(ids), len(ids) + len(part)))
        ids += part
    return [*ids, 9], LinkRequest(tuple(spans), LinkOptions())


class Placed:
    """Requests that run until they are let go."""

    def __init__(self, ranks: int):
        self.placing = LeastWork(ranks)
        self.stack = contextlib.ExitStack()

    def ask(self, *parts: list[int], rank: int | None = None, space: str = "t", **obj: Any) -> Any:
        request = GenerateReqInput(input_ids=[1], routed_dp_rank=rank, **obj)
        ids, link = prompt_of(*parts)
        self.stack.enter_context(self.placing.placed(request, space, ids, link))
        return request.routed_dp_rank

    def end(self) -> None:
        self.stack.close()


def test_a_prompt_goes_where_its_segments_are() -> None:
    placed = Placed(3)
    first = placed.ask(A, B)
    placed.end()
    for _ in range(5):
        assert placed.ask(B, A) == first
        placed.end()
        assert placed.ask(C) is not None
        placed.end()
    # Another tenant's, or another adapter's, are others.
    assert {placed.ask(A, B, space=f"t{i}") for i in range(3)} == {0, 1, 2}
    placed.end()
    assert len({placed.ask(A, B, lora_path=f"a{i}") for i in range(3)}) == 3


def test_a_rank_that_is_busy_is_left_alone() -> None:
    placed = Placed(2)
    first = placed.ask(A)
    # Behind one prompt of its length it is as well computed anew, elsewhere.
    assert placed.ask(A) == 1 - first
    placed.end()
    assert placed.ask(A) in (0, 1)


def test_a_rank_that_is_named_is_the_one() -> None:
    placed = Placed(2)
    assert placed.ask(A, rank=1) == 1
    placed.end()
    assert placed.ask(A) == 1
    placed.end()
    assert placed.ask(A, rank=7) == 7
    request = GenerateReqInput(input_ids=[1])
    with OneRank().placed(request, "t", *prompt_of(A)):
        assert request.routed_dp_rank is None


@given(st.lists(st.lists(st.integers(0, 4), max_size=3), max_size=30), st.integers(2, 4))
def test_work_is_spread_and_none_is_forgotten(prompts: list[list[int]], ranks: int) -> None:
    placed = Placed(ranks)
    for prompt in prompts:
        placed.ask(*([i] * 50 for i in prompt))
    under_way = placed.placing._under_way
    longest = max((3 + 50 * len(prompt) for prompt in prompts), default=0)
    # No rank is behind another by more than a prompt, and what it would have to compute.
    assert max(under_way) - min(under_way) <= 2 * longest
    placed.end()
    assert placed.placing._under_way == [0] * ranks


@pytest.mark.server
@pytest.mark.long
def test_two_ranks_reuse_what_each_has(tiny_path: pathlib.Path, logs: pathlib.Path) -> None:
    # One core each.
    env = {**CHECKS, "SGLANG_CPU_OMP_THREADS_BIND": "0|1"}
    with serve(tiny_path, logs / "dp2.log", *TINY, "--dp-size=2", env=env) as server:
        assert server.get("/pic/info").json()["canary"]["result"] == "passed"
        documents = [ids_of(20 + i, 60) for i in range(3)]
        salt = fresh_salt()
        for i in range(6):
            parts = [("segment", documents[(i + j) % 3]) for j in range(3)]
            ids, segments = assemble([*parts, ("text", ids_of(50 + i, 5))])
            answer = server.generate(**body(ids, segments, 2, salt, seam=4))
            check_linked(answer, ids, segments, seam=4, page=1, n_new=2)
            compiled = answer["meta_info"]["pic"]["tokens_compiled"]
            assert compiled == (180 if i == 0 else 0)
        # By name, on every rank: nobody knows where the links will run.
        salt = fresh_salt()
        named = {"input_ids": documents, "cache_salt": salt, "company": True}
        made = server.post("/pic/compile", named).json()
        assert [one["tokens_computed"] for one in made["segments"]] == [120] * 3
        for rank in range(2):
            ids, segments = assemble(
                [*(("segment", one) for one in documents[::-1]), ("text", [7])]
            )
            fields = {**body(ids, segments, 2, salt, seam=4), "routed_dp_rank": rank}
            report = server.generate(**fields)["meta_info"]["pic"]
            assert report["tokens_compiled"] == 0
            # What opens a prompt as it was compiled needs no company.
            assert [one["company"] for one in report["segments"]] == [0, 3, 3]
