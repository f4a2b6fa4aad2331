"""Every family at every page size, number of ranks and schedule: held to the oracle.

A cell is a server. CI runs those that no other module covers; ``-m long`` runs all.
"""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from conftest import CHECKS, TINY, serve
from families import FAMILIES, Family
from hypothesis import given, settings
from hypothesis import strategies as st
from linking import TOLERANCE, assemble, body, distributions, fresh_salt, ids_of

from sglang_pic.eval.oracle import dense
from sglang_pic.eval.oracle.company import company_logprobs
from sglang_pic.eval.serving import Server

pytestmark = pytest.mark.server

PAGES = (1, 16)
RANKS = {1: (), 2: ("--tp-size=2",)}
SCHEDULES: dict[str, tuple[str, ...]] = {
    "plain": (),
    "chunked": ("--chunked-prefill-size=64",),
    "mixed": ("--chunked-prefill-size=64", "--enable-mixed-chunk"),
    "retracted": ("--chunked-prefill-size=64", "--enable-mixed-chunk"),
}
# SGLang keeps a hybrid's states at the end of sequences, or on a grid of 64 tokens.
STATES = {
    1: ("--mamba-radix-cache-strategy=no_buffer", "--disable-overlap-schedule"),
    16: ("--mamba-radix-cache-strategy=extra_buffer",),
}
ENV = {
    "SGLANG_CPU_OMP_THREADS_BIND": "0|1",
    "SGLANG_ENABLE_RANK_CONSENSUS_CHECKER": "1",
}
RETRACT = {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "7"}
IN_CI = {
    (family, 16, 1, "retracted") for family in ("nemotron_h", "deepseek_v2_yarn", "gemma3", "ling")
}


@dataclasses.dataclass(frozen=True)
class Cell:
    family: Family
    page: int
    server: Server


def _cells() -> Iterator[Any]:
    for key in itertools.product(FAMILIES, PAGES, RANKS, SCHEDULES):
        marks = () if key in IN_CI else (pytest.mark.long,)
        yield pytest.param(key, id="-".join(map(str, key)), marks=marks)


@pytest.fixture(scope="module", params=_cells())
def cell(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, logs: pathlib.Path
) -> Iterator[Cell]:
    name, page, ranks, schedule = request.param
    family = FAMILIES[name]
    path = family.save(tmp_path_factory.mktemp("matrix"))
    flags = (*TINY, f"--page-size={page}", *RANKS[ranks], *SCHEDULES[schedule])
    # Of linear layers a company has what links of the server's own width need.
    flags = (*flags, "--pic-company-seam=3")
    if family.linear:
        flags = (*flags, *STATES[page])
    env = CHECKS | (ENV if ranks > 1 else {}) | (RETRACT if schedule == "retracted" else {})
    log = logs / f"matrix_{name}_{page}_{ranks}_{schedule}.log"
    # What is asked for a second time is there, but after a flush.
    store = (f"--pic-store={path / 'store'}", "--pic-store-when=always", "--pic-store-timeout=60")
    with serve(path, log, *flags, *store, env=env) as server:
        yield Cell(family, page, server)


def check(
    cell: Cell, answer: dict[str, Any], ids: list[int], segments: list[Any], **where: Any
) -> None:
    """The answer is the oracle's."""
    chosen = answer["output_ids"]
    rule = {"seam": where["seam"], "page": cell.page, "whole": cell.family.linear}
    planned = dense.layout(len(ids), segments, prompt_ids=ids, **rule)
    report = answer["meta_info"]["pic"]
    if planned.n_reused:
        assert report["reason"] is None
        expected = cell.family.linked(ids, segments, page=cell.page, forced=chosen, **where)
        reused = report["tokens_reused"] - report["prefix_tokens"] - report["turn_tokens"]
        assert reused == planned.n_reused
    else:
        assert report["exactness"] == "exact"
        expected = cell.family.plain(ids, chosen)
    worst = (distributions(answer) - expected).abs().max().item()
    assert worst < TOLERANCE, f"log-probabilities differ by {worst}"


def test_a_family_links(cell: Cell) -> None:
    assert cell.server.forest()["refusal"] is None


lengths = st.one_of(st.integers(1, 6), st.sampled_from([15, 16, 17, 31, 33, 64, 65, 90, 150]))
part = st.tuples(st.sampled_from(["segment", "segment", "text"]), st.integers(0, 3), lengths)


def test_any_layout_matches_the_oracle(cell: Cell) -> None:
    @settings(max_examples=12, deadline=None, derandomize=True)
    @given(
        parts=st.lists(part, min_size=1, max_size=6),
        seam=st.sampled_from([0, 1, 3, 4, 16]),
        state=st.sampled_from(["compose", "last"]),
        mode=st.sampled_from(["share", "relocate"]),
    )
    def holds(parts: list[tuple[str, int, int]], seam: int, state: str, mode: str) -> None:
        ids, segments = assemble([(kind, ids_of(seed, n)) for kind, seed, n in parts])
        where: dict[str, Any] = {"seam": seam, "state": state}
        salt = fresh_salt()
        for _ in ("compiles", "finds everything"):
            answer = cell.server.generate(**body(ids, segments, 3, salt, mode=mode, **where))
            check(cell, answer, ids, segments, **where)

    holds()


def test_rows_of_every_kind_share_batches(cell: Cell) -> None:
    documents = [ids_of(20 + i, 40 + 19 * i) for i in range(4)]
    salt = fresh_salt()
    jobs = []
    for order in itertools.islice(itertools.permutations(range(4)), 0, 24, 4):
        parts = [("segment", documents[i]) for i in order]
        prompt = assemble([*parts, ("text", ids_of(sum(order) + order[0], 7))])
        jobs += [(prompt, {"seam": 5, "state": state}) for state in ("compose", "last")]
    plain: list[Callable[[], Any]] = [
        lambda i=i: cell.server.generate(**body(documents[i], [], 12, f"{salt}-{i}"))
        for i in range(4)
    ]
    with ThreadPoolExecutor(12) as pool:
        ordinary = [pool.submit(ask) for ask in plain]
        linked = [
            pool.submit(lambda p=p, w=w: cell.server.generate(**body(*p, 12, salt, **w)))
            for p, w in jobs
        ]
        for (prompt, where), future in zip(jobs, linked, strict=True):
            check(cell, future.result(), *prompt, **where)
        for ids, future in zip(documents, ordinary, strict=True):
            check(cell, future.result(), ids, [], seam=0)


def test_what_the_store_gives_back_links_as_it_did(cell: Cell) -> None:
    parts = [("segment", ids_of(60 + i, 50 + 21 * i)) for i in range(3)]
    salt, where = fresh_salt(), {"seam": 4, "state": "compose"}
    sent = {"input_ids": [ids for _, ids in parts], "cache_salt": salt, "seam": 4}
    made = cell.server.post("/pic/compile", {**sent, "publish": True})
    assert made.status_code == 200, made.text
    assert cell.server.post("/flush_cache", {}).status_code == 200
    ids, segments = assemble([("text", ids_of(7, 21)), *parts[::-1], ("text", ids_of(8, 9))])
    answer = cell.server.generate(**body(ids, segments, 4, salt, **where))
    waited = answer["meta_info"]["pic"]["waited_for"]
    assert [one["source"] for one in waited if one["segment"] is not None] == ["store"] * 3
    check(cell, answer, ids, segments, **where)


def test_a_company_answers_as_its_oracle(cell: Cell) -> None:
    documents = [ids_of(80 + i, 40 + 25 * i) for i in range(3)]
    opening = ids_of(90, 19)
    salt = fresh_salt()
    sent = {"input_ids": documents, "opening": opening, "company": True, "cache_salt": salt}
    made = cell.server.post("/pic/compile", sent)
    assert made.status_code == 200, made.text
    parts = [("segment", one) for one in documents[::-1]]
    ids, segments = assemble([("text", opening), *parts, ("text", ids_of(91, 9))])
    answer = cell.server.generate(**body(ids, segments, 4, salt, company_seam=3))
    assert [one["company"] for one in answer["meta_info"]["pic"]["segments"]] == [3] * 3
    where = {"seam": 3, "page": cell.page, "forced": answer["output_ids"]}
    if cell.family.linear:
        expected = cell.family.linked(ids, segments, companies=[range(3)], **where)
    else:
        expected = company_logprobs(
            cell.family.model(), ids, segments, [range(3)], n_new=4, **where
        ).full_logprobs
    assert (distributions(answer) - expected).abs().max() < TOLERANCE


def test_ordinary_prefixes_are_right_whatever_ran_beside_them(cell: Cell) -> None:
    """SGLang keeps a hybrid's state where a chunk ended, which decoding rows may move."""
    draw = random.Random(1)
    for round_ in range(6):
        lengths = draw.sample([40, 65, 90, 150, 190, 208, 240, 300], 3)
        prompts = [ids_of(100 * round_ + n, n) for n in lengths]
        salt = fresh_salt()
        with ThreadPoolExecutor(3) as pool:
            list(
                pool.map(
                    lambda asked: cell.server.generate(**asked),
                    [body(ids, [], 1, salt) for ids in prompts],
                )
            )
        for ids in prompts:
            longer = [*ids, *ids_of(5, 9)]
            check(cell, cell.server.generate(**body(longer, [], 3, salt)), longer, [], seam=0)


def test_conversations_go_on(cell: Cell) -> None:
    """Turns are kept where SGLang's own state is that of the last token: they change nothing."""
    where: dict[str, Any] = {"seam": 4, "state": "compose"}
    parts = [("segment", ids_of(71, 60)), ("segment", ids_of(72, 45))]
    ids, segments = assemble([("text", ids_of(70, 6)), *parts, ("text", ids_of(73, 9))])
    salt = fresh_salt()
    for turn in range(3):
        answer = cell.server.generate(**body(ids, segments, 5, salt, turns=True, **where))
        check(cell, answer, ids, segments, **where)
        ids = [*ids, *answer["output_ids"], *ids_of(74 + turn, 9)]
