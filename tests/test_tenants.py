"""The salt of a request is its API key's, where the operator says so."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from types import SimpleNamespace
from typing import Any

import pytest
import requests
import start_log
from conftest import TINY, serve
from fastapi import FastAPI, WebSocket
from fastapi.testclient import TestClient
from linking import assemble, body, ids_of

from sglang_pic.config import ENV_NAME, PicConfig
from sglang_pic.errors import PicConfigError, PicRequestError
from sglang_pic.launch_server import with_defaults
from sglang_pic.server.tenants import TenantMiddleware, Tenants, set_salt
from sglang_pic.sglang_hooks import install_http

KEYS = {"key-a": "a", "key-b": "b"}


def flags_of(**changed: Any) -> Any:
    """SGLang's arguments, as far as they matter."""
    usual = {"admin_api_key": "root", "api_key": None, "tokenizer_worker_num": 1, "grpc_port": None}
    return SimpleNamespace(**{**usual, **changed})


ADMIN = flags_of()


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def file_of(tmp_path: pathlib.Path, content: Any) -> str:
    path = tmp_path / "tenants.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


@pytest.fixture
def asked(tmp_path: pathlib.Path) -> TestClient:
    """An application that tells the salt a request got."""
    app = FastAPI()

    @app.api_route("/generate", methods=["GET", "POST"])
    async def generate(cache_salt: str | None = None, batch: bool = False) -> Any:
        obj = SimpleNamespace(cache_salt=[cache_salt, None] if batch else cache_salt)
        try:
            set_salt(obj)
        except PicRequestError as error:
            return {"refused": str(error)}
        return {"salt": obj.cache_salt}

    @app.websocket("/live")
    async def live(socket: WebSocket) -> None:
        await socket.accept()
        await socket.send_text("hello")

    app.add_middleware(TenantMiddleware, tenants=Tenants.read(file_of(tmp_path, KEYS), ADMIN))
    return TestClient(app)


def test_a_key_decides_the_salt(asked: TestClient) -> None:
    for key, salt in KEYS.items():
        assert asked.post("/generate", headers=bearer(key)).json() == {"salt": salt}
        same = asked.post(f"/generate?cache_salt={salt}", headers=bearer(key))
        assert same.json() == {"salt": salt}
        for batch in ("", "&batch=1"):
            other = asked.post(f"/generate?cache_salt=x{batch}", headers=bearer(key))
            assert "cache_salt" in other.json()["refused"]
    # Nothing of one request is left to the next.
    assert asked.post("/generate?cache_salt=x", headers=bearer("root")).json() == {"salt": "x"}
    assert asked.get("/generate").json() == {"salt": None}


@pytest.mark.parametrize("headers", [{}, bearer("key-c"), bearer(""), {"Authorization": "key-a"}])
def test_without_a_key_nothing_is_asked(asked: TestClient, headers: dict[str, str]) -> None:
    refused = asked.post("/generate", headers=headers)
    assert refused.status_code == 401 and refused.json() == {"error": "Unauthorized"}
    with pytest.raises(Exception), asked.websocket_connect("/live", headers=headers) as socket:  # noqa: B017
        socket.receive_text()
    with asked.websocket_connect("/live", headers=bearer("key-a")) as socket:
        assert socket.receive_text() == "hello"


@pytest.mark.parametrize(
    ("content", "args"),
    [
        ("not json", ADMIN),
        ([], ADMIN),
        ({}, ADMIN),
        ({"key": 3}, ADMIN),
        ({"key": ""}, ADMIN),
        ({"key": "pic\x1fx"}, ADMIN),
        ({"": "a"}, ADMIN),
        ({"root": "a"}, ADMIN),
        (KEYS, flags_of(admin_api_key=None)),
        (KEYS, flags_of(api_key="key")),
        (KEYS, flags_of(tokenizer_worker_num=2)),
        (KEYS, flags_of(grpc_port=30001)),
    ],
)
def test_a_way_around_is_refused(tmp_path: pathlib.Path, content: Any, args: Any) -> None:
    with pytest.raises(PicConfigError, match="--pic-tenants"):
        Tenants.read(file_of(tmp_path, content), args)
    with pytest.raises(PicConfigError, match="--pic-tenants"):
        Tenants.read(str(tmp_path / "absent.json"), args)


def test_another_cache_maps_no_keys(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mapping is ours: it must not be dropped in silence."""
    flags = flags_of(radix_cache_backend=None)
    install_http(flags)
    config = PicConfig(tenants=file_of(tmp_path, KEYS))
    monkeypatch.setenv(ENV_NAME, json.dumps(dataclasses.asdict(config)))
    with pytest.raises(PicConfigError, match="--radix-cache-backend pic"):
        install_http(flags)


def test_sglang_does_not_warm_up_without_a_key() -> None:
    assert "--skip-server-warmup" in with_defaults(["--model-path", "m"], cuda=False, tenants=True)


@pytest.mark.server
def test_tenants_are_apart_on_a_server(
    tiny_path: pathlib.Path, logs: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    flags = (f"--pic-tenants={file_of(tmp_path, KEYS)}", "--admin-api-key=root")
    segment = ids_of(3, 64)
    prompt = assemble([("segment", segment), ("text", [3, 4])])
    asking = {k: v for k, v in body(*prompt, 2, "", seam=4).items() if k != "cache_salt"}
    with serve(tiny_path, logs / "tenants.log", *TINY, *flags) as server:
        assert start_log.unexpected(server.log) == []

        def ask(key: str, **fields: Any) -> requests.Response:
            sent = fields or asking
            return requests.post(
                server.url + "/generate", json=sent, headers=bearer(key), timeout=120
            )

        first, again, other = ask("key-a"), ask("key-a"), ask("key-b")
        counts = [a.json()["meta_info"]["pic"]["tokens_compiled"] for a in (first, again, other)]
        assert counts == [64, 0, 64]
        refused = ask("key-b", **asking, cache_salt="a")
        assert refused.status_code == 400 and "cache_salt" in refused.text
        assert ask("key-c").status_code == 401
        # Ordinary prompts are apart as well.
        ids = ids_of(4, 80)
        plain = [ask(key, input_ids=ids) for key in ("key-a", "key-a", "key-b")]
        cached = [answer.json()["meta_info"]["cached_tokens"] for answer in plain]
        assert cached[0] == cached[2] == 0 and cached[1] > 0
        # Management is the admin's, who names the tenant.
        for key, status in (("key-a", 401), ("root", 200)):
            found = requests.get(
                server.url + "/pic/segments?cache_salt=a", headers=bearer(key), timeout=60
            )
            assert found.status_code == status
        assert len(found.json()["segments"]) == 1
