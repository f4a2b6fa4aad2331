"""What the GPU script does where there is no GPU: check kernels interpreted, compile them."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

from sglang_pic.eval.gpu import checks, run
from sglang_pic.eval.gpu.offline import SHARED_LIMIT
from sglang_pic.launch_server import with_defaults


def test_the_script_checks_every_kernel() -> None:
    outcome = run.run(quick=True, seed=0)
    assert outcome.rows and all(row["ok"] for row in outcome.rows)
    held = {row["kernel"].split(",")[0] for row in outcome.rows}
    assert {"walk_rows", "walk_unrotated", "relocate", "states_before", "compose"} <= held


def test_a_failed_check_is_one() -> None:
    assert not checks.Check("k", "m", "float32", 1e-3, 1e-5).ok
    assert not checks.Check("k", "m", "float32", float("nan"), 1e-5).ok


def test_every_kernel_compiles_for_a_hopper(tmp_path: pathlib.Path) -> None:
    """At Qwen3-Next's shapes, in a process that does not interpret."""
    found = tmp_path / "aot.json"
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    line = [sys.executable, "-m", "eval.gpu.aot", "--quick", f"--json={found}"]
    root = pathlib.Path(__file__).parents[1]
    done = subprocess.run(line, cwd=root, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(found.read_text())["rows"]
    kernels = {row["kernel"] for row in rows}
    assert len(kernels) >= 9
    for row in rows:
        assert row["shared"] <= SHARED_LIMIT, row
        # The widest tiles spill some registers where a row enters a span, not in the loop.
        assert row["spilled"] <= 512, row


def test_the_launcher_asks_for_a_backend_that_links() -> None:
    """On a GPU SGLang's own choice could not; whoever chooses is left alone."""
    bare = ["--model-path", "m"]
    pic = ["--radix-cache-backend", "pic"]
    assert with_defaults(bare, cuda=False) == [*bare, *pic]
    assert with_defaults(bare, cuda=True) == [*bare, *pic, "--attention-backend", "triton"]
    for flag in ("--attention-backend=flashinfer", "--decode-attention-backend"):
        assert with_defaults([*bare, flag], cuda=True) == [*bare, flag, *pic]
    own = ["--radix-cache-backend=other"]
    assert with_defaults([*bare, *own], cuda=False) == [*bare, *own]
