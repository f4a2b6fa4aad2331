"""Where training rows come from: the synthetic task from short to long, or questions
over texts in a file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from sglang_pic.eval.encoder.data import Asked, Row, synthetic
from sglang_pic.eval.models.hybrid import task
from sglang_pic.eval.multihop import Example, load_examples
from sglang_pic.eval.passages import prompt_pieces

RISE_AT = 0.9  # mean exact match over a rung's categories
AT_LEAST = 40  # steps on a rung
REPLAYS = 0.25  # share of batches from the two rungs below
MAX_ANSWER = 24  # tokens of a greedy answer
WORDS = 60  # of a passage


class Drawn(NamedTuple):
    """Rows of a batch. ``counts``: they are of the present difficulty, so that how they
    are answered says whether to go on."""

    rows: list[Row]
    counts: bool


class Source(Protocol):
    """``pad`` is the token behind rows; ``label`` what the curve calls the present rows;
    ``stage`` goes into checkpoints."""

    pad: int
    stage: int

    @property
    def label(self) -> str: ...

    def draw(self, rng: np.random.Generator) -> Drawn: ...

    def advance(self, shares: Mapping[str, float], steps: int) -> bool:
        """Go on to harder rows if these ``shares`` of exact answers, after ``steps``
        batches that counted, are enough; whether it did."""


class Rung(NamedTuple):
    """A step of the curriculum: documents and their tokens, questions a row, rows a batch."""

    documents: int
    length: int
    questions: int
    rows: int
    categories: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.documents}x{self.length} {'+'.join(self.categories)}"


# Not ``update`` and ``seam``: which statement is the later one, and which document goes on
# where another ends, a set of documents cannot say.
ALL = ("single", "twohop", "copy")
RUNGS = (
    Rung(1, 32, 4, 32, ("single",)),
    Rung(1, 32, 4, 32, ("single", "copy")),
    Rung(2, 32, 6, 24, ("single", "copy")),
    Rung(2, 32, 7, 24, ALL),
    Rung(4, 32, 10, 16, ALL),
    Rung(4, 48, 10, 16, ALL),
    Rung(8, 48, 16, 10, ALL),
)


class Curriculum:
    """The hybrid's task, rung by rung."""

    pad = task.PAD

    def __init__(self, first: int, highest: int):
        self.stage, self.highest = first, highest

    @property
    def label(self) -> str:
        return str(RUNGS[self.stage])

    def draw(self, rng: np.random.Generator) -> Drawn:
        replay = self.stage > 0 and rng.random() < REPLAYS
        below = int(rng.integers(max(0, self.stage - 2), max(1, self.stage)))
        rung = RUNGS[below if replay else self.stage]
        rows = [
            synthetic(rng, rung.documents, rung.length, rung.questions, rung.categories)
            for _ in range(rung.rows)
        ]
        return Drawn(rows, not replay)

    def advance(self, shares: Mapping[str, float], steps: int) -> bool:
        found = [shares[name] for name in RUNGS[self.stage].categories if name in shares]
        learnt = steps >= AT_LEAST and sum(found) > RISE_AT * len(found)
        if not learnt or self.stage >= self.highest:
            return False
        self.stage += 1
        return True


class Texts:
    """A fixed pool of questions over passages of a file (see ``eval.multihop``): each has a
    random number of its passages in random order, and is answered by the frozen model,
    greedily, when it is first drawn.

    Args:
        answers: a file that keeps those answers for the next run.
    """

    label, stage = "texts", 0

    def __init__(
        self, path: Path, model: Any, tokenizer: Any, answers: Path, *, pool: int, rows: int
    ):
        self.model, self.answers, self.rows = model, answers, rows
        self.pad = tokenizer.pad_token_id or 0
        self.end = tokenizer.eos_token_id
        rng = np.random.default_rng(0)
        examples = load_examples(path, WORDS, None, 0)
        chosen = (examples[int(i)] for i in rng.integers(len(examples), size=pool))
        self.unasked = [_text_row(rng, example, tokenizer) for example in chosen]
        self.known: dict[int, list[int]] = {}
        if answers.exists():
            for line in answers.read_text().splitlines():
                row, ids = json.loads(line)
                self.known[row] = ids

    def draw(self, rng: np.random.Generator) -> Drawn:
        return Drawn(
            [self._row(int(i)) for i in rng.integers(len(self.unasked), size=self.rows)], True
        )

    def advance(self, shares: Mapping[str, float], steps: int) -> bool:
        return False

    def _row(self, index: int) -> Row:
        row, prompt = self.unasked[index]
        if index not in self.known:
            self.known[index] = self._greedy([*row.before, *row.text, *prompt])
            with self.answers.open("a") as file:
                file.write(json.dumps([index, self.known[index]]) + "\n")
        return Row(row.before, row.documents, [Asked("answer", prompt, self.known[index])])

    @torch.no_grad()
    def _greedy(self, ids: Sequence[int]) -> list[int]:
        prompt = torch.tensor([list(ids)])
        out = self.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=MAX_ANSWER,
            do_sample=False,
            eos_token_id=self.end,
            pad_token_id=self.pad,
        )
        return out[0, len(ids) :].tolist()


def _text_row(rng: np.random.Generator, example: Example, tokenizer: Any) -> tuple[Row, list[int]]:
    """A row that asks nothing yet, and the question's tokens. What stands between two
    passages is the end of the first."""
    order = rng.permutation(len(example.documents))[: rng.integers(1, len(example.documents) + 1)]
    pieces = prompt_pieces([example.documents[int(i)] for i in order], example.question)
    texts = [text for text, _ in pieces]
    glue = [[texts[i], *texts[i + 1 : i + 2]] for i in range(1, len(texts) - 1, 2)]

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    documents = [[token for text in pair for token in ids(text)] for pair in glue]
    return Row(ids(texts[0]), documents, []), ids(texts[-1])
