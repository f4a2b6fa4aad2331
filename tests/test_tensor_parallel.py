"""Two tensor-parallel ranks: each plans, evicts and allocates by itself, and alike."""

from __future__ import annotations

import itertools
import pathlib
import random
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import faults
import pytest
from conftest import CHECKS, TINY, serve
from encoders import save_encoder
from families import FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st
from linking import (
    TOLERANCE,
    assemble,
    body,
    check_exact,
    check_linked,
    distributions,
    fresh_salt,
    ids_of,
    model,
)
from test_encoded import RANKS, encoded_body
from test_encoded import check as check_encoded

from sglang_pic.eval.oracle import dense
from sglang_pic.eval.oracle.company import company_logprobs
from sglang_pic.eval.serving import Server
from sglang_pic.forest.consensus import EVERY

ENV = CHECKS | RANKS[2]


def many_prompts() -> list[tuple[list[int], list[tuple[int, int]]]]:
    """Over more documents than there is room for."""
    draw, prompts = random.Random(0), []
    for _ in range(40):
        chosen = draw.sample(range(24), 4)
        pieces = [("segment", ids_of(40 + i, 60 + i)) for i in chosen]
        prompts.append(assemble([*pieces, ("text", ids_of(chosen[0], 6))]))
    return prompts


def read_any_layout(server: Server, encoder: pathlib.Path) -> None:
    sizes = st.one_of(st.integers(1, 6), st.sampled_from([15, 16, 17, 33, 90, 150]))
    part = st.tuples(st.sampled_from(["segment", "segment", "text"]), st.integers(0, 3), sizes)

    @settings(max_examples=8, deadline=None, derandomize=True)
    @given(parts=st.lists(part, min_size=1, max_size=6), question=st.integers(1, 30))
    def holds(parts: list[tuple[str, int, int]], question: int) -> None:
        made = [(kind, ids_of(seed, n)) for kind, seed, n in parts]
        made.append(("text", ids_of(9, question)))
        check_encoded(server.generate(**encoded_body(made, 3, "layouts")), encoder, made)

    holds()


def read_in_batches(server: Server, encoder: pathlib.Path) -> None:
    """Of all kinds of rows, over more documents than there is room for: 4096 tokens a rank."""
    salt = fresh_salt()
    linked = assemble([("segment", ids_of(30, 40)), ("segment", ids_of(31, 33)), ("text", [1, 2])])
    seeing = [
        [("segment", ids_of(200 + 2 * i, 290)), ("segment", ids_of(201 + 2 * i, 270 + i)),
         ("text", ids_of(240 + i, 30))]
        for i in range(10)
    ]  # fmt: skip
    with ThreadPoolExecutor(8) as pool:
        reads = [
            pool.submit(lambda one=one: server.generate(**encoded_body(one, 8, salt)))
            for one in [*seeing, *seeing[:3]]
        ]
        link = pool.submit(lambda: server.generate(**body(*linked, 8, salt, seam=5)))
        plain = pool.submit(lambda: server.generate(**body(linked[0], [], 8, fresh_salt())))
        for one, future in zip([*seeing, *seeing[:3]], reads, strict=True):
            check_encoded(future.result(), encoder, one)
        check_linked(link.result(), *linked, seam=5, page=4, n_new=8)
        check_exact(plain.result(), linked[0], 8)
    held = server.forest()["encoded"]
    # One of two KV heads.
    assert held["encoder"]["bytes_per_token"] == 256
    assert held["documents"] < 20 and held["bytes"] <= held["budget"] and held["in_use"] == 0


def leave_the_queue(server: Server, encoder: pathlib.Path) -> None:
    """What clients abort in SGLang's queue gives its documents back, on both ranks."""
    salt, document = fresh_salt(), ("segment", ids_of(260, 100))
    prompts = [[document, ("text", ids_of(270 + i, 300))] for i in range(12)]
    check_encoded(server.generate(**encoded_body(prompts[0], 2, salt)), encoder, prompts[0])

    def ask(i: int) -> Any:
        sent = encoded_body(prompts[i], 24, salt) | {"rid": f"leaving-{i:02}"}
        return server.post("/generate", sent)

    with ThreadPoolExecutor(12) as pool:
        asked = [pool.submit(ask, i) for i in range(12)]
        time.sleep(0.3)
        for i in range(1, 12, 2):
            server.post("/abort_request", {"rid": f"leaving-{i:02}"})
        answers = [one.result() for one in asked]
    for parts, answer in zip(prompts[::2], answers[::2], strict=True):
        check_encoded(answer.json(), encoder, parts)
    ends = [one.json()["meta_info"]["finish_reason"]["type"] for one in answers[1::2]]
    assert "abort" in ends
    assert server.forest()["encoded"]["in_use"] == 0


@pytest.mark.server
def test_two_ranks_link_and_read_alike(
    tiny_path: pathlib.Path, tmp_path: pathlib.Path, logs: pathlib.Path
) -> None:
    encoder = save_encoder(tmp_path, tiny_path, model().config)
    flags = ("--tp-size=2", "--page-size=4", "--max-total-tokens=1600", "--pic-company-when=idle")
    flags = (*flags, f"--pic-encoder={encoder}", "--pic-state-mib=1")
    with serve(tiny_path, logs / "tp2.log", *TINY, *flags, env=ENV) as server:
        assert server.forest()["refusal"] is None
        parts = [("segment", ids_of(10, 40)), ("segment", ids_of(11, 33)), ("text", [1, 2])]
        ids, segments = assemble(parts)

        def linked() -> None:
            for pic in ({}, {"mode": "relocate"}):
                answer = server.generate(**body(ids, segments, 4, fresh_salt(), seam=5, **pic))
                check_linked(answer, ids, segments, seam=5, page=4, n_new=4)

        linked()
        # What recurs is made in company, on both ranks.
        ids, segments = assemble([("text", [5, 6, 7, 8]), *parts])
        salt = fresh_salt()
        for _ in range(2):
            server.generate(**body(ids, segments, 1, salt))
        until = time.monotonic() + 60
        while not server.forest()["companies"] and time.monotonic() < until:
            time.sleep(0.2)
        answer = server.generate(**body(ids, segments, 3, salt))
        assert [one["company"] for one in answer["meta_info"]["pic"]["segments"]] == [2, 2]
        made = company_logprobs(
            model(), ids, segments, [(0, 1)], seam=0, page=4, n_new=3, forced=answer["output_ids"]
        )
        assert (distributions(answer) - made.full_logprobs).abs().max() < TOLERANCE
        # More documents than there is room for, so that the ranks must evict alike.
        prompts, salt = many_prompts(), fresh_salt()
        with ThreadPoolExecutor(6) as pool:
            answers = list(
                pool.map(lambda p: server.generate(**body(*p, 3, salt, seam=4)), prompts)
            )
        reused = [answer["meta_info"]["pic"]["tokens_reused"] for answer in answers]
        assert sum(n > 0 for n in reused) > 30
        assert any(s["held"] == 0 for s in server.forest()["segments"]), "nothing was evicted"
        linked()
        read_any_layout(server, encoder)
        read_in_batches(server, encoder)
        leave_the_queue(server, encoder)
        linked()
        assert server.forest()["refusal"] is None


PLAIN = ("--page-size=1", "--mamba-radix-cache-strategy=no_buffer", "--disable-overlap-schedule")
HARD = ("--page-size=16", "--chunked-prefill-size=64", "--enable-mixed-chunk")
RETRACT = {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "7"}


def check_hybrid(
    answer: dict[str, Any], ids: list[int], segments: list[tuple[int, int]], kind: str, page: int
) -> None:
    """The answer is the oracle's, whatever of it was reused by an earlier turn."""
    assert answer["meta_info"]["pic"]["reason"] is None
    expected = FAMILIES[kind].linked(ids, segments, seam=4, page=page, forced=answer["output_ids"])
    assert (distributions(answer) - expected).abs().max() < TOLERANCE


def ask(server: Server, prompt: tuple[list[int], list[tuple[int, int]]], salt: str) -> Any:
    return server.generate(**body(*prompt, 3, salt, seam=4))


@pytest.mark.server
@pytest.mark.parametrize(
    ("kind", "page"),
    [
        ("qwen3_5", 1),
        pytest.param("qwen3_next", 16, marks=pytest.mark.long),
        pytest.param("falcon_h1", 1, marks=pytest.mark.long),
        pytest.param("granite", 16, marks=pytest.mark.long),
    ],
)
def test_two_ranks_link_a_hybrid_alike(
    tmp_path: pathlib.Path, logs: pathlib.Path, kind: str, page: int
) -> None:
    path = FAMILIES[kind].save(tmp_path)
    flags = ("--tp-size=2", "--max-total-tokens=1600", "--pic-state-mib=1")
    hard = PLAIN if page == 1 else HARD
    env = ENV if page == 1 else {**ENV, **RETRACT}
    with serve(path, logs / f"tp2_{kind}.log", *TINY, *flags, *hard, env=env) as server:
        assert server.forest()["refusal"] is None
        documents = [ids_of(20 + i, 40 + 19 * i) for i in range(4)]
        salt = fresh_salt()
        for order in itertools.islice(itertools.permutations(range(4)), 0, 24, 5):
            parts = [("segment", documents[i]) for i in order]
            prompt = assemble([("text", [5, 6]), *parts, ("text", ids_of(order[0], 7))])
            answer = ask(server, prompt, salt)
            ids, segments = prompt
            planned = dense.layout(
                len(ids), segments, seam=4, page=page, whole=True, prompt_ids=ids
            )
            report = answer["meta_info"]["pic"]
            assert report["tokens_reused"] - report["prefix_tokens"] == planned.n_reused
            check_hybrid(answer, ids, segments, kind, page)
        # More than there is room for, of pages and of states: the ranks must evict alike.
        prompts, salt = many_prompts(), fresh_salt()
        with ThreadPoolExecutor(6) as pool:
            answers = list(pool.map(lambda prompt: ask(server, prompt, salt), prompts))
        reused = [answer["meta_info"]["pic"]["tokens_reused"] for answer in answers]
        assert sum(n > 0 for n in reused) > 20
        state = server.forest()
        assert any(one["held"] == 0 for one in state["segments"]), "nothing was evicted"
        assert 0 < state["state_bytes_packed"] <= state["state_bytes"] <= state["state_budget"]
        # A conversation goes on.
        prompt = assemble([*(("segment", one) for one in documents[:2]), ("text", [1, 2, 3])])
        salt = fresh_salt()
        turns = {"sampling_params": {"max_new_tokens": 3, "temperature": 0, "ignore_eos": True}}
        first = server.generate(**{**body(*prompt, 3, salt, seam=4, turns=True), **turns})
        longer = [*prompt[0], *first["output_ids"], 9, 8, 7]
        again = server.generate(**body(longer, prompt[1], 3, salt, seam=4, turns=True))
        check_hybrid(again, longer, prompt[1], kind, page)
        assert server.forest()["refusal"] is None


@pytest.mark.server
@pytest.mark.long
@pytest.mark.parametrize("kind", ["qwen3_5", "granite"])
def test_two_ranks_start_warm(tmp_path: pathlib.Path, logs: pathlib.Path, kind: str) -> None:
    path = FAMILIES[kind].save(tmp_path)
    store = (f"--pic-store={tmp_path / 'store'}", "--pic-store-when=always")
    flags = ("--tp-size=2", *store, "--pic-store-timeout=60", *PLAIN)
    parts = [("segment", ids_of(70 + i, 64)) for i in range(3)]
    salt = fresh_salt()
    with serve(path, logs / f"tp2_save_{kind}.log", *TINY, *flags, env=ENV) as server:
        ask(server, assemble([*parts, ("text", [1, 2])]), salt)
        saved = server.post("/pic/save", {"cache_salt": salt}).json()
        assert saved["segments"] == 3
    names = [file.stem.partition("-")[2] for file in (tmp_path / "store").iterdir()]
    assert len(names) == 6 and len(set(names)) == 3
    with serve(path, logs / f"tp2_load_{kind}.log", *TINY, *flags, env=ENV) as server:
        prompt = assemble([("text", [9]), *parts[::-1], ("text", [3, 4])])
        answer = ask(server, prompt, salt)
        assert [one["hit"] for one in answer["meta_info"]["pic"]["segments"]] == [True] * 3
        waited = answer["meta_info"]["pic"]["waited_for"]
        assert [one["source"] for one in waited if one["segment"] is not None] == ["store"] * 3
        assert answer["meta_info"]["pic"]["tokens_compiled"] == 1
        check_hybrid(answer, *prompt, kind, 1)


@pytest.mark.server
@pytest.mark.long
@pytest.mark.parametrize(
    ("fault", "reason"), [("ranks_differ", "differ"), ("one_rank_refuses", "second rank")]
)
def test_what_one_rank_says_holds_for_all(
    tiny_path: pathlib.Path, tmp_path: pathlib.Path, logs: pathlib.Path, fault: str, reason: str
) -> None:
    env = ENV | faults.environment(tmp_path / "faults", fault)
    with serve(tiny_path, logs / f"tp2_{fault}.log", *TINY, "--tp-size=2", env=env) as server:
        salt = fresh_salt()
        for number in range(EVERY):
            ids, segments = assemble([("segment", ids_of(90, 40)), ("text", ids_of(number, 5))])
            answer = server.generate(**body(ids, segments, 2, salt))
        assert reason in server.forest()["refusal"]
        assert reason in answer["meta_info"]["pic"]["reason"]
        check_exact(answer, ids, 2)
        assert reason in server.log.read_text()
