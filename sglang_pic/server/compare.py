"""Ask for a prompt's next token twice, in full and linked: how far are they apart?

What calibration, canary and audit share. Their requests are internal: they pass by
the funnel and are not counted among those of clients.
"""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from sglang.srt.managers.io_struct import GenerateReqInput

from sglang_pic.link.divergence import kl_with_remainder
from sglang_pic.link.policy import LinkOptions
from sglang_pic.request.base import LinkRequest
from sglang_pic.request.internal import EncodedRequest, encoded_hints, link_hints

TOP = 64

Generate = Callable[[GenerateReqInput], Awaitable[dict[str, Any]]]


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A linked prompt in internal form, whose it is, and the data-parallel rank it is
    asked on, if there are several."""

    ids: list[int]
    link: LinkRequest
    cache_salt: str | None
    extra_key: str | None
    lora_path: str | None
    rank: int | None = None


@dataclasses.dataclass(frozen=True)
class Distribution:
    """Log-probabilities of some next tokens, the likeliest of all, and the report
    of what was linked for it."""

    tokens: list[int]
    logprobs: list[float]
    likeliest: int
    report: dict[str, Any] | None = None

    def kl_from(self, full: Distribution) -> float:
        """KL divergence in nats of this one from ``full``, over its tokens and the rest."""
        return kl_with_remainder(full.logprobs, self.logprobs)


def fresh_salt(purpose: str) -> str:
    """A namespace of its own: nothing is cached there, nothing left for others."""
    return f"sglang-pic-{purpose}-{uuid.uuid4()}"


def _one_token(ids: Sequence[int], **fields: Any) -> GenerateReqInput:
    return GenerateReqInput(
        input_ids=list(ids),
        sampling_params={"max_new_tokens": 1, "temperature": 0},
        return_logprob=True,
        **fields,
    )


def _of_prompt(prompt: Prompt, **fields: Any) -> GenerateReqInput:
    return _one_token(
        prompt.ids,
        extra_key=prompt.extra_key,
        lora_path=prompt.lora_path,
        routed_dp_rank=prompt.rank,
        **fields,
    )


def _likeliest(meta: dict[str, Any]) -> Distribution:
    (top,) = meta["output_top_logprobs"]
    return Distribution([token for _, token, _ in top], [value for value, *_ in top], top[0][1])


def _of_tokens(meta: dict[str, Any], tokens: Sequence[int], report: Any) -> Distribution:
    (row,), (top,) = meta["output_token_ids_logprobs"], meta["output_top_logprobs"]
    values = {token: value for value, token, _ in row}
    return Distribution(list(tokens), [values[token] for token in tokens], top[0][1], report)


async def in_full(generate: Generate, prompt: Prompt, salt: str) -> Distribution:
    """The likeliest next tokens as stock SGLang computes them, in a namespace where
    nothing of this prompt was linked."""
    output = await generate(_of_prompt(prompt, cache_salt=salt, top_logprobs_num=TOP))
    return _likeliest(output["meta_info"])


async def linked(
    generate: Generate, prompt: Prompt, options: LinkOptions, tokens: Sequence[int]
) -> Distribution:
    """The same of these tokens, linked under ``options``; keeps nothing for a next turn."""
    link = LinkRequest(prompt.link.spans, dataclasses.replace(options, turns=False), strict=False)
    output = await generate(
        _of_prompt(
            prompt,
            cache_salt=prompt.cache_salt,
            top_logprobs_num=1,
            token_ids_logprob=list(tokens),
            kv_hints=link_hints(link),
        )
    )
    meta = output["meta_info"]
    return _of_tokens(meta, tokens, meta["pic"][0])


async def encoded(
    generate: Generate,
    row: Sequence[int],
    asked: EncodedRequest,
    salt: str,
    tokens: Sequence[int] | None,
) -> Distribution:
    """The likeliest next tokens of a row that sees encoded documents, or these tokens."""
    output = await generate(
        _one_token(
            row,
            cache_salt=salt,
            top_logprobs_num=TOP,
            token_ids_logprob=None if tokens is None else list(tokens),
            kv_hints=encoded_hints(asked),
        )
    )
    meta = output["meta_info"]
    return _likeliest(meta) if tokens is None else _of_tokens(meta, tokens, None)
