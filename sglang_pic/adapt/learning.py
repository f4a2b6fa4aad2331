"""Self-distillation: the linked forward learns to say what the frozen model says of the
whole prompt.

A step takes one prompt and one way to link it. The frozen model reads all of it, and its
next-token distributions along the questions and its own greedy answers are what the linked
forward, with the adapter, is held to: KL(full || linked), weighted to tokens where the two
differ (block distillation, arXiv 2605.15913, weighs so).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
import random
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sglang_pic.adapt.data import AdaptError, Ids, Prompt
from sglang_pic.adapt.linked import (
    Rows,
    Way,
    begin,
    compile_segments,
    cores_of,
    joined,
    rows_of,
)
from sglang_pic.adapt.lora import Adapter
from sglang_pic.link.policy import Graded, RecomputePolicy, Seam

CURVE, STATE = "curve.jsonl", "state.pt"
# A token counts between half and this much, by how far the two are apart there.
MOST = 2.5
CLIP = 1.0


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to learn.

    Attributes:
        steps: in all; the rate falls to zero over them.
        rate: the highest learning rate.
        warmup: steps until it is reached.
        answer: tokens of each answer.
        seed: of everything that is drawn.
        every: steps between checkpoints.
    """

    steps: int = 1000
    rate: float = 5e-4
    warmup: int = 20
    answer: int = 32
    seed: int = 0
    every: int = 20

    def rate_at(self, step: int) -> float:
        left = (self.steps - step) / self.steps
        return self.rate * min(1.0, (step + 1) / self.warmup, left * 2)


class Reference(NamedTuple):
    """What the frozen model makes of a prompt.

    rows: its questions and answers, one branch each, w rows. answered: bool [w], whether
    what follows one is the answer's. logprobs: float32 [w, vocab], of what follows.
    """

    rows: Rows
    answered: Tensor
    logprobs: Tensor


@torch.no_grad()
def answers_of(model: Any, prompt: Prompt, count: int) -> tuple[Ids, ...]:
    """Full recompute's greedy answer to each question, ``count`` tokens; nothing ends it."""
    questions = prompt.questions
    walk = begin(model, prompt, [], [(0, 0)] * len(prompt.segments))
    asked = [
        rows_of(question, range(prompt.length, prompt.length + len(question)), i + 1)
        for i, question in enumerate(questions)
    ]
    last = torch.tensor([len(question) for question in questions]).cumsum(0) - 1
    likeliest = [walk.compute(joined(asked), last).argmax(-1).cpu()]
    for i in range(count - 1):
        rows = Rows(
            likeliest[-1],
            torch.tensor([prompt.length + len(question) + i for question in questions]),
            torch.arange(1, len(questions) + 1),
        )
        likeliest.append(walk.compute(rows, torch.arange(len(questions))).argmax(-1).cpu())
    return tuple(map(tuple, torch.stack(likeliest, 1).tolist()))


@torch.no_grad()
def refer(model: Any, prompt: Prompt, answers: Sequence[Ids]) -> Reference:
    """Full recompute along its questions and these answers."""
    rows, answered = [], []
    for i, (question, answer) in enumerate(zip(prompt.questions, answers, strict=True)):
        ids = [*question, *answer[:-1]]
        rows.append(rows_of(ids, range(prompt.length, prompt.length + len(ids)), i + 1))
        answered += [j >= len(question) - 1 for j in range(len(ids))]
    asked = joined(rows)
    walk = begin(model, prompt, [], [(0, 0)] * len(prompt.segments))
    logprobs = walk.compute(asked, torch.arange(len(answered))).log_softmax(-1)
    return Reference(asked, torch.tensor(answered), logprobs)


def linked(
    model: Any, prompt: Prompt, way: Way, policy: RecomputePolicy, reference: Reference
) -> Tensor:
    """The same distributions by the linked forward, float32 [w, vocab]."""
    kept = compile_segments(model, prompt, way)
    walk = begin(model, prompt, kept, cores_of(prompt, policy, way.company))
    every = torch.arange(len(reference.answered))
    return walk.compute(reference.rows, every).log_softmax(-1)


def divergence(reference: Reference, logprobs: Tensor) -> Tensor:
    """KL(full || linked) in nats at each judged token, float32 [w]."""
    full = reference.logprobs
    return (full.exp() * (full - logprobs)).sum(-1)


def loss_of(kl: Tensor) -> Tensor:
    """Its mean, weighted to where it is large."""
    with torch.no_grad():
        weight = (0.5 + kl / (2 * kl.mean()).clamp_min(1e-9)).clamp(max=MOST)
    return (weight * kl).sum() / weight.sum()


class Drawn(NamedTuple):
    """What one step takes: a prompt by its number, with its segments in another order."""

    number: int
    prompt: Prompt
    way: Way
    policy: RecomputePolicy
    name: str


def draw(prompts: Sequence[Prompt], guests: Sequence[Ids], rng: random.Random) -> Drawn:
    """A prompt, its segments in any order, and a way to link it, each as likely as it is
    served: in companies of two to all, alone, or among guests; seams narrow or wide."""
    number = rng.randrange(len(prompts))
    prompt = prompts[number]
    segments = rng.sample(prompt.segments, len(prompt.segments))
    prompt = dataclasses.replace(prompt, segments=tuple(segments))
    n = len(segments)
    kind = rng.choice(("alone", "guests", "three", "three", "all")) if n > 1 else "alone"
    size = {"three": 3, "all": n}.get(kind, 1)
    groups = [tuple(range(i, min(i + size, n))) for i in range(0, n, size)]
    if size > 1 and len(groups) > 1 and len(groups[-1]) == 1:
        groups[-2:] = [groups[-2] + groups[-1]]
    width = rng.choice((0, 4, 16))
    seam = Seam(width, 0 if width == 16 else width)
    graded = rng.random() < 0.3
    way = Way(tuple(groups), tuple(guests) if kind == "guests" else ())
    policy = Graded(seam, rng.choice((0.15, 0.25))) if graded else seam
    name = f"{kind}, {'graded' if graded else f'seam {width}'}"
    return Drawn(number, prompt, way, policy, name)


class Learning:
    """A run: its adapter, its optimiser, and how far it is.

    Args:
        folder: where checkpoint, curve and adapter are kept; what is there goes on.
        base: the model's name or path, for the adapter's file.
        guests: texts to put in front of segments, not of the data.

    Raises:
        AdaptError: the folder is of a run with other settings, or over other data.
    """

    def __init__(
        self,
        model: Any,
        adapter: Adapter,
        prompts: Sequence[Prompt],
        settings: Settings,
        folder: pathlib.Path,
        *,
        base: str,
        guests: Sequence[Ids] = (),
    ):
        self.model, self.adapter, self.prompts = model, adapter, prompts
        self.settings, self.folder, self.base, self.guests = settings, folder, base, guests
        self.step = 0
        # To each prompt's questions, its segments as they stand in the data.
        self._answers: dict[int, tuple[Ids, ...]] = {}
        self._optimizer = torch.optim.AdamW(adapter.parameters, lr=settings.rate, weight_decay=0.0)
        self._known = {
            **dataclasses.asdict(settings),
            **dataclasses.asdict(adapter.shape),
            "data": hashlib.blake2b(repr(list(prompts)).encode(), digest_size=8).hexdigest(),
        }
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / STATE).exists():
            self._resume()

    def _resume(self) -> None:
        state = torch.load(self.folder / STATE, weights_only=True)
        if state["settings"] != json.dumps(self._known):
            raise AdaptError(f"{self.folder} is of a run with other settings: {state['settings']}")
        for factor, kept in zip(self.adapter.parameters, state["factors"], strict=True):
            factor.data.copy_(kept)
        self._optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        curve = self.folder / CURVE
        lines = curve.read_text(encoding="utf-8").splitlines(keepends=True)[: self.step]
        curve.write_text("".join(lines), encoding="utf-8")

    def keep(self) -> None:
        """Write checkpoint and adapter."""
        new = self.folder / f"{STATE}.new"
        torch.save(
            {
                "settings": json.dumps(self._known),
                "factors": [factor.detach() for factor in self.adapter.parameters],
                "optimizer": self._optimizer.state_dict(),
                "step": self.step,
            },
            new,
        )
        new.replace(self.folder / STATE)
        self.adapter.save(self.folder, self.base)

    def advance(self) -> dict[str, Any]:
        """The next step; what it was, for the curve."""
        rng = random.Random(f"{self.settings.seed} {self.step}")
        return self.learn(draw(self.prompts, self.guests, rng))

    def learn(self, drawn: Drawn) -> dict[str, Any]:
        """A step of one's own choice."""
        begun = time.monotonic()
        if drawn.number not in self._answers:
            answers = answers_of(self.model, self.prompts[drawn.number], self.settings.answer)
            self._answers[drawn.number] = answers
        reference = refer(self.model, drawn.prompt, self._answers[drawn.number])
        with self.adapter.on(self.model):
            kl = divergence(
                reference, linked(self.model, drawn.prompt, drawn.way, drawn.policy, reference)
            )
            loss = loss_of(kl)
            self._optimizer.zero_grad()
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.adapter.parameters, CLIP)
        for group in self._optimizer.param_groups:
            group["lr"] = self.settings.rate_at(self.step)
        self._optimizer.step()
        self.step += 1
        row = {
            "step": self.step,
            "way": drawn.name,
            "loss": round(float(loss.detach()), 6),
            "kl": round(float(kl.detach()[reference.answered].mean()), 6),
            "seconds": round(time.monotonic() - begun, 2),
        }
        with (self.folder / CURVE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        return row

    def run(self, minutes: float) -> None:
        """Learn until all steps are done or the time is up, and keep what there is."""
        until = time.monotonic() + 60 * minutes
        while self.step < self.settings.steps and time.monotonic() < until:
            row = self.advance()
            if self.step % self.settings.every == 0:
                self.keep()
                print(json.dumps(row), flush=True)
        self.keep()
