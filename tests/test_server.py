"""What a server with linking promises beside right answers: one copy of shared
pages, nothing leaked, clear errors, tenants apart, exact where asked."""

from __future__ import annotations

import random
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from linking import (
    TOLERANCE,
    assemble,
    body,
    check_exact,
    check_linked,
    fresh_salt,
    ids_of,
    model,
)
from traffic import check_no_leak

from sglang_pic.eval.oracle import dense
from sglang_pic.eval.serving import Server

pytestmark = pytest.mark.server


def reasons(answer: dict[str, Any]) -> list[str]:
    return [segment["reason"] for segment in answer["meta_info"]["pic"]["segments"]]


def test_concurrent_requests_hold_one_copy(page1: Server) -> None:
    """Eight running requests over the same four segments, in eight orders: the
    segments' pages exist once, and nothing else but private tokens."""
    documents = [ids_of(40 + i, 150 + i) for i in range(4)]
    salt = fresh_salt()
    rng = random.Random(3)
    total = page1.forest()["available_tokens"] + page1.forest()["evictable_tokens"]
    prompts = []
    for _ in range(8):
        order = rng.sample(documents, 4)
        prompts.append(assemble([*(("segment", d) for d in order), ("text", ids_of(7, 9))]))
    page1.generate(**body(*prompts[0], 1, salt, seam=4))
    shared = sum(len(document) for document in documents)
    peaks = []
    with ThreadPoolExecutor(8) as pool:
        answers = [
            pool.submit(page1.generate, **body(*prompt, 150, salt, seam=4)) for prompt in prompts
        ]
        while not all(answer.done() for answer in answers):
            peaks.append(page1.forest())
            time.sleep(0.05)
    computed = sum(a.result()["meta_info"]["pic"]["tokens_computed"] + 151 for a in answers)
    busiest = max(peaks, key=lambda state: state["live_plans"])
    assert busiest["live_plans"] == 8
    assert busiest["protected_tokens"] == shared
    private = total - busiest["available_tokens"] - busiest["evictable_tokens"] - shared
    assert 0 < private <= computed < 8 * shared
    segments = {s["id"]: s for s in busiest["segments"] if s["tokens"] in range(150, 154)}
    assert all(s["held"] == s["tokens"] for s in segments.values())


def test_relocated_requests_own_copies(page1: Server) -> None:
    """The baseline for memory: every request pays for its reused tokens again."""
    documents = [ids_of(60 + i, 120) for i in range(3)]
    salt = fresh_salt()
    prompt = assemble([*(("segment", d) for d in documents), ("text", [5])])
    page1.generate(**body(*prompt, 1, salt, seam=4))
    # In use: neither free nor to be evicted, whatever other tests left behind.
    total = page1.forest()["available_tokens"] + page1.forest()["evictable_tokens"]
    used = []
    with ThreadPoolExecutor(4) as pool:
        answers = [
            pool.submit(page1.generate, **body(*prompt, 120, salt, seam=4, mode="relocate"))
            for _ in range(4)
        ]
        while not all(answer.done() for answer in answers):
            state = page1.forest()
            used.append(total - state["available_tokens"] - state["evictable_tokens"])
            time.sleep(0.05)
    reused = answers[0].result()["meta_info"]["pic"]["tokens_reused"]
    assert reused > 300
    assert max(used) >= 4 * reused
    for answer in answers:
        check_linked(answer.result(), *prompt, seam=4, page=1, n_new=120)


def test_segments_give_way_and_come_back(page1: Server) -> None:
    """More segments than the pool holds: LRU eviction, then a miss, compiled
    anew, right again; pages in use are never taken."""
    salt = fresh_salt()
    first = assemble([("segment", ids_of(70, 300)), ("segment", ids_of(71, 300)), ("text", [1])])
    page1.generate(**body(*first, 2, salt, seam=4))
    for i in range(14):
        other = assemble([("segment", ids_of(100 + i, 700)), ("text", [i])])
        page1.generate(**body(*other, 1, salt, seam=4))
    held = {s["tokens"]: s["held"] for s in page1.forest()["segments"]}
    assert held[300] == 0
    again = page1.generate(**body(*first, 2, salt, seam=4))
    check_linked(again, *first, seam=4, page=1, n_new=2)


def test_exact_on_request(page1: Server) -> None:
    salt = fresh_salt()
    prompt = assemble([("segment", ids_of(80, 90)), ("segment", ids_of(81, 90)), ("text", [9])])
    page1.generate(**body(*prompt, 1, salt))
    answer = page1.generate(**body(*prompt, 3, salt, require_exact=True))
    assert answer["meta_info"]["pic"]["exactness"] == "exact"
    assert answer["meta_info"]["pic"]["reason"] == "require_exact"
    check_exact(answer, prompt[0], 3)


def test_log_probabilities_of_segments_turn_linking_off(page1: Server) -> None:
    prompt = assemble([("segment", ids_of(82, 90)), ("segment", ids_of(83, 90)), ("text", [9])])
    request = body(*prompt, 2, fresh_salt())
    answer = page1.generate(**{**request, "logprob_start_len": 0})
    assert answer["meta_info"]["pic"]["reason"] == "input_logprobs"
    assert len(answer["meta_info"]["input_token_logprobs"]) == len(prompt[0])
    check_exact(answer, prompt[0], 2)


@pytest.mark.parametrize("name", ["page1", "page16"])
def test_an_answer_behind_segments_is_scored(name: str, request: pytest.FixtureRequest) -> None:
    """Log-probabilities of prompt tokens behind the last segment, of a linked row: the
    oracle's along that continuation. Beside rows that ask for none."""
    server: Server = request.getfixturevalue(name)
    page = int(name.removeprefix("page"))
    salt, answer = fresh_salt(), ids_of(86, 21)
    parts = [("segment", ids_of(82, 90)), ("text", [7]), ("segment", ids_of(83, 97))]
    ids, segments = assemble([*parts, ("text", [9, 8])])
    asked = body(ids + answer, segments, 1, salt, seam=4)
    asked["logprob_start_len"] = len(ids) - 1
    with ThreadPoolExecutor(3) as pool:
        beside = [pool.submit(server.generate, **body(ids, segments, 5, salt)) for _ in range(2)]
        scored = pool.submit(server.generate, **asked).result()
        assert {one.result()["meta_info"]["pic"]["exactness"] for one in beside} == {"composed"}
    report = scored["meta_info"]["pic"]
    assert report["exactness"] == "composed" and report["tokens_reused"] > 100
    # The first stands for the token before ``logprob_start_len``.
    rows = scored["meta_info"]["input_token_ids_logprobs"][1:]
    told = torch.tensor([[value for value, *_ in row] for row in rows])
    where = {"seam": 4, "page": page, "min_segment": 1}
    expected = dense.linked_logprobs(
        model(), ids, segments, n_new=len(answer), forced=answer, **where
    ).full_logprobs
    assert told.shape == expected.shape
    assert (told - expected).abs().max() < TOLERANCE
    chosen = [value for value, *_ in scored["meta_info"]["input_token_logprobs"][1:]]
    assert torch.allclose(
        torch.tensor(chosen), expected[range(len(answer)), answer], atol=TOLERANCE
    )


def test_tenants_never_share(page1: Server) -> None:
    """Another salt sees none of a tenant's segments; the same salt sees them all."""
    prompt = assemble([("text", [7]), ("segment", ids_of(84, 90)), ("text", [9])])
    ours, theirs = fresh_salt(), fresh_salt()
    page1.generate(**body(*prompt, 1, ours))
    ids = {s["id"] for s in page1.forest()["segments"]}
    other = page1.generate(**body(*prompt, 1, theirs))
    assert other["meta_info"]["pic"]["segments"][0]["id"] not in ids
    same = page1.generate(**body(*prompt, 1, ours))
    assert same["meta_info"]["pic"]["segments"][0]["id"] in ids
    assert reasons(same) == ["hit"]


def test_a_hostile_prefix_poisons_nothing(page1: Server) -> None:
    """A segment first seen behind other text is compiled alone all the same."""
    salt = fresh_salt()
    segment = ids_of(85, 100)
    hostile = assemble([("text", ids_of(86, 60)), ("segment", segment), ("text", [1])])
    page1.generate(**body(*hostile, 1, salt, seam=4))
    clean = assemble([("segment", ids_of(87, 50)), ("segment", segment), ("text", [2])])
    check_linked(page1.generate(**body(*clean, 3, salt, seam=4)), *clean, seam=4, page=1, n_new=3)


def test_the_opening_text_is_an_exact_prefix(page16: Server) -> None:
    """Plain text before the first segment is reused from the ordinary prefix cache."""
    prompt = assemble([("text", ids_of(88, 70)), ("segment", ids_of(89, 60)), ("text", [3])])
    salt = fresh_salt()
    for _ in range(2):
        answer = page16.generate(**body(*prompt, 2, salt, seam=4))
        assert answer["meta_info"]["pic"]["prefix_tokens"] == 64
        check_linked(answer, *prompt, seam=4, page=16, n_new=2)


def test_a_prompt_that_only_opens_with_a_segment_is_exact(page1: Server) -> None:
    prompt = assemble([("segment", ids_of(90, 80)), ("text", [3, 4])])
    answer = page1.generate(**body(*prompt, 3, fresh_salt()))
    assert answer["meta_info"]["pic"]["exactness"] == "exact"
    assert answer["meta_info"]["pic"]["tokens_reused"] == 80
    check_exact(answer, prompt[0], 3)


def test_batches_and_samples(page1: Server) -> None:
    """A batch with one ``pic`` a prompt; several samples of one prompt."""
    a, b = (
        assemble([("segment", ids_of(i, 50)), ("segment", ids_of(i + 1, 50))]) for i in (91, 93)
    )
    salt = fresh_salt()
    batch = {
        "input_ids": [a[0], b[0]],
        "sampling_params": {"max_new_tokens": 2, "temperature": 0},
        "cache_salt": [salt, salt],
        "pic": [{"segments": [{"start": s, "end": e} for s, e in p[1]]} for p in (a, b)],
    }
    answers = page1.generate(**batch)
    assert [reasons(answer) for answer in answers] == [["hit", "hit"]] * 2
    one = body(*a, 2, salt)
    one["sampling_params"]["n"] = 3
    assert [reasons(answer) for answer in page1.generate(**one)] == [["hit", "hit"]] * 3


def test_the_same_cold_segment_is_compiled_once(page1: Server) -> None:
    salt = fresh_salt()
    segment = ids_of(95, 400)
    prompts = [assemble([("text", [i]), ("segment", segment), ("text", [i + 1])]) for i in range(6)]
    held = page1.forest()["segment_tokens"]
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda p: page1.generate(**body(*p, 1, salt, seam=4)), prompts))
    assert all(reasons(answer) == ["hit"] for answer in answers)
    assert page1.forest()["segment_tokens"] - held <= 400


BAD_BODIES = [
    ({"pic": 3}, "pic"),
    ({"pic": {"segments": [{"start": 0, "end": 500}]}}, "pic.segments[0].end"),
    ({"pic": {"segments": [{"start": 5, "end": 2}]}}, "pic.segments[0].end"),
    ({"pic": {"segments": [{"start": 0, "end": 9}, {"start": 5, "end": 12}]}}, "pic.segments[1]"),
    ({"pic": {"segments": [{"start": 0.5, "end": 9}]}}, "pic.segments[0].start"),
    ({"pic": {"segments": [{"start": 5, "end": 4}]}}, "pic.segments[0].end"),
    ({"pic": {"segments": [{"start": i, "end": i + 1} for i in range(10_000)]}}, "pic.segments"),
    ({"pic": {"segments": [], "seam": "wide"}}, "pic.seam"),
    ({"pic": {"unknown": 1}}, "pic.unknown"),
    ({"pic": [{}]}, "pic"),
    ({"pic": {}, "cache_salt": 17}, "cache_salt"),
    ({"pic": {}, "cache_salt": "pic\x1fsomebody"}, "cache_salt"),
    ({"cache_salt": "pic\x1fsomebody"}, "cache_salt"),
    (
        {
            "kv_hints": {
                "protocol_version": "1",
                "message_id": "m",
                "actions": [{"action_id": "0", "action_type": "pic.link", "action_version": "1"}],
            }
        },
        "kv_hints",
    ),
    ({"pic": {"segments": []}, "input_ids": ids_of(1, 9000)}, "9000"),
]


@pytest.mark.parametrize(("change", "named"), BAD_BODIES, ids=lambda value: str(value)[:50])
@pytest.mark.parametrize("stream", [False, True])
def test_bad_input_is_named_and_survived(
    page1: Server, change: dict[str, Any], named: str, stream: bool
) -> None:
    request = {
        "input_ids": ids_of(96, 20),
        "sampling_params": {"max_new_tokens": 1},
        "stream": stream,
        **change,
    }
    response = page1.post("/generate", request)
    # SGLang reports what its own engine finds inside a stream that has begun.
    if not (stream and named in ("cache_salt", "kv_hints", "9000", "pic")):
        assert response.status_code == 400, response.text
    assert named in response.text
    assert "400" in response.text or response.status_code == 400
    assert page1.generate(input_ids=[1, 2, 3], sampling_params={"max_new_tokens": 1})


@pytest.mark.parametrize(
    ("sent", "named"),
    [
        ({}, "text"),
        ({"input_ids": [1], "text": "x"}, "text"),
        ({"input_ids": "abc"}, "input_ids"),
        ({"input_ids": []}, "input_ids"),
        ({"input_ids": [[1, "2"]]}, "input_ids[0][1]"),
        ({"input_ids": [[]]}, "input_ids[0]"),
        ({"input_ids": [1, 2], "cache_salt": 4}, "cache_salt"),
        ({"input_ids": [1, 2], "tokens": 4}, "tokens"),
        ([1], "body"),
    ],
)
def test_bad_compiles_are_named(page1: Server, sent: Any, named: str) -> None:
    response = page1.post("/pic/compile", sent)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == named


def test_compile_ahead(page1: Server) -> None:
    salt = fresh_salt()
    segment = ids_of(97, 64)
    answer = page1.post("/pic/compile", {"input_ids": segment, "cache_salt": salt}).json()
    (made,) = answer["segments"]
    assert made["tokens"] == made["tokens_computed"] == 64
    prompt = assemble([("text", [1, 2]), ("segment", segment), ("text", [3])])
    linked = page1.generate(**body(*prompt, 1, salt, seam=4))
    assert linked["meta_info"]["pic"]["segments"][0]["id"] == made["id"]
    again = page1.post("/pic/compile", {"input_ids": segment, "cache_salt": salt}).json()
    assert again["segments"][0]["tokens_computed"] == 0
    assert {s["id"]: s["hits"] for s in page1.forest()["segments"]}[made["id"]] == 1


def test_a_report_counts_what_was_compiled_for_it(page1: Server) -> None:
    # So that nothing which other tests left makes these segments go.
    assert page1.post("/flush_cache", {}).status_code == 200
    salt, segments = fresh_salt(), [ids_of(70 + i, 40 + i) for i in range(3)]
    prompts = [
        assemble([*(("segment", segment) for segment in part), ("text", [1, 2, 3])])
        for part in (segments[:1], segments, segments)
    ]
    one, three, again = (
        page1.generate(**body(*prompt, 1, salt, seam=4))["meta_info"]["pic"] for prompt in prompts
    )
    assert one["tokens_compiled"] == 40
    assert three["tokens_compiled"] == 41 + 42
    assert again["tokens_compiled"] == 0
    batch = [body(*prompt, 1, fresh_salt(), seam=4) for prompt in prompts[:2]]
    salts = [one["cache_salt"] for one in batch]
    assert salts[0] != salts[1]
    answers = page1.generate(
        input_ids=[one["input_ids"] for one in batch],
        pic=[one["pic"] for one in batch],
        cache_salt=salts,
        sampling_params=batch[0]["sampling_params"],
    )
    counts = [answer["meta_info"]["pic"]["tokens_compiled"] for answer in answers]
    assert counts == [40, 40 + 41 + 42]


def test_samples_and_batches_ask_first_what_is_missing(page1: Server) -> None:
    """What is held is not compiled again, whatever form the request has."""
    assert page1.post("/flush_cache", {}).status_code == 200
    salt = fresh_salt()
    held, other = ids_of(80, 40), ids_of(81, 41)
    prompts = [assemble([("segment", one), ("text", [1, 2])]) for one in (held, other)]
    page1.generate(**body(*prompts[0], 1, salt, seam=4))
    sent = body(*prompts[0], 1, salt, seam=4)
    params = {**sent["sampling_params"], "n": 2, "temperature": 1}
    samples = page1.generate(**{**sent, "sampling_params": params})
    assert len(samples) == 2
    several = [body(*prompt, 1, salt, seam=4) for prompt in prompts]
    batch = {
        "input_ids": [one["input_ids"] for one in several],
        "pic": [one["pic"] for one in several],
        "cache_salt": [salt, salt],
        "sampling_params": params,
    }
    for answers, new in ((samples, [0, 0]), (page1.generate(**batch), [0, 0, 41, 41])):
        reports = [answer["meta_info"]["pic"] for answer in answers]
        assert [report["tokens_compiled"] for report in reports] == new
        assert [bool(report["waited_for"]) for report in reports] == [n > 0 for n in new]
        assert all(report["segments"][0]["reason"] == "hit" for report in reports)


def test_what_is_held_as_a_prefix_compiles_nothing(page1: Server) -> None:
    salt = fresh_salt()
    ids, segments = assemble([("text", [1, 2]), ("segment", ids_of(82, 64)), ("text", [3])])
    page1.generate(input_ids=ids, cache_salt=salt, sampling_params={"max_new_tokens": 1})
    report = page1.generate(**body(ids, segments, 1, salt, seam=4))["meta_info"]["pic"]
    assert (report["tokens_compiled"], report["waited_for"]) == (0, [])
    assert (report["exactness"], report["prefix_tokens"]) == ("exact", len(ids) - 1)
    # One token in front, and it is needed.
    report = page1.generate(**body([7, *ids], [(3, 67)], 1, salt, seam=4))["meta_info"]["pic"]
    assert report["tokens_compiled"] == 3 + 64 and report["segments"][0]["hit"]


def test_a_thousand_requests_leak_nothing(page16: Server) -> None:
    """Linked, relocated, aborted, disconnected and retracted requests: SGLang's
    strict checks run all the while, and in the end every token is accounted for."""
    check_no_leak(page16, 1000)


def test_without_an_encoder_no_document_is_encoded(page1: Server) -> None:
    pic = {"mode": "encode", "segments": [{"start": 0, "end": 2}]}
    answer = page1.post("/generate", {"input_ids": [1, 2, 3], "pic": pic})
    assert answer.status_code == 400
    assert "no encoder: --pic-encoder" in answer.json()["error"]["message"]
    assert page1.get("/pic/info").json()["encoder"] is None
