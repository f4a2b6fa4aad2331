"""What the GPU script does where there is no GPU: check kernels interpreted, compile them."""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import types
from typing import Any

import pytest
import torch

from sglang_pic.eval.bench import linear_layers
from sglang_pic.eval.gpu import checks, models, run, ttft
from sglang_pic.eval.gpu.offline import SHARED_LIMIT
from sglang_pic.eval.gpu.shapes import TINY
from sglang_pic.launch_server import with_defaults


def compiled_env() -> dict[str, str]:
    """The environment of a process that does not interpret kernels."""
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def test_the_script_checks_every_kernel() -> None:
    outcome = run.run(quick=True, seed=0)
    assert outcome.rows and all(row["ok"] for row in outcome.rows)
    held = {row["kernel"].split(",")[0] for row in outcome.rows}
    assert {"walk_rows", "relocate", "states_before"} <= held
    assert {"tiny", "tiny latent"} == {row["model"] for row in outcome.rows}


def test_a_failed_check_is_one() -> None:
    assert not checks.Check("k", "m", "float32", 1e-3, 1e-5).ok
    assert not checks.Check("k", "m", "float32", float("nan"), 1e-5).ok


def test_every_kernel_compiles_for_a_hopper(tmp_path: pathlib.Path) -> None:
    """At the shapes of Qwen3-Next and DeepSeek V2 Lite, in a process that does not interpret."""
    found = tmp_path / "aot.json"
    env = {**compiled_env(), "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    line = [sys.executable, "-m", "eval.gpu.aot", "--quick", f"--json={found}"]
    root = pathlib.Path(__file__).parents[1]
    done = subprocess.run(line, cwd=root, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(found.read_text())["rows"]
    kernels = {row["kernel"] for row in rows}
    assert len(kernels) >= 10 and {"walk_latent", "attend_latent"} <= kernels
    for row in rows:
        assert row["shared"] <= SHARED_LIMIT, row
        # The widest tiles spill some registers where a row enters a span, not in the loop.
        assert row["spilled"] <= 512, row


VARIANTS = """
import dataclasses, random, torch
from sglang_pic.attention.kernels import latent_kernels, triton_kernels
from sglang_pic.attention.table_runner import TableRunner
from sglang_pic.attention.tables import Shape, tile_of
from sglang_pic.eval.gpu.offline import compiling
from sglang_pic.eval.gpu.scenario import Layout, Scenario
from sglang_pic.eval.gpu.shapes import TINY, TINY_LATENT
from sglang_pic.kernels.rotate import LayerRope

draw = random.Random(0)
shape = dataclasses.replace(TINY, dim=64, rotary=64)
kernels, sizes = triton_kernels(), Shape(tile_of(4, 2), 2, 264)
if LATENT:
    shape, kernels, sizes = TINY_LATENT, latent_kernels(), Shape(4, 1, 264)
runner = TableRunner(kernels, sizes, "cpu")
with compiling() as found:
    for case in range(60):
        layout = Layout(
            segments=draw.randint(1, 5), length=draw.randint(20, 700), seam=16,
            question=draw.randint(1, 90), requests=draw.randint(1, 7), shared=case % 2 == 0,
            decoded=draw.randint(0, 40),
        )
        made = Scenario(shape, layout, "cpu", torch.bfloat16, case)
        rope = LayerRope(made.cos_sin, not shape.latent, shape.latent)
        for rows in (made.link_rows(), made.decode_rows()):
            runner.step = None
            runner.plan(rows)
            query = made.normal(sum(row.extend for row in rows), shape.heads, shape.dim)
            out = query.new_empty(*query.shape[:2], shape.latent or shape.dim)
            runner.run(query, made.pool(), rope, made.scale, out)
print(sorted(one.kernel for one in found))
"""


@pytest.mark.parametrize("latent", [False, True])
def test_serving_compiles_little_anew(latent: bool) -> None:
    """A kernel that is compiled while requests wait stops them all: neither lengths, nor
    numbers of rows, spans or pieces, may make it another."""
    line = [sys.executable, "-c", f"LATENT = {latent}{VARIANTS}"]
    done = subprocess.run(line, capture_output=True, text=True, env=compiled_env(), check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    kernels = ast.literal_eval(done.stdout.strip().splitlines()[-1])
    # A walk of links, one of cut and one of uncut decode; Triton treats a 1 as special.
    assert len(kernels) <= 12, kernels


@pytest.mark.parametrize(
    ("kib", "head_dim", "hybrid", "latent", "reason"),
    [
        (227, 256, True, False, None),
        (99, 128, False, False, None),
        (99, 128, True, False, "180 KiB"),
        (163, 256, False, False, "180 KiB"),
        (227, 512, False, False, "head dimension 512"),
        (163, 512, False, True, None),
        (99, 512, False, True, "148 KiB"),
        (227, 1024, False, True, "head dimension 1024"),
    ],
)
def test_a_gpu_that_is_too_small_is_refused(
    kib: int,
    head_dim: int,
    hybrid: bool,
    latent: bool,
    reason: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from sglang_pic.attention.triton import shared_memory_refusal

    device = types.SimpleNamespace(shared_memory_per_block_optin=kib << 10)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: device)
    found = shared_memory_refusal(head_dim, hybrid, latent)
    assert found is None if reason is None else found is not None and reason in found


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


def test_large_models_are_what_sglang_serves(tmp_path: pathlib.Path) -> None:
    """Their sizes, without their weights."""
    from sglang.srt.models.registry import ModelRegistry
    from transformers import AutoConfig, AutoTokenizer

    for name, told in models.CONFIGS.items():
        path = models.write_model(name, tmp_path)
        config = AutoConfig.from_pretrained(path)
        assert set(config.architectures) <= set(ModelRegistry.get_supported_archs())
        assert linear_layers(config) == told.get("layer_types", []).count("linear_attention")
        assert AutoTokenizer.from_pretrained(path).vocab_size <= config.vocab_size
        # Every prompt that is timed fits, and an answer behind it.
        assert max(s * t for s, t in ttft.GRID) < config.max_position_embeddings


def test_a_kernel_that_raises_is_one_failed_check(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no such instruction")

    kernels = dataclasses.replace(checks.triton_kernels(), relocate=broken)
    monkeypatch.setattr(checks, "triton_kernels", lambda: kernels)
    made = list(checks.attention_checks(TINY, run.SMOKE, "cpu", torch.float32, 0))
    (failed,) = [one for one in made if not one.ok]
    assert failed.kernel == "relocate" and "no such instruction" in failed.failure
    assert len(made) == 5
