"""What a server would say along an answer that is given.

The answer stands behind the prompt, in one prefill; SGLang reports log-probabilities of the
prompt's tokens from there on. Behind its last segment a linked row reports them, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from sglang_pic.eval.serving import Server


class Step(NamedTuple):
    """``listed``: log-probabilities by token; ``likeliest``: the token with the largest of all."""

    listed: dict[int, float]
    likeliest: int


def score(
    server: Server, body: dict[str, Any], answer: Sequence[int], wanted: Sequence[int]
) -> tuple[list[Step], dict[str, Any]]:
    """Score an answer behind a prompt.

    Args:
        body: the request, with ``input_ids`` and without sampling.
        wanted: tokens whose log-probabilities are listed.

    Returns:
        A step for each token of the answer, and the request's ``meta_info``.
    """
    ids = body["input_ids"]
    out = server.generate(
        **{**body, "input_ids": [*ids, *answer]},
        sampling_params={"max_new_tokens": 1, "temperature": 0},
        return_logprob=True,
        logprob_start_len=len(ids) - 1,
        top_logprobs_num=1,
        token_ids_logprob=list(wanted),
    )
    meta = out["meta_info"]
    # The first entries are of the prompt's last token, whose own are not asked.
    rows = zip(meta["input_token_ids_logprobs"][1:], meta["input_top_logprobs"][1:], strict=True)
    steps = [Step({token: value for value, token, *_ in listed}, top[0][1]) for listed, top in rows]
    return steps, meta
