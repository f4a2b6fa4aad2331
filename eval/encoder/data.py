"""Questions over documents, as the rows that an encoder is trained and judged on."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sglang_pic.eval.models.hybrid import task

IGNORED = -100


@dataclasses.dataclass(frozen=True)
class Asked:
    """A question, its answer with the end token, and what it is counted as."""

    category: str
    prompt: list[int]
    answer: list[int]


@dataclasses.dataclass(frozen=True)
class Row:
    """Documents, the text before them, and questions in a row behind them (token ids)."""

    before: list[int]
    documents: list[list[int]]
    asked: list[Asked]

    @property
    def text(self) -> list[int]:
        """The documents as text."""
        return [token for document in self.documents for token in document]

    def alone(self) -> list[Row]:
        """Each question in a row of its own."""
        return [Row(self.before, self.documents, [asked]) for asked in self.asked]


class Batch(NamedTuple):
    """Rows as tensors, padded at their ends.

    Attributes:
        full, encoded: int64 [rows, tokens], with and without the documents as text.
        full_where, encoded_where: bool, where an answer's next token is predicted;
            both hold the same number, in the same order.
        targets: int64 [targets], what is predicted there.
        question: int64 [targets], the question each belongs to.
        categories: of each question.
        documents: of all rows; ``owned`` says which are whose.
    """

    full: Tensor
    full_where: Tensor
    encoded: Tensor
    encoded_where: Tensor
    targets: Tensor
    question: Tensor
    categories: list[str]
    documents: list[list[int]]
    owned: list[list[int]]


def batch_of(rows: Sequence[Row], pad: int) -> Batch:
    full: list[list[int]] = []
    encoded: list[list[int]] = []
    full_where: list[list[bool]] = []
    encoded_where: list[list[bool]] = []
    targets: list[int] = []
    question: list[int] = []
    categories: list[str] = []
    documents: list[list[int]] = []
    owned: list[list[int]] = []
    for row in rows:
        ids: list[int] = []
        where: list[bool] = []
        for asked in row.asked:
            ids += [*asked.prompt, *asked.answer]
            where += [False] * (len(asked.prompt) - 1) + [True] * len(asked.answer) + [False]
            targets += asked.answer
            question += [len(categories)] * len(asked.answer)
            categories.append(asked.category)
        owned.append([len(documents) + i for i in range(len(row.documents))])
        documents += row.documents
        for opening, out, out_where in (
            (row.before + row.text, full, full_where),
            (row.before, encoded, encoded_where),
        ):
            out.append(opening + ids)
            out_where.append([False] * len(opening) + where)
    return Batch(
        _padded(full, pad),
        _padded(full_where, False),
        _padded(encoded, pad),
        _padded(encoded_where, False),
        torch.tensor(targets),
        torch.tensor(question),
        categories,
        documents,
        owned,
    )


def _padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])


def exact(batch: Batch, predicted: Tensor) -> dict[str, tuple[int, int]]:
    """By category: questions of which every token is right, and questions asked."""
    right = (predicted == batch.targets).long()
    whole = torch.ones(len(batch.categories), dtype=torch.long)
    whole = whole.scatter_reduce(0, batch.question, right, "amin").tolist()
    names = sorted({*batch.categories})
    return {
        name: (
            sum(w for w, c in zip(whole, batch.categories, strict=True) if c == name),
            batch.categories.count(name),
        )
        for name in names
    }


def synthetic(
    rng: np.random.Generator,
    segments: int,
    length: int,
    questions: int,
    categories: Sequence[str],
) -> Row:
    """An example of the hybrid's task that asks at least one question."""
    while True:
        drawn = task.example(rng, segments, length, questions, categories)
        if drawn.questions:
            asked = [Asked(q.category, q.prompt, [*q.answer, task.END]) for q in drawn.questions]
            return Row(drawn.prefix, drawn.segments, asked)
