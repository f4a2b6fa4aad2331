"""Segments computed in company on a real server: what it answers is an oracle's."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from linking import (
    TOLERANCE,
    VOCAB,
    assemble,
    body,
    check_exact,
    distributions,
    fresh_salt,
    ids_of,
    model,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from sglang_pic.eval.models.smollm2 import ensure_model
from sglang_pic.eval.oracle.company import company_logprobs
from sglang_pic.eval.passages import load_passages
from sglang_pic.eval.serving import Server
from sglang_pic.server.guests import PATH, Shipped

pytestmark = pytest.mark.server
N_NEW = 3


def prompt_of(seed: int, lengths: list[int]) -> tuple[list[int], list[tuple[int, int]]]:
    """An opening, segments with text between, and a question."""
    rng = random.Random(seed)
    ids, segments = ids_of(seed, 19), []
    for i, length in enumerate(lengths):
        segments.append((len(ids), len(ids) + length))
        ids += ids_of(1000 * seed + i, length)
        if rng.random() < 0.5:
            ids += ids_of(seed + i, 3)
    return ids + ids_of(seed + 77, 9), segments


def compile_company(
    server: Server,
    ids: list[int],
    segments: list[tuple[int, int]],
    salt: str,
    opening: list[int] | None = None,
) -> Any:
    answer = server.post(
        "/pic/compile",
        {
            "input_ids": [ids[start:end] for start, end in segments],
            "opening": ids[: min(segments)[0]] if opening is None else opening,
            "company": True,
            "cache_salt": salt,
        },
    )
    assert answer.status_code == 200, answer.text
    return answer.json()["companies"]


@pytest.fixture(params=["page1", "page16"])
def paged(request: pytest.FixtureRequest) -> tuple[Server, int]:
    return request.getfixturevalue(request.param), int(request.param[4:])


@pytest.mark.parametrize("seam", [0, 5])
@pytest.mark.parametrize("lengths", [[70, 40], [33, 64, 90]])
def test_a_company_answers_as_its_oracle(
    paged: tuple[Server, int], lengths: list[int], seam: int
) -> None:
    server, page = paged
    ids, segments = prompt_of(len(lengths) + seam, lengths)
    salt = fresh_salt()
    made = compile_company(server, ids, segments[::-1], salt)
    assert [len(one["segments"]) for one in made] == [len(lengths)]
    answer = server.generate(**body(ids, segments, N_NEW, salt, company_seam=seam))
    report = answer["meta_info"]["pic"]
    assert [one["company"] for one in report["segments"]] == [len(lengths)] * len(lengths)
    chosen = answer["output_ids"]
    expected = company_logprobs(
        model(), ids, segments, [range(len(segments))],
        seam=seam, page=page, n_new=N_NEW, forced=chosen,
    ).full_logprobs  # fmt: skip
    assert (distributions(answer) - expected).abs().max() < TOLERANCE


def test_two_companies_serve_one_prompt(page1: Server) -> None:
    ids, segments = prompt_of(9, [40, 50, 60, 45])
    salt = fresh_salt()
    for pair in ((0, 3), (1, 2)):
        part = [segments[i] for i in pair]
        body_of = {
            "input_ids": [ids[start:end] for start, end in part],
            "opening": ids[: segments[0][0]],
            "company": True,
            "cache_salt": salt,
        }
        assert page1.post("/pic/compile", body_of).status_code == 200
    answer = page1.generate(**body(ids, segments, N_NEW, salt))
    expected = company_logprobs(
        model(), ids, segments, [(0, 3), (1, 2)],
        seam=0, page=1, n_new=N_NEW, forced=answer["output_ids"],
    ).full_logprobs  # fmt: skip
    assert (distributions(answer) - expected).abs().max() < TOLERANCE


def test_a_segment_among_guests_answers_as_its_oracle(smollm: Server) -> None:
    """Its opening and guests are the model's own: of a server with a tokenizer."""
    path = ensure_model()
    tokenizer = AutoTokenizer.from_pretrained(path)
    first, second = (passage.document for passage in load_passages()[:2])
    parts = [tokenizer.encode(text) for text in ("Read.\n", first, "\n\n", second, "\nWho?")]
    ids, segments = assemble(
        [("segment" if i in (1, 3) else "text", part) for i, part in enumerate(parts)]
    )
    salt, guests = fresh_salt(), Shipped(tokenizer).of(b"", tuple(parts[1])).texts
    assert guests == Shipped(tokenizer).of(b"", tuple(parts[3])).texts
    for segment in segments:
        (made,) = compile_company(smollm, ids, [segment], salt, opening=parts[0])
        assert made["guests"] == 3
        tokens = len(parts[0]) + sum(map(len, guests)) + segment[1] - segment[0]
        assert made["tokens_computed"] == tokens
    answer = smollm.generate(**body(ids, segments, N_NEW, salt, seam=8))
    report = answer["meta_info"]["pic"]
    assert [(one["company"], one["guests"]) for one in report["segments"]] == [(4, 3)] * 2
    expected = company_logprobs(
        AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, attn_implementation="eager"
        ).eval(),
        ids, segments, [[0], [1]],
        seam=8, page=1, n_new=N_NEW, forced=answer["output_ids"], guests=guests,
    ).full_logprobs[:, :VOCAB]  # fmt: skip
    assert (distributions(answer) - expected).abs().max() < TOLERANCE


def test_exact_requests_stay_exact_beside_companies(page1: Server) -> None:
    ids, segments = prompt_of(11, [40, 50])
    salt = fresh_salt()
    compile_company(page1, ids, segments, salt)
    answer = page1.generate(**body(ids, segments, N_NEW, salt, require_exact=True))
    check_exact(answer, ids, N_NEW)
    assert answer["meta_info"]["pic"]["exactness"] == "exact"


def test_a_company_serves_in_another_mode(page1: Server) -> None:
    ids, segments = prompt_of(12, [40, 50])
    salt = fresh_salt()
    compile_company(page1, ids, segments, salt)
    shared = page1.generate(**body(ids, segments, N_NEW, salt))
    moved = page1.generate(**body(ids, segments, N_NEW, salt, mode="relocate"))
    assert moved["meta_info"]["pic"]["segments"][0]["company"] == 2
    assert (distributions(shared) - distributions(moved)).abs().max() < TOLERANCE


def test_the_forest_lists_companies_until_they_are_flushed(page1: Server) -> None:
    ids, segments = prompt_of(13, [40, 50])
    salt = fresh_salt()
    (made,) = compile_company(page1, ids, segments, salt)
    assert made["tokens_computed"] == 2 * (19 + 90)
    state = page1.forest()
    (listed,) = [one for one in state["companies"] if one["segments"] == sorted(made["segments"])]
    assert listed["held"] == listed["segments"] and listed["orders"] == 2
    assert listed["tokens"] == 90 and listed["opening_tokens"] == 19
    assert state["integrity"] == "ok"
    page1.post("/pic/flush", {"cache_salt": salt}).raise_for_status()
    assert listed["id"] not in [one["id"] for one in page1.forest()["companies"]]


def test_what_is_wrong_with_a_company_is_said(page1: Server) -> None:
    segment = ids_of(1, 40)
    one = page1.post("/pic/compile", {"input_ids": [segment], "company": True})
    assert one.status_code == 200 and one.json()["companies"] == []
    for opening, status in ((5, 400), ([-1], 400), ([10**6], 400), ("text", 400)):
        answer = page1.post(
            "/pic/compile",
            {"input_ids": [segment, ids_of(2, 40)], "company": True, "opening": opening},
        )
        assert answer.status_code == status, answer.text
        assert "opening" in answer.text
    stray = page1.post("/pic/compile", {"input_ids": [segment], "opening": [1]})
    assert stray.status_code == 400 and "opening" in stray.text


def _telling(texts: Sequence[str]) -> set[str]:
    """Words that a text alone would bring: names and numbers."""
    words = {word for text in texts for word in re.findall(r"\w+", text)}
    return {word for word in words if len(word) > 2 and (word[0].isupper() or word.isdigit())}


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_no_word_of_a_guest_reaches_an_answer(smollm: Server) -> None:
    """500 answers over documents compiled among guests; a word that full recompute says
    as well is the model's own."""
    passages = load_passages()
    guests = [text for texts in json.loads(PATH.read_text()).values() for text in texts]
    telling = _telling(guests) - _telling([one.document for one in passages])
    assert len(telling) > 50
    asked = [(passage, question.text) for passage in passages for question in passage.questions]
    opening, salt, rng = "Read.\n\n", fresh_salt(), random.Random(0)
    for passage in passages:
        body = {"text": passage.document, "opening": opening, "company": True}
        smollm.post("/pic/compile", {**body, "cache_salt": salt}).raise_for_status()
    sampling = {"max_new_tokens": 16, "temperature": 0}
    leaked, among = [], 0
    for i in range(500):
        passage, question = asked[i % len(asked)]
        others = rng.sample([one for one in passages if one is not passage], 2)
        documents = rng.sample([passage, *others], 3)
        parts = [opening, *({"segment": one.document} for one in documents), f"\n{question}\n"]
        fields = {"cache_salt": salt, "sampling_params": sampling}
        out = smollm.generate(**fields, pic={"parts": parts, "turns": False})
        among += sum(one["guests"] > 0 for one in out["meta_info"]["pic"]["segments"])
        said = telling & set(re.findall(r"\w+", out["text"]))
        if said:
            exact = {"parts": parts, "require_exact": True}
            full = smollm.generate(**fields, pic=exact)["text"]
            leaked += [(word, out["text"]) for word in said - set(re.findall(r"\w+", full))]
    assert among == 3 * 500
    assert not leaked
