"""``sgl.Engine`` in a program of one's own, without HTTP."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest

from sglang_pic.config import ENV_NAME

pytestmark = pytest.mark.server

PROGRAM = """
import json, random, sys
import sglang as sgl
from sglang.srt.managers.kv_hints import decode_kv_hints_envelope
from sglang_pic.eval.hostile import ATTACKS, Forger
from sglang_pic.request.hints import pic_hints

GREEDY = {"max_new_tokens": 2, "temperature": 0}

def said(engine, hints, **asked):
    try:
        return engine.generate(
            input_ids=[1, 2, 3], sampling_params=GREEDY, kv_hints=hints, **asked
        )["output_ids"]
    except ValueError as error:
        return str(error)

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
            input_ids=ids + [7], sampling_params=GREEDY, kv_hints=hints
        )
        reports.append(answer["meta_info"]["pic"])
    # One of a batch is linked, on the seams of the turn before it too; the other is an
    # ordinary prompt.
    both = engine.generate(
        input_ids=[b + a + [9], a], sampling_params=GREEDY, kv_hints=[hints, None]
    )
    assert both[0]["meta_info"]["pic"]["tokens_reused"] == 160, both
    assert not any(one["hit"] for one in both[1]["meta_info"]["pic"]["segments"]), both
    usual = said(engine, None)
    for name, hints in ATTACKS.items():
        for given in (hints, decode_kv_hints_envelope(hints)):
            answer = said(engine, given)
            assert "kv_hints" in answer, (name, answer)
    for i in range(300):
        forger = Forger(random.Random(i), range(512))
        answer = said(engine, forger.hints(), cache_salt=str(forger.salt()))
        assert answer == usual or isinstance(answer, str) and "sglang_pic: " not in answer, answer
    assert said(engine, None) == usual
    engine.shutdown()
    print("REPORTS", json.dumps(reports))
"""


def test_engine_links_and_obeys_nobody(tiny_path: pathlib.Path, tmp_path: pathlib.Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    out = subprocess.run(
        [sys.executable, program, tiny_path], capture_output=True, text=True, timeout=600,
        env={**os.environ, ENV_NAME: json.dumps({"cold": "link"})},
    )  # fmt: skip
    assert "REPORTS" in out.stdout, out.stderr[-3000:]
    assert out.stdout.count('"reason": "hit"') == 4
    assert out.stdout.count('"tokens_reused": 152') == 2
