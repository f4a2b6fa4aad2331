"""Canary and audit: what they measure, whom they stop, and that they leave nothing."""

from __future__ import annotations

import asyncio
import functools
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import faults
import pytest
import torch
from conftest import CHECKS, TINY, serve
from linking import assemble, body, fresh_salt, ids_of
from sglang.srt.layers.radix_attention import RadixAttention
from tiny_models import tiny_hybrid

from sglang_pic.attention import selfcheck
from sglang_pic.checks import Check
from sglang_pic.config import PicConfig
from sglang_pic.errors import PicConfigError, PicRefused
from sglang_pic.eval.serving import Server
from sglang_pic.forest.keys import is_reserved
from sglang_pic.kernels.operators.pair import Pair, apply
from sglang_pic.kernels.operators.storage import pack
from sglang_pic.kernels.rotate import LayerRope, angles, rotate
from sglang_pic.linear.selfcheck import first_layer_check
from sglang_pic.linear.state import CoreState
from sglang_pic.link.policy import LinkOptions
from sglang_pic.metrics import front
from sglang_pic.metrics.front import Counts
from sglang_pic.request.base import LinkRequest, TokenSpan
from sglang_pic.request.internal import read_internal
from sglang_pic.server import audit as audit_module
from sglang_pic.server import gate as gate_module
from sglang_pic.server.audit import POSITIONS, QUEUE, WINDOW, Audit, is_chosen
from sglang_pic.server.canary import Canary, Model
from sglang_pic.server.compare import TOP, Prompt
from sglang_pic.server.gate import AUDIT_FAILED, CANARY_FAILED, Gate
from sglang_pic.server.verdict import FAILED, PASSED, UNTESTED, Once

# -- without a server ---------------------------------------------------------------


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counts:
    fresh = Counts()
    for module in (front, audit_module, gate_module):
        monkeypatch.setattr(module, "counts", fresh)
    return fresh


class FakeModel:
    """Answers internal requests: a linked one is ``off`` by so much in its likeliest
    token's log-probability."""

    def __init__(self, off: Callable[[LinkOptions], float] = lambda options: 0.0):
        self.off = off
        self.asked: list[Any] = []
        self.flushed: list[str] = []
        self.exactness = "composed"
        self.error: Exception | None = None

    async def generate(self, obj: Any) -> Any:
        await asyncio.sleep(0)
        self.asked.append(obj)
        if self.error is not None:
            raise self.error
        asked = read_internal(obj.kv_hints, salt=obj.cache_salt)
        if asked.compile is not None:
            return {}
        first = math.log(0.5)
        rest = math.log(0.4 / TOP)
        link = asked.link
        if link is None:
            top = [(first, 0, None), *((rest, token, None) for token in range(1, TOP))]
            return {"meta_info": {"output_top_logprobs": [top]}}
        off = self.off(link.options)
        row = [(first - off if t == 0 else rest, t, None) for t in obj.token_ids_logprob]
        report = {"exactness": self.exactness, "segments": [{"hit": True, "reason": "hit"}]}
        return {
            "meta_info": {
                "output_token_ids_logprobs": [row],
                "output_top_logprobs": [[(0.0, 0 if off < 2 else 1, None)]],
                "pic": [report],
            }
        }

    async def flush(self, salt: str) -> None:
        self.flushed.append(salt)


def prompt(salt: str | None = "acme") -> Prompt:
    spans = (TokenSpan(2, 40),)
    return Prompt(ids_of(1, 50), LinkRequest(spans, LinkOptions(seam=8)), salt, None, None)


async def audited(audit: Audit, answers: int, length: int = 8) -> None:
    for _ in range(answers):
        audit.consider(prompt(), range(length))
        if audit._task is not None:
            await audit._task


def make_audit(
    model: FakeModel, gate: Gate, idle: Callable[[], bool] = lambda: True, **config: Any
):
    return Audit(model.generate, model.flush, idle, PicConfig(**config), gate)


def test_the_sample_is_a_share_of_all_and_always_the_same() -> None:
    for rate in (0.0, 0.01, 0.25, 1.0):
        chosen = [is_chosen(number, rate) for number in range(20000)]
        assert sum(chosen) == pytest.approx(rate * 20000, rel=0.15)
        assert chosen == [is_chosen(number, rate) for number in range(20000)]


def test_an_audit_compares_the_tenants_link_with_a_namespace_of_its_own(counts: Counts) -> None:
    model, gate = FakeModel(lambda options: 0.1), Gate()
    asyncio.run(audited(make_audit(model, gate, audit_rate=1.0), 1))
    assert len(model.asked) == 2 * POSITIONS
    full, again = model.asked[::2], model.asked[1::2]
    assert {one.cache_salt for one in again} == {"acme"}
    (salt,) = {one.cache_salt for one in full}
    assert salt != "acme" and model.flushed == [salt]
    for one, other in zip(full, again, strict=True):
        assert one.input_ids == other.input_ids and one.kv_hints is None
        link = read_internal(other.kv_hints).link
        assert link is not None and not link.strict
        # Nothing is kept for a next turn.
        assert link.options == LinkOptions(seam=8, turns=False)
    assert [len(one.input_ids) for one in full] == [50, 52, 54, 56]
    assert (counts.audit.audits, counts.audit.agreements) == (1, 1)
    assert 0 < counts.audit.kl_sum == counts.audit.kl_max < 0.1
    assert counts.answers == {} and counts.compiles == 0


def test_an_answer_whose_tokens_are_not_known_is_audited_behind_its_prompt(counts: Counts) -> None:
    model = FakeModel()
    asyncio.run(audited(make_audit(model, Gate(), audit_rate=1.0), 1, length=0))
    assert len(model.asked) == 2
    assert counts.audit.audits == 1


def test_audits_wait_for_idle_time_and_drop_the_oldest(counts: Counts) -> None:
    model, idle = FakeModel(), False

    async def run() -> None:
        nonlocal idle
        audit = make_audit(model, Gate(), lambda: idle, audit_rate=1.0)
        for _ in range(QUEUE + 3):
            audit.consider(prompt(), [])
        await asyncio.sleep(0.05)
        assert not model.asked
        idle = True
        await audit._task

    asyncio.run(run())
    assert (counts.audit.audits, counts.audit.dropped) == (QUEUE, 3)


def test_what_cannot_be_audited_is_dropped_and_leaves_nothing(counts: Counts) -> None:
    model = FakeModel()
    audit = make_audit(model, Gate(), audit_rate=1.0)
    model.exactness = "exact"
    asyncio.run(audited(audit, 1))
    model.error = ValueError("too long")
    asyncio.run(audited(audit, 1))
    assert (counts.audit.audits, counts.audit.dropped) == (0, 2)
    assert len(model.flushed) == 2


@pytest.mark.parametrize("action", ["log", "off"])
def test_above_the_bound_it_says_so_or_stops(
    action: str, counts: Counts, caplog: pytest.LogCaptureFixture
) -> None:
    off = 0.0
    model, gate = FakeModel(lambda options: off), Gate()
    audit = make_audit(model, gate, audit_rate=1.0, audit_kl=0.5, audit_action=action)
    asyncio.run(audited(audit, WINDOW))
    off = 2.5
    # One that is far off does not stop it: the mean of a window does.
    asyncio.run(audited(audit, 1))
    assert gate.reason is None and not caplog.records
    asyncio.run(audited(audit, WINDOW - 1))
    assert any("nats in the mean" in record.message for record in caplog.records)
    assert counts.audit.agreements == WINDOW
    if action == "log":
        assert gate.reason is None is counts.linking_off
        return
    assert (gate.reason, counts.linking_off) == (AUDIT_FAILED, AUDIT_FAILED)
    gate.open()
    assert gate.to_json() == {"on": True, "reason": None, "why": None}
    assert counts.linking_off is None


SOUND = {"found": 1e-6, "bound": 1e-3}


def ask_canary(model: FakeModel, told: dict[str, Any], **config: Any) -> tuple[Once, Gate]:
    gate = Gate()

    async def tell(do: str, **fields: Any) -> list[Any]:
        if do == "flush":
            await model.flush(fields["cache_salt"])
            return [{}]
        answer = told.get(do, {"stats": {"refusal": None}, "selfcheck": {"rotation": SOUND}}[do])
        if isinstance(answer, Exception):
            raise answer
        if callable(answer):
            await answer()
        return [answer]

    made = Model(vocabulary=512, longest=4096, page=16, context=())
    settings = PicConfig(**config)
    checks = Canary(model.generate, tell, lambda: made, settings).checks
    closed = functools.partial(gate.close, CANARY_FAILED)
    canary = Once("the canary", checks, settings.canary_timeout_s, closed)

    async def both() -> None:
        await asyncio.gather(canary.settle(), canary.settle())

    asyncio.run(both())
    return canary, gate


def test_the_canary_passes_once_and_leaves_nothing(
    counts: Counts, caplog: pytest.LogCaptureFixture
) -> None:
    model = FakeModel(lambda options: 0.0 if options.policy == "full" else 0.05)
    with caplog.at_level("INFO"):
        canary, gate = ask_canary(model, {})
    # Said before they come: SGLang logs each of them as if it were a client's.
    prompts = sum(
        len(one.input_ids) if isinstance(one.input_ids[0], list) else 1 for one in model.asked
    )
    said = [record.getMessage() for record in caplog.records]
    assert said[0] == f"sglang_pic: the next {prompts} prompts to prefill are the canary's"
    assert len(said) == 2 and "the canary passed" in said[1]
    assert canary.verdict.result == PASSED and gate.reason is None
    assert {"rotation", "opening_kl", "attention_kl", "modes_kl", "linked_kl"} == set(
        canary.verdict.checks
    )
    used = {one.cache_salt for one in model.asked if not is_reserved(one.cache_salt)}
    assert used == set(model.flushed)
    assert counts.compiles == 0 and counts.answers == {}


@pytest.mark.parametrize(
    ("off", "told", "name"),
    [
        (lambda o: 0.5 * (o.policy == "full"), {}, "attention_kl"),
        (lambda o: 0.5 * (o.mode == "relocate"), {}, "modes_kl"),
        (lambda o: 20.0 * (o.policy == "seam"), {}, "linked_kl"),
        (lambda o: 0.0, {"selfcheck": {"rotation": {"found": 1.4, "bound": 1e-3}}}, "rotation"),
        (lambda o: math.nan, {}, "attention_kl"),
    ],
)
def test_the_canary_stops_what_it_finds_broken(
    off: Any, told: Any, name: str, counts: Counts
) -> None:
    canary, gate = ask_canary(FakeModel(off), told)
    assert canary.verdict.result == FAILED
    assert gate.reason == CANARY_FAILED == counts.linking_off
    assert name in gate.why


@pytest.mark.parametrize(
    ("told", "why"),
    [
        ({"stats": {"refusal": "speculative decoding is not supported"}}, "does not link"),
        ({"selfcheck": PicRefused(404, "a segment of the canary is not held", "ids")}, "not held"),
    ],
)
def test_the_canary_leaves_alone_what_it_cannot_test(told: Any, why: str, counts: Counts) -> None:
    canary, gate = ask_canary(FakeModel(), told)
    assert canary.verdict.result == UNTESTED and why in canary.verdict.why
    assert gate.reason is None


def test_a_canary_that_hangs_is_given_up(counts: Counts) -> None:
    """In whatever it asks for, tidying up included."""
    for hangs in ("generate", "flush", "stats"):
        model = FakeModel()

        async def forever(*_: Any, **__: Any) -> Any:
            await asyncio.Event().wait()

        if hangs == "stats":
            told: dict[str, Any] = {"stats": forever}
        else:
            told = {}
            setattr(model, hangs, forever)
        canary, gate = ask_canary(model, told, canary_timeout_s=0.05)
        assert canary.verdict.result == UNTESTED
        assert canary.verdict.why == "took longer than 0.05 s"
        assert gate.reason is None


def test_a_canary_that_dies_stops_links(counts: Counts) -> None:
    model = FakeModel()
    model.error = RuntimeError("no memory")
    canary, gate = ask_canary(model, {})
    assert canary.verdict.result == FAILED and "no memory" in gate.why


def test_no_number_passes_as_none() -> None:
    assert Check(0.1, 0.2).passed and not Check(0.3, 0.2).passed
    assert not Check(math.nan, 0.2).passed
    assert not Check.of_json(json.loads(json.dumps(Check(math.nan, 0.2).to_json()))).passed
    assert Check.of_json(Check(0.1, 0.2).to_json()) == Check(0.1, 0.2)


@pytest.mark.parametrize(
    "wrong",
    [{"audit_rate": 1.5}, {"canary_kl": -1.0}, {"audit_kl": -1.0}, {"audit_action": "stop"}],
)
def test_settings_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(PicConfigError, match=next(iter(wrong))):
        PicConfig(**wrong)


# -- what the scheduler compares ------------------------------------------------------


def pool_of(keys: torch.Tensor, values: torch.Tensor) -> Any:
    class Pool:
        get_key_buffer = staticmethod(lambda layer: keys)
        get_value_buffer = staticmethod(lambda layer: values)

    return Pool()


@pytest.mark.parametrize("neox", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moved_keys_are_held_against_those_computed_there(neox: bool, dtype: Any) -> None:
    inverse = 1.0 / 10000 ** (torch.arange(0, 16, 2) / 16)
    freqs = torch.arange(256)[:, None] * inverse
    rope = LayerRope(torch.cat([freqs.cos(), freqs.sin()], -1), neox)
    alone, behind = torch.arange(0, 32), torch.arange(40, 112)
    torch.manual_seed(0)
    raw, values = torch.randn(72, 2, 16), torch.randn(128, 2, 16)
    keys = torch.zeros(128, 2, 16)
    for slots, tokens in ((alone, raw[40:]), (behind, raw)):
        cos, sin = angles(rope.cos_sin_cache, torch.arange(len(slots)))
        keys[slots] = rotate(tokens, cos, sin, neox=neox)
    values[behind[40:]] = values[alone]
    pool = pool_of(keys.to(dtype), values.to(dtype))
    checks = selfcheck.first_layer_checks(pool, {0: rope}, alone, behind)
    assert all(check.passed for check in checks.values()), checks
    assert selfcheck.first_layer_checks(pool, {1: rope}, alone, behind) == {}
    # In the other layout.
    other = {0: LayerRope(rope.cos_sin_cache, not neox)}
    checks = selfcheck.first_layer_checks(pool, other, alone, behind)
    assert [check.passed for check in checks.values()] == [False, True]


class Rotary(torch.nn.Module):
    """As SGLang's of keys [n, heads, head_dim], with angles of ``position ** power``."""

    def __init__(self, power: float):
        super().__init__()
        positions = torch.arange(512.0)[:, None] ** power
        freqs = positions / 10000 ** (torch.arange(0, 16, 2) / 16)
        self.cos_sin_cache = torch.cat([freqs.cos(), freqs.sin()], -1)

    def forward_native(self, positions: Any, query: Any, key: Any) -> Any:
        cos, sin = self.cos_sin_cache[positions].chunk(2, -1)
        return tuple(rotate(x, cos, sin, neox=True) for x in (query, key))


@pytest.mark.parametrize(("power", "sound"), [(1.0, True), (1.1, False)])
def test_rotations_must_add_up(power: float, sound: bool) -> None:
    layer = torch.nn.Module()
    layer.attn = RadixAttention(1, 16, 1.0, 1, layer_id=0)
    layer.rotary_emb = Rotary(power)
    ropes = {0: LayerRope(layer.rotary_emb.cos_sin_cache, True)}
    check = selfcheck.rotary_check(torch.nn.ModuleList([layer]), ropes)
    assert check is not None and check.passed == sound, check
    assert selfcheck.rotary_check(torch.nn.Module(), {}) is None


@pytest.mark.parametrize("scalar", [True, False])
def test_a_composed_state_is_held_against_a_single_pass(scalar: bool) -> None:
    torch.manual_seed(0)
    pair = Pair(torch.randn(2, 3) if scalar else torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 5))
    before = torch.randn(2, 3, 4, 5)
    behind = apply(pair, before)
    behind[1] = 0  # further layers differ, as they do
    core = CoreState(pack(pair), None, torch.zeros(2, 1, 3))
    assert first_layer_check(core, before, behind, inputs=torch.float32).passed
    assert not first_layer_check(core, 1.1 * before, behind, inputs=torch.bfloat16).passed


# -- on a server ----------------------------------------------------------------------

BOUND = 0.1
EVERY = ("--pic-audit-rate=1", f"--pic-audit-kl={BOUND}", "--pic-audit-action=off")
PARTS = [("text", ids_of(1, 5)), ("segment", ids_of(2, 80)), ("segment", ids_of(3, 80))]


def ask(server: Server, salt: str, n_new: int = 4, tail: int = 4) -> dict[str, Any]:
    ids, segments = assemble([*PARTS, ("text", ids_of(tail, 7))])
    return server.generate(**body(ids, segments, n_new, salt, seam=16))


def audits(server: Server) -> dict[str, Any]:
    return server.get("/pic/stats").json()["front"]["audit"]


def wait_for_audits(server: Server, number: int) -> dict[str, Any]:
    until = time.monotonic() + 120
    while (found := audits(server))["audits"] < number:
        assert time.monotonic() < until, found
        time.sleep(0.2)
    return found


@pytest.fixture(params=[pytest.param("llama", marks=pytest.mark.long), "hybrid"])
def audited_server(request: pytest.FixtureRequest, tmp_path: Path, logs: Path) -> Iterator[Server]:
    """Every answer is audited, and looking a segment up corrupts it."""
    env = {**CHECKS, **faults.environment(tmp_path / "faults", "corrupt_on_get")}
    if request.param == "llama":
        model = request.getfixturevalue("tiny_path")
    else:
        model = tiny_hybrid(tmp_path, "qwen3_5")
    log = logs / f"audit_{request.param}.log"
    with serve(model, log, *TINY, *EVERY, env=env) as server:
        yield server


@pytest.mark.server
def test_the_audit_flags_a_segment_that_was_corrupted(audited_server: Server) -> None:
    server, salt = audited_server, fresh_salt()
    info = server.get("/pic/info").json()
    assert info["canary"]["result"] == PASSED, info["canary"]
    assert info["linking"]["on"]
    # The canary has left nothing behind.
    assert server.forest()["segments"] == []

    report = ask(server, salt)["meta_info"]["pic"]
    assert report["exactness"] == "composed"
    sound = wait_for_audits(server, 1)
    segments = server.get(f"/pic/segments?cache_salt={salt}").json()["segments"]
    assert len(segments) == 2
    answers = server.get("/pic/stats").json()["front"]["answers"]
    assert answers == {"composed": 1}

    for segment in segments:
        server.get(f"/pic/segments/{segment['id']}?cache_salt={salt}").raise_for_status()
    for number in range(WINDOW):
        again = ask(server, salt, tail=10 + number)["meta_info"]["pic"]
        assert again["segments"][0]["reason"] == "hit"
    found = wait_for_audits(server, 1 + WINDOW)
    corrupted = (found["kl_sum"] - sound["kl_sum"]) / WINDOW
    assert corrupted > max(BOUND, 3 * sound["kl_max"]), (corrupted, sound)
    assert "nats in the mean" in server.log.read_text()

    # Off for that model, and said so.
    linking = server.get("/pic/info").json()["linking"]
    assert linking["on"] is False and linking["reason"] == AUDIT_FAILED
    answer = ask(server, salt)
    assert answer["meta_info"]["pic"]["reason"] == AUDIT_FAILED
    assert answer["meta_info"]["pic"]["exactness"] == "exact"
    assert server.get("/pic/stats").json()["front"]["linking_off"] == AUDIT_FAILED

    # Until an operator turns it on again.
    assert server.post("/pic/linking", {"on": True}).json()["on"]
    report = ask(server, fresh_salt())["meta_info"]["pic"]
    assert report["exactness"] == "composed"
    off = server.post("/pic/linking", {"on": False}).json()
    assert off["reason"] == "switched_off"
    assert ask(server, salt)["meta_info"]["pic"]["reason"] == "switched_off"
    assert server.post("/pic/linking", {"on": "yes"}).status_code == 400
    wait_for_audits(server, 2 + WINDOW)
    assert server.forest()["live_plans"] == 0


@pytest.mark.server
def test_a_broken_rotation_is_not_linked(tiny_path: Path, logs: Path, tmp_path: Path) -> None:
    env = {**CHECKS, **faults.environment(tmp_path / "faults", "turned_back")}
    with serve(tiny_path, logs / "broken.log", *TINY, env=env) as server:
        info = server.get("/pic/info").json()
        assert info["canary"]["result"] == FAILED
        assert info["linking"]["reason"] == CANARY_FAILED
        assert "rotation" in info["linking"]["why"] and "keys" in info["linking"]["why"]
        assert "linking is off (canary_failed): " in server.log.read_text()
        report = ask(server, fresh_salt())["meta_info"]["pic"]
        assert (report["exactness"], report["reason"]) == ("exact", CANARY_FAILED)
        assert server.forest()["segments"] == []
        # An operator may know better.
        server.post("/pic/linking", {"on": True}).raise_for_status()
        assert ask(server, fresh_salt())["meta_info"]["pic"]["exactness"] == "composed"
