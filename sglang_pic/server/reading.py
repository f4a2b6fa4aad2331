"""``pic`` fields out of a request's JSON body, as its route has them."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import orjson
from pydantic import ValidationError
from sglang.srt.entrypoints.openai.protocol import StreamOptions
from sglang.srt.entrypoints.openai.utils import should_include_usage
from sglang.srt.runtime_context import get_serving

from sglang_pic.errors import PicRequestError
from sglang_pic.link.policy import LinkOptions
from sglang_pic.request.fields import check_inside, parse_fields
from sglang_pic.server.exchange import Exchange
from sglang_pic.server.gateways import SALT, unpack
from sglang_pic.server.marks import Marks, mark_messages
from sglang_pic.server.shapes import MESSAGES, RESPONSES, marks_of, twin_of
from sglang_pic.server.strays import drop_nulls, refuse_strays

GENERATE = "/generate"
COMPLETIONS = "/v1/completions"
# SageMaker's /invocations is the chat endpoint under another name.
CHATS = ("/v1/chat/completions", "/invocations")
_PROMPT_FIELD = {GENERATE: "text", COMPLETIONS: "prompt"}


def _written(name: bytes) -> bytes:
    """A pattern of a key as JSON may write it: each letter as it is, or as its code."""
    return b'"' + b"".join(rb"(?:%c|\\u00(?i:%02x))" % (letter, letter) for letter in name) + b'"'


_OURS = re.compile(b"|".join(map(_written, (b"pic", b"pic_segment", SALT.encode()))))

# In JSON, of a request for a stream that ends with its usage; in a text its quotes would be
# escaped.
_USAGE = re.compile(rb'"include_usage"\s*:\s*true')


def take(path: str, raw: bytes, defaults: LinkOptions, app: Any = None) -> tuple[bytes, Exchange]:
    """A request's body without its ``pic`` fields, and these.

    Args:
        path: of its route.
        defaults: options of the server, for what the request leaves out.
        app: SGLang's application, whose endpoints make prompts of conversations.

    Raises:
        PicRequestError: naming the field at fault, or one that this route ignores.
    """
    if _OURS.search(raw) is None:
        return raw, Exchange(usage_chunk=_USAGE.search(raw) is not None)
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError:
        return raw, Exchange()  # SGLang's answer to invalid JSON is the right one
    if not isinstance(body, dict):
        refuse_strays(body, "this route takes no segments")
        return raw, Exchange()
    exchange = read_request(path, body, defaults)
    if exchange.marks is not None and path not in CHATS:
        exchange.twin = twin_of(path, body, exchange.marks, app)
    try:
        return orjson.dumps(body), exchange
    except TypeError as error:  # it reads deeper than it writes
        raise PicRequestError("body", "is nested too deeply for a request with segments") from error


def read_request(path: str, body: dict[str, Any], defaults: LinkOptions) -> Exchange:
    """Take the ``pic`` fields out of a decoded body, in place.

    Raises:
        PicRequestError: naming the field at fault, or one that this route ignores.
    """
    drop_nulls(body)
    if path in CHATS:
        unpack(body)
    reader = _READERS.get(path)
    exchange = reader(path, body, defaults) if reader is not None else Exchange()
    if body.get("stream"):
        exchange.usage_chunk = _tells_usage(body.get("stream_options"))
    refuse_strays(body, "means nothing here" if reader else "this route takes no segments")
    return exchange


def _tells_usage(options: Any) -> bool:
    try:
        asked = None if options is None else StreamOptions.model_validate(options)
    except ValidationError:
        return False  # SGLang refuses it
    return should_include_usage(asked, get_serving().stream_response_default_include_usage)[0]


# -- prompts ------------------------------------------------------------------------


def _prompts(path: str, body: dict[str, Any], defaults: LinkOptions) -> Exchange:
    if "pic" not in body:
        return Exchange()
    pic = body.pop("pic")
    field = _PROMPT_FIELD[path]
    given = "input_ids" if body.get(field) is None and body.get("input_ids") else field
    prompt: Any = body.get(given)
    if not _is_batch(prompt):
        if isinstance(pic, list):
            raise PicRequestError("pic", "must be one object, the request has one prompt")
        prompt, pic = _one(prompt, pic, field, defaults)
        if prompt is not None:
            body[given] = prompt
        return Exchange(pic)
    prompts = list(prompt)
    if isinstance(pic, dict) and len(prompts) == 1:
        prompts[0], pic = _one(prompts[0], pic, field, defaults)
        pics = [pic]
    else:
        if not isinstance(pic, list) or len(pic) != len(prompts):
            raise PicRequestError("pic", f"must be a list of {len(prompts)} objects, one a prompt")
        pics = list(pic)
        for i, item in enumerate(pics):
            if item is not None:
                try:
                    prompts[i], pics[i] = _one(prompts[i], item, field, defaults)
                except PicRequestError as error:
                    raise PicRequestError(f"pic[{i}]{error.field[3:]}", error.problem) from error
    if path == COMPLETIONS and len(prompts) == 1:
        # Its answer looks the same, and one prompt is compiled for as one.
        body[given] = prompts[0]
        return Exchange(pics[0])
    body[given] = prompts
    return Exchange(pics)


def _is_batch(prompt: Any) -> bool:
    return isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], str | list)


def _one(prompt: Any, pic: Any, field: str, defaults: LinkOptions) -> tuple[Any, Any]:
    """One prompt and its ``pic`` object, with ranges in place of parts."""
    fields = parse_fields(pic, defaults)
    if fields.text is not None:
        if prompt:
            raise PicRequestError("pic.parts", f"replaces {field!r}; leave that out or empty")
        pic = {key: value for key, value in pic.items() if key != "parts"}
        pic["segments"] = [{"start": span.start, "end": span.end} for span in fields.ranges]
        return fields.text, pic
    if isinstance(prompt, str):
        check_inside(fields.ranges, len(prompt), "characters")
    elif isinstance(prompt, list) and prompt and isinstance(prompt[0], int):
        check_inside(fields.ranges, len(prompt), "tokens")
    return prompt, pic


# -- conversations ------------------------------------------------------------------


def _options(body: dict[str, Any]) -> dict[str, Any]:
    pic = body.pop("pic", {})
    if not isinstance(pic, dict):
        raise PicRequestError("pic", f"must be an object, got {pic!r:.80}")
    pic = {key: value for key, value in pic.items() if value is not None}
    if "parts" in pic:
        raise PicRequestError("pic.parts", "not in a chat request: mark its content parts")
    return pic


def _marked(pic: dict[str, Any], marks: Marks | None) -> Exchange:
    # A chat request without a mark is an ordinary one, unless something is found in it.
    return Exchange(pic, marks) if marks is not None else Exchange(find=pic)


def _chat(path: str, body: dict[str, Any], defaults: LinkOptions) -> Exchange:
    pic = _options(body)
    marks = mark_messages(body.get("messages"), pic.pop("segments", []), body.get("tools"))
    parse_fields(pic, defaults)
    if marks is not None and body.get("input_ids") is not None:
        raise PicRequestError("input_ids", "stands for the messages: they cannot be marked")
    return _marked(pic, marks)


def _other_chat(path: str, body: dict[str, Any], defaults: LinkOptions) -> Exchange:
    pic = _options(body)
    if "segments" in pic:
        raise PicRequestError("pic.segments", "not on this route: mark its content parts")
    marks = marks_of(path, body)
    parse_fields(pic, defaults)
    if marks is not None and path in MESSAGES and body.get("cache_salt") is not None:
        raise PicRequestError("cache_salt", "SGLang ignores it on this route")
    return _marked(pic, marks)


_Reader = Callable[[str, dict[str, Any], LinkOptions], Exchange]
_READERS: dict[str, _Reader] = {
    GENERATE: _prompts,
    COMPLETIONS: _prompts,
    RESPONSES: _other_chat,
    **dict.fromkeys(CHATS, _chat),
    **dict.fromkeys(MESSAGES, _other_chat),
}
