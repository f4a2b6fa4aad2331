"""An answer forced token by token while a server decodes, and what it would have said.

SGLang lets a request bring a processor of logits, which sees them before a token is chosen,
and computes the log-probabilities that it reports from what the processor left. This one
leaves them so that they can be had back: the forced token's logit goes into the place of a
token that nobody would say, and the forced token gets more than the likeliest one. Without
the forced token's class what remains is the distribution as it was.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from sglang.srt.sampling.custom_logit_processor import CustomLogitProcessor

from sglang_pic.eval.serving import Server

# A server's flag, without which it refuses such requests.
FLAG = "--enable-custom-logit-processor"
# Of the forced token's logit over the largest.
MARGIN = 1.0


class ForceAnswer(CustomLogitProcessor):
    """Reads ``answer`` (token ids) and ``spare`` (a token id) of ``custom_params``."""

    def __call__(
        self, logits: torch.Tensor, custom_param_list: list[dict[str, Any]] | None = None
    ) -> torch.Tensor:
        for row, params in zip(logits, custom_param_list or (), strict=True):
            # One call a token; with overlap scheduling SGLang does not know the last one yet.
            at = params["at"] = params.get("at", -1) + 1
            answer, likeliest = params["answer"], row.max()
            token = answer[min(at, len(answer) - 1)]
            row[params["spare"]] = row[token]
            row[token] = likeliest + MARGIN
        return logits


class Step(NamedTuple):
    """``listed``: log-probabilities by token; ``likeliest``: the largest of all."""

    listed: dict[int, float]
    likeliest: float


def undo(found: dict[int, float], token: int, spare: int) -> Step:
    """What the log-probabilities ``found`` were before ``token`` was forced.

    The spare token's own probability counts as 0.
    """
    others = math.log1p(-math.exp(found[token]))
    back = {one: value - others for one, value in found.items()}
    likeliest = back[token] - MARGIN
    back[token] = back.pop(spare)
    return Step(back, likeliest)


def force(
    server: Server, body: dict[str, Any], answer: Sequence[int], wanted: Sequence[int], spare: int
) -> tuple[list[Step], dict[str, Any]]:
    """Decode behind a prompt with the answer forced.

    Args:
        server: started with ``FLAG``.
        body: the request, without sampling.
        wanted: tokens whose log-probabilities are listed.
        spare: a token that is neither in ``answer`` nor wanted, and that nobody would say.

    Returns:
        A step for each token of the answer, and the answer's ``meta_info``.

    Raises:
        ValueError: the spare token is none.
        RuntimeError: the server said something else.
    """
    if spare in (told := {*wanted, *answer}):
        raise ValueError(f"token {spare} is asked about")
    asked = sorted(told | {spare})
    out = server.generate(
        **body,
        sampling_params={
            "max_new_tokens": len(answer),
            "temperature": 0,
            "ignore_eos": True,
            "custom_params": {"answer": list(answer), "spare": spare},
        },
        custom_logit_processor=ForceAnswer.to_str(),
        return_logprob=True,
        token_ids_logprob=asked,
    )
    if out["output_ids"] != list(answer):
        raise RuntimeError(f"{out['output_ids']} was said where {list(answer)} was forced")
    meta = out["meta_info"]
    listed = [
        {token: value for value, token, *_ in row} for row in meta["output_token_ids_logprobs"]
    ]
    return [undo(one, token, spare) for one, token in zip(listed, answer, strict=True)], meta
