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
from typing import Any

from sglang_pic.link.policy import STATE_POLICIES
from sglang_pic.server.compare import Generate, Prompt, fresh_salt, in_full, linked

logger = logging.getLogger(__name__)

PROMPTS = 4
# A prompt of one segment tells nothing: no core has another in front of it.
MIN_SEGMENTS = 2


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
            full = await in_full(self._generate, prompt, fresh_salt("calibration"))
            found = {}
            for policy in STATE_POLICIES:
                options = dataclasses.replace(prompt.link.options, state=policy)
                under = await linked(self._generate, prompt, options, full.tokens)
                found[policy] = under.kl_from(full)
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
