"""What is kept of one linked request while it lives, and what forbids to link one."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from array import array
from typing import Any

import torch
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.mem_cache.base_prefix_cache import MatchResult

from sglang_pic.forest.lookups import Lookup
from sglang_pic.forest.turns import Chain, Core
from sglang_pic.link.plan import LinkPlan
from sglang_pic.request.base import LinkRequest

# Why a request that was to be linked is answered exactly, beside ``unlinkable``.
REQUIRE_EXACT = "require_exact"
LINK_OFF = "link_off"
NO_ROOM = "no_room_to_relocate"
LOADING = "prefix_on_its_way"
FAULT = "internal_fault"


@dataclasses.dataclass(frozen=True, eq=False)
class LinkHandle:
    """Stands where SGLang expects the node that ends a request's prefix: that
    node, those of the segments' tree whose pages the row reuses, each once, the
    ids of the segments found, and the earlier turns."""

    prefix: Any
    nodes: tuple[Any, ...]
    plan: LinkPlan
    segments: tuple[str, ...]
    chain: Chain | None = None


@dataclasses.dataclass(frozen=True)
class Basis:
    """What a plan was made of. While it is as it was, the same plan would be made.

    Attributes:
        request: the link, with its options.
        tokens: of the prompt and those generated.
        limit: no token at or behind this index is reused.
        prefix: SGLang's node that ends the ordinary prefix, and how long that is; the one
            that ends what it could bring back from the host, and how much that is.
        refusal: why nothing is linked, or ``None``.
    """

    request: LinkRequest
    tokens: int
    limit: int
    prefix: tuple[Any, int, Any, int]
    refusal: str | None


@dataclasses.dataclass(frozen=True)
class Kept:
    """A plan that is handed out again until something that it stands on has changed.

    Attributes:
        basis: what it was made of.
        lacking: segments that it would reuse if they were held, and when they had been
            compiled last.
        nodes: whose pages it reuses.
        companies: whose segments' companies it could use, and their version.
        turns: whose turns it could go on from, the segment that those began with, and
            their version.
        plan: as it was made.
        order: the request's tokens in the row's order, ``None`` where they keep theirs.
        result: for SGLang.
    """

    basis: Basis
    lacking: tuple[tuple[str, int], ...]
    nodes: tuple[int, ...]
    companies: tuple[tuple[str, str], int]
    turns: tuple[tuple[str, ...], str | None, int]
    plan: LinkPlan | None
    order: array | None
    result: MatchResult


@dataclasses.dataclass
class LinkState:
    """A linked request's decoded link, current plan and private copies; the cores
    of the plan and the earlier turns it reuses.

    ``found`` are its segments as they were looked up last, when companies had that
    ``version``. ``private`` holds the slots
    of relocated pages between load-back and allocation; from then on the row owns them.
    ``permutes`` says that the plan changed the order of the request's tokens, and
    forbade to cache them as a prefix.
    """

    request: LinkRequest
    plan: LinkPlan | None = None
    cores: tuple[Core, ...] = ()
    chain: Chain | None = None
    private: torch.Tensor | None = None
    permutes: bool = False
    found: list[Lookup | None] | None = None
    version: int = 0
    kept: Kept | None = None


def text_of(req: Req) -> array:
    """The request's tokens in their own order, prompt and generated; not to be changed."""
    if not req.output_ids:
        return req.origin_input_ids
    return req.origin_input_ids + req.output_ids


# Of SGLang's flags ``return_*``, those whose output does not depend on the order in
# which a row holds the prompt: it is of generated tokens, or a matter of form. From where on
# a request wants log-probabilities of its prompt it says by ``logprob_start_len``.
ORDERLESS = frozenset({"return_logprob", "return_sampling_mask", "return_flat_raw_top_logprobs"})
# They ask by place in the prompt, not by a flag.
PLACES = ("multi_item_delimiter_indices", "token_indices_to_pool", "decision_layout")


@functools.cache
def ordered_flags() -> tuple[str, ...]:
    """Flags of SGLang's request that ask for what is not known to be ``ORDERLESS``."""
    names = inspect.signature(Req).parameters
    return tuple(n for n in names if n.startswith("return_") and n not in ORDERLESS)


def asked_of_prompt(req: Req, link: LinkRequest) -> str | None:
    """What this request wants to know of its prompt's tokens, which a linked row holds
    in an order of its own, or ``None``.

    From ``logprob_start_len`` on SGLang reuses nothing, and what is computed stands in
    logical order at the row's end: there row and prompt agree.
    """
    behind = link.spans[-1].end if link.spans else 0
    if req.return_logprob and 0 <= req.logprob_start_len < behind:
        return "input_logprobs"
    for name in ordered_flags():
        if getattr(req, name):
            return name.removeprefix("return_")
    return next((name for name in PLACES if getattr(req, name) is not None), None)


def unlinkable(req: Req, link: LinkRequest) -> str | None:
    """Why this request must be answered as stock would, or ``None``."""
    asked = asked_of_prompt(req, link)
    if asked is not None:
        return asked
    if req.multimodal_inputs is not None:
        return "multimodal"
    if req.input_embeds is not None or req.positional_embed_overrides is not None:
        return "input_embeds"
    if req.session is not None:
        return "session"
    if req.beam_group is not None:
        return "beam_search"
    return None
