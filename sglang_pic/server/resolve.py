"""From what a client sent to token ids plus spans, for every prompt of a request."""

from __future__ import annotations

from typing import Any

from sglang.srt.managers.io_struct import GenerateReqInput

from sglang_pic.errors import PicRequestError
from sglang_pic.link.policy import LinkOptions
from sglang_pic.request.base import LinkRequest
from sglang_pic.request.fields import check_inside, check_length, parse_fields
from sglang_pic.request.tokenize import encode_marked
from sglang_pic.server.exchange import Exchange


class Resolver:
    """Reads prompts for one tokenizer manager.

    Args:
        manager: SGLang's.
        defaults: options of the server, for what a request leaves out.
    """

    def __init__(self, manager: Any, defaults: LinkOptions):
        self._manager = manager
        self._defaults = defaults

    def resolve(
        self, obj: GenerateReqInput, pic: Any, exchange: Exchange | None
    ) -> list[tuple[list[int], LinkRequest]]:
        """Token ids and link of every prompt of the request.

        Raises:
            PicRequestError: naming the field at fault.
        """
        if exchange is not None and exchange.marks is not None:
            return [self._chat(obj, pic, exchange)]
        batched = isinstance(obj.text, list) or (
            isinstance(obj.input_ids, list)
            and bool(obj.input_ids)
            and isinstance(obj.input_ids[0], list)
        )
        if not batched:
            if isinstance(pic, list):
                raise PicRequestError("pic", "must be one object, the request has one prompt")
            return [self.one(obj.text, obj.input_ids, pic)]
        texts = obj.text if obj.text is not None else [None] * len(obj.input_ids)
        ids = obj.input_ids if obj.input_ids is not None else [None] * len(obj.text)
        if not isinstance(pic, list) or len(pic) != len(texts):
            raise PicRequestError("pic", f"must be a list of {len(texts)} objects, one a prompt")
        if obj.stream:
            raise PicRequestError("pic", "a batch cannot be streamed; send its prompts one by one")
        return [self.one(*one) for one in zip(texts, ids, pic, strict=True)]

    def one(
        self, text: str | None, ids: list[int] | None, pic: Any
    ) -> tuple[list[int], LinkRequest]:
        """The same of one prompt.

        Raises:
            PicRequestError: it is malformed.
        """
        fields = parse_fields(pic or {}, self._defaults)
        if ids is not None:
            check_inside(fields.ranges, len(ids), "tokens")
            return list(ids), LinkRequest(fields.ranges, fields.options)
        if text is None:
            raise PicRequestError("pic", "needs a prompt given as text or as token ids")
        check_length(text, self._manager.model_config.context_len, "text")
        check_inside(fields.ranges, len(text), "characters")
        ids, spans = encode_marked(
            self._manager.tokenizer, text, fields.ranges, rule=fields.tokenize
        )
        return ids, LinkRequest(spans, fields.options)

    def segment(self, text: str) -> list[int]:
        """Token ids of a segment given as text, as a prompt's piece would get them.

        Raises:
            PicRequestError: the text cannot fit the model's context.
        """
        check_length(text, self._manager.model_config.context_len, "text")
        return self._manager.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _chat(
        self, obj: GenerateReqInput, pic: Any, exchange: Exchange
    ) -> tuple[list[int], LinkRequest]:
        fields = parse_fields(
            {key: value for key, value in pic.items() if key != "segments"}, self._defaults
        )
        assert exchange.marks is not None
        if exchange.ids is not None:
            ids = list(obj.input_ids or [])
            if ids[: len(exchange.ids)] != exchange.ids:
                raise PicRequestError("messages", "the prompt was changed behind the template")
            return ids, LinkRequest(exchange.spans, fields.options)
        if not isinstance(obj.text, str):
            raise PicRequestError("messages", "this model's chat encoding cannot carry segments")
        text, ranges = exchange.marks.cut(obj.text)
        ids, spans = encode_marked(self._manager.tokenizer, text, ranges, rule=fields.tokenize)
        return ids, LinkRequest(spans, fields.options)
