"""Trains an encoder and cross blocks beside a frozen decoder.

    python -m eval.encoder.train --model M --out DIR --minutes 60
    python -m eval.encoder.train --model M --out DIR --data FILE --minutes 60

Without --data: the synthetic task of eval/models/hybrid, from one document of 32
tokens upwards. The encoded answers are held to the frozen model's greedy ones (cross
entropy) and to its distribution over the same documents as text; the encoder also
restores masked tokens. DIR gets ``checkpoint.pt`` (a second call goes on from it),
``curve.jsonl`` and the weights as they are served.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from sglang_pic.encoder.config import EncoderConfig, evenly
from sglang_pic.encoder.weights import EncoderModules, save
from sglang_pic.eval.encoder import data, initial
from sglang_pic.eval.encoder.decoder import looking, seen_by, shape_of
from sglang_pic.eval.models.hybrid import task
from sglang_pic.eval.models.hybrid.train import Optimizers, kl

LOG_EVERY = 20
SAVE_SECONDS = 120
WARM_UP = 50
RISE_AT = 0.92
REPLAYS = 0.25
MASKED = 0.15
DECAY = 0.3  # last share of the time


class Rung(NamedTuple):
    """A step of the curriculum."""

    segments: int
    length: int
    questions: int
    rows: int
    categories: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.segments}x{self.length} {'+'.join(self.categories)}"


RUNGS = (
    Rung(1, 32, 4, 32, ("single",)),
    Rung(1, 32, 4, 32, ("single", "copy")),
    Rung(2, 32, 6, 24, ("single", "copy")),
    Rung(2, 32, 7, 24, ("single", "seam", "twohop", "copy")),
    Rung(4, 32, 10, 16, ("single", "seam", "twohop", "copy")),
    Rung(4, 48, 10, 16, ("single", "seam", "twohop", "copy")),
    Rung(8, 48, 16, 10, ("single", "seam", "twohop", "copy")),
)


class Training:
    """A run and all that a checkpoint must hold to go on with it."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.out = Path(options.out)
        self.out.mkdir(parents=True, exist_ok=True)
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
        self.model = model.eval().requires_grad_(False)
        self.modules = self._first_modules()
        self.optimizers = Optimizers(self.modules, options.lr, options.other_lr)
        self.step = self.rung = self.on_rung = 0
        self.seconds = 0.0
        self.running: dict[str, float] = {}
        self.checkpoint = self.out / "checkpoint.pt"
        if self.checkpoint.exists():
            self._restore()
        if options.rung is not None:
            self.rung, self.on_rung, self.running = options.rung, 0, {}

    def _first_modules(self) -> EncoderModules:
        options, config = self.options, self.model.config
        torch.manual_seed(options.seed)
        shape = shape_of(self.model)
        places = options.cross or evenly(shape.layers, options.layers)
        modules = EncoderModules(
            EncoderConfig(
                decoder=shape,
                cross_layers=tuple(places),
                intermediate_size=config.intermediate_size,
                rotary_dim=shape.head_dim,
                conv=options.conv,
            )
        )
        if options.first == "decoder":
            initial.from_decoder(modules, self.model, options.gate)
        else:
            initial.fresh(modules, options.gate)
        return modules.train()

    def run(self) -> None:
        started, before = time.monotonic(), self.seconds
        budget = self.options.minutes * 60
        saved, session = started, 0
        rng = task.generator(stream=(self.options.seed + 7) * 1_000_000 + self.step)
        while (spent := time.monotonic() - started) < budget:
            self.seconds = before + spent
            left = 1 - spent / budget
            self._train_on_one(rng, min(1.0, (session + 1) / WARM_UP, left / DECAY + 0.02))
            session += 1
            if time.monotonic() - saved > SAVE_SECONDS:
                self._save()
                saved = time.monotonic()
        self._save()

    def _train_on_one(self, rng: np.random.Generator, scale: float) -> None:
        replay = self.rung > 0 and rng.random() < REPLAYS
        rung = RUNGS[int(rng.integers(max(0, self.rung - 2), self.rung)) if replay else self.rung]
        rows = [
            data.synthetic(rng, rung.segments, rung.length, rung.questions, rung.categories)
            for _ in range(rung.rows)
        ]
        batch = data.batch_of(rows, task.PAD)
        noted = self._learn_from(batch, rng)
        nn.utils.clip_grad_norm_(self.modules.parameters(), 1.0)
        self.optimizers.step(scale)
        self.step += 1
        if not replay:
            self._note(noted)
        if self.step % LOG_EVERY == 0:
            self._log()

    def _learn_from(self, batch: data.Batch, rng: np.random.Generator) -> dict[str, float]:
        options, modules = self.options, self.modules
        lengths = [len(document) for document in batch.documents]
        ids = torch.tensor([token for document in batch.documents for token in document])
        embedded = self.model.get_input_embeddings()(ids)
        kv = modules.encoder(embedded, lengths)
        with looking(self.model, modules, kv, seen_by(lengths, batch.owned)):
            logits = self._logits(batch.encoded, batch.encoded_where)
        loss = F.cross_entropy(logits, batch.targets)
        noted = {"loss": loss.item()}
        if options.distil:
            with torch.no_grad():
                teacher = self._logits(batch.full, batch.full_where)
            away = kl(teacher, logits).mean()
            noted["kl"] = away.item()
            loss = loss + options.distil * away
        if options.masked:
            hidden = torch.from_numpy(rng.random(len(ids)) < MASKED)
            rows = modules.encoder.hidden(embedded.masked_fill(hidden[:, None], 0), lengths)[1]
            guess = rows[hidden] @ self.model.get_input_embeddings().weight.T
            restored = F.cross_entropy(guess, ids[hidden])
            noted["masked"] = restored.item()
            loss = loss + options.masked * restored
        loss.backward()
        found = data.exact(batch, logits.argmax(-1))
        return noted | {name: right / asked for name, (right, asked) in found.items()}

    def _logits(self, ids: Tensor, where: Tensor) -> Tensor:
        hidden = self.model.get_decoder()(ids, use_cache=False).last_hidden_state
        return self.model.lm_head(hidden[where])

    def _note(self, noted: dict[str, float]) -> None:
        self.on_rung += 1
        weight = max(0.05, 1 / self.on_rung)
        for name, value in noted.items():
            before = self.running.get(name, value)
            self.running[name] = before + weight * (value - before)
        found = [self.running[name] for name in RUNGS[self.rung].categories if name in self.running]
        learnt = sum(found) / len(found) > RISE_AT and self.on_rung >= 40
        if learnt and self.rung < self.options.highest:
            self.rung, self.on_rung, self.running = self.rung + 1, 0, {}

    def _log(self) -> None:
        gates = [round(b.attention_gate.tanh().item(), 3) for b in self.modules.cross]
        line = {
            "step": self.step,
            "minutes": round(self.seconds / 60, 2),
            "rung": str(RUNGS[self.rung]),
            **{name: round(value, 4) for name, value in self.running.items()},
            "gates": gates,
        }
        with (self.out / "curve.jsonl").open("a") as log:
            log.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)

    def _save(self) -> None:
        state = {
            "modules": self.modules.state_dict(),
            "optimizers": self.optimizers.state_dict(),
            **{name: getattr(self, name) for name in self._counted},
        }
        partial = self.checkpoint.with_suffix(".partial")
        torch.save(state, partial)
        partial.rename(self.checkpoint)
        save(self.modules, self.out)

    _counted = ("step", "seconds", "rung", "on_rung", "running")

    def _restore(self) -> None:
        state: dict[str, Any] = torch.load(self.checkpoint, weights_only=True)
        self.modules.load_state_dict(state["modules"])
        self.optimizers.load_state_dict(state["optimizers"])
        for name in self._counted:
            setattr(self, name, state[name])


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="directory of the frozen decoder")
    parser.add_argument("--out", required=True, help="directory of checkpoint and curve")
    parser.add_argument("--minutes", type=float, default=60, help="to train in this call")
    parser.add_argument("--layers", type=int, default=2, help="of the encoder")
    parser.add_argument("--cross", type=int, nargs="+", help="decoder layers, not the even ones")
    parser.add_argument("--conv", type=int, default=7, help="width, 0 for none (%(default)s)")
    parser.add_argument("--first", choices=("fresh", "decoder"), default="fresh")
    parser.add_argument("--gate", type=float, default=0.5, help="at first (%(default)s)")
    parser.add_argument("--distil", type=float, default=1.0, help="weight (%(default)s)")
    parser.add_argument("--masked", type=float, default=0.1, help="weight (%(default)s)")
    parser.add_argument("--rung", type=int, help=f"to begin at, 0 to {len(RUNGS) - 1}")
    parser.add_argument("--highest", type=int, default=len(RUNGS) - 1, help="rung to stop at")
    parser.add_argument("--lr", type=float, default=0.015, help="of Muon")
    parser.add_argument("--other-lr", type=float, default=3e-3, help="of AdamW")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    Training(options).run()


if __name__ == "__main__":
    main()
