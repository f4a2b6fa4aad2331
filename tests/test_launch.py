"""The launcher's words for what is wrong with its flags, said at once."""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import subprocess
import sys
from typing import Any

import pytest

from sglang_pic import flags, launch_server
from sglang_pic.config import ENV_NAME, PicConfig
from sglang_pic.errors import PicConfigError

# Each case in one process that has imported nothing large.
RUN = """
import contextlib, io, json, sys
from sglang_pic import launch_server
said = []
for flags in json.load(sys.stdin):
    err = io.StringIO()
    with contextlib.redirect_stderr(err):
        try:
            launch_server.main(["--model-path", "m", *flags])
        except SystemExit as ended:
            said.append([ended.code, err.getvalue()])
large = [name for name in ("sglang", "torch", "transformers") if name in sys.modules]
print(json.dumps([said, large]))
"""


def test_what_is_wrong_is_said_before_anything_is_loaded(tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").write_text("not JSON")
    (tmp_path / "list").write_text("[]")
    (tmp_path / "bytes").write_bytes(b"\xff")
    cases = {
        # Mistyped, with a value beside it or within, abbreviated, in another spelling.
        ("--pic-seem", "3"): "there is no --pic-seem, did you mean --pic-seam?",
        ("--pic-seem=3",): "there is no --pic-seem, did you mean --pic-seam?",
        ("--port", "1", "--pic-min-segmnet=3"): "did you mean --pic-min-segment?",
        ("--pic-compile-t", "3"): "did you mean --pic-compile-timeout?",
        ("--pic-canary",): "did you mean --pic-canary-kl?",
        ("--pic_kv_mib", "3"): "there is no --pic_kv_mib, did you mean --pic-kv-mib?",
        ("-pic-mode", "share"): "there is no -pic-mode, did you mean --pic-mode?",
        ("--PIC-STORE=x",): "did you mean --pic-store?",
        ("--pci-policy", "none"): "there is no --pci-policy, did you mean --pic-policy?",
        ("--compile-context", "x"): "did you mean --pic-compile-context?",
        ("--pic-zzzzzzzzzzzzzzz",): "there is no --pic-zzzzzzzzzzzzzzz\n",
        # Values.
        ("--pic-seam", "many"): "argument --pic-seam: invalid int value: 'many'",
        ("--pic-mode", "shared"): "argument --pic-mode: invalid choice: 'shared'",
        ("--pic-seam", "-1"): "seam must be at least 0",
        # Files.
        ("--pic-tenants", str(tmp_path / "none")): "--pic-tenants: [Errno 2] No such file",
        ("--pic-tenants", str(tmp_path)): "--pic-tenants: [Errno 21] Is a directory",
        ("--pic-tenants", str(tmp_path / "file")): "--pic-tenants: Expecting value",
        ("--pic-tenants", str(tmp_path / "bytes")): "--pic-tenants: 'utf-8' codec",
        ("--pic-tenants", str(tmp_path / "list")): "--pic-tenants: must be a JSON object",
        ("--pic-compile-context-file", str(tmp_path / "none")): "--pic-compile-context-file: ",
        ("--pic-compile-context-file", str(tmp_path / "bytes")): "--pic-compile-context-file: ",
        ("--pic-store", str(tmp_path / "file")): "--pic-store: [Errno 17] File exists",
        ("--pic-store", "/proc/self/x"): "--pic-store: [Errno 2] No such file",
    }
    done = subprocess.run(
        [sys.executable, "-c", RUN], input=json.dumps(list(cases)), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    said, large = json.loads(done.stdout)
    assert large == []
    for (given, expected), (code, text) in zip(cases.items(), said, strict=True):
        assert code == 2 and expected in text, (given, text)
        # How it is called, and what is wrong.
        assert len(text.splitlines()) == 2, (given, text)


def test_no_flag_of_sglangs_is_taken_for_one_of_ours() -> None:
    from sglang.srt.server_args import ServerArgs

    stock = argparse.ArgumentParser()
    ServerArgs.add_cli_args(stock)
    theirs = [option for action in stock._actions for option in action.option_strings]
    assert len(theirs) > 300
    args = flags.pic_parser().parse_args(["--model-path", "m"])
    flags.check_rest(args, [*theirs, "pic-seem", "-1", "--", "-"])
    with pytest.raises(PicConfigError):
        flags.check_rest(args, [*theirs, "--pic-seem"])


def test_tenants_without_the_admins_key_are_refused_before_the_model_is_loaded(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    ran: list[Any] = []
    monkeypatch.setattr("sglang.launch_server.run_server", ran.append)
    monkeypatch.setattr("sglang.srt.plugins.load_plugins", lambda: None)
    monkeypatch.setattr("sglang.srt.utils.kill_process_tree", lambda *_, **__: None)
    monkeypatch.setenv(ENV_NAME, "")
    file = tmp_path / "tenants"
    file.write_text('{"a-key-of-twenty-letters": "salt"}')
    words = ["--model-path", "m", "--pic-tenants", str(file)]
    with pytest.raises(SystemExit) as ended:
        launch_server.main(words)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and "--pic-tenants needs --admin-api-key" in said
    assert not ran
    launch_server.main([*words, "--admin-api-key", "a-key-of-the-operators"])
    assert len(ran) == 1


def test_every_flag_reaches_its_setting() -> None:
    defaults = PicConfig()
    reached = set()
    for action in flags.pic_parser()._actions:
        flag = action.option_strings[-1]
        name = flag.removeprefix("--pic-").replace("-", "_")
        if not flag.startswith("--pic-") or name in ("compile_context", "compile_context_file"):
            continue
        name = name if hasattr(defaults, name) else f"{name}_s"
        before = getattr(defaults, name)
        words = [flag]
        if action.nargs != 0:
            other: Any = next((c for c in action.choices or () if c != before), None)
            if other is None:
                kind = action.type or str
                other = kind(before / 2 if before else 1) if kind is not str else "path"  # type: ignore
            words.append(str(other))
        args = flags.pic_parser().parse_args(["--model-path", "model", *words])
        found = getattr(flags.read_config(args), name)
        assert found != before, flag
        assert len(words) == 1 or str(found) == words[1], flag
        reached.add(name)
    assert reached == {f.name for f in dataclasses.fields(PicConfig)} - {"compile_context"}
