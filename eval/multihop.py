"""Questions over ten passages each: MuSiQue where it is at hand, else our own; documentation.

MuSiQue (Trivedi et al., TACL 2022) asks for facts that several passages hold
together. A file of it is a JSON list of ``{question, answers, ctxs: [{title,
text}]}``. Without it, the passages that ship with this project stand in: one
question each, with nine others as distractors. ``DOCSTRINGS`` in the place of a file stands
for what Python's standard library says of itself (``eval.docstrings``), one name asked about.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
import platform
import random
from collections.abc import Sequence

from sglang_pic.eval import docstrings
from sglang_pic.eval.passages import PATH, Passage, load_passages

MUSIQUE = pathlib.Path(__file__).resolve().parents[2] / "shared" / "data" / "musique_dev.json"
DOCSTRINGS = pathlib.Path("docstrings")
DOCUMENTS = 10


@dataclasses.dataclass(frozen=True)
class Example:
    """A question, the answers that count as right, and the passages in the order in
    which they are given."""

    documents: tuple[Passage, ...]
    question: str
    answers: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Source:
    """What is asked about, for a result's configuration.

    Attributes:
        name: the file's, or in words.
        sha256: of all of it.
    """

    name: str
    sha256: str


def cut(text: str, answers: Sequence[str], words: int) -> str:
    """At most ``words`` words of a passage: those around the first answer that stands
    in it, or its first ones."""
    found = text.split()
    at = 0
    for answer in answers:
        place = text.lower().find(answer.lower())
        if place >= 0:
            at = len(text[:place].split())
            break
    start = max(0, min(at - words // 2, len(found) - words))
    return " ".join(found[start : start + words])


def read_musique(path: pathlib.Path, words: int, documents: int = DOCUMENTS) -> list[Example]:
    """All examples of a file, passages cut.

    Raises:
        ValueError: the file is not MuSiQue in the shape above.
    """
    try:
        return [
            Example(
                tuple(
                    Passage(one["title"] or "Passage", cut(one["text"], item["answers"], words), ())
                    for one in item["ctxs"][:documents]
                ),
                item["question"],
                tuple(item["answers"]),
            )
            for item in json.loads(path.read_text(encoding="utf-8"))
        ]
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no list of question, answers and ctxs: {error!r}") from error


def own_examples(documents: int = DOCUMENTS) -> list[Example]:
    """A first question of every passage that ships, then the second ones."""
    passages = load_passages()
    rng = random.Random(0)
    made = []
    for i in range(max(len(passage.questions) for passage in passages)):
        for passage in passages:
            others = [other for other in passages if other is not passage]
            question = passage.questions[i]
            beside = rng.sample(others, documents - 1)
            made.append(Example((passage, *beside), question.text, question.answers))
    return made


def source_of(path: pathlib.Path, words: int) -> Source:
    """What ``load_examples`` reads there."""
    if path == DOCSTRINGS:
        text = "\n".join(one.document for one in docstrings.load_docstrings(words))
        name = f"docstrings of Python {platform.python_version()}"
        return Source(name, hashlib.sha256(text.encode()).hexdigest())
    if path.exists():
        return Source(path.name, hashlib.sha256(path.read_bytes()).hexdigest())
    return Source("the project's own passages", hashlib.sha256(PATH.read_bytes()).hexdigest())


def load_examples(
    path: pathlib.Path, words: int, count: int | None, seed: int, documents: int = DOCUMENTS
) -> list[Example]:
    """The first ``count`` examples (all if ``None``), their passages shuffled.

    Says so and takes our own passages where there is no file at ``path``.

    Args:
        path: a file of MuSiQue, or ``DOCSTRINGS``.
        words: of a passage, at most; our own are short and stay whole.
        documents: passages an example.
    """
    if path == DOCSTRINGS:
        asked = docstrings.questions(words, documents)
        examples = [Example(passages, question, ()) for passages, question in asked]
    elif path.exists():
        examples = read_musique(path, words, documents)
    else:
        print(f"{path} is not there: asking about the passages that ship with the project")
        examples = own_examples(documents)
    rng = random.Random(seed)
    return [
        dataclasses.replace(one, documents=tuple(rng.sample(one.documents, len(one.documents))))
        for one in examples[:count]
    ]
