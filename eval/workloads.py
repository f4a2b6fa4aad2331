"""Traffic of the kinds that position-independent caching is for.

Prompts of random tokens: what they say does not matter to speed. Popularity follows
Zipf's law, as that of documents and web pages does.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence

QUESTION_TOKENS = 32

Tokens = Callable[[int], list[int]]


@dataclasses.dataclass(frozen=True)
class Prompt:
    """Token ids of the segments, in order, and of what is asked behind them."""

    segments: list[list[int]]
    question: list[int]

    @property
    def ids(self) -> list[int]:
        return [token for segment in self.segments for token in segment] + self.question

    @property
    def ranges(self) -> list[dict[str, int]]:
        """Token ranges of the segments, as ``pic.segments`` takes them."""
        found, at = [], 0
        for segment in self.segments:
            found.append({"start": at, "end": at + len(segment)})
            at += len(segment)
        return found


def draw(rng: random.Random, items: Sequence[list[int]], count: int) -> list[list[int]]:
    """``count`` different items, the r-th most popular with weight 1/r."""
    left = list(range(len(items)))
    chosen = []
    for _ in range(count):
        (i,) = rng.choices(left, weights=[1 / (1 + rank) for rank in left])
        left.remove(i)
        chosen.append(items[i])
    return rng.sample(chosen, count)


def dynamic_rag(rng: random.Random, tokens: Tokens, count: int, length: int) -> list[Prompt]:
    """Four of 24 Zipf-popular documents a question, in the order of a retriever."""
    corpus = [tokens(length) for _ in range(24)]
    return [Prompt(draw(rng, corpus, 4), tokens(QUESTION_TOKENS)) for _ in range(count)]


def multi_agent(rng: random.Random, tokens: Tokens, count: int, length: int) -> list[Prompt]:
    """Agents that share tool schemas and skills: three to five of eight, in varying order,
    behind them the agent's own task."""
    shared = [tokens(length) for _ in range(8)]
    return [
        Prompt(rng.sample(shared, rng.randint(3, 5)), tokens(QUESTION_TOKENS)) for _ in range(count)
    ]


def edited_history(rng: random.Random, tokens: Tokens, count: int, length: int) -> list[Prompt]:
    """Three conversations of six segments; before each turn one in the middle is
    rewritten (a tool's result summed up, a file edited)."""
    talks = [[tokens(length) for _ in range(6)] for _ in range(3)]
    prompts = []
    for turn in range(count):
        talk = talks[turn % len(talks)]
        talk[rng.randint(1, 4)] = tokens(length)
        prompts.append(Prompt(list(talk), tokens(QUESTION_TOKENS)))
    return prompts


WORKLOADS: dict[str, Callable[[random.Random, Tokens, int, int], list[Prompt]]] = {
    "dynamic_rag": dynamic_rag,
    "multi_agent": multi_agent,
    "edited_history": edited_history,
}
