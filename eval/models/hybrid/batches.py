"""Examples as tensors: many questions in a row to train on, or one a row to evaluate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sglang_pic.eval.models.hybrid import task

IGNORED = -100


class Rung(NamedTuple):
    """A step of the curriculum: segments of a length, questions and examples a batch."""

    segments: int
    length: int
    questions: int
    examples: int

    def __str__(self) -> str:
        return f"{self.segments}x{self.length}"


class Batch(NamedTuple):
    """Rows of tokens and what is to be predicted.

    Attributes:
        ids: [rows, tokens], padded at the end.
        targets: [rows, tokens], the next token where an answer or its end
            comes next, else ``IGNORED``.
        question: int64 [targets], which question each target belongs to, in
            the order of ``targets[targets != IGNORED]``.
        category: int64 [questions], as an index of ``task.CATEGORIES``.
    """

    ids: Tensor
    targets: Tensor
    question: Tensor
    category: Tensor


def in_a_row(rng: np.random.Generator, rung: Rung) -> Batch:
    """Examples of a rung, every example a row with all its questions."""
    examples = [
        task.example(rng, rung.segments, rung.length, rung.questions) for _ in range(rung.examples)
    ]
    return _batch([(example.context(), example.questions) for example in examples])


def questions_alone(examples: Sequence[task.Example]) -> tuple[Batch, Tensor]:
    """Every question a row without its context, and whose it is: int64 [rows]."""
    rows = [(i, asked) for i, example in enumerate(examples) for asked in example.questions]
    owner = torch.tensor([i for i, _ in rows])
    return _batch([([], [asked]) for _, asked in rows]), owner


def _batch(rows: Sequence[tuple[list[int], Sequence[task.Question]]]) -> Batch:
    ids, targets = [], []
    question: list[int] = []
    category: list[int] = []
    for context, questions in rows:
        row, target = list(context), [IGNORED] * len(context)
        for asked in questions:
            answer = [*asked.answer, task.END]
            row += [*asked.prompt, *answer]
            target += [*[IGNORED] * (len(asked.prompt) - 1), *answer, IGNORED]
            question += [len(category)] * len(answer)
            category.append(task.CATEGORIES.index(asked.category))
        ids.append(row)
        targets.append(target)
    return Batch(
        _padded(ids, task.PAD),
        _padded(targets, IGNORED),
        torch.tensor(question),
        torch.tensor(category),
    )


def _padded(rows: list[list[int]], value: int) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows])


class Score(NamedTuple):
    """Questions asked and answered exactly, each [categories]."""

    asked: Tensor
    exact: Tensor

    @staticmethod
    def of(batch: Batch, predicted: Tensor) -> Score:
        """``predicted``: the most likely token at every target, [targets]."""
        right = (predicted == batch.targets[batch.targets != IGNORED]).long()
        whole = torch.ones_like(batch.category)
        whole = whole.scatter_reduce(0, batch.question, right, "amin")
        size = len(task.CATEGORIES)
        return Score(
            torch.bincount(batch.category, minlength=size),
            torch.bincount(batch.category, weights=whole.float(), minlength=size),
        )

    def plus(self, other: Score) -> Score:
        return Score(self.asked + other.asked, self.exact + other.exact)

    def share(self) -> dict[str, float]:
        """Exact match of every category that was asked."""
        counts = zip(task.CATEGORIES, self.asked.tolist(), self.exact.tolist(), strict=True)
        return {name: exact / asked for name, asked, exact in counts if asked}
