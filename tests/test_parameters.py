"""Every sampling parameter that SGLang has, alone and together, marked and not: an
answer or a 400, and the server goes on. Beams beside linked rows."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import pytest
from linking import assemble, body, check_linked, fresh_salt, ids_of
from sglang.srt.sampling.sampling_params import SamplingParams
from traffic import wait_idle

from sglang_pic.eval.serving import Server

pytestmark = pytest.mark.server

SCHEMA = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
TAG = {
    "type": "structural_tag",
    "format": {"type": "json_schema", "json_schema": SCHEMA},
}
GRAMMARS = {
    "json_schema": json.dumps(SCHEMA),
    "regex": "[ab]{3}",
    "ebnf": 'root ::= "a" | "b"',
    "structural_tag": json.dumps(TAG),
}
VALUES: dict[str, Any] = {
    "max_new_tokens": 4,
    "stop": ["qqq"],
    "stop_token_ids": [3],
    "stop_regex": "q{3}",
    "temperature": 0.7,
    "top_p": 0.9,
    "top_k": 7,
    "min_p": 0.01,
    "frequency_penalty": 0.3,
    "presence_penalty": -0.3,
    "repetition_penalty": 1.3,
    "min_new_tokens": 2,
    "n": 2,
    "ignore_eos": True,
    "skip_special_tokens": False,
    "spaces_between_special_tokens": False,
    "no_stop_trim": True,
    "stream_interval": 2,
    "logit_bias": {"17": 1.5},
    "sampling_seed": 11,
    "custom_params": {"a": [1, 2]},
}
# Another way to search, which takes few of the others; not for this server.
ELSE: dict[str, Any] = {"beam_width": 2, "watermark": {"enabled": True, "key": 5}}
INTERNAL = {
    *("stop_strs", "stop_regex_strs", "stop_str_max_len", "stop_regex_max_len"),
    *("is_normalized", "ebnf_full_assistant"),
}

ALONE = [{name: value} for name, value in (VALUES | GRAMMARS | ELSE).items()]
TOGETHER = [
    VALUES,
    *({**VALUES, name: value} for name, value in GRAMMARS.items()),
    {**VALUES, **GRAMMARS},
    {**VALUES, **ELSE},
    {"beam_width": 3, "n": 2, "max_new_tokens": 4, "stop_token_ids": [3], "ignore_eos": True},
]
# Grammars that come to an end where no token may.
DEAD_ENDS = [
    {"min_new_tokens": 12, "max_new_tokens": 16, "temperature": temperature, **more, **grammar}
    for temperature in (0, 1)
    for more in ({}, {"top_k": 7, "top_p": 0.9})
    for grammar in (
        {"regex": "[ab]"},
        {"ebnf": 'root ::= "a" | "b"'},
        {"json_schema": json.dumps({"const": 1})},
    )
]


def test_none_is_forgotten() -> None:
    assert {*VALUES, *GRAMMARS, *ELSE, *INTERNAL} == set(SamplingParams.__struct_fields__)


def check_alive(server: Server) -> None:
    assert server.generate(text="One, two,", sampling_params={"max_new_tokens": 1})


@pytest.mark.parametrize("marked", [False, True], ids=["unmarked", "marked"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_the_server_outlives_every_parameter(smollm: Server, marked: bool, stream: bool) -> None:
    refused = []
    for params in [*ALONE, *TOGETHER]:
        request: dict[str, Any] = {"sampling_params": {"max_new_tokens": 4, **params}}
        document = "The ferry across Lake Orrin leaves from the stone pier at seven. " * 4
        if marked:
            parts = ["Read this.\n", {"segment": document}, "\nWhen does it leave?"]
            request |= {"pic": {"parts": parts}, "cache_salt": fresh_salt()}
        else:
            request["text"] = document
        response = smollm.post("/generate", {**request, "stream": stream})
        if response.status_code == 400 or (stream and '"code":400' in response.text):
            refused.append(params)
        else:
            # What is drawn may bring a grammar to its end before `min_new_tokens`.
            ended = "accept_token failed" in response.text
            assert response.status_code == 200 or ended, (params, response.text)
        check_alive(smollm)
    # What is not for this server, and what excludes each other.
    assert refused == [{"watermark": ELSE["watermark"]}, *TOGETHER[5:7]]


def test_a_grammar_that_leaves_no_token_ends_its_request_alone(smollm: Server) -> None:
    for params in DEAD_ENDS:
        document = "The ferry leaves at seven. " * 4
        answer = smollm.post("/generate", {"text": document, "sampling_params": params})
        assert answer.status_code in (200, 400, 500), answer.text
        assert "accept_token failed" in answer.text, (params, answer.text)
        check_alive(smollm)


def beam(ids: list[int], width: int) -> dict[str, Any]:
    return {"input_ids": ids, "sampling_params": {"max_new_tokens": 12, "beam_width": width}}


def test_a_marked_beam_is_answered_as_stock_would(page1: Server) -> None:
    prompt = assemble([("segment", ids_of(601, 60)), ("segment", ids_of(602, 60)), ("text", [5])])
    plain = page1.generate(**beam(prompt[0], 2))
    marked = {"segments": [{"start": s, "end": e} for s, e in prompt[1]]}
    answer = page1.generate(**beam(prompt[0], 2), pic=marked, cache_salt=fresh_salt())
    assert answer["meta_info"]["pic"]["reason"] == "beam_search"
    assert answer["meta_info"]["pic"]["tokens_compiled"] == 0
    assert answer["output_ids"] == plain["output_ids"]
    wait_idle(page1)


def test_a_beam_beside_linked_rows(page1: Server) -> None:
    """Its members are rows of no request, behind those of all."""
    prompt = assemble([("segment", ids_of(603, 70)), ("segment", ids_of(604, 70)), ("text", [5])])
    request = body(*prompt, 200, fresh_salt(), seam=4)
    page1.generate(**body(*prompt, 1, request["cache_salt"], seam=4))
    alone = page1.generate(**beam(ids_of(605, 40), 3))
    answers: list[Any] = []
    thread = threading.Thread(target=lambda: answers.append(page1.generate(**request)))
    thread.start()
    while page1.forest()["live_plans"] == 0 and thread.is_alive():
        time.sleep(0.02)
    beside = page1.generate(**beam(ids_of(605, 40), 3))
    assert thread.is_alive(), "the linked request was over before the beam"
    thread.join()
    assert beside["output_ids"] == alone["output_ids"]
    check_linked(answers[0], *prompt, seam=4, page=1, n_new=200)
    wait_idle(page1)
