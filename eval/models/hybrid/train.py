"""Trains the hybrid on a CPU, from short prompts to long ones.

    python -m eval.models.hybrid.train --out DIR --minutes 60
    python -m eval.models.hybrid.train --out DIR --minutes 30 --init DIR2 --block

DIR gets ``checkpoint.pt`` (a second call with the same DIR goes on from it)
and ``log.jsonl``, one line for every 20 steps. With ``--block`` every batch is
computed twice, in full and linked from segments that were compiled alone (see
``block``); the linked answers are held to the truth and to the full ones.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sglang_pic.eval.models.hybrid import batches, task
from sglang_pic.eval.models.hybrid.batches import IGNORED, Rung, Score
from sglang_pic.eval.models.hybrid.block import Layout, linked
from sglang_pic.eval.models.hybrid.model import forward, new_model

RUNGS = (
    Rung(1, 32, 4, 24),
    Rung(2, 32, 7, 18),
    Rung(4, 32, 12, 12),
    Rung(4, 48, 14, 10),
    Rung(8, 48, 22, 6),
    Rung(8, 128, 24, 3),
)
LOG_EVERY = 20
SAVE_EVERY = 100
WARM_UP = 50
RISE_AT = 0.88  # mean exact match over the categories
REPLAYS = 0.25  # share of batches from the two rungs below
SEAMS = (4, 4, 8, 16)  # drawn evenly in block fine-tuning


def kl(full: Tensor, other: Tensor) -> Tensor:
    """KL(full || other) of each row of logits [targets, vocabulary], in nats."""
    return F.kl_div(
        other.log_softmax(-1), full.log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)


def save_whole(state: dict[str, Any], path: Path) -> None:
    """Write a checkpoint whole or not at all."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.rename(path)


class Optimizers:
    """Muon for the matrices, AdamW for all else; one schedule over both."""

    def __init__(self, model: nn.Module, lr: float, other_lr: float):
        matrices: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, weight in model.named_parameters():
            plain = weight.dim() == 2 and not any(
                part in name for part in ("embed_tokens", "in_proj_a", "in_proj_b")
            )
            (matrices if plain else others).append(weight)
        self.members: tuple[torch.optim.Optimizer, ...] = (
            torch.optim.Muon(matrices, lr=lr, weight_decay=0.01),
            torch.optim.AdamW(others, lr=other_lr, betas=(0.9, 0.98), weight_decay=0.0),
        )
        self.rates = (lr, other_lr)

    def step(self, scale: float) -> None:
        for member, rate in zip(self.members, self.rates, strict=True):
            for group in member.param_groups:
                group["lr"] = rate * scale
            member.step()
            member.zero_grad()

    def state_dict(self) -> list[dict[str, Any]]:
        return [member.state_dict() for member in self.members]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        for member, state in zip(self.members, states, strict=True):
            member.load_state_dict(state)


class Family(NamedTuple):
    """What is trained: its first weights from a seed, and logits of ids at a mask."""

    new_model: Callable[[int], Any]
    forward: Callable[[Any, Tensor, Tensor], Tensor]


HYBRID = Family(new_model, forward)


class Training:
    """A run and all that a checkpoint must hold to go on with it."""

    def __init__(self, options: argparse.Namespace, family: Family = HYBRID):
        self.options = options
        self.family = family
        self.out = Path(options.out)
        self.out.mkdir(parents=True, exist_ok=True)
        self.model = family.new_model(options.seed)
        self.optimizers = Optimizers(self.model, options.lr, options.other_lr)
        self.step = self.tokens = 0
        self.rung = self.on_rung = 0
        self.seconds = 0.0
        self.running: dict[str, float] = {}  # means of the present rung
        self.checkpoint = self.out / "checkpoint.pt"
        if self.checkpoint.exists():
            self._restore()
        elif options.init:
            state = torch.load(Path(options.init) / "checkpoint.pt", weights_only=True)
            self.model.load_state_dict(state["model"])
            self.rung = state["rung"]
        if options.rung is not None:
            self.rung, self.on_rung, self.running = options.rung, 0, {}

    def run(self) -> None:
        started, before = time.monotonic(), self.seconds
        budget = self.options.minutes * 60
        session = 0
        rng = task.generator(stream=self.options.seed * 1_000_000 + self.step)
        while (spent := time.monotonic() - started) < budget:
            self.seconds = before + spent
            left = 1 - spent / budget
            scale = min(1.0, (session + 1) / WARM_UP) * min(1.0, left / self.options.decay + 0.02)
            self._train_on_one(rng, scale)
            session += 1
            if self.step % SAVE_EVERY == 0:
                self._save()
        self._save()

    def _train_on_one(self, rng: np.random.Generator, scale: float) -> None:
        replay = self.rung > 0 and rng.random() < REPLAYS
        rung = RUNGS[int(rng.integers(max(0, self.rung - 2), self.rung)) if replay else self.rung]
        batch = batches.in_a_row(rng, rung)
        where = batch.targets != IGNORED
        truth = batch.targets[where]
        logits = self.family.forward(self.model, batch.ids, where)
        loss = F.cross_entropy(logits, truth)
        noted = {"loss": loss.item(), **Score.of(batch, logits.argmax(-1)).share()}
        if self.options.block and rung.segments > 1:
            seam = int(rng.choice(SEAMS))
            tokens = batch.ids.shape[1]
            layout = Layout(task.PREFIX_LENGTH, rung.segments, rung.length, seam, tokens)
            answer = linked(self.model, batch.ids, layout, where)
            away = kl(logits.detach(), answer).mean()
            loss = loss + F.cross_entropy(answer, truth) + away
            share = Score.of(batch, answer.argmax(-1)).share()
            noted |= {"kl": away.item(), **{f"linked {k}": x for k, x in share.items()}}
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizers.step(scale)
        self.step += 1
        self.tokens += batch.ids.numel()
        if not replay:
            self._note(rung, noted)
        if self.step % LOG_EVERY == 0:
            self._log()

    def _note(self, rung: Rung, noted: dict[str, float]) -> None:
        """Keep running means; rise to the next rung when this one is learnt."""
        self.on_rung += 1
        weight = max(0.05, 1 / self.on_rung)
        for name, value in noted.items():
            before = self.running.get(name, value)
            self.running[name] = before + weight * (value - before)
        exact = [self.running[name] for name in task.CATEGORIES if name in self.running]
        learnt = sum(exact) / len(exact) > RISE_AT and self.on_rung >= 40
        if learnt and self.rung < self.options.highest:
            self.rung, self.on_rung, self.running = self.rung + 1, 0, {}

    def _log(self) -> None:
        line = {
            "step": self.step,
            "minutes": round(self.seconds / 60, 2),
            "tokens": self.tokens,
            "rung": str(RUNGS[self.rung]),
            **{name: round(value, 4) for name, value in self.running.items()},
        }
        with (self.out / "log.jsonl").open("a") as log:
            log.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)

    def _save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizers": self.optimizers.state_dict(),
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "rung": self.rung,
            "on_rung": self.on_rung,
            "running": self.running,
        }
        save_whole(state, self.checkpoint)

    def _restore(self) -> None:
        state = torch.load(self.checkpoint, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizers.load_state_dict(state["optimizers"])
        for name in ("step", "tokens", "seconds", "rung", "on_rung", "running"):
            setattr(self, name, state[name])


def load_checkpoint(directory: Path, family: Family = HYBRID) -> Any:
    """The model of a training directory."""
    model = family.new_model(0)
    state = torch.load(directory / "checkpoint.pt", weights_only=True)
    model.load_state_dict(state["model"])
    return model.eval()


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, help="directory of checkpoint and log")
    parser.add_argument("--minutes", type=float, default=60, help="to train in this call")
    parser.add_argument("--init", help="directory whose checkpoint gives the first weights")
    parser.add_argument("--block", action="store_true", help="fine-tune for linking")
    parser.add_argument("--rung", type=int, help=f"rung to begin at, 0 to {len(RUNGS) - 1}")
    parser.add_argument("--highest", type=int, default=len(RUNGS) - 1, help="rung to stop at")
    parser.add_argument("--lr", type=float, default=0.015, help="of Muon")
    parser.add_argument("--other-lr", type=float, default=3e-3, help="of AdamW")
    parser.add_argument("--decay", type=float, default=0.3, help="last share of the time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    Training(options).run()


if __name__ == "__main__":
    main()
