"""What watches whether links are sound: canary, audit and calibration, and the gate
that the first two close."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

from sglang.srt.configs.hybrid_arch import mambaish_config
from sglang.srt.managers.io_struct import GenerateReqInput
from sglang.srt.runtime_context import get_parallel, get_schedule

from sglang_pic.config import PicConfig
from sglang_pic.link.policy import AUTO
from sglang_pic.request.base import LinkRequest
from sglang_pic.server.answers import Answered
from sglang_pic.server.audit import Audit
from sglang_pic.server.calibrate import Calibration
from sglang_pic.server.canary import Canary, Model
from sglang_pic.server.commands import command
from sglang_pic.server.gate import CANARY_FAILED, Gate
from sglang_pic.server.verdict import Once


class Guards:
    """Of one tokenizer manager.

    Attributes:
        generate: runs one internal request and returns its last output.
        flush: forgets all that a namespace holds.

    Args:
        context: the compile context, whole pages.
        unhooked: SGLang's ``generate_request``, which no hook of ours is around.
    """

    def __init__(self, manager: Any, config: PicConfig, context: Sequence[int], unhooked: Any):
        self._config = config

        async def generate(obj: GenerateReqInput) -> Any:
            return await anext(unhooked(manager, obj))

        async def flush(salt: str) -> None:
            await command(manager, "flush", cache_salt=salt)

        def model() -> Model:
            return Model(
                vocabulary=manager.model_config.vocab_size,
                longest=manager.max_req_input_len,
                page=get_schedule().page_size,
                context=tuple(context),
                rank=0 if get_parallel().dp_size > 1 else None,
            )

        self.generate, self.flush = generate, flush
        self._is_hybrid = mambaish_config(manager.model_config) is not None
        self.gate = Gate()
        self.calibration = Calibration(generate)
        self.audit = Audit(generate, flush, lambda: not manager.rid_to_state, config, self.gate)
        canary = Canary(generate, functools.partial(command, manager), model, config)
        self.canary = Once(
            "the canary",
            canary.checks,
            config.canary_timeout_s,
            lambda why: self.gate.close(CANARY_FAILED, why),
        )

    def settled(self, ids: list[int], link: LinkRequest) -> tuple[list[int], LinkRequest]:
        """Settle the state policy, and whether anything is linked now."""
        options = link.options
        if options.state == AUTO:
            options = dataclasses.replace(options, state=self.calibration.policy)
        return ids, dataclasses.replace(link, options=options, off=self.gate.reason)

    def watching(
        self,
        obj: GenerateReqInput,
        asked: Sequence[tuple[list[int], LinkRequest]],
        prompts: Sequence[tuple[list[int], LinkRequest]],
    ) -> Answered:
        """What is to see the outputs of a request; ``asked`` as it was resolved,
        ``prompts`` as it was settled."""
        calibration = self.calibration if self._is_hybrid else None
        return Answered(calibration, self.audit, self._config.link_defaults, obj, asked, prompts)
