"""What is refused of any request, linked or not, because it ends SGLang's scheduler.

The front of SGLang lets each of these through, and the scheduler, which serves
everybody, dies of it. One entry a flaw: to be taken out when SGLang mends it, which
``tests/test_bounds.py`` notices.
"""

from __future__ import annotations

import dataclasses
import re
from array import array
from collections.abc import Callable
from typing import Any, TypeAlias

import msgspec
import numpy as np
from sglang.srt.managers import io_struct
from sglang.srt.managers.io_struct import GenerateReqInput, TokenizedGenerateReqInput
from sglang.srt.sampling.sampling_params import SamplingParams, sre_parse

from sglang_pic.errors import PicRequestError

# Samples of one prompt. SGLang makes a request of each before it looks at any.
MOST_SAMPLES = 16384
# Below it logits, which are divided by it, overflow: no probabilities are left.
LEAST_REPETITION_PENALTY = 1e-20
# Of SGLang's sampling parameters, those that it computes itself. A client that sets
# them switches off the normalisation that the scheduler relies on.
COMPUTED = ("is_normalized", "stop_str_max_len", "stop_regex_max_len")
# Of parentheses in a grammar's text. A few ten thousand overflow the parser's stack.
MOST_NESTED = 1000
GRAMMARS = ("json_schema", "regex", "ebnf", "structural_tag")
MOST_BIAS = float(np.finfo(np.float32).max)
MOST_TOP_K = int(np.iinfo(np.int32).max)
_NO_IDS = array("q")

Problem: TypeAlias = Callable[[TokenizedGenerateReqInput, int], "str | None"]


@dataclasses.dataclass(frozen=True)
class Bound:
    """One way to end a scheduler.

    Attributes:
        field: of the request.
        problem: what is wrong with a request, if anything; takes what is sent to the
            scheduler and the size of the vocabulary.
        reason: what becomes of it there.
    """

    field: str
    problem: Problem
    reason: str


def _empty(sent: TokenizedGenerateReqInput, vocabulary: int) -> str | None:
    if sent.input_ids or sent.input_embeds is not None or sent.mm_inputs is not None:
        return None
    return "must not be empty"


def _token_ids(sent: TokenizedGenerateReqInput, vocabulary: int) -> str | None:
    # The places of images and the like hold numbers of their own.
    if not sent.input_ids or sent.mm_inputs is not None:
        return None
    ids = np.frombuffer(sent.input_ids, dtype=np.int64)
    for id_ in (int(ids.min()), int(ids.max())):
        if not 0 <= id_ < vocabulary:
            return f"token {id_} is outside the vocabulary of {vocabulary}"
    return None


def _logprob_start(sent: TokenizedGenerateReqInput, vocabulary: int) -> str | None:
    asked = sent.return_logprob and sent.logprob_start_len < -1
    return f"must be at least -1, got {sent.logprob_start_len}" if asked else None


def _top_logprobs(sent: TokenizedGenerateReqInput, vocabulary: int) -> str | None:
    if not sent.return_logprob or 0 <= sent.top_logprobs_num <= vocabulary:
        return None
    return f"must be from 0 to {vocabulary}, the vocabulary, got {sent.top_logprobs_num}"


def _stop_tokens(sent: TokenizedGenerateReqInput, vocabulary: int) -> str | None:
    stops = sent.sampling_params.stop_token_ids or ()
    wrong = next((id_ for id_ in stops if not 0 <= id_ < vocabulary), None)
    if wrong is None:
        return None
    return f"token {wrong} is outside the vocabulary of {vocabulary}"


def _logit_bias(sent: TokenizedGenerateReqInput, vocabulary: int) -> str | None:
    for id_, bias in (sent.sampling_params.logit_bias or {}).items():
        if isinstance(bias, (int, float)) and not abs(bias) <= MOST_BIAS:
            return f"the bias of {id_} must be a finite number of 32 bits, got {bias}"
    return None


def _repetition(sent: TokenizedGenerateReqInput, vocabulary: int) -> str | None:
    penalty = sent.sampling_params.repetition_penalty
    if isinstance(penalty, bool) or penalty >= LEAST_REPETITION_PENALTY:
        return None
    return f"must be at least {LEAST_REPETITION_PENALTY}, got {penalty}"


def _top_k(sent: TokenizedGenerateReqInput, vocabulary: int) -> str | None:
    top = sent.sampling_params.top_k
    return f"must be at most {MOST_TOP_K}, got {top}" if top > MOST_TOP_K else None


def _places(name: str) -> Problem:
    def problem(sent: TokenizedGenerateReqInput, vocabulary: int) -> str | None:
        length = len(sent.input_ids or ())
        for place in getattr(sent, name) or ():
            if not 0 <= place < length:
                return f"place {place} is outside the prompt of {length} tokens"
        return None

    return problem


def _nested(name: str) -> Problem:
    def problem(sent: TokenizedGenerateReqInput, vocabulary: int) -> str | None:
        depth = 0
        for sign in re.findall(r"\\.|[()]", getattr(sent.sampling_params, name) or ""):
            depth = max(0, depth + {"(": 1, ")": -1}.get(sign, 0))
            if depth > MOST_NESTED:
                return f"parentheses must not be nested deeper than {MOST_NESTED}"
        return None

    return problem


def _stop_regex(sent: TokenizedGenerateReqInput, vocabulary: int) -> str | None:
    for pattern in sent.sampling_params.stop_regex_strs or ():
        if _repeats_repeats(sre_parse.parse(pattern), inside=False):
            return f"{pattern!r} repeats without bound what repeats without bound"
    return None


def _repeats_repeats(part: Any, *, inside: bool) -> bool:
    """Whether an unbounded repeat stands in another, in a parsed pattern or a part of one."""
    if isinstance(part, (list, tuple, sre_parse.SubPattern)):
        repeats = (sre_parse.MAX_REPEAT, sre_parse.MIN_REPEAT)
        if len(part) == 2 and part[0] in repeats:
            _, most, body = part[1]
            unbounded = most is sre_parse.MAXREPEAT
            if unbounded and inside:
                return True
            return _repeats_repeats(body, inside=inside or unbounded)
        return any(_repeats_repeats(one, inside=inside) for one in part)
    return False


BOUNDS = (
    Bound("input_ids", _empty, "a row of no length, of which attention makes no shape"),
    Bound("input_ids", _token_ids, "an index outside the embedding"),
    Bound("logprob_start_len", _logprob_start, "a slice of a negative length"),
    Bound("top_logprobs_num", _top_logprobs, "more of the best than there are"),
    Bound(
        "sampling_params.stop_token_ids",
        _stop_tokens,
        "an index outside the logits, beside any request with `min_new_tokens`",
    ),
    Bound("sampling_params.logit_bias", _logit_bias, "probabilities that are no numbers"),
    Bound("sampling_params.repetition_penalty", _repetition, "probabilities that are no numbers"),
    Bound("sampling_params.top_k", _top_k, "more than the batch's tensor of 32 bits takes"),
    Bound(
        "sampling_params.stop_regex",
        _stop_regex,
        "a search of exponential time on the scheduler's thread, until its watchdog ends it",
    ),
    *(
        Bound(name, _places(name), "an index outside the hidden states, where nothing is generated")
        for name in ("multi_item_delimiter_indices", "token_indices_to_pool")
    ),
    *(
        Bound(f"sampling_params.{name}", _nested(name), "a stack that overflows in XGrammar")
        for name in GRAMMARS
    ),
)


def _field_at(error: str) -> str:
    """The request's field that a message of msgspec's is about: ``... - at `$[8][6]` ``."""
    found = re.search(r"`\$\[(\d+)\](?:\[(\d+)\])?", error)
    if found is None:
        return "request"
    # In front of the fields stands the type's name.
    name = TokenizedGenerateReqInput.__struct_fields__[int(found[1]) - 1]
    if name == "sampling_params" and found[2]:
        return f"{name}.{SamplingParams.__struct_fields__[int(found[2])]}"
    return name


def _check_readable(sent: TokenizedGenerateReqInput) -> None:
    """The scheduler reads by type what it is sent, and ends at what it cannot read; the
    front takes any JSON for a sampling parameter."""
    # These are SGLang's own, and may be large.
    bare = msgspec.structs.replace(sent, input_ids=_NO_IDS, time_stats=None, mm_inputs=None)
    try:
        io_struct.msgpack_decode(io_struct.msgpack_encode(bare))
    except (msgspec.ValidationError, OverflowError, TypeError, ValueError) as error:
        raise PicRequestError(_field_at(str(error)), str(error).split(" - at")[0]) from error


def check_samples(obj: GenerateReqInput) -> None:
    """Refuse what must not reach SGLang's normalisation of a request.

    Raises:
        PicRequestError: naming the field.
    """
    params = obj.sampling_params
    for one in params if isinstance(params, list) else [params]:
        if not isinstance(one, dict):
            continue
        samples = one.get("n")
        if isinstance(samples, int) and samples > MOST_SAMPLES:
            raise PicRequestError(
                "sampling_params.n", f"must be at most {MOST_SAMPLES}, got {samples}"
            )
        for name in COMPUTED:
            if name in one:
                raise PicRequestError(f"sampling_params.{name}", "is not for clients to set")


def check_sent(sent: Any, vocabulary: int) -> None:
    """Refuse what the scheduler would not survive.

    Args:
        sent: what SGLang's front has made of one prompt.
        vocabulary: its size.

    Raises:
        PicRequestError: naming the field.
    """
    if not isinstance(sent, TokenizedGenerateReqInput):
        return
    _check_readable(sent)
    for bound in BOUNDS:
        problem = bound.problem(sent, vocabulary)
        if problem is not None:
            raise PicRequestError(bound.field, problem)
