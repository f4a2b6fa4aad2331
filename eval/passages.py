"""Passages of plain facts with questions, and the prompts made of them.

The facts are common knowledge in our own words. Every accepted answer stands
literally in its passage, and the questions are simple enough for a model of
135 million parameters.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

PATH = pathlib.Path(__file__).parent / "data" / "passages.json"

SYSTEM = "You answer questions from documents, in a few words."
INSTRUCTION = "Answer the question from the documents.\n\n"
# SGLang joins the content parts of a chat message by a space where, as here,
# the chat template takes a message's content for a string.
JOIN = " "
# What every prompt opens with, as SmolLM2's chat template renders it.
OPENING = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{INSTRUCTION}{JOIN}"
CLOSING = "<|im_end|>\n<|im_start|>assistant\n"
GAP = "\n\n"  # behind each document, outside its segment


@dataclasses.dataclass(frozen=True)
class Question:
    """A question and the answers that count as right."""

    text: str
    answers: tuple[str, ...]

    def is_answered(self, answer: str) -> bool:
        """Whether an accepted answer stands in ``answer``; case is ignored."""
        return any(accepted.lower() in answer.lower() for accepted in self.answers)


@dataclasses.dataclass(frozen=True)
class Passage:
    """One document and what is asked about it."""

    title: str
    text: str
    questions: tuple[Question, ...]

    @property
    def document(self) -> str:
        """The text of its segment."""
        return f"{self.title}\n{self.text}"


def load_passages() -> list[Passage]:
    """All passages, in the order of the file."""
    return [
        Passage(
            item["title"],
            item["text"],
            tuple(Question(one["question"], tuple(one["answers"])) for one in item["questions"]),
        )
        for item in json.loads(PATH.read_text(encoding="utf-8"))
    ]


def find(passages: Sequence[Passage], title: str) -> Passage:
    """The passage of that title.

    Raises:
        KeyError: there is none.
    """
    for passage in passages:
        if passage.title == title:
            return passage
    raise KeyError(title)


def prompt_pieces(passages: Sequence[Passage], question: str) -> list[tuple[str, bool]]:
    """The prompt in pieces of text, each with whether it is a segment.

    Joined, they are what the chat template makes of ``chat_messages``.
    """
    return _pieces(OPENING, passages, f"Question: {question}{CLOSING}")


def plain_pieces(passages: Sequence[Passage], question: str) -> list[tuple[str, bool]]:
    """The same for a model that knows no chat."""
    return _pieces(INSTRUCTION, passages, f"Question: {question}\nAnswer:")


def _pieces(opening: str, passages: Sequence[Passage], closing: str) -> list[tuple[str, bool]]:
    pieces = [(opening, False)]
    for passage in passages:
        pieces += [(passage.document, True), (GAP + JOIN, False)]
    text, _ = pieces.pop()
    return [*pieces, (text + closing, False)]


@dataclasses.dataclass(frozen=True)
class Prompt:
    """Token ids, and the segments' token ranges as ``pic.segments`` takes them."""

    ids: list[int]
    segments: list[dict[str, int]]


def tokenize(tokenizer: Any, pieces: Sequence[tuple[str, bool]]) -> Prompt:
    """A prompt given in pieces, each tokenised alone."""
    ids: list[int] = []
    segments = []
    for text, is_segment in pieces:
        start = len(ids)
        ids += tokenizer(text, add_special_tokens=False)["input_ids"]
        if is_segment:
            segments.append({"start": start, "end": len(ids)})
    return Prompt(ids, segments)


def chat_messages(
    passages: Sequence[Passage], question: str, *, mark: bool
) -> list[dict[str, Any]]:
    """The same prompt for the chat endpoint, its documents marked or not."""
    flag = {"pic_segment": True} if mark else {}
    documents = [{"type": "text", "text": passage.document + GAP, **flag} for passage in passages]
    content = [
        {"type": "text", "text": INSTRUCTION},
        *documents,
        {"type": "text", "text": f"Question: {question}"},
    ]
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": content}]
