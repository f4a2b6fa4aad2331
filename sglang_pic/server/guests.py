"""Guests: who stands in front of a segment that has no company of its own.

What a segment lacks is passages of its kind in front of it, more than which ones
(``docs/ideas/companies.md``). Where only what a prompt contains may touch what it reuses
they are passages that ship with the project; where a tenant is one trust domain, its own.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import pathlib
import re
from typing import Any, Protocol

from cachetools import LRUCache

from sglang_pic.forest.keys import order_key

PATH = pathlib.Path(__file__).with_name("guests.json")
# Guests of a tenant's own; kinds of prompts that have some; tokens of one.
OWN, MAX_KINDS, MAX_OWN_TOKENS = 3, 128, 512
Text = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Guests:
    """Passages to stand in front of a segment.

    Attributes:
        texts: token ids of each, in the order in which they stand.
        shipped: they are the project's, not a tenant's.
    """

    texts: tuple[Text, ...]
    shipped: bool


DIALOGUE = "dialogue"
# Who speaks, at the beginning of a line.
SPEAKER = re.compile(r"^\w[\w .'-]{0,30}:\s", re.MULTILINE)
NO_GUESTS = Guests((), shipped=True)


class Inviting(Protocol):
    """Chooses guests."""

    def saw(self, kind: bytes, text: Text) -> None:
        """A segment stood in a prompt of this kind."""
        ...

    def of(self, kind: bytes, text: Text) -> Guests:
        """The guests of a segment, of prompts of a kind; never itself."""
        ...


class Nobody:
    """None."""

    def saw(self, kind: bytes, text: Text) -> None:
        pass

    def of(self, kind: bytes, text: Text) -> Guests:
        return NO_GUESTS


class Shipped:
    """Passages that ship with the project: those of the kind of text that a segment's
    tokens are most like.

    Args:
        tokenizer: the model's.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._kinds = {
            kind: [tuple(tokenizer.encode(text, add_special_tokens=False)) for text in texts]
            for kind, texts in json.loads(PATH.read_text(encoding="utf-8")).items()
        }
        self._weights = {
            kind: [_weights(text) for text in texts] for kind, texts in self._kinds.items()
        }

    def saw(self, kind: bytes, text: Text) -> None:
        pass

    def nearest(self, text: Text) -> str:
        """The kind of text that it is most like: by the cosines with its passages. By words alone
        plain prose is often nearest to speech, so only where speakers are named it may be."""
        weights = _weights(text)
        speakers = SPEAKER.findall(self._tokenizer.decode(text))
        kinds = [kind for kind in self._weights if kind != DIALOGUE or len(speakers) > 1]
        return max(
            kinds, key=lambda kind: sum(_product(weights, other) for other in self._weights[kind])
        )

    def of(self, kind: bytes, text: Text) -> Guests:
        texts = [one for one in self._kinds[self.nearest(text)] if one != text]
        return Guests(tuple(sorted(texts, key=order_key)), shipped=True)


def _weights(text: Text) -> dict[int, float]:
    """A vector of length 1: the logarithm of one more than how often each token stands
    in a text."""
    counts = {token: math.log1p(n) for token, n in collections.Counter(text).items()}
    length = math.hypot(*counts.values())
    return {token: count / length for token, count in counts.items()}


def _product(one: dict[int, float], other: dict[int, float]) -> float:
    return sum(weight * other.get(token, 0.0) for token, weight in one.items())


class Own:
    """The first segments that a tenant names in prompts of a kind, fixed from then on, so
    that what is held among them goes on serving; until there are as many, the others'.

    Args:
        until: whose guests are invited until then.
    """

    def __init__(self, until: Inviting):
        self._until = until
        self._texts: LRUCache[bytes, tuple[Text, ...]] = LRUCache(MAX_KINDS)

    def saw(self, kind: bytes, text: Text) -> None:
        texts = self._texts.get(kind, ())
        if len(texts) < OWN and len(text) <= MAX_OWN_TOKENS and text not in texts:
            self._texts[kind] = (*texts, text)

    def of(self, kind: bytes, text: Text) -> Guests:
        own = self._texts.get(kind, ())
        if len(own) < OWN:
            return self._until.of(kind, text)
        texts = (one for one in own if one != text)
        return Guests(tuple(sorted(texts, key=order_key)), shipped=False)
