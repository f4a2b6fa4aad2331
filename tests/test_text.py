"""A real model behind every front: text, chat, completions, frontend language."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import Any

import openai
import pytest
import requests
import sglang as sgl
from linking import fresh_salt

from sglang_pic import pic_segment
from sglang_pic.client import NotFoundError, PicClient
from sglang_pic.eval.models.smollm2 import ensure_model
from sglang_pic.eval.passages import load_passages
from sglang_pic.eval.serving import Server
from sglang_pic.forest.keys import namespace
from sglang_pic.lang import PicRuntimeEndpoint, report_of

pytestmark = pytest.mark.server

DOCUMENTS = [f"{passage.title}\n{passage.text}\n" for passage in load_passages()[:4]]
QUESTION = "\nQuestion: name one thing. Answer:"


@pytest.fixture(scope="module")
def client(smollm: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=smollm.url + "/v1", api_key="none")


def marked(documents: list[str]) -> dict[str, Any]:
    return {"parts": [*({"segment": document} for document in documents), QUESTION]}


def greedy(n: int) -> dict[str, Any]:
    return {"max_new_tokens": n, "temperature": 0}


def test_text_parts_and_ranges_are_one_form(smollm: Server) -> None:
    text = "".join(DOCUMENTS) + QUESTION
    ranges, at = [], 0
    for document in DOCUMENTS:
        ranges.append({"start": at, "end": at + len(document)})
        at += len(document)
    salt = fresh_salt()
    options = {"sampling_params": greedy(8), "cache_salt": salt}
    # As the first of its conversation, each of them.
    parts = smollm.generate(pic={**marked(DOCUMENTS), "turns": False}, **options)
    spans = smollm.generate(text=text, pic={"segments": ranges, "turns": False}, **options)
    reports = [answer["meta_info"]["pic"] for answer in (parts, spans)]
    compiled = [report.pop("tokens_compiled") for report in reports]
    waits = [(report.pop("waited_s"), report.pop("waited_for")) for report in reports]
    assert waits[0][0] > 0 and len(waits[0][1]) == len(DOCUMENTS) and waits[1] == (0, [])
    assert compiled[0] > 300 and compiled[1] == 0
    assert reports[0] == reports[1]
    assert reports[0]["tokens_reused"] > 300
    assert parts["output_ids"] == spans["output_ids"]


def test_order_does_not_matter_to_reuse(smollm: Server) -> None:
    salt = fresh_salt()
    options = {"sampling_params": greedy(4), "cache_salt": salt}
    forward = smollm.generate(pic=marked(DOCUMENTS), **options)["meta_info"]["pic"]
    backward = smollm.generate(pic=marked(DOCUMENTS[::-1]), **options)["meta_info"]["pic"]
    assert {s["id"] for s in forward["segments"]} == {s["id"] for s in backward["segments"]}
    assert all(s["reason"] == "hit" for s in backward["segments"])


def test_unmarked_text_is_no_segment(smollm: Server) -> None:
    """The same document outside a mark is neither a segment nor reused as one."""
    salt = fresh_salt()
    document = DOCUMENTS[0]
    parts = [{"segment": document}, "Again: " + document + QUESTION]
    pic = {"parts": parts, "turns": False}
    options = {"sampling_params": greedy(4), "cache_salt": salt}
    smollm.generate(pic=pic, **options)
    report = smollm.generate(pic=pic, **options)["meta_info"]["pic"]
    assert len(report["segments"]) == 1
    assert report["tokens_reused"] <= report["segments"][0]["end"]
    plain = smollm.generate(text="x" + document + QUESTION, **options)
    assert "pic" not in plain["meta_info"]
    assert plain["meta_info"]["cached_tokens"] == 0


def chat_messages(documents: list[str]) -> list[dict[str, Any]]:
    parts = [{"type": "text", "text": d, "pic_segment": True} for d in documents]
    return [
        {"role": "system", "content": "You answer questions."},
        {"role": "user", "content": [*parts, {"type": "text", "text": QUESTION}]},
    ]


def test_chat_through_the_stock_client(client: openai.OpenAI) -> None:
    salt = fresh_salt()
    options = {
        "model": "default",
        "temperature": 0,
        "max_tokens": 12,
        "extra_body": {"cache_salt": salt},
    }
    for documents in (DOCUMENTS, DOCUMENTS[::-1]):
        answer = client.chat.completions.create(messages=chat_messages(documents), **options)
        report = answer.usage.pic
        assert [s["reason"] for s in report["segments"]] == ["hit"] * len(documents)
        assert report["tokens_reused"] + report["tokens_computed"] == answer.usage.prompt_tokens
        assert report["exactness"] == "composed"


@pytest.mark.parametrize("usage", [False, True])
def test_chat_stream_is_the_answer(client: openai.OpenAI, usage: bool) -> None:
    salt = fresh_salt()
    options = {
        "model": "default",
        "temperature": 0,
        "max_tokens": 12,
        "messages": chat_messages(DOCUMENTS[:2]),
    }
    body = {"cache_salt": salt, "pic": {"seam": 8}}
    whole = client.chat.completions.create(**options, extra_body=body)
    stream = list(
        client.chat.completions.create(
            **options,
            stream=True,
            extra_body=body,
            **({"stream_options": {"include_usage": True}} if usage else {}),
        )
    )
    text = "".join(c.choices[0].delta.content or "" for c in stream if c.choices)
    assert text == whole.choices[0].message.content
    report = stream[-1].usage.pic if usage else stream[-1].pic
    assert report["seam"] == 8
    assert report["tokens_reused"] > 100


def test_segments_may_be_named_beside_the_messages(client: openai.OpenAI) -> None:
    messages = chat_messages(DOCUMENTS[:2])
    for part in messages[1]["content"]:
        part.pop("pic_segment", None)
    named = {"segments": [{"message": 1, "part": 0}, {"message": 1, "part": 1}]}
    answer = client.chat.completions.create(
        model="default", messages=messages, max_tokens=2, extra_body={"pic": named}
    )
    assert len(answer.usage.pic["segments"]) == 2


def test_the_chat_prompt_is_stocks(smollm: Server) -> None:
    """With the rule ``whole``, marks change no token of the prompt; with either
    rule none of them reaches the model."""
    messages = chat_messages(DOCUMENTS[:2])
    bare = [
        {**m, "content": [{"type": "text", "text": p["text"]} for p in m["content"]]}
        if isinstance(m["content"], list)
        else m
        for m in messages
    ]
    body = {"model": "default", "max_tokens": 1, "return_prompt_token_ids": True}

    def prompt(messages: list[dict[str, Any]], **fields: Any) -> str:
        answer = smollm.post("/v1/chat/completions", {**body, "messages": messages, **fields})
        assert answer.status_code == 200, answer.text
        return json.dumps(answer.json())

    def ids(answer: str) -> list[int]:
        found: list[int] = []

        def walk(value: Any) -> None:
            if isinstance(value, dict):
                found.extend(value.get("prompt_token_ids") or [])
                for inner in value.values():
                    walk(inner)
            elif isinstance(value, list):
                for inner in value:
                    walk(inner)

        walk(json.loads(answer))
        return found

    stock = prompt(bare)
    whole = prompt(messages, pic={"tokenize": "whole"})
    pieces = prompt(messages)
    assert len(ids(stock)) > 100
    assert ids(whole) == ids(stock)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ensure_model())
    assert tokenizer.decode(ids(pieces)) == tokenizer.decode(ids(stock))
    for answer in (stock, whole, pieces):
        assert "PICOPEN" not in answer
        assert "PICOPEN" not in tokenizer.decode(ids(answer))


def test_completions(client: openai.OpenAI) -> None:
    text = DOCUMENTS[0] + DOCUMENTS[1] + QUESTION
    cut = len(DOCUMENTS[0])
    ranges = [{"start": 0, "end": cut}, {"start": cut, "end": cut + len(DOCUMENTS[1])}]
    pic = {"segments": ranges, "turns": False}
    options = {"model": "default", "max_tokens": 6, "temperature": 0, "extra_body": {"pic": pic}}
    answer = client.completions.create(prompt=text, **options)
    assert [s["reason"] for s in answer.usage.pic["segments"]] == ["hit", "hit"]
    stream = list(client.completions.create(prompt=text, stream=True, **options))
    assert "".join(c.choices[0].text for c in stream) == answer.choices[0].text
    assert stream[-1].pic["tokens_reused"] == answer.usage.pic["tokens_reused"]
    parts = {"parts": [{"segment": DOCUMENTS[0]}, QUESTION]}
    made = client.completions.create(model="default", prompt="", extra_body={"pic": parts})
    assert len(made.usage.pic["segments"]) == 1


def events(response: requests.Response) -> list[dict[str, Any]]:
    lines = response.content.split(b"\n")
    return [json.loads(line[6:]) for line in lines if line.startswith(b"data: {")]


def ids_of_segments(report: dict[str, Any]) -> list[str]:
    return [segment["id"] for segment in report["segments"]]


def test_each_answer_has_its_report(smollm: Server, client: openai.OpenAI) -> None:
    """Of several prompts, and of several samples; by the choices' index."""
    spans = [[{"start": 0, "end": len(document)}] for document in DOCUMENTS[:2]]
    prompts = [DOCUMENTS[0] + QUESTION, "No segment.", DOCUMENTS[1] + QUESTION]
    pic = [{"segments": spans[0]}, None, {"segments": spans[1]}]
    options = {"model": "default", "max_tokens": 3, "temperature": 0}
    extra = {"extra_body": {"pic": pic, "cache_salt": fresh_salt()}}
    answer = client.completions.create(prompt=prompts, n=2, **options, **extra)
    reports = answer.usage.pic
    assert [len(report["segments"]) for report in reports] == [1, 1, 0, 0, 1, 1]
    assert ids_of_segments(reports[0]) == ids_of_segments(reports[1])
    assert ids_of_segments(reports[0]) != ids_of_segments(reports[4])
    assert reports[0]["tokens_compiled"] > 50 and reports[4]["tokens_compiled"] > 50
    for usage in ({}, {"stream_options": {"include_usage": True}}):
        stream = list(
            client.completions.create(prompt=prompts, n=2, stream=True, **usage, **options, **extra)
        )
        told = [getattr(chunk, "pic", None) for chunk in stream]
        if usage:
            assert not any(told)
            ids = list(map(ids_of_segments, stream[-1].usage.pic))
        else:
            ends = {
                chunk.choices[0].index: one
                for chunk, one in zip(stream, told, strict=True)
                if chunk.choices[0].finish_reason
            }
            assert sum(one is not None for one in told) == 6
            ids = [ids_of_segments(ends[index]) for index in range(6)]
        assert ids == list(map(ids_of_segments, reports))
        for index, choice in enumerate(answer.choices):
            mine = [c for chunk in stream for c in chunk.choices if c.index == index]
            assert "".join(c.text for c in mine) == choice.text


def test_chat_with_several_samples(client: openai.OpenAI) -> None:
    options = {"model": "default", "max_tokens": 3, "messages": chat_messages(DOCUMENTS[:1])}
    answer = client.chat.completions.create(n=2, **options)
    assert [len(report["segments"]) for report in answer.usage.pic] == [1, 1]


def test_an_answer_without_a_token_has_its_report(smollm: Server) -> None:
    salt = fresh_salt()
    body = {"pic": marked(DOCUMENTS[:2]), "cache_salt": salt, "sampling_params": greedy(0)}
    answer = smollm.generate(**body)
    assert (answer["text"], len(answer["meta_info"]["pic"]["segments"])) == ("", 2)
    told = events(smollm.post("/generate", {**body, "stream": True}))
    assert [len(chunk["meta_info"]["pic"]["segments"]) for chunk in told] == [2]


def test_usage_in_every_chunk_delays_none(client: openai.OpenAI) -> None:
    stream = list(
        client.chat.completions.create(
            model="default",
            messages=chat_messages(DOCUMENTS[:1]),
            max_tokens=5,
            stream=True,
            stream_options={"include_usage": True, "continuous_usage_stats": True},
        )
    )
    assert sum(chunk.usage is not None for chunk in stream) > 2
    assert [hasattr(chunk.usage, "pic") for chunk in stream] == [False] * (len(stream) - 1) + [True]


def test_a_stream_says_it_once(smollm: Server) -> None:
    told = events(
        smollm.post(
            "/generate",
            {
                "pic": marked(DOCUMENTS[:2]),
                "sampling_params": {**greedy(6), "ignore_eos": True},
                "stream": True,
            },
        )
    )
    assert len(told) > 2
    assert ["pic" in chunk["meta_info"] for chunk in told] == [True] + [False] * (len(told) - 1)


def test_what_is_not_linked_may_still_be_a_prefix(smollm: Server) -> None:
    text = DOCUMENTS[0] + QUESTION
    span = {"start": 0, "end": len(DOCUMENTS[0])}
    body = {
        "text": text,
        "pic": {"segments": [span], "require_exact": True},
        "cache_salt": fresh_salt(),
        "sampling_params": greedy(1),
    }
    cold, warm = (smollm.generate(**body)["meta_info"]["pic"] for _ in range(2))
    assert cold["reason"] == warm["reason"] == "require_exact"
    told = [(one["segments"][0]["hit"], one["segments"][0]["reason"]) for one in (cold, warm)]
    assert told == [(False, "request_not_linked"), (True, "prefix")]


def test_a_list_of_one_prompt_is_one_prompt(smollm: Server, client: openai.OpenAI) -> None:
    """As LangChain sends it."""
    parts = {"parts": [{"segment": DOCUMENTS[0]}, QUESTION]}
    options = {"model": "default", "max_tokens": 3, "temperature": 0}
    answers = [
        client.completions.create(prompt=prompt, extra_body={"pic": pic}, **options)
        for prompt, pic in (("", parts), ([""], parts), ([""], [parts]))
    ]
    assert len({answer.choices[0].text for answer in answers}) == 1
    assert all(len(answer.usage.pic["segments"]) == 1 for answer in answers)
    span = {"start": 0, "end": len(DOCUMENTS[0])}
    body = {"text": [DOCUMENTS[0] + QUESTION], "pic": {"segments": [span]}}
    (answer,) = smollm.generate(**body, sampling_params=greedy(1))
    assert len(answer["meta_info"]["pic"]["segments"]) == 1


def test_a_report_may_be_asked_for(smollm: Server, client: openai.OpenAI) -> None:
    """By the id in any chunk, for a client that drops what it does not know."""
    salt = fresh_salt()
    us = PicClient(smollm.url, cache_salt=salt)
    body = {"cache_salt": salt}
    chat = {"model": "default", "max_tokens": 3, "messages": chat_messages(DOCUMENTS[:2])}
    first, *_, last = client.chat.completions.create(stream=True, extra_body=body, **chat)
    assert us.report(first.id) == last.pic
    named = {**body, "rid": f"mine of {salt}?"}
    client.chat.completions.create(extra_body=named, **chat)
    assert len(us.report(named["rid"])["segments"]) == 2
    answer = smollm.generate(**body, pic=marked(DOCUMENTS[:1]), sampling_params=greedy(1))
    assert us.report(answer["meta_info"]["id"]) == answer["meta_info"]["pic"]
    for other in (None, fresh_salt()):
        with pytest.raises(NotFoundError) as caught:
            PicClient(smollm.url, cache_salt=other).report(first.id)
        assert caught.value.field == "id"
    plain = smollm.generate(text="No segment.", sampling_params=greedy(1))
    with pytest.raises(NotFoundError):
        PicClient(smollm.url).report(plain["meta_info"]["id"])


def blocks(documents: list[str], kind: str = "text") -> list[dict[str, Any]]:
    marked_parts = [{"type": kind, "text": d, "pic_segment": True} for d in documents]
    return [*marked_parts, {"type": kind, "text": QUESTION}]


def test_anthropic_messages(smollm: Server) -> None:
    system = [{"type": "text", "text": DOCUMENTS[2], "pic_segment": True}]
    body = {
        "model": "default",
        "max_tokens": 6,
        "temperature": 0,
        "system": system,
        "messages": [{"role": "user", "content": blocks(DOCUMENTS[:2])}],
        "pic": {"seam": 8, "turns": False},
    }
    whole = smollm.post("/v1/messages", body).json()
    report = whole["usage"]["pic"]
    assert (report["seam"], len(report["segments"])) == (8, 3)
    assert [segment["reason"] for segment in report["segments"]] == ["hit"] * 3
    told = events(smollm.post("/v1/messages", {**body, "stream": True}))
    assert told[0]["message"]["usage"]["pic"]["tokens_reused"] == report["tokens_reused"]
    text = "".join(event["delta"].get("text", "") for event in told if "delta" in event)
    assert text == whole["content"][0]["text"]
    us = PicClient(smollm.url)
    assert us.report(whole["id"]) == report
    assert us.report(told[0]["message"]["id"])["segments"]
    counted = smollm.post("/v1/messages/count_tokens", {k: body[k] for k in ("model", "system",
                          "messages")}).json()  # fmt: skip
    assert counted["input_tokens"] == report["tokens_reused"] + report["tokens_computed"]
    results = [{"type": "tool_result", "tool_use_id": "1", "content": DOCUMENTS[0],
                "pic_segment": True}]  # fmt: skip
    messages = [{"role": "user", "content": results}]
    answer = smollm.post(
        "/v1/messages", {"model": "default", "max_tokens": 1, "messages": messages}
    )
    assert answer.status_code == 200, answer.text
    (segment,) = answer.json()["usage"]["pic"]["segments"]
    assert segment["id"] in ids_of_segments(report)


def test_responses(smollm: Server, client: openai.OpenAI) -> None:
    options = {
        "model": client.models.list().data[0].id,
        "temperature": 0,
        "max_output_tokens": 6,
        "input": [{"role": "user", "content": blocks(DOCUMENTS[:2], "input_text")}],
        "extra_body": {"pic": {"seam": 8, "turns": False}, "cache_salt": fresh_salt()},
    }
    whole = client.responses.create(**options)
    report = whole.usage.pic
    assert [segment["reason"] for segment in report["segments"]] == ["hit"] * 2
    *_, last = client.responses.create(stream=True, **options)
    assert last.response.usage.pic["tokens_reused"] == report["tokens_reused"]
    assert last.response.output_text == whole.output_text
    output = {"type": "function_call_output", "call_id": "1", "output": DOCUMENTS[0],
              "pic_segment": True}  # fmt: skip
    call = {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"}
    answer = client.responses.create(**{**options, "input": [call, output]})
    assert ids_of_segments(answer.usage.pic) == ids_of_segments(report)[:1]


def test_sagemakers_name_of_the_chat_endpoint(smollm: Server) -> None:
    body = {"model": "default", "max_tokens": 1, "messages": chat_messages(DOCUMENTS[:2])}
    answer = smollm.post("/invocations", body).json()
    assert len(answer["usage"]["pic"]["segments"]) == 2


LONG = "word " * 400_000
BOTH = [{"type": "text", "text": "A line.", "pic_segment": True}, {"type": "text", "text": LONG}]
INPUTS = [{**part, "type": "input_text"} for part in BOTH]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body", "named"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": BOTH}]}, "messages"),
        ("/v1/messages", {"messages": [{"role": "user", "content": BOTH}]}, "messages"),
        ("/v1/responses", {"input": [{"role": "user", "content": INPUTS}]}, "messages"),
        ("/v1/completions", {"prompt": "hi", "cache_salt": namespace((), "x")}, "cache_salt"),
        ("/generate", {"text": "hi", "cache_salt": namespace((), "x")}, "cache_salt"),
        ("/generate", {"pic": {"parts": [{"segment": LONG}]}}, "text"),
    ],
)
def test_what_is_refused_late_is_named_too(
    smollm: Server, path: str, body: dict[str, Any], named: str, stream: bool
) -> None:
    """Behind the endpoint, where SGLang answers, in its stream as well."""
    model = smollm.get("/v1/models").json()["data"][0]["id"]
    body = {"model": model, "max_tokens": 1, "stream": stream, **body}
    response = smollm.post(path, body)
    told = response.json() if response.status_code == 400 else events(response)[-1]
    assert told["error"]["param"] == named, response.text
    assert told["error"]["message"].startswith(named)


NO_TEXT = {"role": "user", "content": 3, "pic_segment": True}
OUTSIDE = {"start": 0, "end": 999}


@pytest.mark.parametrize(
    ("path", "change", "named"),
    [
        ("/v1/chat/completions", {"pic": 3}, "pic"),
        ("/v1/chat/completions", {"pic": {"seam": -1}}, "pic.seam"),
        ("/v1/chat/completions", {"pic": {"segments": [{"message": 9}]}}, "pic.segments"),
        ("/v1/chat/completions", {"messages": [NO_TEXT]}, "messages[0].content"),
        ("/v1/completions", {"pic": {"segments": [OUTSIDE]}}, "pic.segments[0].end"),
        ("/v1/completions", {"pic": {"parts": ["x"]}}, "pic.parts"),
        ("/v1/completions", {"pic": [{}]}, "pic"),
        ("/v1/completions", {"prompt": ["a", "b"], "pic": {}}, "pic"),
        ("/v1/chat/completions", {"tools": [{"pic_segment": True}]}, "tools[0].pic_segment"),
        ("/generate", {"text": "abc", "pic": {"segments": [{"start": 1, "end": 4}]}},
         "pic.segments[0].end"),
    ],
)  # fmt: skip
def test_bad_openai_requests_are_named(
    smollm: Server, path: str, change: dict[str, Any], named: str
) -> None:
    chat = path == "/v1/chat/completions"
    base = {"messages": [{"role": "user", "content": "hi"}]} if chat else {"prompt": "hi"}
    response = smollm.post(path, {"model": "default", "max_tokens": 1, **base, **change})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == named
    if chat:
        client = openai.OpenAI(base_url=smollm.url + "/v1", api_key="none")
        messages = change.get("messages", base["messages"])
        extra = {key: value for key, value in change.items() if key != "messages"}
        with pytest.raises(openai.BadRequestError, match=re.escape(named)):
            client.chat.completions.create(
                model="default", messages=messages, max_tokens=1, extra_body=extra
            )


def test_giant_text_is_refused(smollm: Server) -> None:
    giant = {"pic": {"parts": [{"segment": "word " * 400_000}, "?"]}}
    response = smollm.post("/generate", giant)
    assert response.status_code == 400
    assert smollm.post("/pic/compile", {"text": "word " * 400_000}).status_code == 400
    assert smollm.generate(text="still there?", sampling_params=greedy(1))


def test_compile_text_ahead(smollm: Server) -> None:
    salt = fresh_salt()
    answer = smollm.post("/pic/compile", {"text": DOCUMENTS, "cache_salt": salt}).json()
    assert len(answer["segments"]) == 4
    request = {"pic": marked(DOCUMENTS), "cache_salt": salt, "sampling_params": greedy(1)}
    report = smollm.generate(**request)["meta_info"]["pic"]
    assert [s["id"] for s in report["segments"]] == [s["id"] for s in answer["segments"]]


def test_invalid_json_is_sglangs_to_answer(smollm: Server) -> None:
    response = requests.post(
        smollm.url + "/generate", data=b'{"pic": ', headers={"content-type": "application/json"}
    )
    assert 400 <= response.status_code < 500


@sgl.function
def ask(s: Any, documents: list[str], question: str) -> None:
    s += sgl.system("You answer questions.")
    s += sgl.user_begin()
    for document in documents:
        s += pic_segment(document)
    s += question + sgl.user_end()
    s += sgl.assistant(sgl.gen("answer", max_tokens=8, temperature=0))


def test_frontend_language(smollm: Server) -> None:
    backend = PicRuntimeEndpoint(smollm.url, seam=8, cache_salt=fresh_salt())
    assert backend.pic_info() is not None
    states = [
        ask.run(documents=documents, question="Name one thing.", backend=backend)
        for documents in (DOCUMENTS, DOCUMENTS[::-1])
    ]
    for state in states:
        report = report_of(state, "answer")
        assert report is not None
        assert [s["reason"] for s in report["segments"]] == ["hit"] * 4
        assert "__pic" not in state.text()
    streamed = ask.run(
        documents=DOCUMENTS, question="Name one thing.", backend=backend, stream=True
    )
    text = "".join(streamed.text_iter(var_name="answer"))
    assert text == states[0]["answer"]
    (company,) = backend.compile_company(states[0])
    assert len(company["segments"]) == len(DOCUMENTS)
    turned = DOCUMENTS[1:] + DOCUMENTS[:1]
    state = ask.run(documents=turned, question="Name one thing.", backend=backend)
    found = report_of(state, "answer")
    assert found is not None
    assert [s["company"] for s in found["segments"]] == [len(DOCUMENTS)] * len(DOCUMENTS)


def test_frontend_language_on_a_plain_backend(smollm: Server) -> None:
    """A backend that knows nothing of segments gets the same text."""
    plain = sgl.RuntimeEndpoint(smollm.url)
    state = ask.run(documents=DOCUMENTS[:1], question="Name one thing.", backend=plain)
    assert DOCUMENTS[0] in state.text()
    assert report_of(state, "answer") is None


@sgl.function
def choose(s: Any, document: str) -> None:
    s += "Read this.\n" + pic_segment(document) + "The text is about"
    s += sgl.select("topic", [" rivers", " music theory", " a planet"])


def test_select_scores_linked_choices(smollm: Server) -> None:
    """By the log-probabilities that the same linked rows give while they decode."""
    salt = fresh_salt()
    backend = PicRuntimeEndpoint(smollm.url, cache_salt=salt)
    meta = choose.run(document=DOCUMENTS[0], backend=backend).get_meta_info("topic")
    report = backend.last_report
    assert report is not None and report["exactness"] == "composed"
    assert report["tokens_reused"] > report["tokens_computed"]
    behind = {
        "parts": ["Read this.\n", {"segment": DOCUMENTS[0]}, "The text is about"],
        "turns": False,
    }
    for scored in meta["input_token_logprobs"]:
        # The prompt's last two tokens, of which nothing is said of the first.
        assert scored[0][0] is None
        first = scored[2]
        out = smollm.generate(
            pic=behind, cache_salt=salt, sampling_params=greedy(1), return_logprob=True,
            token_ids_logprob=[first[1]],
        )  # fmt: skip
        ((value, *_),) = out["meta_info"]["output_token_ids_logprobs"][0]
        assert abs(value - first[0]) < 1e-3


def test_select_is_exact_on_request(smollm: Server) -> None:
    exact = PicRuntimeEndpoint(smollm.url, require_exact=True)
    decisions = [
        choose.run(document=DOCUMENTS[0], backend=backend)["topic"]
        for backend in (exact, sgl.RuntimeEndpoint(smollm.url))
    ]
    assert decisions[0] == decisions[1]
    assert exact.last_report is not None and exact.last_report["exactness"] == "exact"


@pytest.mark.parametrize("program", ["rag", "multi_agent"])
def test_example_programs_reuse(smollm: Server, program: str) -> None:
    out = subprocess.run(
        [sys.executable, "-m", f"sglang_pic.eval.examples.{program}", "--url", smollm.url],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert out.returncode == 0, out.stderr
    reused = [int(n) for n in re.findall(r"\[(\d+) tokens reused", out.stdout)]
    assert max(reused) > 100
