"""What the middleware takes from a request and adds to its answer, without a server."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import types
from collections.abc import Callable, Iterator
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sglang.srt.entrypoints.anthropic.serving import AnthropicServing
from sglang.srt.entrypoints.openai.serving_responses import OpenAIServingResponses
from sglang.srt.managers.io_struct import GenerateReqInput

from sglang_pic.errors import PicRequestError
from sglang_pic.link.policy import LinkOptions
from sglang_pic.server import answers, reading, sending
from sglang_pic.server.exchange import Exchange, current, noting
from sglang_pic.server.middleware import PicMiddleware
from sglang_pic.server.reading import CHATS, COMPLETIONS, GENERATE, take
from sglang_pic.server.reports import Reports
from sglang_pic.server.sending import AnswerSender
from sglang_pic.server.shapes import MESSAGES, RESPONSES
from sglang_pic.server.waited import Waited

CHAT = CHATS[0]
DEFAULTS = LinkOptions()
STREAM = [(b"content-type", b"text/event-stream; charset=utf-8")]


@pytest.fixture(autouse=True)
def serving(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.SimpleNamespace]:
    """The settings of SGLang that are asked for."""
    settings = types.SimpleNamespace(stream_response_default_include_usage=False)
    monkeypatch.setattr(reading, "get_serving", lambda: settings)
    yield settings


# As far as SGLang's conversions of a conversation need its server.
CHAT_SERVING = types.SimpleNamespace(
    supports_inline_system=False, supports_native_reasoning_history=lambda: False
)
RESPONSES_SERVING: Any = object.__new__(OpenAIServingResponses)
RESPONSES_SERVING.tool_call_parser = None
RESPONSES_SERVING.supports_inline_system = False
STATE = types.SimpleNamespace(
    anthropic_serving=AnthropicServing(CHAT_SERVING),
    openai_serving_responses=RESPONSES_SERVING,
)


def taken(path: str, **body: Any) -> tuple[dict[str, Any], Exchange]:
    app = types.SimpleNamespace(state=STATE)
    raw, exchange = take(path, orjson.dumps(body), DEFAULTS, app)
    return orjson.loads(raw), exchange


def refused(path: str, **body: Any) -> str:
    with pytest.raises(PicRequestError) as caught:
        taken(path, **body)
    return caught.value.field


# -- prompts ------------------------------------------------------------------------

SPAN = {"start": 0, "end": 2}
PARTS = {"parts": [{"segment": "ab"}, "c"]}


@pytest.mark.parametrize("prompt", ["", [""], [], None])
def test_parts_stand_for_one_empty_prompt(prompt: Any) -> None:
    body, exchange = taken(COMPLETIONS, prompt=prompt, pic=PARTS)
    assert body["prompt"] == "abc"
    assert exchange.pic == {"segments": [SPAN]}


def test_a_list_of_one_prompt_takes_one_object() -> None:
    body, exchange = taken(COMPLETIONS, prompt=["abc"], pic={"segments": [SPAN]})
    assert (body["prompt"], exchange.pic) == ("abc", {"segments": [SPAN]})
    body, exchange = taken(COMPLETIONS, prompt=[[5, 6, 7]], pic=[{"segments": [SPAN]}])
    assert (body["prompt"], exchange.pic) == ([5, 6, 7], {"segments": [SPAN]})
    # SGLang's own endpoint answers a list with a list.
    body, exchange = taken(GENERATE, text=[""], pic=PARTS)
    assert (body["text"], exchange.pic) == (["abc"], [{"segments": [SPAN]}])
    body, exchange = taken(GENERATE, input_ids=[[5, 6, 7]], pic={"segments": [SPAN]})
    assert (body["input_ids"], exchange.pic) == ([[5, 6, 7]], [{"segments": [SPAN]}])


def test_each_prompt_of_a_batch_has_its_own() -> None:
    body, exchange = taken(GENERATE, text=["", "xy", "z"], pic=[PARTS, {"segments": [SPAN]}, None])
    assert body["text"] == ["abc", "xy", "z"]
    assert exchange.pic == [{"segments": [SPAN]}, {"segments": [SPAN]}, None]


@pytest.mark.parametrize(
    ("prompt", "pic", "field"),
    [
        ("abc", [{}], "pic"),
        (["a", "b"], {}, "pic"),
        (["a", "b"], [{}], "pic"),
        (["abc", "b"], [None, {"segments": [SPAN]}], "pic[1].segments[0].end"),
        (["abc", "b"], [{}, {"seam": -1}], "pic[1].seam"),
        (["abc", "b"], [{}, PARTS], "pic[1].parts"),
        (["abc"], {"seam": -1}, "pic.seam"),
        (["abc", "b"], ["x", None], "pic[0]"),
    ],
)
def test_of_several_prompts_the_one_at_fault_is_named(prompt: Any, pic: Any, field: str) -> None:
    assert refused(GENERATE, text=prompt, pic=pic) == field
    assert refused(COMPLETIONS, prompt=prompt, pic=pic) == field


# -- null, and what nobody reads -----------------------------------------------------

OPENAI_PART = {"type": "text", "text": "abc"}


@pytest.mark.parametrize("path", [GENERATE, COMPLETIONS, RESPONSES, *CHATS, *MESSAGES, "/v1/score"])
def test_null_is_absent(path: str) -> None:
    message = {"role": "user", "content": [{**OPENAI_PART, "pic_segment": None}], "pic": None}
    tool = {"type": "function", "function": {"name": "f"}, "pic_segment": None}
    body, exchange = taken(
        path, pic=None, pic_segment=None, messages=[message], input=[message], tools=[tool]
    )
    assert exchange.pic is None
    assert b"pic" not in orjson.dumps(body)
    options = {**dict.fromkeys(("segments", "parts", "seam", "link", "tokenize", "ablation"))}
    if path in (GENERATE, COMPLETIONS):
        assert taken(path, text="abc", prompt="abc", pic=options)[1].pic == options
    elif path != "/v1/score":
        assert taken(path, messages=[], pic=options)[1].pic is None


def _message(part: dict[str, Any]) -> dict[str, Any]:
    return {"role": "user", "content": [part]}


IMAGE = {"type": "image", "source": {"type": "url", "url": "x"}}


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        (CHAT, {"messages": [], "pic_segment": True}, "pic_segment"),
        (CHAT, {"messages": [], "tools": [{"pic_segment": True}]}, "tools[0].pic_segment"),
        (CHAT, {"tools": [{"function": {"name": "f", "pic": {}}}]}, "tools[0].function.pic"),
        (CHAT, {"messages": [{"role": "user", "content": "x", "pic": {}}]}, "messages[0].pic"),
        (CHAT, {"extra_body": {"pic": {}}}, "extra_body.pic"),
        (GENERATE, {"text": "x", "pic_segment": True}, "pic_segment"),
        (GENERATE, {"text": "x", "sampling_params": {"pic": {}}}, "sampling_params.pic"),
        (MESSAGES[0], {"messages": [_message({**IMAGE, "pic_segment": True})]},
         "messages[0].content[0].text"),
        (MESSAGES[0], {"messages": [{**_message(OPENAI_PART), "pic_segment": True}]},
         "messages[0].content"),
        (MESSAGES[0], {"messages": [], "pic": {"segments": [{"message": 0}]}}, "pic.segments"),
        (MESSAGES[0], {"messages": [], "pic": {"seam": -1}}, "pic.seam"),
        (MESSAGES[0], {"messages": [], "pic": PARTS}, "pic.parts"),
        (MESSAGES[0], {"messages": [_message({**OPENAI_PART, "pic_segment": True})],
                       "cache_salt": "t"}, "cache_salt"),
        (MESSAGES[0], {"system": [{**OPENAI_PART, "pic_segment": 1}]}, "system[0].pic_segment"),
        (MESSAGES[0], {"messages": [_message({"type": "tool_result", "content": "x",
                                              "pic_segment": "yes"})]},
         "messages[0].content[0].pic_segment"),
        (RESPONSES, {"input": [{"type": "reasoning", "pic_segment": True}]}, "input[0].text"),
        (RESPONSES, {"input": "x", "pic_segment": True}, "pic_segment"),
        (RESPONSES, {"input": [{"type": "function_call_output", "output": "x",
                                "pic_segment": 3}]}, "input[0].pic_segment"),
        ("/v1/score", {"query": "x", "pic": {}}, "pic"),
        ("/v1/rerank", {"documents": [{"text": "x", "pic_segment": True}]},
         "documents[0].pic_segment"),
        ("/api/chat", {"messages": [_message({**OPENAI_PART, "pic_segment": True})]},
         "messages[0].content[0].pic_segment"),
        ("/vertex_generate", {"instances": [{"text": "x", "pic": {}}]}, "instances[0].pic"),
        ("/vertex_generate", {"instances": [{"text": "x"}], "parameters": {"pic": {}}},
         "parameters.pic"),
    ],
)  # fmt: skip
def test_a_field_that_would_be_ignored_is_refused(
    path: str, body: dict[str, Any], field: str
) -> None:
    assert refused(path, **body) == field


def test_a_clients_own_names_are_its_own() -> None:
    """A tool may have a parameter of any name, and its calls carry it."""
    schema = {"type": "object", "properties": {"pic": {"type": "string"}, "pic_segment": {}}}
    body = {
        "tools": [{"function": {"parameters": schema}}, {"input_schema": schema}],
        "messages": [
            {"role": "assistant", "tool_calls": [{"function": {"arguments": {"pic": "a"}}}]},
            {"role": "assistant", "content": [{"type": "tool_use", "input": {"pic": "a"}}]},
            {"role": "user", "content": [{**OPENAI_PART, "pic_segment": True}]},
        ],
        "response_format": {"json_schema": {"schema": schema}},
        "metadata": {"pic": "a", "pic_segment": True},
    }
    for path in (CHAT, MESSAGES[0], "/v1/score"):
        mine = {**body, "messages": body["messages"][: 3 if path != "/v1/score" else 2]}
        rest, exchange = taken(path, **mine)
        assert {key: rest[key] for key in rest if key != "messages"} == {
            key: mine[key] for key in mine if key != "messages"
        }
        assert rest["messages"][:2] == mine["messages"][:2]
        assert (exchange.marks is not None) == (path != "/v1/score")


def test_a_key_may_be_written_in_any_way() -> None:
    for key in (b"\\u0070\\u0069c_segment", b"pic\\u005Fseg\\u006Dent", b"pi\\u0063"):
        raw = b'{"messages": [{"%s": true}]}' % key
        with pytest.raises(PicRequestError, match="pic"):
            take("/v1/score", raw, DEFAULTS)
    # No other is looked at.
    raw = b'{"picture": 1,  "pics": 2, "epic": 3, "text": "a pic of \\"pic\\" "}'
    assert take("/v1/score", raw, DEFAULTS)[0] is raw
    # The last of equal keys counts, with us as with SGLang.
    raw = b'{"text": "abc", "pic": {"seam": -1}, "pic": {"seam": 1}}'
    assert take(GENERATE, raw, DEFAULTS)[1].pic == {"seam": 1}


@pytest.mark.parametrize("depth", [200, 900, 5000])
def test_a_deep_body_is_read_or_refused(depth: int) -> None:
    raw = b'{"pic": null, "a":' + b"[" * depth + b"]" * depth + b"}"
    if depth == 900:
        with pytest.raises(PicRequestError):
            take("/v1/score", raw, DEFAULTS)
    else:
        assert take("/v1/score", raw, DEFAULTS)[1].pic is None


# -- other APIs' conversations ---------------------------------------------------------


MARKED = {"pic_segment": True}
CONVERSATIONS = {
    MESSAGES[0]: {
        "system": [{**OPENAI_PART, "text": "system", **MARKED}, {"type": "text", "text": "no 1"}],
        "messages": [
            {"role": "user", "content": "message", **MARKED},
            {"role": "assistant", "content": [
                {"type": "tool_use", "id": "1", "name": "f", "input": {"x": "no 2"}}]},
            {"role": "user", "content": [
                IMAGE,
                {"type": "tool_result", "content": "result", **MARKED},
                {"type": "tool_result", "content": [
                    {"type": "text", "text": "inside", **MARKED},
                    {"type": "search_result", "title": "no 3", "content": [
                        {"type": "text", "text": "found", **MARKED}]},
                ]},
                {"type": "text", "text": "part", **MARKED},
                {"type": "text", "text": "no 4"},
            ]},
        ],
    },
    RESPONSES: {
        "instructions": "no 1",
        "input": [
            {"role": "developer", "content": "message", **MARKED},
            {"role": "user", "content": [
                {"type": "input_image", "image_url": "no 2"},
                {"type": "input_text", "text": "part", **MARKED},
                {"type": "input_text", "text": "no 3"},
            ]},
            {"type": "function_call", "name": "f", "arguments": "no 4"},
            {"type": "function_call_output", "call_id": "1", "output": "result", **MARKED},
            {"type": "function_call_output", "call_id": "2", "output": [
                {"type": "input_text", "text": "inside", **MARKED}]},
        ],
    },
}  # fmt: skip


@pytest.mark.parametrize("path", CONVERSATIONS)
def test_every_text_of_a_conversation_may_be_a_segment(path: str) -> None:
    """Where the mark is, and nowhere else; what SGLang gets is the body without them."""
    body = CONVERSATIONS[path]
    rest, exchange = taken(path, **body)
    assert exchange.marks is not None
    wanted = ["system"] if path in MESSAGES else []
    wanted += {MESSAGES[0]: ["message", "result", "inside", "found", "part"],
               RESPONSES: ["message", "part", "result", "inside"]}[path]  # fmt: skip
    assert [mark.text for mark in exchange.marks.all] == wanted
    assert rest == orjson.loads(orjson.dumps(body).replace(b',"pic_segment":true', b""))


@pytest.mark.parametrize("path", CONVERSATIONS)
def test_chat_messages_are_made_as_sglang_makes_them(path: str) -> None:
    """Of the body with signs around the first marks: each in the text that it is about."""
    _, exchange = taken(path, model="x", **CONVERSATIONS[path])
    assert exchange.twin is not None and exchange.marks is not None
    for count in (0, 1, len(exchange.marks.all)):
        text = repr(exchange.twin(count))
        signed = re.findall(r"PICOPEN\w{36}(\w+?)PICCLOSE", text)
        assert signed == [mark.text for mark in exchange.marks.all[:count]]


@pytest.mark.parametrize("path", CONVERSATIONS)
def test_the_text_at_fault_is_named_as_the_body_has_it(path: str) -> None:
    key = "messages" if path in MESSAGES else "input"
    part = {"type": "text", "text": 3, **MARKED}
    assert refused(path, **{key: [{}, {"content": [{}, part]}]}) == f"{key}[1].content[1].text"
    assert refused(path, **{key: [{"content": 3, **MARKED}]}) == f"{key}[0].content"
    inner = {"type": "tool_result", "content": [IMAGE, part]}
    if path in MESSAGES:
        field = "messages[1].content[0].content[1].text"
        assert refused(path, system="x", messages=[{}, _message(inner)]) == field
        assert refused(path, system=[part], messages=[]) == "system[0].text"
    else:
        assert refused(path, input=[{"output": 3, **MARKED}]) == "input[0].output"


# -- bodies on their way in ------------------------------------------------------------


class Client:
    """One request through the middleware, to an application of the test's."""

    def __init__(self, app: Callable[..., Any], path: str, *messages: Any, **headers: str):
        self.sent: list[Any] = []
        self._messages = list(messages)
        named = {"content_type": "application/json", "content_length": "1", **headers}
        self.scope = {
            "type": "http",
            "method": "POST",
            "path": path,
            "headers": [
                (key.replace("_", "-").encode(), value.encode())
                for key, value in named.items()
                if value
            ],
        }
        asyncio.run(PicMiddleware(app)(self.scope, self._receive, self._send))

    async def _receive(self) -> Any:
        return self._messages.pop(0) if self._messages else {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        self.sent.append(message)

    @property
    def status(self) -> int:
        return self.sent[0]["status"]

    @property
    def body(self) -> Any:
        return orjson.loads(b"".join(message.get("body", b"") for message in self.sent[1:]))


def request(body: bytes, *, more: bool = False) -> Any:
    return {"type": "http.request", "body": body, "more_body": more}


class App:
    """Keeps what it was sent and who it is from, and answers 200."""

    def __init__(self) -> None:
        self.got: list[Any] = []
        self.exchange: Exchange | None = None
        self.scope: Any = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.scope, self.exchange = scope, current.get()
        while True:
            self.got.append(await receive())
            if not self.got[-1].get("more_body"):
                break
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.got)


def test_an_ordinary_body_passes_as_it_came() -> None:
    app = App()
    raw = b'{"text": "a picture", "x": 1e400, \xff}'
    Client(app, GENERATE, request(raw[:7], more=True), request(raw[7:]))
    assert app.body == raw
    assert app.exchange is not None and app.exchange.pic is None
    assert current.get() is None


def test_a_chunked_body_gets_its_new_length() -> None:
    app = App()
    raw = b'{"text": "abc", "pic": {"segments": []}}'
    headers = {"content_length": "", "transfer_encoding": "chunked"}
    Client(app, GENERATE, request(raw[:20], more=True), request(raw[20:]), **headers)
    assert orjson.loads(app.body) == {"text": "abc"}
    names = dict(app.scope["headers"])
    assert names[b"content-length"] == str(len(app.body)).encode()
    assert b"transfer-encoding" not in names
    assert app.exchange is not None and app.exchange.pic == {"segments": []}


def test_half_a_body_is_no_body() -> None:
    """A client that leaves while it sends: SGLang sees it leave."""
    app = App()
    Client(app, GENERATE, request(b'{"text": "abc"}  ', more=True))
    assert [message["type"] for message in app.got] == ["http.request", "http.disconnect"]
    assert app.got[0]["more_body"]


@pytest.mark.parametrize(
    "headers",
    [
        {"content_length": ""},
        {"content_length": "0"},
        {"content_type": "multipart/form-data; boundary=x"},
        {"content_type": "text/plain"},
    ],
)
def test_what_is_no_json_is_not_read(headers: dict[str, str]) -> None:
    app = App()
    Client(app, "/v1/audio/transcriptions", request(b'{"pic": 3}', more=True), **headers)
    assert app.exchange is None
    assert app.got[0] == request(b'{"pic": 3}', more=True)


def test_a_prefix_of_the_application_is_not_part_of_the_path(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    app = App()
    read: list[str] = []
    monkeypatch.setattr(
        "sglang_pic.server.middleware.take",
        lambda path, raw, *_: (read.append(path), (raw, Exchange()))[1],
    )
    middleware = PicMiddleware(app)

    async def run() -> None:
        body = [request(b"{}")]
        scope = {
            "type": "http",
            "path": "/served/generate",
            "root_path": "/served",
            "headers": [(b"content-length", b"2")],
        }

        async def receive() -> Any:
            return body.pop(0)

        async def send(message: Any) -> None:
            pass

        await middleware(scope, receive, send)

    asyncio.run(run())
    assert read == [GENERATE]


def test_every_route_of_sglangs_reads_or_refuses() -> None:
    """Also one that SGLang adds: a field of ours never goes by unread."""
    from fastapi.routing import APIRoute
    from sglang.srt.entrypoints.http_server import app as sglangs

    paths = [route.path for route in sglangs.routes if isinstance(route, APIRoute)]
    assert {"/v1/messages", "/v1/responses", "/v1/score", "/vertex_generate"} <= set(paths)
    known = {GENERATE, COMPLETIONS, RESPONSES, *CHATS, *MESSAGES}
    assert known <= set(paths)
    for path in paths:
        app = App()
        body = {"pic": {"seam": 3}, "text": "abc", "prompt": "abc", "messages": [], "input": []}
        client = Client(app, path, request(orjson.dumps(body)))
        if path in known:
            assert client.status == 200, path
            assert b"pic" not in app.body
        else:
            assert (client.status, client.body["error"]["param"]) == (400, "pic"), path
        hidden = {"a": [{"pic_segment": True}]}
        client = Client(App(), path, request(orjson.dumps(hidden)))
        assert (client.status, client.body["error"]["param"]) == (400, "a[0].pic_segment"), path


# -- refusals ----------------------------------------------------------------------------

FAULT = PicRequestError("pic.segments", "at most 7 segments a request")


def answering(status: int, kind: bytes, *pieces: bytes) -> Callable[..., Any]:
    """SGLang's answer to what generation refused, in pieces."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        exchange = current.get()
        if kind.startswith(b"text/event-stream"):
            # Its headers leave before anything is generated.
            await send(
                {
                    "type": "http.response.start",
                    "status": status,
                    "headers": [(b"content-type", kind)],
                }
            )
        with pytest.raises(PicRequestError), noting(exchange):
            raise FAULT
        if not kind.startswith(b"text/event-stream"):
            headers = [(b"content-type", kind), (b"Content-Length", b"3")]
            await send({"type": "http.response.start", "status": status, "headers": headers})
        for i, piece in enumerate(pieces):
            more = i + 1 < len(pieces)
            await send({"type": "http.response.body", "body": piece, "more_body": more})

    return app


@pytest.mark.parametrize("path", [GENERATE, COMPLETIONS, CHAT, MESSAGES[0], RESPONSES])
def test_what_generation_refuses_names_its_field(path: str) -> None:
    app = answering(400, b"application/json", b'{"error":{"message":', b'"what SGLang says"}}')
    client = Client(app, path, request(b'{"text": "abc"}'))
    error = client.body["error"]
    assert client.status == 400
    assert (error["param"], error["message"]) == (FAULT.field, str(FAULT))
    lengths = [v for k, v in client.sent[0]["headers"] if k.lower() == b"content-length"]
    assert lengths == [str(len(client.sent[1]["body"])).encode()]
    if path == MESSAGES[0]:
        assert client.body["type"] == "error" and error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "event",
    [
        {"error": {"message": str(FAULT), "type": "invalid_request_error", "code": 400}},
        {"type": "error", "error": {"type": "invalid_request_error", "message": str(FAULT)}},
        {"type": "response.failed", "response": {"error": {"message": str(FAULT)}}},
    ],
)
def test_a_refusal_in_a_stream_names_its_field(event: Any) -> None:
    raw = b"event: error\ndata: " + orjson.dumps(event) + b"\n\ndata: [DONE]\n\n"
    app = answering(200, b"text/event-stream", raw[:30], raw[30:])
    client = Client(app, GENERATE, request(b'{"text": "abc"}'))
    sent = b"".join(message["body"] for message in client.sent[1:])
    head, data, end, rest = sent.split(b"\n")[0], *sent.split(b"\n")[1:4]
    assert (head, end, rest) == (b"event: error", b"", b"data: [DONE]")
    found = orjson.loads(data.removeprefix(b"data: "))
    error = found.get("error") or found["response"]["error"]
    assert error.pop("param") == FAULT.field
    assert found == event


def test_other_errors_are_sglangs() -> None:
    body = b'{"error": {"message": "x"}}'

    async def app(scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": 400, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    client = Client(app, GENERATE, request(b'{"text": "abc", "pic": {}}'))
    assert client.sent[1]["body"] == body


# -- reports in answers --------------------------------------------------------------------


def send_all(path: str, exchange: Exchange, headers: Any, *pieces: bytes) -> list[bytes]:
    """What leaves, piece by piece, of an answer that comes in these pieces."""
    sent: list[bytes] = []

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            sent.append(message.get("body", b""))

    async def run() -> None:
        sender = AnswerSender(send, path, exchange)
        await sender({"type": "http.response.start", "status": 200, "headers": headers})
        for piece in pieces:
            await sender({"type": "http.response.body", "body": piece, "more_body": True})
        await sender({"type": "http.response.body", "body": b"", "more_body": False})

    asyncio.run(run())
    return sent


def report(index: int) -> dict[str, Any]:
    return {"exactness": "composed", "seam": index}


def linked(answers: int = 1, **fields: Any) -> Exchange:
    return Exchange({}, reports={i: report(i) for i in range(answers)}, **fields)


def event(chunk: Any) -> bytes:
    return b"data: " + orjson.dumps(chunk) + b"\n\n"


def choice(index: int, text: str, reason: str | None = None) -> Any:
    return {"index": index, "text": text, "finish_reason": reason}


USAGE = {"prompt_tokens": 3}


@pytest.mark.parametrize("usage_chunk", [False, True])
@pytest.mark.parametrize("continuous", [False, True])
@pytest.mark.parametrize("answered", [1, 3])
def test_no_event_of_a_stream_waits_for_another(
    usage_chunk: bool, continuous: bool, answered: int
) -> None:
    """Each leaves when it came, whichever usage it tells, and each report comes once."""
    usage = USAGE if continuous else None
    chunks = [
        {"choices": [choice(i, text, reason)], "usage": usage}
        for text, reason in (("a", None), ('"finish_reason":"stop"', None), ("c", "stop"))
        for i in range(answered)
    ]
    if usage_chunk:
        chunks.append({"choices": [], "usage": USAGE})
    events = [event(chunk) for chunk in chunks]
    exchange = linked(answered, usage_chunk=usage_chunk)
    sent = send_all(COMPLETIONS, exchange, STREAM, *events, b"data: [DONE]\n\n")
    assert len(sent) == len(events) + 2  # [DONE], and the empty end
    got = [orjson.loads(raw.removeprefix(b"data: ")) for raw in sent[:-2]]
    if usage_chunk:
        reports = [report(i) for i in range(answered)]
        assert got[-1]["usage"].pop("pic") == (reports[0] if answered == 1 else reports)
    else:
        ends = got[-answered:]
        assert [chunk.pop("pic") for chunk in ends] == [report(i) for i in range(answered)]
    assert got == chunks


@given(cuts=st.lists(st.integers(0, 300), max_size=6), events=st.integers(1, 4))
def test_a_stream_keeps_its_events_however_it_is_cut(cuts: list[int], events: int) -> None:
    chunks: list[Any] = [
        {"choices": [{"index": 0, "delta": {"content": str(i)}, "finish_reason": None}]}
        for i in range(events)
    ]
    chunks[-1]["choices"][0]["finish_reason"] = "stop"
    raw = b"".join(map(event, chunks)) + b"data: [DONE]\n\n"
    bounds = sorted({0, len(raw), *(cut for cut in cuts if cut < len(raw))})
    pieces = [raw[start:end] for start, end in itertools.pairwise(bounds)]
    lines = b"".join(send_all(CHAT, linked(), STREAM, *pieces)).split(b"\n\n")
    assert lines[-2:] == [b"data: [DONE]", b""]
    got = [json.loads(line[6:]) for line in lines[:-2]]
    assert got[-1].pop("pic") == report(0)
    assert got == chunks


def test_whether_usage_comes_is_sglangs_to_say(serving: types.SimpleNamespace) -> None:
    def asked(**body: Any) -> bool:
        return taken(COMPLETIONS, prompt="abc", pic={}, **body)[1].usage_chunk

    assert not asked(stream=True)
    assert not asked(stream=True, stream_options={"continuous_usage_stats": True})
    assert asked(stream=True, stream_options={"include_usage": True})
    assert not asked(stream=True, stream_options=3)
    serving.stream_response_default_include_usage = True
    assert asked(stream=True) and asked(stream=True, stream_options={"include_usage": False})


JSON = [(b"content-type", b"application/json"), (b"content-length", b"1")]


@pytest.mark.parametrize(("answered", "pic"), [(1, report(0)), (2, [report(0), report(1)])])
def test_usage_of_several_answers_is_a_list(answered: int, pic: Any) -> None:
    body = {"choices": [{"index": i} for i in range(answered)], "usage": USAGE}
    (sent,) = send_all(COMPLETIONS, linked(answered), JSON, orjson.dumps(body))[:1]
    assert orjson.loads(sent) == {**body, "usage": {**USAGE, "pic": pic}}


def test_a_prompt_without_segments_has_no_report() -> None:
    exchange = Exchange([None, {}], reports={1: report(1)})
    body = orjson.dumps({"choices": [{"index": 0}, {"index": 1}], "usage": None})
    sent = orjson.loads(send_all(COMPLETIONS, exchange, JSON, body)[0])
    assert sent["usage"]["pic"] == [None, report(1)]


@pytest.mark.parametrize(
    ("path", "answer"),
    [
        (MESSAGES[0], {"type": "message", "id": "msg_1", "usage": {"input_tokens": 3}}),
        (RESPONSES, {"id": "resp_1", "usage": {"input_tokens": 3}}),
    ],
)
def test_other_apis_have_it_in_their_usage(
    monkeypatch: pytest.MonkeyPatch, path: str, answer: Any
) -> None:
    monkeypatch.setattr(sending, "last_reports", kept := Reports())
    sent = orjson.loads(send_all(path, linked(salt="t"), JSON, orjson.dumps(answer))[0])
    assert sent["usage"].pop("pic") == report(0)
    assert sent == answer
    # An id that SGLang made for this answer alone.
    assert kept.find("t", "msg_1") == (report(0) if path in MESSAGES else None)


def test_other_apis_have_it_in_their_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sending, "last_reports", Reports())
    message = {"type": "message", "id": "msg_1", "usage": {"input_tokens": 3}}
    start = {"type": "message_start", "message": message}
    delta = {"type": "content_block_delta", "delta": {"text": '"type":"message_start"'}}
    end = {"type": "message_delta", "usage": {"output_tokens": 3}}
    sent = send_all(MESSAGES[0], linked(), STREAM, *map(event, (start, delta, end)))
    got = [orjson.loads(raw.removeprefix(b"data: ")) for raw in sent[:-1]]
    assert got[0]["message"]["usage"].pop("pic") == report(0)
    assert got == [start, delta, end]
    made = {"type": "response.created", "response": {"usage": None}}
    done = {"type": "response.completed", "response": {"usage": {"input_tokens": 3}}}
    sent = send_all(RESPONSES, linked(), STREAM, *map(event, (made, done)))
    got = [orjson.loads(raw.removeprefix(b"data: ")) for raw in sent[:-1]]
    assert got[1]["response"]["usage"].pop("pic") == report(0)
    assert got == [made, done]


def test_what_needs_nothing_passes_untouched() -> None:
    raw = [b'data: {"choices": [], "usage": {}}\n', b"\n"]
    assert send_all(CHAT, Exchange(), STREAM, *raw)[:2] == raw
    packed = [(b"content-type", b"text/event-stream"), (b"content-encoding", b"gzip")]
    assert send_all(CHAT, linked(), packed, b"\x1f", b"\x8b")[:2] == [b"\x1f", b"\x8b"]
    assert send_all(GENERATE, linked(), JSON, b'{"a": 1}')[0] == b'{"a": 1}'


# -- reports as they come --------------------------------------------------------------------


def test_each_answer_has_the_report_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two samples of two prompts, in a stream that repeats what it knows."""
    monkeypatch.setattr(answers, "last_reports", kept := Reports())
    exchange = Exchange([{}, {}], salt=["s", "t"])
    counted: set[int] = set()
    waits = [Waited(seconds=1.0), Waited(seconds=2.0)]

    def chunk(index: int) -> dict[str, Any]:
        meta = {"id": f"r{index}", "pic": [{**ordinary, "seam": index}]}
        out = {"index": index, "meta_info": meta}
        return answers.tidy(out, exchange, counted, waits, 2)["meta_info"]

    ordinary = {"exactness": "exact", "reason": None, "tokens_reused": 0, "tokens_computed": 1,
                "prefix_tokens": 0, "turn_tokens": 0, "segments": []}  # fmt: skip
    for index in (3, 0, 1, 2):
        waited = waits[index // 2].to_json()
        assert chunk(index)["pic"] == {**ordinary, "seam": index, **waited}
        assert "pic" not in chunk(index)
    assert [one["seam"] for one in exchange.report(4)] == [0, 1, 2, 3]
    assert kept.find("s", "r1")["seam"] == 1 and kept.find("t", "r3")["seam"] == 3
    assert kept.find("t", "r1") is None and kept.find(None, "r1") is None


@given(
    kept=st.lists(
        st.tuples(st.sampled_from("stu"), st.integers(0, 9), st.integers(0, 60)), max_size=60
    )
)
def test_reports_are_bounded(kept: list[tuple[str, int, int]]) -> None:
    """By number and by bytes, of one tenant and of all; the newest are there."""
    reports = Reports(most_of_tenant=4, bytes_of_tenant=150, most=7, bytes_=250)
    alive: list[tuple[str, str, str]] = []

    def size(entries: list[tuple[str, str, str]]) -> int:
        return sum(len(text) + 2 + len(id) + len(salt) for salt, id, text in entries)

    def of(salt: str) -> list[tuple[str, str, str]]:
        return [one for one in alive if one[0] == salt]

    for salt, number, length in kept:
        id, text = str(number), "x" * length
        reports.keep(salt, id, text)
        alive = [one for one in alive if one[:2] != (salt, id)] + [(salt, id, text)]
        while len(of(salt)) > 4 or size(of(salt)) > 150:
            alive.remove(of(salt)[0])
        while len(alive) > 7 or size(alive) > 250:
            alive.pop(0)
        ids = [(s, str(n)) for s in "stu" for n in range(10)]
        found = {one for one in ids if reports.find(*one) is not None}
        assert found == {(s, i) for s, i, t in alive}
        for s, i, t in alive:
            assert reports.find(s, i) == t
    assert reports.find("s", "none") is None


def test_a_giant_report_evicts_nobody() -> None:
    reports = Reports(most_of_tenant=4, bytes_of_tenant=150)
    reports.keep(None, "a", "x")
    reports.keep("", "b", "x" * 200)
    assert (reports.find("", "a"), reports.find(None, "b")) == ("x", None)


def test_a_batch_is_streamed_as_it_comes() -> None:
    """Each output with the index of its answer; who is late holds nobody up."""
    closed = []

    async def prompt(number: int, wait: asyncio.Event) -> Any:
        try:
            for sample in (1, 0):
                yield {"index": sample, "text": f"{number}{sample}"}
                await wait.wait()
        finally:
            closed.append(number)

    async def run() -> list[tuple[int, str]]:
        first, second = asyncio.Event(), asyncio.Event()
        second.set()
        got = []
        outputs = answers.interleaved([prompt(0, first), prompt(1, second)], 2)
        async for out in outputs:
            got.append((out["index"], out["text"]))
            if len(got) == 3:
                first.set()
        leaving = answers.interleaved([prompt(2, asyncio.Event())], 2)
        await anext(leaving)
        await leaving.aclose()
        return got

    got = asyncio.run(run())
    assert sorted(got[:2]) == [(1, "01"), (3, "11")]
    assert got[2:] == [(2, "10"), (0, "00")]
    assert closed == [1, 0, 2]


@pytest.mark.parametrize(
    ("params", "samples"),
    [
        (None, 1),
        ({}, 1),
        ({"n": 3}, 3),
        ([{"n": 3}, {"n": 3}], 3),
        ({"n": 3, "beam_width": 4}, 1),
        ({"n": 3, "beam_width": None}, 3),
    ],
)
def test_samples_are_counted_as_sglang_counts_them(params: Any, samples: int) -> None:
    """Before and after it has spread a batch's parameters over its prompts."""
    obj = GenerateReqInput(input_ids=[[1], [2]], sampling_params=params)
    assert answers.samples_of(obj) == samples
    obj.normalize_batch_and_arguments()
    assert answers.samples_of(obj) == obj.parallel_sample_num == samples
