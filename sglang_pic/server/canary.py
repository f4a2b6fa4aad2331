"""The canary: may this model be linked at all? Asked once, before the first link.

A prompt of pseudo-random tokens, the same at every start, is computed in full by
stock SGLang, in full through our attention, and linked in both modes; its segments
are compiled alone and one behind the other. What must be equal is held against a
tight bound, what may differ against a loose one.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import random
import statistics
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from sglang_pic.checks import Check
from sglang_pic.config import PicConfig
from sglang_pic.forest.keys import namespace
from sglang_pic.link.policy import LinkOptions, ceil_to
from sglang_pic.request.base import LinkRequest, TokenSpan
from sglang_pic.server.compare import Distribution, Generate, Prompt, fresh_salt, in_full, linked
from sglang_pic.server.compiler import Caller, compile_request
from sglang_pic.server.items import CompileItem
from sglang_pic.server.verdict import UntestedError

logger = logging.getLogger(__name__)

SEED = 20261123
SEAM = 16
SEGMENTS = 3
SHORTEST = 64
LEAD, TAIL = 5, 7
# The link is compared behind so many tails: one next token says little.
TAILS = 4
# What is computed twice in another order, in nats.
EXACT_KL = 0.01

Tell = Callable[..., Awaitable[list[Any]]]


@dataclasses.dataclass(frozen=True)
class Model:
    """What of a served model the canary has to know.

    Attributes:
        vocabulary: how many tokens it knows.
        longest: tokens of the longest prompt.
        page: tokens of a KV page.
        context: of every compile.
        rank: the data-parallel rank that is asked for all, of several.
    """

    vocabulary: int
    longest: int
    page: int
    context: tuple[int, ...]
    rank: int | None = None


class Canary:
    """To be asked once (``verdict.Once``).

    Args:
        generate: runs one internal request and returns its last output.
        tell: sends a command to the schedulers.
    """

    def __init__(
        self,
        generate: Generate,
        tell: Tell,
        model: Callable[[], Model],
        config: PicConfig,
    ):
        self._generate = generate
        self._tell = tell
        self._model = model
        self._config = config

    async def checks(self) -> dict[str, Check]:
        """What must hold; leaves nothing.

        Raises:
            UntestedError, PicRefused: this server cannot hold what it takes.
        """
        salt = fresh_salt("canary")
        if any(rank["refusal"] is not None for rank in await self._tell("stats")):
            raise UntestedError("this server does not link")
        try:
            return await self._found(salt)
        finally:
            for used in (salt, _stock(salt)):
                await self._tell("flush", cache_salt=used)

    async def _found(self, salt: str) -> dict[str, Check]:
        model = self._model()
        head = ceil_to(SEAM, model.page)
        shortest = max(SHORTEST, self._config.min_segment, 2 * (head + model.page))
        length = ceil_to(shortest, model.page)
        if len(model.context) + LEAD + SEGMENTS * length + TAIL >= model.longest:
            raise UntestedError("it does not fit into the model's context")
        segments, lead, tails = _tokens(model.vocabulary, length)
        one, other = segments[:2]
        compiled = [*segments, one + other, one + other[:head]]
        # Behind these the opening, each tail, and the last tail two ways more.
        prompts = len(compiled) + 2 + 2 * TAILS + 2
        logger.info("sglang_pic: the next %d prompts to prefill are the canary's", prompts)
        await self._compile(compiled, salt, model)
        selfcheck = await self._tell(
            "selfcheck", ids=one + other, cache_salt=salt, at=length, seam=SEAM
        )
        checks = {name: Check.of_json(check) for rank in selfcheck for name, check in rank.items()}
        opening = Prompt(
            [*model.context, *one, *tails[0]],
            _link(len(model.context), length, 1),
            salt,
            None,
            None,
            model.rank,
        )
        full = await in_full(self._generate, opening, _stock(salt))
        again = await self._linked(opening, full, policy="seam")
        checks["opening_kl"] = Check(again.kl_from(full), EXACT_KL)
        kls = []
        for tail in tails:
            ids = [*lead, *(token for segment in segments for token in segment), *tail]
            prompt = Prompt(ids, _link(LEAD, length, SEGMENTS), salt, None, None, model.rank)
            full = await in_full(self._generate, prompt, _stock(salt))
            shared = await self._linked(prompt, full, policy="seam")
            kls.append(shared.kl_from(full))
        computed = await self._linked(prompt, full, policy="full")
        checks["attention_kl"] = Check(computed.kl_from(full), EXACT_KL)
        relocated = await self._linked(prompt, full, policy="seam", mode="relocate")
        checks["modes_kl"] = Check(relocated.kl_from(shared), EXACT_KL)
        checks["linked_kl"] = Check(statistics.fmean(kls), self._config.canary_kl)
        return checks

    async def _compile(self, segments: Sequence[list[int]], salt: str, model: Model) -> None:
        space = namespace(model.context, salt)
        items = [
            CompileItem((*model.context, *ids), space, None, None, seams=(SEAM,), rank=model.rank)
            for ids in segments
        ]
        await asyncio.gather(*(self._generate(compile_request(item, Caller())) for item in items))

    async def _linked(
        self, prompt: Prompt, full: Distribution, *, policy: str, mode: str = "share"
    ) -> Distribution:
        options = LinkOptions(policy=policy, seam=SEAM, mode=mode)
        found = await linked(self._generate, prompt, options, full.tokens)
        assert found.report is not None
        if policy != "full" and not all(segment["hit"] for segment in found.report["segments"]):
            why = [segment["reason"] for segment in found.report["segments"]]
            raise UntestedError(f"its segments could not be linked: {why}")
        return found


def _stock(salt: str) -> str:
    return f"{salt}-stock"


def _link(start: int, length: int, count: int) -> LinkRequest:
    spans = tuple(TokenSpan(start + i * length, start + (i + 1) * length) for i in range(count))
    return LinkRequest(spans, LinkOptions())


def _tokens(vocabulary: int, length: int) -> tuple[list[list[int]], list[int], list[list[int]]]:
    """Segments, the text in front, and the tails; of the middle of the vocabulary,
    where no special tokens are."""
    rng = random.Random(SEED)
    ordinary = range(vocabulary // 4, max(vocabulary // 2, vocabulary // 4 + 1))
    segments = [rng.choices(ordinary, k=length) for _ in range(SEGMENTS)]
    tails = [rng.choices(ordinary, k=TAIL) for _ in range(TAILS)]
    return segments, rng.choices(ordinary, k=LEAD), tails
