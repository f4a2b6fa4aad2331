"""Marks and salts that pass a gateway, and who finds out whether they do."""

from __future__ import annotations

import copy
import http.server
import json
import pathlib
import threading
from collections.abc import Callable
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_pic import cli, doctor
from sglang_pic.client import through_gateway
from sglang_pic.errors import PicRequestError
from sglang_pic.eval.serving import Server
from sglang_pic.link.policy import LinkOptions
from sglang_pic.server.reading import take

CHAT, KWARGS = "/v1/chat/completions", "chat_template_kwargs"
texts = st.text(max_size=5)
flags = st.sampled_from([{}, {}, {"pic_segment": True}, {"pic_segment": False}])
parts = st.builds(lambda text, flag: {"type": "text", "text": text, **flag}, texts, flags)
messages = st.builds(
    lambda content, flag: {
        "role": "user",
        "content": content,
        **(flag if isinstance(content, str) else {}),
    },
    st.one_of(texts, st.lists(parts, max_size=4)),
    flags,
)
bodies = st.builds(
    lambda said, pic, salt, more: {"model": "m", "messages": said, **pic, **salt, **more},
    st.lists(messages, max_size=4),
    st.sampled_from([{}, {"pic": {"seam": 8}}, {"pic": {"require_exact": True, "seam": None}}]),
    st.sampled_from([{}, {"cache_salt": "tenant"}]),
    st.sampled_from(
        [{}, {"metadata": {"user": "7"}}, {"chat_template_kwargs": {"thinking": True}}]
    ),
)


def read(body: dict[str, Any]) -> tuple[Any, Any, list[Any]]:
    """What SGLang gets, ``pic``, and where the marks are."""
    left, exchange = take(CHAT, orjson.dumps(body), LinkOptions())
    marks = [] if exchange.marks is None else [(m.path, m.text) for m in exchange.marks.all]
    return orjson.loads(left), exchange.pic, marks


@given(bodies, st.sampled_from([through_gateway, doctor.in_template_kwargs]))
def test_what_a_gateway_lets_through_is_read_as_what_was_sent(
    body: dict[str, Any], form: Callable[[Any], Any]
) -> None:
    sent = copy.deepcopy(body)
    carried = form(body)
    assert body == sent
    assert "pic" not in carried and "cache_salt" not in carried
    assert b"pic_segment" not in orjson.dumps(carried["messages"])
    assert all(isinstance(value, str) for value in carried.get("metadata", {}).values())
    expected, pic, marks = read(body)
    found, carried_pic, carried_marks = read(carried)
    assert carried_marks == marks
    assert (carried_pic or {}) == ({k: v for k, v in (pic or {}).items() if v is not None})
    expected.setdefault("metadata", {})
    found.setdefault("metadata", {})
    for part in (expected, found):
        part.setdefault("chat_template_kwargs", {})
    assert found == expected


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"metadata": {"pic": "{"}}, "metadata.pic"),
        ({"metadata": {"pic": '{"seam": -1}'}}, "pic.seam"),
        ({"metadata": {"pic": "{}"}, "pic": {}}, "metadata.pic"),
        ({"metadata": {"pic": "{}"}, KWARGS: {"pic": {}}}, f"{KWARGS}.pic"),
        ({"metadata": {"pic_salt": 7}}, "metadata.pic_salt"),
        ({"metadata": {"pic_salt": "a"}, "cache_salt": "b"}, "metadata.pic_salt"),
        ({"metadata": {"pic": '{"segments": [{"message": 9}]}'}}, "pic.segments"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_it_is_named(body: dict[str, Any], field: str) -> None:
    with pytest.raises(PicRequestError) as caught:
        read({"messages": [{"role": "user", "content": "a"}], **body})
    assert caught.value.field == field


@pytest.mark.parametrize("value", ["https://example.org/cat.png", "", "[1]", None, 7, ["x"]])
def test_a_clients_own_data_is_its_own(value: Any) -> None:
    body = {"messages": [], "metadata": {"pic": value}, "chat_template_kwargs": {"pic": value}}
    assert read(body)[0] == body


# -- doctor -------------------------------------------------------------------------


class Gateway(doctor.Patient):
    """Drops of a request what it does not know, and counts what it was asked."""

    def __init__(self, url: str, drops: tuple[str, ...]):
        super().__init__(url)
        self._drops = drops

    def post(self, path: str, body: dict[str, Any], *, key: bool = True) -> Any:
        body = copy.deepcopy({k: v for k, v in body.items() if k not in self._drops})
        if "pic_segment" in self._drops:
            for message in body.get("messages", []):
                for part in message["content"]:
                    part.pop("pic_segment", None)
        return super().post(path, body, key=key)


def states(patient: doctor.Patient) -> dict[str, str]:
    return {one.about: one.state for one in doctor.examine(patient)}


@pytest.mark.server
def test_a_server_is_well(smollm: Server, tmp_path: pathlib.Path) -> None:
    cli.main(["doctor", smollm.url, "--json", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())["findings"]
    assert {one["state"] for one in found if one["about"] != "keys"} == {doctor.GOOD}
    assert len(found) == 9


@pytest.mark.server
def test_what_a_gateway_drops_is_seen(smollm: Server) -> None:
    """As SGLang's router does; then one that drops everything."""
    router = states(Gateway(smollm.url, ("pic", "pic_segment", "cache_salt")))
    assert router["chat, pic_segment in the messages"] == doctor.BAD
    assert router["chat, metadata"] == router["chat, chat_template_kwargs"] == doctor.GOOD
    assert router["cache_salt"] == router["stream"] == doctor.GOOD
    holders = ("metadata", "chat_template_kwargs")
    wall = states(Gateway(smollm.url, ("pic", "pic_segment", "cache_salt", *holders)))
    assert {state for about, state in wall.items() if about.startswith("chat")} == {doctor.BAD}
    assert "cache_salt" not in wall


class Page(http.server.BaseHTTPRequestHandler):
    """A proxy's, whatever is asked."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"<html>Welcome</html>")

    def log_message(self, *_: Any) -> None:
        pass


def test_an_address_where_a_page_is(capsys: pytest.CaptureFixture[str]) -> None:
    with http.server.HTTPServer(("127.0.0.1", 0), Page) as site:
        threading.Thread(target=site.serve_forever, daemon=True).start()
        with pytest.raises(SystemExit) as ended:
            cli.main(["doctor", f"http://127.0.0.1:{site.server_port}"])
        site.shutdown()
    assert ended.value.code == 1
    assert "Welcome" in capsys.readouterr().err


def test_an_address_where_nobody_is() -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["doctor", "http://127.0.0.1:1"])
    assert ended.value.code == 1
