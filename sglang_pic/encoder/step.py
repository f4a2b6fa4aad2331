"""Which tokens of a batch see which documents, and their attention to them.

Arranged once a step, read once a cross layer: every document's keys are read once for all
rows that see it, and the partial results of a token are merged. Documents are taken in the
order of their names, so that a row reads a set of them.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from sglang_pic.encoder.encoder import EncoderKV
from sglang_pic.errors import PicIntegrityError
from sglang_pic.kernels.attend import attend
from sglang_pic.kernels.merge import merge


@dataclasses.dataclass(frozen=True)
class Part:
    """One document, and the queries that see it.

    Attributes:
        kv: of the document.
        queries: int64, indices into ``DocumentStep.tokens``.
    """

    kv: EncoderKV
    queries: torch.Tensor


@dataclasses.dataclass(frozen=True)
class DocumentStep:
    """The rows of a batch that have documents.

    Attributes:
        tokens: int64, their tokens among the batch's.
        parts: each document once.
        indptr, index: int64, the partial results of each token, as in ``kernels.merge``.
    """

    tokens: torch.Tensor
    parts: tuple[Part, ...]
    indptr: torch.Tensor
    index: torch.Tensor

    def attend(self, queries: torch.Tensor, layer: int) -> torch.Tensor:
        """Attention to all documents of a token's row; nothing is rotated, nothing masked.

        Args:
            queries: [tokens, heads, head_dim].
            layer: of the encoder.

        Returns:
            The same shape and dtype.
        """
        scale = queries.shape[-1] ** -0.5
        found = [
            attend(
                queries[part.queries].contiguous(), part.kv.k[layer], part.kv.v[layer], scale=scale
            )
            for part in self.parts
        ]
        partial = torch.cat([out for out, _ in found])
        lse = torch.cat([one for _, one in found])
        return merge(partial, lse, self.indptr, self.index).to(queries.dtype)


def make_step(
    rows: Sequence[Mapping[str, EncoderKV] | None], lengths: Sequence[int], device: Any
) -> DocumentStep | None:
    """Arrange a batch.

    Args:
        rows: of each row its documents by name, if it has any.
        lengths: tokens of each row in this batch.

    Returns:
        ``None`` where no row has documents, or none of those has a token.
    """
    starts = [0, *itertools.accumulate(lengths)]
    tokens, own, count = [], {}, 0
    for row, (start, length) in enumerate(zip(starts, lengths, strict=False)):
        if rows[row] and length:
            tokens.append(torch.arange(start, start + length))
            own[row] = torch.arange(count, count + length)
            count += length
    if not own:
        return None
    seen: dict[str, list[torch.Tensor]] = {}
    documents: dict[str, EncoderKV] = {}
    for row, queries in own.items():
        documents |= rows[row] or {}
        for name in rows[row] or {}:
            seen.setdefault(name, []).append(queries)
    order = [torch.cat(seen[name]) for name in sorted(seen)]
    owners = torch.cat(order)
    return DocumentStep(
        torch.cat(tokens).to(device),
        tuple(
            Part(documents[name], queries.to(device))
            for name, queries in zip(sorted(seen), order, strict=True)
        ),
        torch.cat(
            [torch.zeros(1, dtype=torch.int64), owners.bincount(minlength=count).cumsum(0)]
        ).to(device),
        owners.argsort(stable=True).to(device),
    )


class Steps:
    """The step of the batch that runs next. SGLang copies a batch, so that nothing can be
    hung on one; what stays is the list of its requests."""

    def __init__(self) -> None:
        self._rids: Sequence[str] | None = None
        self._step: DocumentStep | None = None
        self._is_read = True

    def set(self, rids: Sequence[str], step: DocumentStep | None) -> None:
        """Of the batch of these requests; ``None`` if no row has documents.

        Raises:
            PicIntegrityError: the last one was not read: its rows have seen no document.
        """
        unread, self._is_read = not self._is_read, step is None
        self._rids, self._step = rids, step
        if unread:
            raise PicIntegrityError("a batch ran without its documents")

    def clear(self) -> None:
        """No batch has one."""
        self._rids, self._step, self._is_read = None, None, True

    def has(self, batch: Any) -> bool:
        """Whether any row of a batch has documents."""
        return self._step is not None and batch.rids == self._rids

    def read(self, batch: Any) -> DocumentStep | None:
        """The step of a batch that runs, if any of its rows has documents."""
        if not self.has(batch):
            return None
        self._is_read = True
        return self._step
