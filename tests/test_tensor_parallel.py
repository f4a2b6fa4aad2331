"""Two tensor-parallel ranks: each plans, evicts and allocates by itself, and alike."""

from __future__ import annotations

import pathlib
import random
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import CHECKS, TINY, serve
from linking import (
    TOLERANCE,
    assemble,
    body,
    check_linked,
    distributions,
    fresh_salt,
    ids_of,
    model,
)

from sglang_pic.eval.oracle.company import company_logprobs

# One core each; SGLang refuses more ranks than memory nodes otherwise. It compares what
# its ranks decided, and stops where they differ.
ENV = {
    **CHECKS,
    "SGLANG_CPU_OMP_THREADS_BIND": "0|1",
    "SGLANG_ENABLE_RANK_CONSENSUS_CHECKER": "1",
}


@pytest.mark.server
def test_two_ranks_link_alike(tiny_path: pathlib.Path, logs: pathlib.Path) -> None:
    flags = ("--tp-size=2", "--page-size=4", "--max-total-tokens=1600", "--pic-company-when=idle")
    with serve(tiny_path, logs / "tp2.log", *TINY, *flags, env=ENV) as server:
        assert server.forest()["refusal"] is None
        parts = [("segment", ids_of(10, 40)), ("segment", ids_of(11, 33)), ("text", [1, 2])]
        ids, segments = assemble(parts)

        def linked() -> None:
            for pic in ({}, {"mode": "relocate"}):
                answer = server.generate(**body(ids, segments, 4, fresh_salt(), seam=5, **pic))
                check_linked(answer, ids, segments, seam=5, page=4, n_new=4)

        linked()
        # What recurs is made in company, on both ranks.
        ids, segments = assemble([("text", [5, 6, 7, 8]), *parts])
        salt = fresh_salt()
        for _ in range(2):
            server.generate(**body(ids, segments, 1, salt))
        until = time.monotonic() + 60
        while not server.forest()["companies"] and time.monotonic() < until:
            time.sleep(0.2)
        answer = server.generate(**body(ids, segments, 3, salt))
        assert [one["company"] for one in answer["meta_info"]["pic"]["segments"]] == [2, 2]
        made = company_logprobs(
            model(), ids, segments, [(0, 1)], seam=0, page=4, n_new=3, forced=answer["output_ids"]
        )
        assert (distributions(answer) - made.full_logprobs).abs().max() < TOLERANCE
        # More documents than there is room for, so that the ranks must evict alike.
        draw, salt = random.Random(0), fresh_salt()
        prompts = []
        for _ in range(40):
            chosen = draw.sample(range(24), 4)
            pieces = [("segment", ids_of(40 + i, 60 + i)) for i in chosen]
            prompts.append(assemble([*pieces, ("text", ids_of(chosen[0], 6))]))
        with ThreadPoolExecutor(6) as pool:
            answers = list(
                pool.map(lambda p: server.generate(**body(*p, 3, salt, seam=4)), prompts)
            )
        reused = [answer["meta_info"]["pic"]["tokens_reused"] for answer in answers]
        assert sum(n > 0 for n in reused) > 30
        assert any(s["held"] == 0 for s in server.forest()["segments"]), "nothing was evicted"
        linked()
