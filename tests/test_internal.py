"""Who may tell the scheduler what, and that no fault of ours ends it."""

from __future__ import annotations

import json
import os
import types
from collections.abc import Callable, Iterator
from http import HTTPStatus
from typing import Any

import msgspec
import pytest
import torch
from driver import Driver
from hypothesis import given
from hypothesis import strategies as st
from linking import ids_of
from sglang.srt.managers.io_struct import GenerateReqInput
from sglang.srt.managers.kv_hints import KvHintAction, KvHintsEnvelope
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.runtime_context import get_parallel

from sglang_pic import sglang_hooks
from sglang_pic.config import PicConfig
from sglang_pic.errors import PicActionError, PicRequestError
from sglang_pic.faults import faults
from sglang_pic.forest.containment import MOST_FAULTS
from sglang_pic.forest.keys import check_salt, namespace
from sglang_pic.link.policy import LinkOptions
from sglang_pic.request import commands
from sglang_pic.request.base import LinkRequest, TokenSpan
from sglang_pic.request.hints import DONE, MISSING, pic_hints
from sglang_pic.request.internal import (
    COMMAND,
    COMPILE,
    LINK,
    MAX_COMPANY_TOKENS,
    MAX_MEMBERS,
    NOTHING,
    CompileRequest,
    command_hints,
    compile_hints,
    link_hints,
    read_internal,
)
from sglang_pic.request.seal import ENV_NAME, seal
from sglang_pic.server.public import check_public

SPACE = namespace((), "us")


def envelope(kind: str, payload: Any) -> KvHintsEnvelope:
    action = KvHintAction(action_id="0", action_type=kind, action_version="1", payload=payload)
    return KvHintsEnvelope(protocol_version="1", message_id="x", actions=[action])


def sealed(kind: str, body: str) -> KvHintsEnvelope:
    return envelope(kind, {"body": body, "seal": seal(kind, body)})


# -- what our front sends ---------------------------------------------------------------


def test_what_the_front_sends_is_read() -> None:
    link = LinkRequest((TokenSpan(1, 5), TokenSpan(7, 9)), LinkOptions(seam=3), strict=False)
    assert read_internal(link_hints(link), salt="us", tokens=9).link == link
    made = read_internal(compile_hints([0, 16], named=True), salt=SPACE).compile
    assert made == CompileRequest((0, 16), named=True)
    spans = (TokenSpan(1, 5), TokenSpan(5, 9))
    made = read_internal(compile_hints((), company=spans), salt=SPACE, tokens=9).compile
    assert made == CompileRequest((), False, spans)
    for kind in commands.Command.__args__:
        values = {"id": "a", "tokens": [1], "segments": ["a"], "at": 1, "seam": 2, "on": True}
        values |= {
            "companies": ["a"],
            "lengths": [3],
            "named": True,
            "drop": True,
            "lasting": False,
            "begin": True,
            "leases": [commands.Lease("a", None, ["b"], [3])],
            "now": 1.5,
        }
        values["documents"] = kind is commands.Fetched or ["a"]
        command = kind(**{name: values[name] for name in kind.__struct_fields__})
        assert read_internal(command_hints(command)).command == command
    assert read_internal(None) == read_internal(pic_hints(seam=3)) == NOTHING


@pytest.mark.parametrize(
    "spans",
    [
        [(0, 4)],
        [(i, i + 1) for i in range(MAX_MEMBERS + 1)],
        [(4, 8), (0, 4)],
        [(0, 5), (4, 8)],
        [(0, 4), (4, 99)],
        [(0, 4), (4, MAX_COMPANY_TOKENS + 1)],
    ],
)
def test_a_company_is_within_its_bounds(spans: list[tuple[int, int]]) -> None:
    hints = compile_hints((), company=[TokenSpan(*span) for span in spans])
    tokens = MAX_COMPANY_TOKENS + 1 if spans[-1][1] > MAX_COMPANY_TOKENS else 90
    with pytest.raises(PicActionError) as refused:
        read_internal(hints, salt=SPACE, tokens=tokens)
    assert refused.value.status == HTTPStatus.BAD_REQUEST and "company" in str(refused.value)


# -- what it has not sent ---------------------------------------------------------------

_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)
_kinds = st.sampled_from([LINK, COMPILE, COMMAND]) | st.text(max_size=5).map("pic.{}".format)


@given(_kinds, st.dictionaries(st.sampled_from(["body", "seal", "do", "spans"]), _json))
def test_nothing_is_obeyed_without_the_secret(kind: str, payload: dict[str, Any]) -> None:
    with pytest.raises(PicActionError) as refused:
        read_internal(envelope(kind, payload))
    assert refused.value.status == HTTPStatus.FORBIDDEN
    assert refused.value.field.startswith("kv_hints.actions[0]")


@given(st.data())
def test_a_seal_is_of_one_action_and_one_body(data: st.DataObject) -> None:
    hints = link_hints(LinkRequest((TokenSpan(1, 5),), LinkOptions()))
    payload = dict(hints.actions[0].payload)
    name = data.draw(st.sampled_from(["body", "seal"]))
    at = data.draw(st.integers(0, len(payload[name]) - 1))
    char = data.draw(st.characters(codec="ascii").filter(lambda c: c != payload[name][at]))
    payload[name] = payload[name][:at] + char + payload[name][at + 1 :]
    for kind, content in ((LINK, payload), (COMPILE, hints.actions[0].payload)):
        with pytest.raises(PicActionError):
            read_internal(envelope(kind, content), salt=SPACE if kind == COMPILE else None)


def test_a_secret_is_one_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    hints = command_hints(commands.Forest())
    read_internal(hints)
    monkeypatch.setenv(ENV_NAME, "another")
    with pytest.raises(PicActionError):
        read_internal(hints)


def test_the_secret_itself_is_never_sent() -> None:
    hints = command_hints(commands.Forest())
    assert os.environ[ENV_NAME] not in msgspec.json.encode(hints).decode()


_bodies = st.sampled_from(
    [
        {"spans": [{"start": 0, "end": 4}], "options": {}, "strict": True, "off": None},
        {"seams": [4], "named": False},
        {"do": "forest"},
        {"do": "get", "id": "a"},
        {"do": "reserve", "tokens": [1, 2]},
    ]
)


@st.composite
def _mutated(draw: st.DrawFn) -> str:
    """A body that is almost right."""
    body: Any = json.loads(json.dumps(draw(_bodies)))
    for _ in range(draw(st.integers(1, 3))):
        place = body
        while isinstance(place, dict | list) and place and draw(st.booleans()):
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            key = draw(st.sampled_from(keys))
            if not isinstance(place[key], dict | list) or not place[key]:
                place[key] = draw(_json)
                break
            place = place[key]
        if isinstance(place, dict):
            place[draw(st.sampled_from(["spans", "seams", "do", "id", "x"]))] = draw(_json)
        elif isinstance(place, list):
            place.append(draw(_json))
    return json.dumps(body)


@given(_kinds, _mutated() | _json.map(json.dumps) | st.text())
def test_a_sealed_body_is_read_or_refused_by_name(kind: str, body: str) -> None:
    """Even from our own front: a fault there must not become one of the scheduler's."""
    try:
        read_internal(sealed(kind, body), salt=SPACE if kind == COMPILE else None, tokens=4)
    except PicActionError as error:
        assert error.status in (HTTPStatus.BAD_REQUEST, HTTPStatus.FORBIDDEN) and error.field


@pytest.mark.parametrize(
    ("kind", "content", "field"),
    [
        (LINK, {"spans": []}, "options"),
        (LINK, {"spans": "abc", "options": {}}, "spans"),
        (LINK, {"spans": [{"start": 0, "end": 5}], "options": {}}, "spans"),
        (LINK, {"spans": [{"start": 3, "end": 2}], "options": {}}, "spans[0]"),
        (LINK, {"spans": [], "options": {"policy": "some"}}, "options.policy"),
        (LINK, {"spans": [], "options": {"seam": -1}}, "options.seam"),
        (LINK, {"spans": [], "options": {"seam": "4"}}, "options.seam"),
        (COMPILE, {"seams": [4]}, "named"),
        (COMMAND, {"x": 1}, "do"),
        (COMMAND, {"do": "get"}, "id"),
        (COMMAND, {"do": "rm"}, "do"),
    ],
)
def test_a_bad_body_names_the_field(kind: str, content: Any, field: str) -> None:
    with pytest.raises(PicActionError) as refused:
        read_internal(
            sealed(kind, json.dumps(content)), salt=SPACE if kind == COMPILE else None, tokens=4
        )
    assert refused.value.status == HTTPStatus.BAD_REQUEST
    assert field in str(refused.value)


def test_reserved_salts_are_for_compiles_alone() -> None:
    link = link_hints(LinkRequest((), LinkOptions()))
    for hints in (None, link, command_hints(commands.List())):
        with pytest.raises(PicActionError, match="cache_salt"):
            read_internal(hints, salt=SPACE)
    for salt in (None, "", "us"):
        with pytest.raises(PicActionError, match="cache_salt"):
            read_internal(compile_hints([4]), salt=salt)


# -- at the front -------------------------------------------------------------------------

_ACTION = {"action_id": "0", "action_type": "pic", "action_version": "1"}


def as_dict(**action: Any) -> dict[str, Any]:
    return {"protocol_version": "1", "message_id": "x", "actions": [{**_ACTION, **action}]}


def asked_for(**fields: Any) -> GenerateReqInput:
    return GenerateReqInput(input_ids=[1, 2], **fields)


@pytest.mark.parametrize("kind", [LINK, COMPILE, COMMAND, "pic.anything"])
@pytest.mark.parametrize("payload", [{}, {"x": 1}, {"do": "forest"}, {"body": "{}", "seal": "0"}])
def test_no_form_of_an_internal_action_passes(kind: str, payload: dict[str, Any]) -> None:
    plain = as_dict(action_type=kind, payload=payload)
    for hints in (plain, envelope(kind, payload), [None, plain], [envelope(kind, payload)]):
        with pytest.raises(PicRequestError, match="kv_hints"):
            check_public(asked_for(kv_hints=hints))


def test_a_public_action_is_read_in_every_form() -> None:
    pic = {"seam": 3}
    plain = as_dict(payload=pic)
    for hints, expected in (
        (plain, pic),
        (pic_hints(seam=3), pic),
        ([plain, None], [pic, None]),
        ([None, pic_hints(seam=3)], [None, pic]),
        (None, None),
        ([None], None),
        (as_dict(action_type="others"), None),
    ):
        obj = asked_for(kv_hints=hints)
        assert check_public(obj) == expected
    for junk in (3, "x", {"actions": 3}, {"protocol_version": "1"}):
        with pytest.raises(PicRequestError, match="kv_hints"):
            check_public(asked_for(kv_hints=junk))


@pytest.mark.parametrize("field", ["cache_salt", "extra_key"])
@pytest.mark.parametrize("value", ["a\x1fb", "pic\x1fus", "\0", "\ud800", "x" * 5000, 3])
def test_salts_and_keys_hold_nothing_of_ours(field: str, value: Any) -> None:
    for given_value in (value, ["fine", value]):
        with pytest.raises(PicRequestError, match=field):
            check_public(asked_for(**{field: given_value}))
    check_salt("Müller & Söhne / 7", field)


# -- faults in the scheduler ----------------------------------------------------------------


@pytest.fixture
def driver() -> Iterator[Driver]:
    faults.counts.clear()
    made = Driver(1, 512, PicConfig(min_segment=1))
    yield made
    faults.counts.clear()


class FakeScheduler:
    """As much of SGLang's as a request's arrival needs."""

    def __init__(self, driver: Driver):
        self.tree_cache = driver.cache
        self.queued: list[Any] = []
        self.ended: list[Any] = []

    def send_abort_output(self, abort: Any, req: Any) -> None:
        self.ended.append((req, abort.finished_reason))

    def arrive(self, req: Any) -> None:
        sglang_hooks.answer_at_once(lambda _, req, __: self.queued.append(req), self, req)


def broken(*args: Any, **kwargs: Any) -> Any:
    raise KeyError("broken on purpose")


def test_at_arrival_a_request_runs_or_ends_alone(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = FakeScheduler(driver)
    ids = ids_of(3, 64)
    forged = driver.request(ids, hints=envelope(COMMAND, {"do": "forest"}))
    reserved = driver.request(ids, salt=SPACE)
    bad = driver.request(ids, hints=sealed(LINK, "{}"))
    cold = driver.link(ids, [(0, 40)], "us")
    plain = driver.request(ids)
    command = driver.request(ids, hints=command_hints(commands.Stats()))
    for req in (forged, reserved, bad, cold, plain, command):
        scheduler.arrive(req)
    assert scheduler.queued == [plain]
    told = [(reason["status_code"], reason["message"]) for _, reason in scheduler.ended]
    assert [status for status, _ in told] == [403, 403, 400, 400, 400]
    assert told[3][1].startswith(MISSING) and told[4][1].startswith(DONE)
    assert "segments" not in told[0][1]

    monkeypatch.setattr(driver.forest.arrivals, "send_back", broken)
    again = driver.link(ids, [(0, 40)], "us")
    scheduler.arrive(again)
    assert scheduler.ended[-1][1]["status_code"] == 500
    assert faults.counts == {"arrival": 1}


def test_what_sglang_has_ended_is_its_own_to_answer(driver: Driver) -> None:
    """It has put another prompt in the place of one that it refuses; who forges is told
    so all the same, and once: nothing of it is read again."""
    scheduler = FakeScheduler(driver)
    ids = ids_of(3, 64)
    linked = driver.link(ids, [(0, 40)], "us")
    compiled = driver.request(ids, SPACE, compile_hints([4]))
    forged = driver.request(ids, hints=envelope(LINK, {"spans": []}))
    for req in (linked, compiled, forged):
        with get_parallel().override(tp_rank=0):
            req.set_finish_with_abort("too long")
        scheduler.arrive(req)
        assert driver.forest.asked.of(req) == NOTHING
    assert scheduler.queued == [linked, compiled]
    assert [reason["status_code"] for _, reason in scheduler.ended] == [403]
    assert driver.start(linked)
    driver.finish(linked, abort=True)
    driver.check()


@pytest.mark.parametrize("also", ["_drop_plan", "_unlinked"])
def test_no_second_fault_leaves_either(
    driver: Driver, monkeypatch: pytest.MonkeyPatch, also: str
) -> None:
    ids = ids_of(3, 64)
    assert driver.compile(ids[10:50])
    monkeypatch.setattr(driver.forest.links._planning, "arrange", broken)
    monkeypatch.setattr(driver.forest.links, also, broken)
    req = driver.link(ids, [(10, 50)])
    assert driver.start(req)
    assert driver.tokens_seen(req) == ids
    driver.finish(req)
    monkeypatch.undo()
    driver.check()


def test_a_forest_of_many_faults_is_trusted_no_more(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is followed by a look at all that is held, so there is an end to them."""
    looked: list[int] = []
    check = driver.forest.check
    monkeypatch.setattr(driver.forest, "check", lambda: (looked.append(1), check()))
    monkeypatch.setattr(driver.forest.holder, "keep", broken)
    for i in range(3 * MOST_FAULTS):
        driver.compile(ids_of(40 + i, 30))
        assert (driver.forest.refusal is not None) == (i + 1 >= MOST_FAULTS)
    assert len(looked) < MOST_FAULTS


def test_a_fault_while_planning_answers_exactly(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = ids_of(3, 64)
    assert driver.compile(ids[10:50])
    monkeypatch.setattr(driver.forest.links._planning, "arrange", broken)
    req = driver.link(ids, [(10, 50)])
    assert driver.start(req)
    (report,) = req.customized_info["pic"]
    assert (report["exactness"], report["reason"]) == ("exact", "internal_fault")
    monkeypatch.undo()
    driver.check()
    driver.decode(req, 5)
    driver.finish(req)
    driver.check()
    other = driver.link([*ids_of(9, 10), *ids[10:]], [(10, 50)])
    assert driver.start(other)
    assert other.customized_info["pic"][0]["exactness"] == "composed"
    driver.finish(other)


# Each is called by a method of the cache that SGLang calls.
BOOKKEEPING: list[tuple[str, Callable[[Driver], Any], str]] = [
    ("use", lambda d: d.forest.segments, "use"),
    ("keep", lambda d: d.forest.holder, "keep"),
    ("keep turn", lambda d: d.forest.conversations, "keep"),
    ("unlock", lambda d: d.forest.nodes, "unlocked"),
    ("insert", lambda d: d.forest.nodes, "note"),
    ("evict", lambda d: d.forest.nodes, "evict"),
    ("use", lambda d: d.forest.nodes, "use"),
]


@pytest.mark.parametrize(("place", "owner", "name"), BOOKKEEPING)
def test_a_fault_in_bookkeeping_ends_no_request(
    driver: Driver,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    owner: Callable[[Driver], Any],
    name: str,
) -> None:
    ids = ids_of(3, 64)
    assert driver.compile(ids[10:50])
    monkeypatch.setattr(owner(driver), name, broken)
    for i in range(8):
        ordinary = driver.request(ids_of(20 + i, 100))
        assert driver.start(ordinary), "an ordinary request found no memory"
        driver.finish(ordinary)
        driver.compile(ids_of(40 + i, 30))
        linked = driver.link(ids, [(10, 50)])
        assert driver.start(linked)
        assert driver.tokens_seen(linked) == ids
        driver.decode(linked, 7)
        driver.finish(linked)
    assert faults.counts[place] > 0
    monkeypatch.undo()
    driver.cache.sanity_check()


def test_a_corrupt_forest_links_no_more(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = ids_of(3, 64)
    assert driver.compile(ids[10:50])
    (record,) = driver.forest.segments.records(None)
    record.tokens += 1  # taken for held, and is not
    monkeypatch.setattr(driver.forest.conversations, "keep", broken)
    first = driver.link(ids, [(10, 50)])
    assert driver.start(first)
    driver.finish(first)
    assert "corrupt" in str(driver.forest.refusal)
    second = driver.link(ids, [(10, 50)])
    assert driver.start(second)
    assert second.customized_info["pic"][0]["exactness"] == "exact"
    driver.finish(second)


def test_rows_that_cannot_be_told_apart_end_alone(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = ids_of(3, 64)
    assert driver.compile(ids[10:50])
    linked, plain = driver.link(ids, [(10, 50)]), driver.request(ids_of(5, 20))
    assert driver.start(linked) and driver.start(plain)
    given_plans: list[Any] = []
    backend = types.SimpleNamespace(set_plans=lambda rids, plans: given_plans.append(plans))
    mode = ForwardMode.EXTEND
    batch = types.SimpleNamespace(
        rids=[linked.rid, plain.rid], forward_mode=mode, positions=torch.zeros(84),
        extend_prefix_lens_cpu=[0], extend_seq_lens_cpu=[64], mrope_positions=None,
    )  # fmt: skip
    sglang_hooks.set_positions(
        batch,
        None,
        types.SimpleNamespace(tree_cache=driver.cache, reqs=[linked, plain]),
        types.SimpleNamespace(attn_backend=backend),
    )
    assert faults.counts == {"positions": 1}
    assert given_plans[-1] == [None, None]
    assert linked.to_finish.status_code == 500 and plain.to_finish is None
