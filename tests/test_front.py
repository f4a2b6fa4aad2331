"""Settings, hooks' shape checks, and the compiler's promises, without a server."""

from __future__ import annotations

import asyncio
import importlib
import pathlib
import subprocess
import sys
import types
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from sglang.srt.managers.io_struct import GenerateReqInput

from sglang_pic.config import ENV_NAME, PicConfig
from sglang_pic.errors import PicConfigError, PicRequestError
from sglang_pic.flags import pic_parser, read_config
from sglang_pic.forest.keys import is_reserved, namespace, segment_id
from sglang_pic.platforms import host_tier
from sglang_pic.server import funnel as funnel_module
from sglang_pic.sglang_contract import check_shape
from sglang_pic.sglang_hooks import (
    ENGINE_HOOKS,
    FRONT_HOOKS,
    engine_refusal,
    set_positions,
)


@pytest.mark.parametrize("hook", [*ENGINE_HOOKS, *FRONT_HOOKS], ids=lambda hook: hook.target)
def test_every_hook_fits_the_pinned_sglang(hook) -> None:
    assert hook.reason
    check_shape(hook.target, hook.parameters)


@pytest.mark.parametrize(
    ("target", "parameters"),
    [
        ("sglang.srt.managers.scheduler.Scheduler.no_such_method", ("self",)),
        ("sglang.srt.managers.no_such_module.f", ()),
        (ENGINE_HOOKS[0].target, ("cls", "batch", "renamed")),
    ],
)
def test_another_shape_is_refused(target: str, parameters: tuple[str, ...]) -> None:
    with pytest.raises(PicConfigError):
        check_shape(target, parameters)


@pytest.mark.parametrize(
    ("module", "name", "other"),
    [("base", "HICACHE_HOST_MEMORY_RESERVE_BYTES", None), ("common", "ALLOC_MEMORY_FUNCS", [])],
)
def test_a_host_tier_of_another_shape_is_refused(
    module: str, name: str, other: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = importlib.import_module(f"sglang.srt.mem_cache.pool_host.{module}")
    monkeypatch.setattr(of, name, other)
    with pytest.raises(PicConfigError, match=name):
        host_tier.bind()


def test_without_hooks_the_cache_refuses_to_plan() -> None:
    """This process never installed them: exactly the case of a failed plug-in."""
    assert "not in place" in (engine_refusal() or "")


def test_a_server_that_must_not_link_leaves_any_backend_alone() -> None:
    """Whatever attention backend runs, its forward passes are stock's."""
    from sglang_pic.forest.adapter import PicCache

    cache = object.__new__(PicCache)
    cache.forest = types.SimpleNamespace(may_link=False)
    schedule_batch = types.SimpleNamespace(tree_cache=cache)
    stock_runner = types.SimpleNamespace(attn_backend=object())
    assert set_positions(None, None, schedule_batch, stock_runner) is None


def test_flags_become_settings(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = pic_parser().parse_args(["--model-path", "x", "--pic-seam", "8", "--pic-mode=relocate"])
    config = read_config(args)
    assert config == PicConfig(seam=8, mode="relocate")
    monkeypatch.setenv(ENV_NAME, "")
    config.to_env()
    assert PicConfig.from_env() == config


@pytest.mark.parametrize("text", ["{", "[]", '{"unknown": 1}', '{"seam": -1}', '{"policy": "x"}'])
def test_bad_settings_are_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENV_NAME, text)
    with pytest.raises(PicConfigError):
        PicConfig.from_env()


def test_help_names_every_flag() -> None:
    out = subprocess.run(
        [sys.executable, "-m", "sglang_pic.launch_server", "--help"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for flag in ("seam", "policy", "mode", "compile-context", "min-segment"):
        assert f"--pic-{flag}" in out


def test_an_unreadable_context_is_an_error(tmp_path: pathlib.Path) -> None:
    args = pic_parser().parse_args(
        ["--model-path", "x", "--pic-compile-context-file", str(tmp_path / "none")]
    )
    with pytest.raises(PicConfigError, match="compile-context-file"):
        read_config(args)


# What ids are told apart by is written with these; few of them, so that pairs meet.
_words = st.none() | st.text(st.sampled_from("a\x1f\0b"), max_size=4)
_named = st.tuples(st.lists(st.integers(0, 1), max_size=2), _words, _words)


@given(a=_named, b=_named)
@example(a=([], "a\x1fb", "c"), b=([], "a", "b\x1fc"))
def test_names_tell_segments_apart(a: Any, b: Any) -> None:
    """Tokens, adapter and tenant each change the id; None and "" are one tenant."""

    def name(tokens: list[int], salt: str | None, extra: str | None) -> str:
        return segment_id(namespace((), salt), extra, tokens)

    def norm(x: Any) -> Any:
        return (x[0], x[1] or "", x[2] or "")

    assert (name(*a) == name(*b)) == (norm(a) == norm(b))
    assert is_reserved(namespace((), a[1]))


def test_an_ordinary_answer_beside_a_link_is_stocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(funnel_module, "is_enabled", lambda: True)
    finding = types.SimpleNamespace(search=lambda *_: None)
    funnel = types.SimpleNamespace(finding=finding)
    monkeypatch.setattr(funnel_module, "funnel_of", lambda manager: funnel)
    closed = []

    async def original(manager: Any, obj: Any, request: Any) -> Any:
        try:
            yield {"text": "a", "meta_info": {"id": "1", "pic": [None]}}
            yield [{"text": "b", "meta_info": {"id": "2", "pic": [None, None]}}]
        finally:
            closed.append(True)

    async def run() -> None:
        sent = GenerateReqInput(input_ids=[1])
        made = funnel_module.generate_request(original, None, sent)
        assert await anext(made) == {"text": "a", "meta_info": {"id": "1"}}
        assert await anext(made) == [{"text": "b", "meta_info": {"id": "2"}}]
        await made.aclose()
        assert closed

    asyncio.run(run())


@pytest.mark.parametrize("wrong", [{"cache_salt": "a\0"}, {"kv_hints": {"actions": 3}}])
def test_what_is_refused_is_left_as_its_endpoint_expects_it(
    monkeypatch: pytest.MonkeyPatch, wrong: dict[str, Any]
) -> None:
    """SGLang aborts, when a stream has ended, whatever it knows by the request's name."""
    monkeypatch.setattr(funnel_module, "is_enabled", lambda: True)
    obj = GenerateReqInput(input_ids=[1], stream=True, **wrong)
    with pytest.raises(PicRequestError):
        funnel_module.generate_request(None, None, obj)
    assert obj.is_single and obj.rid is None
