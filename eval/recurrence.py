"""Do sets of segments recur? How much of three kinds of traffic is served in company.

    python -m eval.recurrence [--quick] [--data FILE] [--json FILE] [--plot FILE]

No server: requests go through what decides on one, ``server.recurring`` and
``server.companions.companies_of``, and what is made through ``forest.companies``, whose
``cover`` says which segments of the next request are served in company. A company is
there for the request after the one that wanted it; what has been used least recently goes
when all of it together is over the budget.

    retrieval      questions of Zipf's popularity, each asked with some of its words left out;
                   the ten passages that BM25 finds, in the order of their scores
    agents         four agents with eight of forty tools each, in a random order, and two of
                   twenty skills that the task brings
    conversations  four retrieved documents; every turn swaps one of them for another
"""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
import random
import statistics
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import bm25s
import numpy as np
from tqdm import tqdm

from sglang_pic.eval.command import Outcome, deliver, new_figure, parser_of
from sglang_pic.eval.multihop import MUSIQUE, load_examples
from sglang_pic.eval.tables import Table
from sglang_pic.forest.companies import Companies, Variant
from sglang_pic.forest.companies import Company as Held
from sglang_pic.forest.keys import company_id, order_key
from sglang_pic.request.internal import MAX_COMPANY_TOKENS
from sglang_pic.server.companions import Kind, companies_of, is_worth_making
from sglang_pic.server.recurring import Recurring

WORDS = 64
DOCUMENTS = 10
REQUESTS, QUICK_REQUESTS = 2000, 300
# Of all segments of the corpus, what companies may hold beside them.
BUDGET = 2.0
WINDOW = 100
RULES = (("subset", 10), ("subset", 5), ("subset", 3), ("subset", 2), ("tenant", 10))
KIND = Kind("tenant", None, None, None, ())
Segment = tuple[int, ...]


# -- traffic ----------------------------------------------------------------------------


def _tokens(text: str) -> Segment:
    """A segment of as many tokens as the text has words: only how many, and which, counts."""
    digest = hashlib.blake2b(text.encode(), digest_size=4).digest()
    return (int.from_bytes(digest, "little"), *range(len(text.split())))


def _zipf(rng: random.Random, count: int) -> int:
    weights = [1 / (rank + 1) for rank in range(count)]
    return rng.choices(range(count), weights)[0]


class Retriever:
    """BM25 over the passages of all questions."""

    def __init__(self, data: pathlib.Path, rng: random.Random):
        self._rng = rng
        examples = load_examples(data, WORDS, None, 0)
        self.questions = [example.question for example in examples]
        self.passages = sorted({d.document for example in examples for d in example.documents})
        self._index = bm25s.BM25()
        corpus = bm25s.tokenize(self.passages, show_progress=False)
        self._index.index(corpus, show_progress=False)

    def find(self, question: str, count: int) -> list[str]:
        """The best passages for a question, some of whose words are left out."""
        words = [word for word in question.split() if self._rng.random() < 0.8] or [question]
        query = bm25s.tokenize(" ".join(words), show_progress=False)
        found, _ = self._index.retrieve(query, k=count, show_progress=False)
        return [self.passages[int(i)] for i in found[0]]


def retrieval(retriever: Retriever, rng: random.Random) -> Iterator[list[Segment]]:
    while True:
        question = retriever.questions[_zipf(rng, len(retriever.questions))]
        yield [_tokens(text) for text in retriever.find(question, DOCUMENTS)]


def agents(_: Retriever, rng: random.Random) -> Iterator[list[Segment]]:
    tools = [(i, *range(rng.randint(60, 250))) for i in range(40)]
    skills = [(100 + i, *range(rng.randint(150, 500))) for i in range(20)]
    teams = [rng.sample(tools, 8) for _ in range(4)]
    while True:
        own = list(rng.choice(teams))
        rng.shuffle(own)
        yield [*own, *rng.sample(skills, 2)]


def conversations(retriever: Retriever, rng: random.Random) -> Iterator[list[Segment]]:
    while True:
        question = retriever.questions[_zipf(rng, len(retriever.questions))]
        texts = retriever.find(question, DOCUMENTS)
        held, others = texts[:4], texts[4:]
        for _ in range(rng.randint(3, 6)):
            yield [_tokens(text) for text in held]
            if others:
                held[rng.randrange(len(held))] = others.pop(0)


TRAFFIC = {"retrieval": retrieval, "agents": agents, "conversations": conversations}


# -- what a server would do ---------------------------------------------------------------


class Simulated:
    """One server's companies, under one rule.

    Args:
        rule: as ``--pic-company``.
        most: segments of a company.
        budget: tokens that companies may hold.
    """

    def __init__(self, rule: str, most: int, budget: int):
        self._rule = rule
        self._most = most
        self._budget = budget
        self._recurring = Recurring()
        self._companies = Companies()
        self._used: OrderedDict[str, None] = OrderedDict()
        self.built = self.asked = 0

    def ask(self, segments: Sequence[Segment]) -> float:
        """One request; the share of its segments' tokens that is served in company."""
        tokens = {order_key(segment): segment for segment in segments}
        names = [key.hex() for key in tokens]
        served = self._companies.cover(names, ("tenant", ""), array("q"), self._rule)
        for variant in served.values():
            self._companies.use(variant.name)
            self._used.move_to_end(variant.name)
        total = sum(map(len, tokens.values()))
        self.asked += total
        for group in self._recurring.saw("kind", tokens):
            chosen = [tokens[name] for name in group]
            for company in companies_of(KIND, chosen, MAX_COMPANY_TOKENS, self._most):
                keys = [order_key(member) for member in company.members]
                had = [served.get(key.hex()) for key in keys]
                if is_worth_making([one.size if one is not None else 0 for one in had]):
                    self._make(dict(zip(keys, company.members, strict=True)))
        return sum(len(tokens[bytes.fromhex(name)]) for name in served) / total

    def _make(self, members: dict[bytes, Segment]) -> None:
        names = frozenset(key.hex() for key in members)
        name = company_id("tenant", "", (), names)
        if self._companies.is_whole(name):
            return
        for old in self._companies.held(name):
            self._drop(old)
        self.built += 2 * sum(map(len, members.values()))
        variants = [
            Variant(f"{name}/{key.hex()}", key.hex(), name, len(members), 0, "", len(member), 0)
            for key, member in members.items()
        ]
        company = Held(name, ("tenant", ""), array("q"), names, names)
        for surplus in self._companies.add(company, variants):
            self._drop(surplus)
        self._used.update(dict.fromkeys(variant.name for variant in variants))
        known = {variant.name: variant for variant in self._companies.variants()}
        while self._companies.tokens > self._budget:
            self._drop(known[next(iter(self._used))])

    def _drop(self, variant: Variant) -> None:
        self._companies.gone(variant.name)
        self._used.pop(variant.name, None)

    @property
    def held(self) -> int:
        """Tokens of all variants."""
        return self._companies.tokens


@dataclasses.dataclass(frozen=True)
class Course:
    """What one rule came to on one kind of traffic.

    Attributes:
        shares: of each request's segment tokens, served in company.
        built: tokens computed to make companies, per token of a segment asked for.
        held: tokens of variants at the end, per token of a distinct segment.
    """

    shares: list[float]
    built: float
    held: float


def measure(
    requests: Sequence[Sequence[Segment]], rule: str, most: int, distinct: int, title: str
) -> Course:
    """One rule over some traffic, with progress under a title.

    Args:
        distinct: tokens of all its segments.
    """
    server = Simulated(rule, most, int(BUDGET * distinct))
    shares = [server.ask(request) for request in tqdm(requests, desc=title, unit="request")]
    return Course(shares, server.built / server.asked, server.held / distinct)


def run(*, quick: bool, data: pathlib.Path = MUSIQUE, seed: int = 0) -> Outcome:
    """All kinds of traffic under all rules."""
    count = QUICK_REQUESTS if quick else REQUESTS
    rows, courses = [], {}
    for kind in TRAFFIC:
        rng = random.Random(seed)
        traffic = TRAFFIC[kind](Retriever(data, rng), rng)
        requests = [next(traffic) for _ in range(count)]
        distinct = sum(map(len, {one for request in requests for one in request}))
        for rule, most in RULES:
            course = measure(requests, rule, most, distinct, f"{kind}, {rule} of {most}")
            shares = course.shares
            courses[kind, rule, most] = course
            rows.append(
                {
                    "traffic": kind,
                    "rule": rule,
                    "most": most,
                    "requests": count,
                    "share": statistics.fmean(shares[count // 2 :]),
                    "built": course.built,
                    "held": course.held,
                }
            )
    config = {
        "data": data.name if data.exists() else "the project's own passages",
        "words_a_passage": WORDS,
        "requests": count,
        "budget": BUDGET,
        "seed": seed,
    }
    return Outcome(config, rows, [table_of(rows)], plot(courses))


def table_of(rows: Sequence[dict[str, Any]]) -> Table:
    return Table(
        f"Served in company: {rows[0]['requests']} requests of each kind",
        ("traffic", "rule", "most segments", "served, %", "built", "held"),
        [
            (
                row["traffic"],
                row["rule"],
                str(row["most"]),
                f"{100 * row['share']:.0f}",
                f"{row['built']:.2f}",
                f"{row['held']:.2f}",
            )
            for row in rows
        ],
        "Served: of the segments' tokens, over the last half. Built: tokens computed for "
        "companies, both orders, a token of a segment asked for. Held: tokens of variants at the "
        "end, a token of a distinct segment; those compiled alone are 1.",
    )


def plot(courses: dict[tuple[str, str, int], Course]) -> Any:
    """Share served in company over the requests, one panel a kind of traffic."""
    kinds = list(dict.fromkeys(kind for kind, _, _ in courses))
    figure, axes = new_figure(len(kinds))
    for axis, kind in zip(axes, kinds, strict=True):
        for (one, rule, most), course in courses.items():
            if one == kind:
                window = np.ones(WINDOW) / WINDOW
                smooth = np.convolve(course.shares, window, mode="valid")
                axis.plot(100 * smooth, label=f"{rule}, {most}")
        axis.set(title=kind, xlabel="requests", ylim=(0, 100))
    axes[0].set(ylabel=f"served in company, % (mean of {WINDOW})")
    axes[-1].legend(title="rule, most segments")
    return figure


def main() -> None:
    parser = parser_of(__doc__, f"{QUICK_REQUESTS} requests of each kind")
    parser.add_argument("--data", type=pathlib.Path, default=MUSIQUE, help="MuSiQue (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn (%(default)s)")
    args = parser.parse_args()
    deliver(run(quick=args.quick, data=args.data, seed=args.seed), args)


if __name__ == "__main__":
    main()
