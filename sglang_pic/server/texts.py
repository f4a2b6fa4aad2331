"""A stand-in for the tokenizer, to which every text is one token.

SGLang builds a chat prompt out of texts that it encodes one by one. Given this
instead of the tokenizer it builds the same prompt, from which the texts can be
read back, and whatever they hold reaches no tokenizer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from sglang_pic.errors import PicRequestError

CANNOT = "this model's chat encoding makes tokens without a text: it cannot carry segments"


@dataclasses.dataclass(frozen=True)
class Piece:
    """One text that SGLang encodes, and how.

    Attributes:
        special: framed by special tokens, as the tokenizer usually does.
        bos: a BOS among them stays; SGLang takes away that of a text it appends.
    """

    text: str
    special: bool
    bos: bool = False


class Texts:
    """Has of a tokenizer what SGLang's chat serving asks of one, and nothing else.

    Args:
        tokenizer: the one it stands for; only its chat template is used.
    """

    bos_token_id = -1

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._encoded: list[Piece] = []

    @property
    def chat_template(self) -> Any:
        return self._tokenizer.chat_template

    @property
    def special_tokens_map(self) -> Any:
        return self._tokenizer.special_tokens_map

    def apply_chat_template(self, messages: Any, *, tokenize: bool, **kwargs: Any) -> str:
        """As the tokenizer's, for text only."""
        if tokenize:
            raise PicRequestError("messages", CANNOT)
        return self._tokenizer.apply_chat_template(messages, tokenize=False, **kwargs)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """One token, behind a BOS if special tokens are asked for."""
        self._encoded.append(Piece(text, add_special_tokens))
        return [self.bos_token_id] * add_special_tokens + [len(self._encoded) - 1]

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        """What was encoded."""
        return "".join(piece.text for piece in self.pieces(ids))

    def pieces(self, ids: Any) -> list[Piece]:
        """The texts that a prompt was put together from.

        Raises:
            PicRequestError: SGLang has made it by other means.
        """
        pieces: list[Piece] = []
        bos = False
        for token in ids if isinstance(ids, list | tuple) else ():
            if token == self.bos_token_id:
                bos = True
            elif token < len(self._encoded):
                pieces.append(dataclasses.replace(self._encoded[token], bos=bos))
                bos = False
            else:
                raise PicRequestError("messages", CANNOT)
        if not pieces:
            raise PicRequestError("messages", CANNOT)
        return pieces
