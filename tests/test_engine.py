"""``sgl.Engine`` in a program of one's own, without HTTP."""

from __future__ import annotations

import pathlib
import subprocess
import sys

import pytest

pytestmark = pytest.mark.server

PROGRAM = """
import json, random, sys
import sglang as sgl
from sglang_pic.request.hints import pic_hints

if __name__ == "__main__":
    engine = sgl.Engine(
        model_path=sys.argv[1], skip_tokenizer_init=True, radix_cache_backend="pic",
        max_total_tokens=4096, dtype="float32",
    )
    rng = random.Random(0)
    a, b = (rng.choices(range(512), k=80) for _ in range(2))
    reports = []
    for ids in (a + b, b + a):
        hints = pic_hints(segments=[{"start": 0, "end": 80}, {"start": 80, "end": 160}], seam=8)
        answer = engine.generate(
            input_ids=ids + [7], sampling_params={"max_new_tokens": 2}, kv_hints=hints
        )
        reports.append(answer["meta_info"]["pic"])
    engine.shutdown()
    print("REPORTS", json.dumps(reports))
"""


def test_engine_links(tiny_path: pathlib.Path, tmp_path: pathlib.Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    out = subprocess.run(
        [sys.executable, program, tiny_path], capture_output=True, text=True, timeout=600
    )
    assert "REPORTS" in out.stdout, out.stderr[-3000:]
    assert out.stdout.count('"reason": "hit"') == 4
    assert out.stdout.count('"tokens_reused": 150') == 2
