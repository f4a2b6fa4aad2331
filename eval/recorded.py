"""Answers recorded in quiet, to hold later ones against.

A prompt is asked alone, greedily, with the likeliest tokens of every step. Asked
again, whatever else runs, it must be answered with the same tokens and the same
log-probabilities. In float32 sums in another order move one by about 1e-6 (another
batch, other chunks, a request retracted and resumed); a token at a wrong place, a page
that somebody else wrote to, or a state too many moves it by more than 1e-2.
``TOLERANCE`` lies between. Where two tokens are as likely within it, either may be
chosen; what follows is then another text and is not compared.
"""

from __future__ import annotations

import dataclasses
from typing import Any

TOLERANCE = 1e-4
TOP = 5

EXACT = "exact"
LINKED = "linked"
PINNED = "pinned"


@dataclasses.dataclass(frozen=True)
class Answer:
    """What is compared of an answer.

    Attributes:
        tokens: the answer's.
        top: of each step the likeliest tokens and their log-probabilities.
        plan: what the report says became of each segment.
        prefix: tokens of ordinary prefix that were reused.
        retractions: how often SGLang took the request back and resumed it.
    """

    tokens: tuple[int, ...]
    top: tuple[dict[int, float], ...]
    plan: tuple[str, ...]
    prefix: int
    retractions: int

    @classmethod
    def of(cls, output: dict[str, Any]) -> Answer:
        """From an answer of ``/generate`` to a request with ``asking``'s fields."""
        meta = output["meta_info"]
        report = meta.get("pic")
        if not isinstance(report, dict):  # an ordinary request
            report = {"segments": [], "prefix_tokens": 0}
        return cls(
            tuple(output["output_ids"]),
            tuple(
                {token: value for value, token, _ in step} for step in meta["output_top_logprobs"]
            ),
            tuple(segment["reason"] for segment in report["segments"]),
            report["prefix_tokens"],
            meta["num_retractions"],
        )


@dataclasses.dataclass(frozen=True)
class Sample:
    """A prompt and its recorded answer.

    Attributes:
        kind: ``exact``: recomputed in full. ``linked``: linked, all segments there.
            ``pinned``: the same, with segments that nothing may evict.
        body: of the request, without its tenant.
        opening: tokens of plain text before the first segment.
    """

    kind: str
    body: dict[str, Any]
    opening: int
    answer: Answer


def asking(count: int) -> dict[str, Any]:
    """Fields of a request whose answer of ``count`` tokens can be compared."""
    return {
        "sampling_params": {"max_new_tokens": count, "temperature": 0, "ignore_eos": True},
        "return_logprob": True,
        "top_logprobs_num": TOP,
    }


def is_comparable(sample: Sample, said: Answer) -> bool:
    """Whether an answer is of the same plan as the recorded one.

    A link that finds a segment evicted is another link. One that was retracted may
    have found so when it was resumed, and its report does not say.
    """
    if sample.kind == EXACT:
        return True
    same = said.plan == sample.answer.plan and said.prefix <= sample.opening
    return same and (sample.kind == PINNED or said.retractions == 0)


def deviation(recorded: Answer, said: Answer) -> float:
    """Largest difference of log-probabilities, as far as the tokens are the same;
    infinite where they part and were not as likely as each other."""
    if len(said.tokens) != len(recorded.tokens):
        return float("inf")
    worst = 0.0
    for i, (before, after) in enumerate(zip(recorded.top, said.top, strict=True)):
        # Ranks may change places: sorted, the values are apart by no more than each is.
        pairs = zip(sorted(before.values()), sorted(after.values()), strict=True)
        worst = max(worst, *(abs(a - b) for a, b in pairs))
        if recorded.tokens[i] != said.tokens[i]:
            chosen = before.get(said.tokens[i], float("-inf"))
            gap = before[recorded.tokens[i]] - chosen
            return max(worst, gap / 2)
    return worst
