"""Whatever is sent, a request is refused by name or answered; nothing else happens."""

from __future__ import annotations

import contextlib
import json
import random
from typing import Any

import orjson
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from linking import fresh_salt, ids_of
from schemathesis import checks
from sglang.srt.managers.io_struct import GenerateReqInput
from sglang.srt.managers.kv_hints import decode_kv_hints_envelope

from sglang_pic.errors import PicActionError, PicRequestError
from sglang_pic.eval.hostile import ATTACKS, Forger
from sglang_pic.eval.serving import Server
from sglang_pic.link.policy import LinkOptions
from sglang_pic.request.fields import _KNOWN, PicFields, parse_fields
from sglang_pic.request.internal import FAMILY, NOTHING, read_internal
from sglang_pic.server.public import check_public
from sglang_pic.server.reading import CHATS, COMPLETIONS, GENERATE, take
from sglang_pic.server.routes import router

# -- the parser -----------------------------------------------------------------------

# What JSON can say.
FLOATS = st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 40) | st.integers() | FLOATS | st.text(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["start", "end", "segment"]) | st.text(), inner)
    ),
    max_leaves=12,
)
RANGES = st.lists(
    st.fixed_dictionaries({"start": st.integers(0, 30) | VALUES, "end": st.integers(0, 40)})
    | VALUES,
    max_size=4,
)
PARTS = st.lists(st.text() | st.fixed_dictionaries({"segment": st.text() | VALUES}), max_size=4)
NEARLY = {
    "segments": RANGES,
    "parts": PARTS,
    "tokenize": st.sampled_from(["pieces", "whole", "none"]),
    "policy": st.sampled_from(["seam", "graded", "none", "full", "half"]),
    "company": st.sampled_from(["off", "subset", "tenant", "all"]),
    "company_seam": st.integers(-1, 1 << 21),
    "share": st.floats(-0.5, 1.5) | st.integers(0, 2),
    "seam": st.integers(-1, 1 << 21),
    "find": st.sampled_from(["off", "structure", "content", "all"]),
    "mode": st.sampled_from(["share", "relocate", "own"]),
    "state": st.sampled_from(["compose", "last", "auto", "first"]),
    "ablation": st.sampled_from([None, "no_conv_tail", "no_state"]),
    "require_exact": st.booleans(),
    "link": st.booleans(),
    "turns": st.booleans(),
}
PIC = VALUES | st.fixed_dictionaries(
    {}, optional={name: value | VALUES for name, value in NEARLY.items()}
)


def test_every_field_is_fuzzed() -> None:
    assert set(NEARLY) == _KNOWN


@given(PIC)
def test_fields_are_read_or_refused_by_name(pic: Any) -> None:
    try:
        fields = parse_fields(pic, LinkOptions())
    except PicRequestError as error:
        assert error.field.startswith("pic")
        return
    assert isinstance(fields, PicFields)
    ends = [0, *(at for span in fields.ranges for at in (span.start, span.end))]
    assert ends == sorted(ends)


CONTENT = st.lists(
    st.fixed_dictionaries(
        {"type": st.sampled_from(["text", "image_url"]), "text": st.text()},
        optional={"pic_segment": VALUES, "pic": VALUES},
    )
    | VALUES,
    max_size=3,
)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "system"]), "content": CONTENT})
    | VALUES,
    max_size=3,
)


@given(
    path=st.sampled_from(
        [GENERATE, COMPLETIONS, "/v1/responses", "/v1/messages", *CHATS, "/v1/score"]
    ),
    pic=PIC | st.lists(PIC, max_size=3),
    prompt=st.text() | st.lists(st.integers(0, 9)) | VALUES,
    messages=MESSAGES | VALUES,
)
def test_bodies_are_read_or_refused_by_name(
    path: str, pic: Any, prompt: Any, messages: Any
) -> None:
    body = {"pic": pic, "text": prompt, "prompt": prompt, "messages": messages, "system": messages}
    body["tools"] = messages
    raw = json.dumps(body).encode()
    try:
        rest, exchange = take(path, raw, LinkOptions())
    except PicRequestError as error:
        assert error.field
        return
    assert exchange.pic is None or path != "/v1/score"
    with contextlib.suppress(orjson.JSONDecodeError):  # an integer that none of us reads
        assert "pic" not in orjson.loads(rest)


# -- hints ----------------------------------------------------------------------------


def test_forged_hints_are_refused_by_the_front_and_by_the_scheduler() -> None:
    """Whichever of the two a forged action reaches first."""
    forged = [*ATTACKS.values(), *(Forger(random.Random(i), range(9)).hints() for i in range(4000))]
    refused = 0
    for hints in forged:
        obj = GenerateReqInput(input_ids=[1], sampling_params={}, kv_hints=hints)
        try:
            check_public(obj)
        except PicRequestError as error:
            assert error.field == "kv_hints"
            refused += 1
        else:
            assert not (obj.kv_hints and isinstance(obj.kv_hints, dict))
        try:
            read = decode_kv_hints_envelope(hints)
        except (ValueError, RecursionError):
            continue
        if any(action.action_type.startswith(FAMILY) for action in read.actions):
            with pytest.raises(PicActionError):
                read_internal(read)
        else:
            assert read_internal(read) == NOTHING
    assert refused > 2000


# -- a server -------------------------------------------------------------------------

# What OpenAPI cannot say: the vocabulary, the context, how segments must lie.
CHECKS = [
    checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
    checks.negative_data_rejection,
]


def survives(server: Server) -> None:
    """Still there, still right."""
    assert server.generate(input_ids=[1, 2, 3], sampling_params={"max_new_tokens": 1})
    server.forest()


@pytest.mark.server
def test_no_request_of_ours_breaks_a_server(page1: Server) -> None:
    schema = schemathesis.openapi.from_url(page1.url + "/openapi.json").include(path_regex="^/pic/")
    tried = 0
    for result in schema.get_all_operations():
        operation = result.ok()
        tried += 1

        @settings(
            max_examples=60,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            derandomize=True,
        )
        @given(
            case=operation.as_strategy()
            | operation.as_strategy(generation_mode=schemathesis.GenerationMode.NEGATIVE)
        )
        def run(case: Any) -> None:
            case.call_and_validate(base_url=page1.url, checks=CHECKS)

        run()
    assert tried == sum(len(route.methods) for route in router.routes)
    survives(page1)


@pytest.mark.server
def test_no_pic_field_breaks_a_server(page1: Server) -> None:
    prompt = ids_of(3, 30)
    salt = fresh_salt()

    @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
    @given(PIC)
    def run(pic: Any) -> None:
        body = {
            "input_ids": prompt,
            "sampling_params": {"max_new_tokens": 1},
            "cache_salt": salt,
            "pic": pic,
        }
        answer = page1.post("/generate", body)
        if answer.status_code != 200:
            assert answer.status_code == 400, answer.text
            assert "pic" in answer.json()["error"]["message"]

    run()
    survives(page1)
