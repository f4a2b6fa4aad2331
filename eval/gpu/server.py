"""SGLang on the GPU with the hybrid that ships: linked answers beside plain SGLang's."""

from __future__ import annotations

import contextlib
import json
import pathlib
import tempfile
from typing import Any

from sglang_pic.eval import hybrid_demo
from sglang_pic.eval.models.hybrid.weights import hybrid_path
from sglang_pic.eval.serving import serve

# Linear layers' kernels take no float32.
FLAGS = (
    f"--max-total-tokens={hybrid_demo.POOL_TOKENS}",
    "--dtype=bfloat16",
    "--attention-backend=triton",
    "--sampling-backend=pytorch",
    # A small model; the rest of the card is others'.
    "--mem-fraction-static=0.05",
)


def serve_hybrid() -> list[dict[str, Any]]:
    """One row a way of answering: questions answered right, tokens computed. Linked
    answers must be as often right as plain SGLang's (``ok``)."""
    with contextlib.ExitStack() as stack:
        logs = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        ours = stack.enter_context(serve(hybrid_path(), logs / "ours.log", *FLAGS))
        module = "sglang.launch_server"
        stock = stack.enter_context(serve(hybrid_path(), logs / "stock.log", *FLAGS, module=module))
        refusal = ours.forest()["refusal"]
        if refusal is not None:
            raise RuntimeError(f"the server does not link: {refusal}")
        print(f"canary: {json.dumps(ours.get('/pic/info').json()['canary'])}", flush=True)
        asked = hybrid_demo.run(ours, stock)
    right = {
        way: sum(row["is_right"] for row in asked if row["method"] == way)
        for way in ("stock", *hybrid_demo.WAYS)
    }
    return [
        {
            "method": way,
            "right": count,
            "questions": hybrid_demo.QUESTIONS,
            "tokens_computed": sum(r["tokens_computed"] for r in asked if r["method"] == way),
            "ok": way != "linked" or count >= right["stock"],
        }
        for way, count in right.items()
    ]
