"""``--pic-state auto``: choose a hybrid's state policy by measuring it.

Exact composition is not better on every model: where a layer's state hardly
outlives a segment, or where errors of the inputs are carried on by it,
forgetting what stood before may be closer to full recompute (published for
Mamba-2). So the first linked requests, answered under ``compose``, are computed
twice more behind their answers, under ``last`` and in full, and the policy whose
next-token distribution is closer to the full one in the mean is taken for all
requests that follow. The choice depends on the request stream alone.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import statistics
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

from sglang.srt.managers.io_struct import GenerateReqInput

from sglang_pic.link.divergence import kl_with_remainder
from sglang_pic.link.policy import STATE_POLICIES
from sglang_pic.request.base import LinkRequest
from sglang_pic.request.hints import link_hints

logger = logging.getLogger(__name__)

PROMPTS = 4
TOP = 64
# A prompt of one segment tells nothing: no core has another in front of it.
MIN_SEGMENTS = 2

Generate = Callable[[GenerateReqInput], Awaitable[dict[str, Any]]]


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A linked prompt in internal form, and whose it is."""

    ids: list[int]
    link: LinkRequest
    cache_salt: str | None
    extra_key: str | None
    lora_path: str | None


class Calibration:
    """Measures the state policies on the first linked prompts.

    Args:
        generate: runs one internal request and returns its last output.
    """

    def __init__(self, generate: Generate):
        self._generate = generate
        self._tasks: set[asyncio.Task[None]] = set()
        self._taken = 0
        self.kl: dict[str, list[float]] = {policy: [] for policy in STATE_POLICIES}
        self.choice: str | None = None

    @property
    def policy(self) -> str:
        """What to answer under now."""
        return self.choice or STATE_POLICIES[0]

    def consider(self, prompt: Prompt) -> None:
        """Measure this prompt in the background, if it is among the first."""
        if self._taken == PROMPTS or len(prompt.link.spans) < MIN_SEGMENTS:
            return
        self._taken += 1
        task = asyncio.get_running_loop().create_task(self._measure(prompt))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _measure(self, prompt: Prompt) -> None:
        try:
            full = await self._next(prompt, None, [])
            (top,) = full["meta_info"]["output_top_logprobs"]
            wanted = [token for _, token, _ in top]
            found = {}
            for policy in STATE_POLICIES:
                output = await self._next(prompt, policy, wanted)
                (row,) = output["meta_info"]["output_token_ids_logprobs"]
                values = {token: value for value, token, _ in row}
                linked = [values[token] for token in wanted]
                found[policy] = kl_with_remainder([value for value, *_ in top], linked)
        except Exception as error:
            # The prompt after this one takes its place.
            self._taken -= 1
            logger.warning("sglang_pic: a prompt could not be used to calibrate: %s", error)
            return
        for policy, kl in found.items():
            self.kl[policy].append(kl)
        if len(self.kl[STATE_POLICIES[0]]) == PROMPTS:
            means = {policy: statistics.fmean(values) for policy, values in self.kl.items()}
            self.choice = min(means, key=lambda policy: means[policy])
            logger.warning("sglang_pic: state policy %s, calibrated: KL %s", self.choice, means)

    async def _next(self, prompt: Prompt, policy: str | None, wanted: list[int]) -> dict[str, Any]:
        """One further token: in full without a policy, else linked under it."""
        made = GenerateReqInput(
            input_ids=list(prompt.ids),
            sampling_params={"max_new_tokens": 1, "temperature": 0},
            return_logprob=True,
            extra_key=prompt.extra_key,
            lora_path=prompt.lora_path,
        )
        if policy is None:
            # A namespace of its own: nothing cached, nothing left behind for others.
            made.cache_salt = f"sglang-pic-calibration-{uuid.uuid4()}"
            made.top_logprobs_num = TOP
        else:
            options = dataclasses.replace(prompt.link.options, state=policy)
            made.cache_salt = prompt.cache_salt
            made.token_ids_logprob = wanted
            made.kv_hints = link_hints(LinkRequest(prompt.link.spans, options, strict=False))
        return await self._generate(made)

    def to_json(self) -> dict[str, Any]:
        """``{"policy", "calibrated", "kl": {policy: mean so far or null}}``."""
        return {
            "policy": self.policy,
            "calibrated": self.choice is not None,
            "prompts": len(self.kl[STATE_POLICIES[0]]),
            "kl": {
                policy: statistics.fmean(values) if values else None
                for policy, values in self.kl.items()
            },
        }
