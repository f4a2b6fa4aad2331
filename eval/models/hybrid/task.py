"""A synthetic language for retrieval: documents that state facts, then questions.

    <bos> system w00 w07 ...                      the prefix, always the same
    document harbour : code of alice is v03 v17 ; w12 note harbour apple fig oat rye ; ...
    ? code of alice is v03 v17 <end>              a question and its answer

An example has some segments of equal length behind the prefix. Its questions
come from categories chosen to tell a right link from a wrong one:

    single  a fact stated once
    update  a fact that a later segment states anew: the old value answers if
            operators do not erase, no older fact answers if they erase everything
    seam    a fact whose statement begins in one segment and ends in the next
    twohop  the code of the owner of somebody, stated in two segments;
            the answer names the owner first
    copy    the note of a document, word for word

Tokens are words, so that a prompt can be written as text (``encode``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

CATEGORIES = ("single", "update", "seam", "twohop", "copy")
PREFIX_LENGTH = 8
CODE_WORDS = 2
NOTE_WORDS = 4
MAX_FACTS = 4  # whole facts a segment, its note and the split ones aside
TRAINING_SEED = 1_000
HELD_OUT_SEED = 9_000_000


def _words(text: str) -> list[str]:
    return text.split()


_MARKS = _words("<pad> <bos> <end> ? ; : document code owner note copy of is system")
_NAMES = _words("""
alice bob carol dave erin frank grace heidi ivan judy kevin laura mallory nina oscar peggy
quentin ruth sybil trent ursula victor wendy xavier yvonne zach adam beth chris diana edgar fiona
george hannah igor jane karl lena martin nora otto paula ralph sara thomas uma vera walter
xenia yuri zoe anton bella clara dennis emma felix gina hugo ida jonas kira leo maria
noah olga peter rosa simon tina ulf viola werner yara abel bruno celia dora elias flora
gregor hilda ines jakob klaus lydia max nadia olaf petra robin stella theo vito wanda zelda
""")
_TITLES = _words("""
harbour meadow castle forest valley island bridge garden tower market desert canyon
glacier lagoon prairie summit village temple quarry orchard station library museum theatre
""")
_NOTE_WORDS = _words("""
apple fig oat rye plum pear corn bean rice kale leek lime mint sage dill date
beet okra pea taro yam nut melon mango grape lemon peach olive onion garlic basil thyme
""")
_CODES = [f"v{i:02d}" for i in range(32)]
_FILLERS = [f"w{i:02d}" for i in range(32)]

WORDS: tuple[str, ...] = (*_MARKS, *_NAMES, *_TITLES, *_NOTE_WORDS, *_CODES, *_FILLERS)
IDS: dict[str, int] = {word: i for i, word in enumerate(WORDS)}
VOCABULARY = len(WORDS)
PAD, BOS, END = IDS["<pad>"], IDS["<bos>"], IDS["<end>"]

_NAME_IDS, _TITLE_IDS, _NOTE_IDS, _CODE_IDS, _FILLER_IDS = (
    np.array([IDS[word] for word in words])
    for words in (_NAMES, _TITLES, _NOTE_WORDS, _CODES, _FILLERS)
)


def encode(text: str) -> list[int]:
    """Ids of words parted by blanks."""
    return [IDS[word] for word in text.split()]


def decode(ids: Sequence[int]) -> str:
    """Words of ids, parted by blanks."""
    return " ".join(WORDS[i] for i in ids)


PREFIX: tuple[int, ...] = tuple(encode("<bos> system w00 w07 w14 w21 w28 w03"))


@dataclasses.dataclass(frozen=True)
class Question:
    """To be asked alone behind prefix and segments; ``<end>`` follows the answer.

    Attributes:
        category: one of ``CATEGORIES``.
        prompt, answer: token ids.
    """

    category: str
    prompt: list[int]
    answer: list[int]


@dataclasses.dataclass(frozen=True)
class Example:
    """A prompt in parts: ``prefix``, segments of equal length, questions."""

    prefix: list[int]
    segments: list[list[int]]
    questions: list[Question]

    def context(self) -> list[int]:
        """Prefix and segments as one list."""
        return [*self.prefix, *(token for segment in self.segments for token in segment)]


def generator(held_out: bool = False, stream: int = 0) -> np.random.Generator:
    """Random numbers for training, or those that training never sees."""
    return np.random.default_rng([HELD_OUT_SEED if held_out else TRAINING_SEED, stream])


def example(
    rng: np.random.Generator,
    segments: int = 4,
    length: int = 32,
    questions: int = 10,
    categories: Sequence[str] = CATEGORIES,
) -> Example:
    """A new example.

    Args:
        segments: at least 1; with 1 there is neither update, seam nor twohop.
        length: tokens of each segment, at least 32.
        questions: how many at most, drawn evenly from the categories that the
            segments allow; no question twice.
    """
    if not 1 <= segments <= len(_TITLES) or length < 32:
        raise ValueError(f"no example of {segments} segments of {length} tokens")
    writer = _Writer(rng, segments, length)
    texts = [writer.segment(index) for index in range(segments)]
    pools = {
        category: [pool[i] for i in rng.permutation(len(pool))]
        for category, pool in writer.questions().items()
        if category in categories and pool
    }
    asked: list[Question] = []
    while pools and len(asked) < questions:
        category = list(pools)[int(rng.integers(len(pools)))]
        asked.append(pools[category].pop())
        if not pools[category]:
            del pools[category]
    return Example(list(PREFIX), texts, asked)


class _Writer:
    """Writes the segments of one example and keeps what they state."""

    def __init__(self, rng: np.random.Generator, segments: int, length: int):
        self.rng, self.segments, self.length = rng, segments, length
        self.names = list(rng.permutation(_NAME_IDS))
        self.titles = [int(title) for title in rng.permutation(_TITLE_IDS)[:segments]]
        self.notes: list[list[int]] = []
        self.codes: dict[int, list[int]] = {}
        self.stated: dict[int, list[int]] = {}  # name: segments that state its code
        self.split: set[int] = set()
        self.owners: dict[int, tuple[int, int]] = {}  # name: its owner, segment
        self.awaited: dict[int, int] = {}  # owner without a code yet: segment that names it
        self.carried: list[int] = []

    def segment(self, index: int) -> list[int]:
        """The next segment; facts of one segment never depend on their order in it."""
        title = self.titles[index]
        words = [int(word) for word in self.rng.choice(_NOTE_IDS, NOTE_WORDS)]
        self.notes.append(words)
        head = [*self.carried, IDS["document"], title, IDS[":"]]
        items = [[IDS["note"], title, *words, IDS[";"]]]
        tail: list[int] = []
        self.carried = []
        if index < self.segments - 1 and self.names and self.rng.random() < 0.6:
            name = self._new_name()
            split = self._code(name, index)
            self.split.add(name)
            cut = int(self.rng.integers(3, 6))
            tail, self.carried = split[:cut], split[cut:]
        room = self.length - len(head) - len(items[0]) - len(tail)
        for _ in range(int(self.rng.integers(2, MAX_FACTS + 1))):
            fact = self._fact(index) if room >= 7 else None
            if fact is None:
                break
            items.append(fact)
            room -= len(fact)
        return [*head, *self._spread(items, room), *tail]

    def _spread(self, items: list[list[int]], fillers: int) -> list[int]:
        """The items in random order with filler words anywhere between them."""
        gaps = self.rng.multinomial(fillers, np.full(len(items) + 1, 1 / (len(items) + 1)))
        words: list[int] = []
        for gap, item in zip(gaps, [*self.rng.permutation(len(items)), None], strict=True):
            words += [int(word) for word in self.rng.choice(_FILLER_IDS, gap)]
            if item is not None:
                words += items[int(item)]
        return words

    def _fact(self, index: int) -> list[int] | None:
        """An owner, an update or a code, of at most 7 tokens; None if names are out."""
        if len(self.names) < 2:
            return None
        draw = self.rng.random()
        if draw < 0.3 and self.segments > 1:
            earlier = [name for name, where in self.stated.items() if where != [index]]
            if earlier and (index == self.segments - 1 or self.rng.random() < 0.5):
                owner = self._pick(earlier)
            else:
                owner = self._new_name()
                self.awaited[owner] = index
            owned = self._new_name()
            self.owners[owned] = (owner, index)
            return [IDS["owner"], IDS["of"], owned, IDS["is"], owner, IDS[";"]]
        if draw < 0.5:
            old = [
                name
                for name, where in self.stated.items()
                if len(where) == 1 and where[0] < index and name not in self.split
            ]
            if old:
                return self._code(self._pick(old), index)
        awaited = [name for name, where in self.awaited.items() if where < index]
        if awaited and self.rng.random() < 0.7:
            name = self._pick(awaited)
            del self.awaited[name]
        else:
            name = self._new_name()
        return self._code(name, index)

    def _code(self, name: int, index: int) -> list[int]:
        code = [int(word) for word in self.rng.choice(_CODE_IDS, CODE_WORDS)]
        self.codes[name] = code
        self.stated.setdefault(name, []).append(index)
        return [IDS["code"], IDS["of"], name, IDS["is"], *code, IDS[";"]]

    def _new_name(self) -> int:
        return int(self.names.pop())

    def _pick(self, names: list[int]) -> int:
        return names[int(self.rng.integers(len(names)))]

    def questions(self) -> dict[str, list[Question]]:
        """All questions that the segments written so far answer."""
        pools: dict[str, list[Question]] = {category: [] for category in CATEGORIES}

        def ask(category: str, prompt: list[int], answer: list[int]) -> None:
            pools[category].append(Question(category, prompt, answer))

        code_of, owner_of = encode("? code of"), encode("? code of owner of")
        for name, where in self.stated.items():
            category = "seam" if name in self.split else "update" if len(where) > 1 else "single"
            ask(category, [*code_of, name, IDS["is"]], self.codes[name])
        for owned, (owner, index) in self.owners.items():
            where = self.stated.get(owner, [index])
            if len(where) == 1 and where != [index]:
                answer = [owner, IDS["is"], *self.codes[owner]]
                ask("twohop", [*owner_of, owned, IDS["is"]], answer)
        for title, words in zip(self.titles, self.notes, strict=True):
            ask("copy", [*encode("? copy note"), title], words)
        return pools
