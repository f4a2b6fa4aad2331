"""From what a client sent to token ids plus spans, for every prompt of a request."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from sglang.srt.managers.io_struct import GenerateReqInput

from sglang_pic.errors import PicRequestError
from sglang_pic.link.policy import LinkOptions
from sglang_pic.request.base import LinkRequest, TokenSpan
from sglang_pic.request.fields import (
    MAX_CHARS_PER_TOKEN,
    PicFields,
    check_inside,
    check_length,
    parse_fields,
)
from sglang_pic.request.tokenize import (
    PIECES,
    WHOLE,
    Encoded,
    Offsets,
    Rule,
    encode,
    encode_marked,
    is_fast,
    usual_rule,
)
from sglang_pic.server.exchange import Exchange
from sglang_pic.server.texts import CANNOT, Piece


def is_list_of_one(obj: GenerateReqInput) -> bool:
    """Whether a request is a batch of one prompt."""
    given = obj.text if obj.text is not None else obj.input_ids
    return isinstance(given, list) and len(given) == 1 and isinstance(given[0], str | list)


class Resolver:
    """Reads prompts for one tokenizer manager.

    Args:
        manager: SGLang's.
        defaults: options of the server, for what a request leaves out.
    """

    def __init__(self, manager: Any, defaults: LinkOptions):
        self._manager = manager
        self._defaults = defaults

    @functools.cached_property
    def usual(self) -> Rule:
        """How requests that name no rule are tokenised."""
        return usual_rule(self._manager.tokenizer)

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
        return [self.one(*one) for one in zip(texts, ids, pic, strict=True)]

    def one(
        self, text: str | None, ids: list[int] | None, pic: Any
    ) -> tuple[list[int], LinkRequest]:
        """The same of one prompt.

        Raises:
            PicRequestError: it is malformed.
        """
        return self.read(text, ids, pic)[:2]

    def read(
        self, text: str | None, ids: list[int] | None, pic: Any, *, placed: bool = False
    ) -> tuple[list[int], LinkRequest, Offsets]:
        """The same, and of each token its characters, if these are asked for and the prompt
        is a text whose tokenizer tells."""
        fields = parse_fields(pic or {}, self._defaults)
        if fields.text is not None:
            # Of a program's ``pic_hints``; those of a body are taken out of it.
            if text or ids:
                raise PicRequestError("pic.parts", "replaces the prompt; leave that out or empty")
            text, ids = fields.text, None
        if ids is not None:
            check_inside(fields.ranges, len(ids), "tokens")
            return list(ids), LinkRequest(fields.ranges, fields.options), []
        if text is None:
            raise PicRequestError("pic", "needs a prompt given as text or as token ids")
        check_length(text, self._manager.model_config.context_len, "text")
        check_inside(fields.ranges, len(text), "characters")
        piece = Piece(text, special=True, bos=True)
        made = self._encode(piece, fields.ranges, fields, placed=placed)
        return made.ids, LinkRequest(made.spans, fields.options), made.offsets

    def segment(self, text: str) -> list[int]:
        """Token ids of a segment given as text, as in a prompt, at the start of a line.

        Raises:
            PicRequestError: the text cannot fit the model's context.
        """
        check_length(text, self._manager.model_config.context_len, "text")
        tokenizer = self._manager.tokenizer
        if self.usual.rule == PIECES:
            return tokenizer(text, add_special_tokens=False)["input_ids"]
        behind = TokenSpan(1, 1 + len(text))
        ids, (span,) = encode_marked(
            tokenizer, "\n" + text, (behind,), rule=WHOLE, add_special_tokens=False
        )
        return ids[span.start : span.end]

    def opening(self, text: str) -> list[int]:
        """Token ids of text that opens a prompt of plain text.

        Raises:
            PicRequestError: it cannot fit the model's context.
        """
        check_length(text, self._manager.model_config.context_len, "opening")
        return self._manager.tokenizer(text)["input_ids"]

    def plain(self, piece: Piece) -> Encoded | None:
        """A text's tokens as stock makes them, and where they lie; ``None`` where the
        tokenizer does not tell, or the text cannot fit the model's context."""
        tokenizer = self._manager.tokenizer
        longest = self._manager.model_config.context_len * MAX_CHARS_PER_TOKEN
        if not is_fast(tokenizer) or len(piece.text) > longest:
            return None
        made = encode(
            tokenizer, piece.text, (), rule=WHOLE, add_special_tokens=piece.special, placed=True
        )
        return self._without_bos(piece, made)

    def chat(
        self,
        pieces: Sequence[Piece],
        ranges: Sequence[Sequence[TokenSpan]],
        pic: Any,
        *,
        placed: bool = False,
    ) -> list[Encoded]:
        """The texts of a chat prompt as tokens, one by one.

        Args:
            pieces: the texts that SGLang encodes one by one.
            ranges: of each, the characters that are segments.
            pic: the request's.
            placed: tell where their tokens lie, if the tokenizer does.

        Raises:
            PicRequestError: the tokenizer cannot follow the rule.
        """
        fields = parse_fields(pic, self._defaults)
        return [
            self._encode(piece, chars, fields, placed=placed)
            for piece, chars in zip(pieces, ranges, strict=True)
        ]

    def _encode(
        self, piece: Piece, ranges: Sequence[TokenSpan], fields: PicFields, *, placed: bool
    ) -> Encoded:
        tokenizer = self._manager.tokenizer
        exact = fields.options.require_exact
        rule = fields.tokenize or (WHOLE if exact else self.usual.rule)
        if rule == PIECES and self.usual.rule == WHOLE and ranges:
            raise PicRequestError("pic.tokenize", f"{self.usual.why}: use 'whole'")
        if exact and fields.tokenize is None and not is_fast(tokenizer):
            ranges = ()  # its prompt is stock's, and it links nothing
        made = encode(
            tokenizer,
            piece.text,
            ranges,
            rule=rule,
            add_special_tokens=piece.special,
            placed=placed and is_fast(tokenizer),
        )
        return self._without_bos(piece, made)

    def _without_bos(self, piece: Piece, made: Encoded) -> Encoded:
        """Without the BOS that SGLang takes away from a text it appends."""
        ids, spans, offsets = made
        if piece.bos or not ids or ids[0] != self._manager.tokenizer.bos_token_id:
            return made
        spans = tuple(TokenSpan(span.start - 1, span.end - 1) for span in spans)
        return Encoded(ids[1:], spans, offsets[1:])

    def _chat(
        self, obj: GenerateReqInput, pic: Any, exchange: Exchange
    ) -> tuple[list[int], LinkRequest]:
        if exchange.ids is None:
            raise PicRequestError("messages", CANNOT)
        if obj.input_ids != exchange.ids:
            raise PicRequestError("messages", "the prompt was changed behind the template")
        return list(exchange.ids), LinkRequest(
            exchange.spans, parse_fields(pic, self._defaults).options
        )
