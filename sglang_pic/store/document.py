"""An encoded document as one value, in the form and under the seals of ``store.value``."""

from __future__ import annotations

import dataclasses
import json
from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from sglang_pic.store.value import DAMAGED, OTHER_NAME, OTHER_TOKENS, BadValue, Codec


@dataclasses.dataclass(frozen=True)
class SavedDocument:
    """What a value holds of a document.

    Attributes:
        ids: its tokens.
        salt: its tenant's; empty for none.
        hits: requests that had seen it.
        tensors: ``k``, ``v`` [encoder layers, tokens, kv heads, head dim].
    """

    ids: array
    salt: str
    hits: int
    tensors: dict[str, torch.Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(one.numel() * one.element_size() for one in self.tensors.values())


class DocumentCodec:
    """Names, writes and reads the documents of one server.

    Args:
        values: whose fingerprint names the encoder.
    """

    def __init__(self, values: Codec):
        self._values = values

    def group(self, salt: str) -> str:
        """As ``Codec.group``, of a tenant's documents."""
        return self._values.group(salt)

    def name(self, salt: str, ids: Sequence[int]) -> str:
        """Name of the value of a tenant's document: 16 and 32 hex digits."""
        return self._values.name(salt, ids, ())

    def encode(self, name: str, saved: SavedDocument) -> np.ndarray:
        """uint8, the value of a document whose tensors are on the host."""
        tensors = {
            **{key: one.contiguous() for key, one in saved.tensors.items()},
            "ids": torch.tensor(saved.ids, dtype=torch.int64),
        }
        return self._values.sealed(name, {"document": json.dumps(saved.hits)}, tensors)

    def decode(
        self, value: Any, name: str, *, salt: str, path: Sequence[int] | None = None
    ) -> SavedDocument:
        """What a value holds; its tensors are views of ``value``.

        Args:
            value: buffer of bytes, not to be changed afterwards.
            name: that it was found under.
            salt: the tenant's that it was looked for.
            path: token ids that it must be of; ``None`` where only its name is known.

        Raises:
            BadValue: it is no such value, damaged, of another encoder, model, version,
                tenant or text, or not signed with the operator's key.
        """
        head, tensors = self._values.opened(value, name)
        try:
            hits = json.loads(head["document"])
            found = array("q", tensors.pop("ids").tolist())
            if not isinstance(hits, int):
                raise TypeError(f"{hits!r:.80}")
        except (KeyError, ValueError, TypeError) as error:
            raise BadValue(DAMAGED, f"not a document: {error!r}") from error
        if self.name(salt, found) != name:
            raise BadValue(OTHER_NAME, "its name is not that of the document it holds")
        if path is not None and found != array("q", path):
            raise BadValue(OTHER_TOKENS, "it holds other tokens")
        return SavedDocument(found, salt, hits, tensors)
