"""Prompts, requests and checks shared by the tests that link on a real server."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Sequence
from typing import Any

import torch

from sglang_pic.eval.models.tiny import tiny_llama_model
from sglang_pic.eval.oracle import dense

VOCAB = 512
TOLERANCE = 1e-4
_salts = itertools.count()


@functools.cache
def model() -> Any:
    """The tiny servers' model, in transformers."""
    return tiny_llama_model()


def ids_of(seed: int, length: int) -> list[int]:
    return random.Random(seed).choices(range(VOCAB), k=length)


def assemble(parts: Sequence[tuple[str, list[int]]]) -> tuple[list[int], list[tuple[int, int]]]:
    """Concatenate ("segment" | "text", ids) parts; return ids and segment ranges."""
    ids: list[int] = []
    segments = []
    for kind, part in parts:
        if kind == "segment":
            segments.append((len(ids), len(ids) + len(part)))
        ids += part
    return ids, segments


def fresh_salt() -> str:
    """A namespace nobody has used: nothing is cached there."""
    return f"salt-{next(_salts)}-{random.random()}"


def body(
    ids: list[int], segments: Sequence[tuple[int, int]], n_new: int, salt: str, **pic: Any
) -> dict[str, Any]:
    """A ``/generate`` request that asks for whole distributions."""
    return {
        "input_ids": ids,
        "sampling_params": {"max_new_tokens": n_new, "temperature": 0, "ignore_eos": True},
        "return_logprob": True,
        "token_ids_logprob": list(range(VOCAB)),
        "cache_salt": salt,
        # Asked twice, a prompt would find its own seams: what a link computes is the subject.
        "pic": {"segments": [{"start": s, "end": e} for s, e in segments], "turns": False, **pic},
    }


def distributions(answer: dict[str, Any]) -> torch.Tensor:
    """float32 [n_new, vocab], log-probabilities the server reports."""
    rows = answer["meta_info"]["output_token_ids_logprobs"]
    return torch.tensor([[value for value, *_ in row] for row in rows])


def check_exact(answer: dict[str, Any], ids: list[int], n_new: int, of: Any = None) -> None:
    """The answer is the plain model's."""
    expected = dense.full_logprobs(of or model(), ids, n_new)
    assert (distributions(answer) - expected.full_logprobs).abs().max() < TOLERANCE


def check_linked(
    answer: dict[str, Any],
    ids: list[int],
    segments: Sequence[tuple[int, int]],
    *,
    seam: int,
    page: int,
    n_new: int,
    policy: str = "seam",
    context: Sequence[int] = (),
    of: Any = None,
) -> None:
    """The answer is the oracle's, and exactly the tokens of the formula were reused.

    Of another model than ``model()`` where ``of`` is one.
    Along the server's own tokens, so that a near-tie ends no comparison; the
    greedy choice may differ from the oracle's by no more than the tolerance.
    """
    where = {"seam": seam, "page": page, "policy": policy, "context": context}
    planned = dense.layout(len(ids), segments, prompt_ids=ids, **where)
    report = answer["meta_info"]["pic"]
    reused = report["tokens_reused"] - report["prefix_tokens"] - report["turn_tokens"]
    assert reused == planned.n_reused
    assert report["tokens_reused"] + report["tokens_computed"] == len(ids)
    for segment, core in zip(report["segments"], planned.cores, strict=True):
        assert segment["tokens_reused"] >= len(core), segment
        assert segment["tokens_reused"] == len(core) or report["turn_tokens"]
    chosen = answer["output_ids"]
    expected = dense.linked_logprobs(
        of or model(), ids, segments, min_segment=1, n_new=n_new, forced=chosen, **where
    ).full_logprobs
    worst = (distributions(answer) - expected).abs().max().item()
    assert worst < TOLERANCE, f"log-probabilities differ by {worst}"
    regret = expected.max(-1).values - expected[range(n_new), chosen]
    assert regret.max() < TOLERANCE
