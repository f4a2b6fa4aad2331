"""What the tree cache keeps of one linked request while it lives."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch

from sglang_pic.forest.turns import Chain, Core
from sglang_pic.link.plan import LinkPlan
from sglang_pic.request.base import LinkRequest

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

# Why a request that was to be linked is answered exactly, beside ``unlinkable``.
NO_ROOM = "no_room_to_relocate"
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


@dataclasses.dataclass
class LinkState:
    """A linked request's decoded link, current plan and private copies; the cores
    of the plan and the earlier turns it reuses.

    ``private`` holds the slots of relocated pages between load-back and
    allocation; from then on the row owns them.
    """

    request: LinkRequest
    plan: LinkPlan | None = None
    cores: tuple[Core, ...] = ()
    chain: Chain | None = None
    private: torch.Tensor | None = None


def unlinkable(req: Req) -> str | None:
    """Why this request must be answered as stock would, or ``None``."""
    if req.return_logprob and 0 <= req.logprob_start_len < len(req.origin_input_ids):
        return "input_logprobs"
    if req.return_hidden_states:
        return "hidden_states"
    if req.multimodal_inputs is not None:
        return "multimodal"
    if req.input_embeds is not None or req.positional_embed_overrides is not None:
        return "input_embeds"
    if req.session is not None:
        return "session"
    if (req.sampling_params.beam_width or 1) > 1:
        return "beam_search"
    return None
