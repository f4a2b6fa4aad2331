"""API keys stand for tenants: who may ask what, and with which salt."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import pathlib
import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import requests
import sglang.srt.entrypoints.http_server as http_server
import start_log
from conftest import TINY, serve
from fastapi import APIRouter, FastAPI, WebSocket
from fastapi.testclient import TestClient
from linking import assemble, body, ids_of
from sglang.srt.managers.io_struct import EmbeddingReqInput, GenerateReqInput
from sglang.srt.server_args import ServerArgs
from sglang.srt.utils import common
from starlette.routing import Mount

from sglang_pic.config import ENV_NAME, PicConfig
from sglang_pic.errors import PicConfigError, PicRequestError
from sglang_pic.eval.serving import Server
from sglang_pic.launch_server import main, with_defaults
from sglang_pic.server.access import TABLE, WEBSOCKET, Who, find, rows_of, warn_of_unknown
from sglang_pic.server.binding import REFUSED, bind
from sglang_pic.server.redact import RedactMiddleware, Secrets
from sglang_pic.server.routes import router
from sglang_pic.server.tenants import TenantMiddleware, Tenants, current
from sglang_pic.sglang_hooks import hide_secrets, install_http

A, B, ROOT = "key-of-a-0123456789", "key-of-b-0123456789", "key-of-root-0123456789"
KEYS = {A: "a", B: "b"}
ASKERS = {"nobody": None, "a": A, "b": B, "operator": ROOT}


def flags_of(**changed: Any) -> Any:
    """SGLang's arguments, as far as they matter."""
    usual = {
        "admin_api_key": ROOT,
        "api_key": None,
        "tokenizer_worker_num": 1,
        "grpc_port": None,
        "grpc_mode": False,
        "smg_grpc_mode": False,
        "enable_response_store": False,
    }
    return SimpleNamespace(**{**usual, **changed})


ADMIN = flags_of()


def bearer(key: str | None) -> dict[str, str]:
    return {} if key is None else {"Authorization": f"Bearer {key}"}


def file_of(tmp_path: pathlib.Path, content: Any) -> str:
    path = tmp_path / "tenants.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


# -- the salt -------------------------------------------------------------------------


@pytest.fixture
def asked(tmp_path: pathlib.Path) -> TestClient:
    """An application that tells the salt a request got."""
    app = FastAPI()

    @app.api_route("/generate", methods=["POST", "PUT"])
    async def generate(cache_salt: str | None = None, batch: bool = False) -> Any:
        obj = GenerateReqInput(text="", cache_salt=[cache_salt, None] if batch else cache_salt)
        try:
            bind(obj)
        except PicRequestError as error:
            return {"refused": str(error)}
        return {"salt": obj.cache_salt}

    @app.get("/health")
    async def health() -> Any:
        return {"salt": current.get()}

    @app.websocket("/v1/realtime")
    async def live(socket: WebSocket) -> None:
        await socket.accept()
        await socket.send_text(str(current.get()))

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
        with asked.websocket_connect("/v1/realtime", headers=bearer(key)) as socket:
            assert socket.receive_text() == salt
    # Nothing of one request is left to the next.
    assert asked.post("/generate?cache_salt=x", headers=bearer(ROOT)).json() == {"salt": "x"}
    assert asked.get("/health").json() == {"salt": None}


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [("Authorization", "Bearer key-of-c-0123456789")],
        [("Authorization", "Bearer ")],
        [("Authorization", A)],
        [("Authorization", f"Basic {A}")],
        [("Authorization", f"Bearer {A}, Bearer {ROOT}")],
        [("Authorization", f"Bearer {A}"), ("Authorization", f"Bearer {ROOT}")],
        [("Authorization", f"Bearer {A}"), ("authorization", f"Bearer {A}")],
        [("X-Authorization", f"Bearer {A}")],
    ],
)
def test_without_one_key_nothing_is_asked(
    asked: TestClient, headers: list[tuple[str, str]]
) -> None:
    raw = [(name.encode(), value.encode()) for name, value in headers]
    refused = asked.post("/generate", headers=raw)
    assert refused.status_code == 401 and refused.json() == {"error": "Unauthorized"}
    with pytest.raises(Exception), asked.websocket_connect("/v1/realtime", headers=raw) as socket:  # noqa: B017
        socket.receive_text()


# -- what a tenant's request carries -----------------------------------------------------


@pytest.fixture
def as_a() -> Iterator[None]:
    token = current.set("a")
    yield
    current.reset(token)


# What a client may say of its own request, each looked at: it reaches no other's.
OWN = {
    *("text", "input_ids", "input_embeds", "image_data", "video_data", "audio_data", "modalities"),
    *("use_audio_in_video", "video_config", "sampling_params", "watermark", "return_logprob"),
    *("logprob_start_len", "top_logprobs_num", "token_ids_logprob", "return_sampling_mask"),
    *("sampling_logprobs_mode", "return_text_in_logprobs", "return_flat_raw_top_logprobs"),
    *("return_flat_raw_output_top_logprobs", "return_flat_raw_top_logprobs_b64", "stream"),
    *("log_metrics", "return_hidden_states", "return_routed_experts", "routed_experts_start_len"),
    *("return_indexer_topk", "lora_path", "custom_logit_processor", "positional_embed_overrides"),
    *("routed_dp_rank", "data_parallel_rank", "routing_key", "conversation_id", "background"),
    *("require_reasoning", "max_thinking_tokens", "priority", "extra_key", "no_logs"),
    *("custom_labels", "return_bytes", "return_entropy", "return_prompt_token_ids"),
    *("received_time", "max_dynamic_patch", "min_dynamic_patch", "image_max_dynamic_patch"),
    *("video_max_dynamic_patch", "images_config", "mm_processor_kwargs"),
    *("multi_item_delimiter_indices", "token_indices_to_pool", "kv_hints"),
}


def test_every_field_of_sglangs_request_is_judged() -> None:
    names = {field.name for field in dataclasses.fields(GenerateReqInput)}
    assert names == OWN | set(REFUSED) | {"rid", "cache_salt"}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_reaches_another_tenants_is_refused(as_a: None, name: str) -> None:
    obj = GenerateReqInput(text="", **{name: "x"})
    with pytest.raises(PicRequestError, match=name):
        bind(obj)
    current.set(None)
    bind(obj)


def test_an_id_is_as_long_as_sglangs_own(as_a: None) -> None:
    """It aborts by how an id begins."""
    whole = "0123456789abcdef" * 2
    for rid in (None, whole, f"resp_{whole}", [whole, whole[::-1]]):
        bind(GenerateReqInput(text="", rid=rid))
    for rid in ("", "a", "resp_", whole[:31], whole.upper(), [whole, "a"], f"{whole}\n"):
        with pytest.raises(PicRequestError, match="rid"):
            bind(GenerateReqInput(text="", rid=rid))


def test_embeddings_have_no_salt(as_a: None) -> None:
    with pytest.raises(PicRequestError, match="salt"):
        bind(EmbeddingReqInput(text=""))


# -- the file and the flags ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "args"),
    [
        ("not json", ADMIN),
        (f'{{"{A}": "a", "{A}": "b"}}', ADMIN),
        ([], ADMIN),
        ({}, ADMIN),
        ({A: 3}, ADMIN),
        ({A: ""}, ADMIN),
        ({A: "pic\x1fx"}, ADMIN),
        ({A: "a\x1fb"}, ADMIN),
        ({A: "a\n"}, ADMIN),
        ({A: "a" * 1025}, ADMIN),
        ({"": "a"}, ADMIN),
        ({"short": "a"}, ADMIN),
        ({"a" * 513: "a"}, ADMIN),
        ({f"{A} b": "a"}, ADMIN),
        ({f"{A}\n": "a"}, ADMIN),
        ({f"{A}é": "a"}, ADMIN),
        ({ROOT: "a"}, ADMIN),
        (KEYS, flags_of(admin_api_key=None)),
        (KEYS, flags_of(admin_api_key="root")),
        (KEYS, flags_of(api_key="key")),
        (KEYS, flags_of(tokenizer_worker_num=2)),
        (KEYS, flags_of(grpc_port=30001)),
        (KEYS, flags_of(grpc_mode=True)),
        (KEYS, flags_of(smg_grpc_mode=True)),
        (KEYS, flags_of(enable_response_store=True)),
    ],
)
def test_a_way_around_is_refused(tmp_path: pathlib.Path, content: Any, args: Any) -> None:
    with pytest.raises(PicConfigError, match="--pic-tenants") as refused:
        Tenants.read(file_of(tmp_path, content), args)
    assert A not in str(refused.value) and ROOT not in str(refused.value)
    with pytest.raises(PicConfigError, match="--pic-tenants"):
        Tenants.read(str(tmp_path / "absent.json"), args)


def test_a_missing_file_is_refused_at_once(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["--model-path", "none", "--pic-tenants", str(tmp_path / "absent.json")])
    assert "absent.json" in capsys.readouterr().err


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
    flags = with_defaults(["--model-path", "/models/m"], cuda=False, tenants=True)
    assert "--skip-server-warmup" in flags
    # Nor is its model called by where it lies.
    assert flags[flags.index("--served-model-name") + 1] == "m"


# -- the table -----------------------------------------------------------------------------


def routes_of_sglang() -> list[Any]:
    """Those of its application and ours, and what it adds while it starts."""
    metrics = Mount("/metrics", app=FastAPI())
    metrics.path_regex = re.compile("^/metrics(?P<path>.*)$")  # as SGLang has it
    return [*http_server.app.router.routes, *router.routes, metrics]


ROUTES = routes_of_sglang()
ROWS = sorted(set(rows_of(ROUTES)))


def scope_of(method: str, path: str, key: str | None = None, **changed: Any) -> dict[str, Any]:
    headers = [(b"authorization", f"Bearer {key}".encode())] if key else []
    kind = "websocket" if method == WEBSOCKET else "http"
    scope = {"type": kind, "path": path, "root_path": "", "headers": headers}
    scope |= {"app": SimpleNamespace(router=SimpleNamespace(routes=ROUTES))}
    if kind == "http":
        scope["method"] = method
    return {**scope, **changed}


def status_of(scope: dict[str, Any]) -> int | None:
    """What the middleware refuses with; ``None`` for what it lets through."""
    sent: list[Any] = []
    reached: list[Any] = []

    async def app(*_: Any) -> None:
        reached.append(True)

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(TenantMiddleware(app, Tenants(KEYS, ROOT))(scope, receive, send))
    assert bool(reached) != bool(sent)
    return sent[0].get("status", sent[0].get("code")) if sent else None


def filled(path: str) -> str:
    """A path that a route of this form takes."""
    return re.sub(r"\{[^}]*\}", "0123456789abcdef" * 2, path)


def may(who: Who | None, asker: str) -> bool:
    if who is None:
        return False
    return who is Who.ANYONE or asker == "operator" or (who is Who.TENANT and asker != "nobody")


@pytest.mark.parametrize("row", ROWS, ids=" ".join)
def test_the_table_decides_every_route_of_sglang_and_ours(row: tuple[str, str]) -> None:
    method, path = row
    assert row in TABLE, "a new route: who may ask it?"
    assert find(ROUTES, scope_of(method, filled(path))) == row
    for asker, key in ASKERS.items():
        status = status_of(scope_of(method, filled(path), key))
        assert (status is None) == may(TABLE[row], asker), (asker, status)
        expected = 1008 if method == WEBSOCKET else 403 if key else 401
        assert status in (None, expected)


def test_the_table_knows_nothing_that_is_not_there() -> None:
    # SGLang has it while it is debugged.
    assert set(TABLE) - set(ROWS) <= {("POST", "/dumper/{method}")}


def test_what_the_table_does_not_know_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    late = APIRouter()
    late.add_api_route("/v1/responses/compact", lambda: None, methods=["POST"])
    app = FastAPI()
    app.add_api_route("/generate", lambda: None, methods=["PATCH"])
    app.include_router(late)
    app.mount("/files", FastAPI())
    app.router.lifespan_context = warn_of_unknown(app.router.lifespan_context)
    with TestClient(app):
        logged = [record.getMessage() for record in caplog.records]
    for method, path in (("PATCH", "/generate"), ("POST", "/v1/responses/compact")):
        assert f"sglang_pic: --pic-tenants refuses {method} {path}" in logged
        for key, status in ((None, 401), (A, 404), (ROOT, 404)):
            assert status_of(scope_of(method, path, key, app=app)) == status
    assert status_of(scope_of("GET", "/files/x", A, app=app)) == 404
    assert any("/files" in line for line in logged)


TRICKS = [
    *("/generate/", "//generate", "/Generate", "/generate%20", "/%67enerate", "/./generate"),
    *("/health/../pic/forest", "/health/", "/healthz", "/health%2f", "/ready/x", "/metrics/x"),
    *("/pic/info/", "/pic//info", "/pic/forest?/health", "", "*", "/v1/models", "/server_info"),
    *("/health_generate/x", "http://x/health", "/\\health", "/health\x00", "/health\n"),
]


@pytest.mark.parametrize("path", TRICKS)
@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "get", "POST", "TRACE", WEBSOCKET])
def test_no_way_to_write_a_path_leads_around_it(method: str, path: str) -> None:
    row = find(ROUTES, scope_of(method, path))
    who = None if row is None else TABLE.get(row)
    for asker, key in ASKERS.items():
        assert (status_of(scope_of(method, path, key)) is None) == may(who, asker)
    # A newline at the end is nothing to SGLang's router either.
    assert who is not Who.ANYONE or path == "/health\n"


def test_behind_a_prefix_the_same_routes_are_found() -> None:
    for key, status in ((None, 401), (A, 403), (ROOT, None)):
        scope = scope_of("GET", "/llm/server_info", key, root_path="/llm")
        assert status_of(scope) == status
    assert status_of(scope_of("GET", "/llm/health", root_path="/llm")) is None


def test_a_browser_may_ask_what_it_may_ask() -> None:
    asks = [(b"origin", b"http://x"), (b"access-control-request-method", b"POST")]
    assert status_of(scope_of("OPTIONS", "/generate", headers=asks)) is None
    assert status_of(scope_of("OPTIONS", "/generate", headers=asks[:1])) == 401
    assert status_of(scope_of("GET", "/server_info", headers=asks)) == 401


# -- secrets -------------------------------------------------------------------------------

SECRET = "swordfish-0123456789"
LOADER = json.dumps({"remote": {"access_key": SECRET}})


def flags_with_secrets() -> ServerArgs:
    args = ServerArgs(
        model_path="dummy",
        admin_api_key=SECRET + "1",
        api_key="k3y",
        ssl_keyfile_password=SECRET + "2",
        model_loader_extra_config=LOADER,
        weight_version=f"s3://me:{SECRET}@host/m",
    )
    args._launch_command = f"--api-key k3y --admin-api-key={SECRET}1 '{LOADER}'"
    return args


def test_no_flag_of_sglang_is_shown_that_is_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """With tenants or without; SGLang's own function says what ``/server_info`` shows."""
    monkeypatch.setenv("SGLANG_PIC_SECRET", SECRET + "3")
    args = flags_with_secrets()
    shows = getattr(common.build_server_info, "__wrapped__", common.build_server_info)
    info = json.loads(json.dumps(shows(args, {}), default=str))
    info["internal_states"] = [{"env_vars": {"SGLANG_PIC_SECRET": SECRET + "3"}, **info}]
    app = FastAPI()

    @app.get("/server_info")
    async def server_info() -> Any:
        return info

    @app.get("/text")
    async def text() -> Any:
        return http_server.Response(f"key {SECRET}1, k3y", media_type="text/plain")

    @app.post("/generate")
    async def generate() -> Any:
        return {"text": f"the model said {SECRET}1", "key": "x"}

    shown = TestClient(app).get("/server_info").text
    assert SECRET in shown and '"k3y"' in shown
    app = FastAPI(routes=app.routes)
    app.add_middleware(RedactMiddleware, secrets=Secrets.of(args.resolved_dict()))
    client = TestClient(app)
    for path in ("/server_info", "/text"):
        shown = client.get(path).text
        assert SECRET not in shown and "k3y" not in shown and "<redacted>" in shown
    # What is no secret stays.
    left = client.get("/server_info").json()
    assert left["model_path"] == "dummy" and left["tokenizer_mode"] == info["tokenizer_mode"]
    assert {name for name in info if left[name] != info[name]} == {
        *("admin_api_key", "api_key", "ssl_keyfile_password", "model_loader_extra_config"),
        *("weight_version", "launch_command", "internal_states"),
    }
    # A model's answer is its own.
    assert client.post("/generate").json()["text"].endswith(SECRET + "1")
    # Where no middleware stands, over gRPC, the flags are the same.
    assert SECRET not in json.dumps(hide_secrets(shows(args, {}), args, {}), default=str)


# -- a server ------------------------------------------------------------------------------

# Each ends the scheduler, where what it is about was not asked for at the start.
NOT_ASKED = {f"/{verb}_expert_distribution_record" for verb in ("start", "stop", "dump")}


@pytest.fixture(scope="module")
def tenanted(
    tiny_path: pathlib.Path, logs: pathlib.Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    path = file_of(tmp_path_factory.mktemp("tenants"), KEYS)
    flags = (f"--pic-tenants={path}", f"--admin-api-key={ROOT}", "--enable-metrics")
    env = {
        "SGLANG_PIC_SECRET": SECRET * 4,
        "SGLANG_EXPOSE_OWN_ENV_VARS": "1",
        # Off by default: a header may name what a body may not.
        "SGLANG_ENABLE_REQUEST_HEADER_OVERRIDES": "1",
    }
    with serve(tiny_path, logs / "tenants.log", *TINY, *flags, env=env) as server:
        assert start_log.unexpected(server.log) == []
        yield server


def ask(server: Server, key: str | None, method: str, path: str, **more: Any) -> Any:
    headers = {**bearer(key), **more.pop("headers", {})}
    return requests.request(method, server.url + path, headers=headers, timeout=120, **more)


@pytest.mark.server
def test_tenants_are_apart_on_a_server(tenanted: Server) -> None:
    segment = ids_of(3, 64)
    prompt = assemble([("segment", segment), ("text", [3, 4])])
    asking = {k: v for k, v in body(*prompt, 2, "", seam=4).items() if k != "cache_salt"}

    def generate(key: str, **fields: Any) -> requests.Response:
        return ask(tenanted, key, "POST", "/generate", json=fields or asking)

    first, again, other = generate(A), generate(A), generate(B)
    counts = [a.json()["meta_info"]["pic"]["tokens_compiled"] for a in (first, again, other)]
    assert counts == [64, 0, 64]
    refused = generate(B, **asking, cache_salt="a")
    assert refused.status_code == 400 and "cache_salt" in refused.text
    # Ordinary prompts are apart as well.
    ids = ids_of(4, 80)
    plain = [generate(key, input_ids=ids) for key in (A, A, B)]
    cached = [answer.json()["meta_info"]["cached_tokens"] for answer in plain]
    assert cached[0] == cached[2] == 0 and cached[1] > 0
    # Management is the operator's, who names the tenant.
    found = ask(tenanted, ROOT, "GET", "/pic/segments?cache_salt=a")
    assert len(found.json()["segments"]) == 1


@pytest.mark.server
def test_sessions_and_ids_are_refused_on_a_server(tenanted: Server) -> None:
    opened = ask(tenanted, ROOT, "POST", "/open_session", json={"capacity_of_str_len": 100})
    session = opened.json()
    prompt = {"input_ids": ids_of(5, 8), "sampling_params": {"max_new_tokens": 1}}
    for fields in (
        {"session_params": {"id": session}},
        {"session_id": session},
        {"input_ids": [[5], [6]], "session_params": {"id": session}},
        {"rid": "a"},
    ):
        refused = ask(tenanted, A, "POST", "/generate", json={**prompt, **fields})
        assert refused.status_code == 400, fields
        assert any(name in refused.text for name in fields if name != "input_ids")
    override = {"X-Override-Rid": "a"}
    refused = ask(tenanted, A, "POST", "/generate", json=prompt, headers=override)
    assert refused.status_code == 400 and "rid" in refused.text
    vertex = {"instances": [prompt], "parameters": {"session_params": {"id": session}}}
    assert "session_params" in ask(tenanted, A, "POST", "/vertex_generate", json=vertex).text
    for path in ("/open_session", "/close_session"):
        for method in ("GET", "POST"):
            refused = ask(tenanted, A, method, path, json={"session_id": session})
            assert refused.status_code == 403 and "session" in refused.text
    assert ask(tenanted, A, "POST", "/generate", json=prompt).status_code == 200


@pytest.mark.server
def test_what_a_tenant_sees_of_a_server(tenanted: Server, tiny_path: pathlib.Path) -> None:
    info = ask(tenanted, A, "GET", "/pic/info").json()
    assert set(info) == {"version", "config", "linking", "encoder"}
    assert "compile_context" not in info["config"] and "tenants" not in info["config"]
    assert "compile_context" in ask(tenanted, ROOT, "GET", "/pic/info").json()["config"]
    model = ask(tenanted, A, "GET", "/get_model_info").json()
    assert model["model_path"] == tiny_path.name
    assert ask(tenanted, ROOT, "GET", "/get_model_info").json()["model_path"] == str(tiny_path)
    (card,) = ask(tenanted, A, "GET", "/v1/models").json()["data"]
    assert card["id"] == card["root"] == tiny_path.name
    for path in ("/model_info", "/v1/models", "/api/tags", "/pic/info"):
        assert str(tiny_path.parent) not in ask(tenanted, A, "GET", path).text


@pytest.mark.server
def test_every_route_of_a_server_answers_as_the_table_says(tenanted: Server) -> None:
    """Its own list, and what SGLang's router has in this process; no body is JSON, so
    that little is done. And no answer, to whom and of what route, has a secret in it."""
    listed = ask(tenanted, ROOT, "GET", "/openapi.json").json()["paths"]
    table = {(method, path.replace(":path}", "}")): who for (method, path), who in TABLE.items()}
    rows = {(m.upper(), path) for path, methods in listed.items() for m in methods}
    rows |= {(m, path.replace(":path}", "}")) for m, path in ROWS if m != WEBSOCKET}
    secrets = [*KEYS, ROOT, SECRET, "tenants.json"]
    for (method, path), (asker, key) in itertools.product(sorted(rows), ASKERS.items()):
        if path in NOT_ASKED and asker == "operator":
            continue
        headers = {"content-type": "application/json"}
        answer = ask(tenanted, key, method, filled(path), data=b"{", headers=headers)
        # SGLang refuses some of them itself, with 401.
        refused = answer.status_code in (401, 403)
        who = table[method, path]
        assert refused != may(who, asker), (asker, method, path, answer.status_code)
        assert not [s for s in secrets if s in answer.text], (asker, method, path)
    for trick in ("/server_info/", "//server_info", "/%73erver_info", "/health/..%2fserver_info"):
        answer = ask(tenanted, A, "GET", trick, allow_redirects=False)
        assert answer.status_code in (403, 404)
    host = {"Host": "x/health?"}
    assert ask(tenanted, None, "GET", "/server_info", headers=host).status_code in (400, 401)
    # It serves on, and refused none of what SGLang brings.
    alive = {"input_ids": [5], "sampling_params": {"max_new_tokens": 1}}
    assert ask(tenanted, A, "POST", "/generate", json=alive).status_code == 200
    assert "--pic-tenants refuses" not in tenanted.log.read_text()
