"""Speculative decoding: linked rows verify drafts as ordinary ones do."""

from __future__ import annotations

import os
import pathlib
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from conftest import CHECKS, TINY, serve
from hypothesis import given
from hypothesis import strategies as st
from linking import assemble, body, check_exact, check_linked, fresh_salt, ids_of

from sglang_pic.attention.step import StepRow, build_step
from sglang_pic.eval.serving import Server
from sglang_pic.kernels.attend import attend_dense
from sglang_pic.kernels.walk import draft_tile, walk
from sglang_pic.link.plan import SegmentHit, make_plan
from sglang_pic.platforms import drafts

N_NEW, SEAM = 24, 4
RETRACTING = {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "7"}
KINDS: tuple[dict[str, Any], ...] = ({}, {"mode": "relocate"}, {"policy": "none"}, {"link": False})


# The parent of every draft but the first, one before it.
trees = st.integers(0, 9).flatmap(
    lambda n: st.tuples(*(st.integers(0, i) for i in range(n))).map(list)
)


def _mask(parents: list[int]) -> torch.Tensor:
    """Which draft sees which: itself, and what it came from."""
    mask = torch.eye(len(parents) + 1, dtype=torch.bool)
    for i, parent in enumerate(parents, 1):
        mask[i] |= mask[parent]
    return mask


@given(st.lists(trees, min_size=1, max_size=3), st.data())
def test_trees_are_read_and_walked(forest: list[list[int]], data: st.DataObject) -> None:
    n = max(map(len, forest)) + 1
    # Of one width, as SGLang has them.
    forest = [tree + [0] * (n - 1 - len(tree)) for tree in forest]
    lengths = torch.tensor(data.draw(st.lists(st.integers(1, 50), min_size=3, max_size=3)))
    lengths = lengths[: len(forest)]
    positions = torch.empty(len(forest) * n, dtype=torch.int64)
    index, child, sibling = torch.empty(3, len(forest), n, dtype=torch.int64).unbind()
    mask = torch.stack([_mask(tree) for tree in forest])
    drafts.reconstruct_indices_from_tree_mask(
        mask.flatten(), lengths, positions, index, child, sibling, len(forest), n
    )
    tokens = st.integers(0, 2)
    drafted = torch.tensor(
        data.draw(st.lists(tokens, min_size=len(forest) * n, max_size=len(forest) * n))
    ).view(-1, n)
    predicted = torch.tensor(
        data.draw(st.lists(tokens, min_size=len(forest) * n, max_size=len(forest) * n))
    ).view(-1, n)
    predicts = torch.zeros(len(forest) * n, dtype=torch.int32)
    accepted = torch.full((len(forest), n), -1, dtype=torch.int32)
    counts = torch.empty(len(forest), dtype=torch.int32)
    drafts.verify_tree_greedy_func(
        predicts, accepted, counts, drafted, index, child, sibling, predicted
    )
    for b, tree in enumerate(forest):
        below: list[list[int]] = [[] for _ in range(n)]
        for i, parent in enumerate(tree, 1):
            below[parent].append(i)
        depth = [0]
        for parent in tree:
            depth.append(depth[parent] + 1)
        assert positions.view(-1, n)[b].tolist() == [int(lengths[b]) + d for d in depth]
        node, way = 0, [0]
        while True:
            fitting = [i for i in below[node] if drafted[b, i] == predicted[b, node]]
            assert predicts[b * n + node] == predicted[b, node]
            if not fitting:
                break
            node = fitting[0]
            way.append(node)
        assert counts[b] == len(way) - 1
        assert accepted[b, : len(way)].tolist() == [b * n + i for i in way]
        assert (accepted[b, len(way) :] == -1).all()


@given(trees, st.integers(0, 20), st.integers(0, 12))
def test_a_draft_sees_the_positions_of_its_window(
    parents: list[int], prefix: int, window: int
) -> None:
    depth = [0]
    for parent in parents:
        depth.append(depth[parent] + 1)
    tree, n = _mask(parents), len(parents) + 1
    seen = draft_tile(prefix, tree, window).mask == 0
    for i in range(n):
        for key in range(prefix + n):
            at = key if key < prefix else prefix + depth[key - prefix]
            own = key < prefix or bool(tree[i, key - prefix])
            assert seen[i, key] == (own and at >= prefix + depth[i] - window)


@given(trees.filter(bool), st.integers(0, 3))
def test_drafts_of_a_linked_row_see_all_of_it_and_their_own_line(
    parents: list[int], decoded: int
) -> None:
    """Turned where they are read, every key of the row at its true position, whatever
    their order in it."""
    draw = torch.Generator().manual_seed(len(parents))
    length, n = 30, len(parents) + 1
    hits = [
        SegmentHit(at, end, at, torch.arange(first, first + end - at), core)
        for at, end, first, core in ((0, 12, 40, (0, 11)), (12, 26, 60, (2, 13)))
    ]
    prefix = torch.empty(0, dtype=torch.int64)
    plan = make_plan(length, limit=length - 1, prefix=prefix, hits=hits, page=1)
    held = length + decoded
    row = torch.cat([plan.slots, torch.arange(100, 100 + held - plan.reused + n)])
    step = build_step([StepRow(plan, 0, held, n, row, _mask(parents))], torch.device("cpu"))
    assert step is not None and step.parts is None
    (made,) = step.walks
    query = torch.randn(n, 2, 8, generator=draw)
    keys, values = torch.randn(2, 200, 2, 8, generator=draw)
    found = walk(query, keys[made.slots], values[made.slots], made.tiles, scale=0.3)
    order = torch.argsort(plan.positions(held))
    slots = torch.cat([row[order], row[held:]])
    assert torch.equal(made.slots, slots)
    assert made.offset is not None
    assert torch.equal(made.offset, 12 * ((slots >= 60) & (slots < 74)))
    mask = torch.zeros(n, held + n)
    mask[:, held:].masked_fill_(~_mask(parents), -torch.inf)
    dense, _ = attend_dense(
        query.transpose(0, 1), keys[slots].transpose(0, 1), values[slots].transpose(0, 1), 0.3, mask
    )
    torch.testing.assert_close(found, dense.transpose(0, 1))


@pytest.fixture(scope="module", params=[1, pytest.param(4, marks=pytest.mark.long)])
def drafting(
    request: pytest.FixtureRequest, tiny_path: pathlib.Path, logs: pathlib.Path
) -> Iterator[tuple[Server, int]]:
    if shutil.which("g++") is None:
        pytest.skip("SGLang compiles its corpus of n-grams with g++, which there is not")
    page = request.param
    # It builds with ninja, of this environment where the machine has none.
    path = os.pathsep.join([str(pathlib.Path(sys.executable).parent), os.environ["PATH"]])
    env = {**CHECKS, "PATH": path}
    args = [*TINY, "--speculative-algorithm=NGRAM", "--speculative-num-draft-tokens=6"]
    if page > 1:
        # SGLang allows such pages with drafts in a chain; this one retracts by force, too.
        args += [f"--page-size={page}", "--speculative-ngram-max-bfs-breadth=1"]
        env |= RETRACTING
    with serve(tiny_path, logs / f"drafts{page}.log", *args, env=env) as server:
        yield server, page


@pytest.mark.server
def test_drafts_are_verified_over_spans(drafting: tuple[Server, int]) -> None:
    server, page = drafting
    assert server.forest()["refusal"] is None
    documents = [ids_of(900 + i, 40 + 9 * i) for i in range(3)]
    salt = fresh_salt()

    def ask(i: int) -> None:
        pic = KINDS[i % 4]
        order = [documents[(i + j) % 3] for j in range(2 + i % 2)]
        parts = [("segment", document) for document in order]
        ids, spans = assemble([("text", ids_of(1, 5)), *parts, ("text", ids_of(950 + i % 8, 6))])
        # In a namespace of its own: an ordinary prompt would be the linked ones' prefix.
        space = f"{salt}-unlinked" if pic.get("link") is False else salt
        answer = server.generate(**body(ids, spans, N_NEW, space, seam=SEAM, **pic))
        if pic.get("link") is False:
            check_exact(answer, ids, N_NEW)
        else:
            policy = pic.get("policy", "seam")
            check_linked(answer, ids, spans, seam=SEAM, page=page, n_new=N_NEW, policy=policy)
        counts.append(answer["meta_info"]["spec_verify_ct"])
        retracted.append(answer["meta_info"]["num_retractions"])

    counts: list[int] = []
    retracted: list[int] = []
    # What was answered once is known to the drafts of who asks again.
    for _ in range(2):
        with ThreadPoolExecutor(6) as pool:
            list(pool.map(ask, range(8)))
    # A retracted request counts what it verified before, too.
    assert sum(counts[8:]) < 8 * (N_NEW - 1) / 2, counts
    if page == 1:
        assert max(counts[8:]) < N_NEW - 1, counts
    else:
        assert any(retracted)
    log = server.log.read_text()
    assert "Traceback" not in log and "leak" not in log


@pytest.mark.server
@pytest.mark.parametrize("policy", ["seam", "none"])
def test_a_turn_goes_on_from_what_was_accepted(drafting: tuple[Server, int], policy: str) -> None:
    """And from nothing that was drafted beyond it."""
    server, page = drafting
    parts = [("segment", ids_of(960 + i, 45)) for i in range(2)]
    opening, spans = assemble([*parts, ("text", ids_of(970, 8))])
    for _ in range(2):
        # The second time drafts are accepted, to beyond the end of the answer.
        ids, salt = opening, fresh_salt()
        for turn in range(3):
            pic = {"seam": SEAM, "policy": policy, "turns": True}
            answer = server.generate(**body(ids, spans, 7, salt, **pic))
            check_linked(answer, ids, spans, seam=SEAM, page=page, n_new=7, policy=policy)
            assert (answer["meta_info"]["pic"]["turn_tokens"] > 0) == (turn > 0)
            ids = [*ids, *answer["output_ids"], *ids_of(980 + turn, 5)]
    assert server.forest()["live_plans"] == 0
