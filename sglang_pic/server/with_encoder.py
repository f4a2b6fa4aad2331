"""The front of a server with a trained encoder: ``server.documents.Documents``."""

from __future__ import annotations

import contextlib
import logging
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any

from sglang.srt.managers.io_struct import GenerateReqInput

from sglang_pic.config import PicConfig
from sglang_pic.encoder.config import EncoderConfig
from sglang_pic.errors import PicRefused, PicRequestError
from sglang_pic.forest.keys import document_id
from sglang_pic.link.encoded_report import make_encoded_report
from sglang_pic.server.answers import samples_of
from sglang_pic.server.asking import Generate
from sglang_pic.server.compiler import Caller
from sglang_pic.server.cut import cut
from sglang_pic.server.encoded_canary import EncodedCanary
from sglang_pic.server.encoded_life import EncodedLife, Fetches, Means, sources_of
from sglang_pic.server.encoding import Encoder, Job, Send
from sglang_pic.server.guards import Guards
from sglang_pic.server.life import Prompt
from sglang_pic.server.queue import FairQueue
from sglang_pic.server.sources import COMPUTED
from sglang_pic.server.verdict import FAILED, Once
from sglang_pic.server.waited import Waited
from sglang_pic.server.waiting import EndedError, Waiting, ended

logger = logging.getLogger(__name__)

FAILED_CANARY = "the encoder failed its canary"


class WithEncoder:
    """Of a server with one.

    Args:
        manager: SGLang's.
        queue: of documents.
        send: as of ``Encoder``.
        fetching: what the store has is not encoded.
        guards: of the server.
    """

    def __init__(
        self,
        manager: Any,
        config: PicConfig,
        waiting: Waiting,
        urgency: Callable[[int | None], int],
        queue: FairQueue[Job],
        send: Send,
        fetching: Fetches,
        guards: Guards,
    ):
        assert config.encoder is not None
        self._manager = manager
        self._budget = config.state_mib << 20
        self._config = EncoderConfig.load(Path(config.encoder))
        self._encoder = Encoder(
            send,
            queue,
            self._config.max_tokens,
            lambda: manager.max_req_input_len - 1,
            fetching.computed,
        )
        self._means = Means(
            manager, self._encoder, fetching, waiting, urgency, config.compile_limit_s
        )
        canary = EncodedCanary(
            self._encoder.encode_uncounted,
            guards.generate,
            guards.flush,
            lambda: manager.model_config.vocab_size,
            lambda: (self._encoder.max_tokens, manager.max_req_input_len),
        )
        self._canary = Once(
            "the canary of documents",
            canary.checks,
            config.canary_timeout_s,
            lambda why: logger.error(
                "sglang_pic: encoded documents are refused: %s: %s", FAILED_CANARY, why
            ),
        )

    @property
    def _refusal(self) -> str | None:
        """Why no document is served, or ``None``."""
        verdict = self._canary.verdict
        return f"{FAILED_CANARY}: {verdict.why}" if verdict.result == FAILED else None

    async def settle(self) -> None:
        await self._canary.settle()

    def check(self, prompt: Prompt) -> None:
        made = cut(prompt)
        if not made.row:
            raise PicRequestError("pic.segments", "a prompt needs text beside its documents")
        self.check_documents(
            {f"pic.segments[{i}]": ids for i, ids in made.documents}, "pic.segments"
        )

    def check_documents(self, documents: Mapping[str, Sequence[int]], field: str) -> None:
        longest, vocabulary = self._encoder.max_tokens, self._manager.model_config.vocab_size
        for one, ids in documents.items():
            if len(ids) > longest:
                problem = f"{len(ids)} tokens are too long for the encoder, at most {longest}"
                raise PicRequestError(one, problem)
            if not 0 <= min(ids) <= max(ids) < vocabulary:
                raise PicRequestError(one, f"token ids are from 0 to {vocabulary - 1}")
        item, ranks = self._manager.model_config.dtype.itemsize, self._manager.server_args.tp_size
        each = self._config.bytes_per_token(item, ranks)
        need = each * sum(len(ids) for ids in {tuple(ids) for ids in documents.values()})
        if need > self._budget:
            raise PicRequestError(
                field,
                f"encoded documents of {need} bytes, this server may hold {self._budget}: "
                "--pic-state-mib",
            )

    async def make(self, documents: Sequence[tuple[int, ...]], caller: Caller) -> list[int] | None:
        if self._refusal is not None:
            raise PicRefused(HTTPStatus.SERVICE_UNAVAILABLE, self._refusal, "mode")
        tenant, urgency = caller.tenant, self._means.urgency(caller.priority)
        sources = await sources_of(self._means.fetching, documents, tenant, named=True)
        absent = [ids for ids in documents if sources[ids].kind == COMPUTED]
        held = [document_id(tenant, ids) for ids in documents if sources[ids].kind != COMPUTED]
        lease = uuid.uuid4().hex
        kept = await self._encoder.encode(lease, tenant, urgency, held, absent, named=True)
        if kept is None:
            return None
        encoded = {ids: len(ids) for ids in absent}
        return [encoded.pop(ids, 0) for ids in documents]

    def to_json(self) -> dict[str, Any]:
        return {
            "max_tokens": self._encoder.max_tokens,
            "cross_layers": list(self._config.cross_layers),
            "canary": self._canary.verdict.to_json(),
        }

    async def live(
        self,
        generate: Generate,
        obj: GenerateReqInput,
        request: Any,
        prompt: Prompt,
        waited: list[Waited],
        index: int,
    ) -> AsyncGenerator[Any, None]:
        (ids, link), made = prompt, cut(prompt)

        def told(so_far: Waited) -> None:
            waited[index] = so_far

        with self._means.waiting.stay(obj) as stay:
            life = EncodedLife(self._means, generate, obj, request, made, stay)
            try:
                if self._refusal is not None:
                    await life.end(self._refusal)
                outputs = await life.outputs(told)
            except Exception as error:
                samples = samples_of(obj)
                if samples > 1:
                    # Its endpoint looks for what SGLang would have made of it.
                    obj.normalize_batch_and_arguments()
                if isinstance(error, PicRefused):
                    raise PicRequestError(error.field, error.message) from error
                if not isinstance(error, EndedError):
                    raise
                outputs = ended(error, samples, stream=obj.stream)
                async for out in outputs:
                    yield out
                return
        async with contextlib.aclosing(outputs):
            async for out in outputs:
                for item in out if isinstance(out, list) else [out]:
                    meta = item.get("meta_info", {})
                    cached = meta.get("cached_tokens", 0)
                    report = make_encoded_report(len(ids), link, names=life.names, cached=cached)
                    meta["pic"] = [report.to_json()]
                yield out
