"""Which requests see which documents, and so which rows of the batch that runs next."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sglang_pic.attention.rows import by_row, can_tell
from sglang_pic.encoder.encoder import EncoderKV
from sglang_pic.encoder.step import DocumentStep, Steps, make_step
from sglang_pic.errors import PicIntegrityError

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req


@dataclasses.dataclass(frozen=True, eq=False)
class _Row:
    """The documents of a request by name."""

    documents: Mapping[str, EncoderKV]


class DocumentRows:
    """Those of one scheduler.

    Args:
        steps: what the cross layers read.
    """

    def __init__(self, steps: Steps):
        self._steps = steps
        self._rows: weakref.WeakKeyDictionary[Req, _Row] = weakref.WeakKeyDictionary()
        self._arranged: tuple[list[_Row | None], list[int], DocumentStep | None] = [], [], None

    def __contains__(self, req: Req) -> bool:
        return req in self._rows

    def add(self, req: Req, documents: Mapping[str, EncoderKV]) -> None:
        """A request sees these, by name, until it ends."""
        self._rows[req] = _Row(documents)

    def remove(self, req: Req) -> None:
        """A request is over."""
        if self._rows.pop(req, None) is not None:
            self._arranged = [], [], None

    def hand_over(self, batch: Any, reqs: Sequence[Req]) -> None:
        """Arrange which rows of the batch that runs next see which documents.

        Args:
            batch: SGLang's ``ForwardBatch``.

        Raises:
            PicIntegrityError: its rows cannot be told apart.
        """
        rows = [self._rows.get(req) for req in reqs]
        if not any(rows):
            self._arranged = [], [], None
            self._steps.set((), None)
            return
        if not can_tell(batch):
            raise PicIntegrityError("which rows of the batch have documents cannot be told")
        of_rows = by_row(batch.rids, rows, batch)
        lengths = [1] * len(of_rows)
        if batch.forward_mode.is_extend():
            lengths = [int(n) for n in batch.extend_seq_lens_cpu]
        # While the same rows decode it stays as it is.
        if (of_rows, lengths) != self._arranged[:2]:
            seen = [row.documents if row is not None else None for row in of_rows]
            step = make_step(seen, lengths, batch.seq_lens.device)
            self._arranged = of_rows, lengths, step
        self._steps.set(batch.rids, self._arranged[2])

    def give_up(self, reqs: Sequence[Req]) -> list[Req]:
        """Let these see nothing in the batch that runs next; those that should."""
        self._arranged = [], [], None
        self._steps.clear()
        return [req for req in reqs if req in self._rows]
