"""Trains an encoder and cross blocks beside a frozen decoder.

    python -m eval.encoder.train --model M --out DIR --minutes 60
    python -m eval.encoder.train --model M --out DIR --data FILE --minutes 60

Without --data: the synthetic task of eval/models/hybrid, from one document of 32
tokens upwards. The encoded answers are held to the right ones (of texts: to what the
frozen model says greedily) by cross entropy, and to the frozen model's distribution over
the same documents as text (``--distil``); the encoder may also restore masked tokens
(``--masked``). DIR gets ``checkpoint.pt`` (a second call goes on from it),
``curve.jsonl`` and the weights as they are served.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from sglang_pic.encoder.config import evenly
from sglang_pic.encoder.weights import EncoderModules, save
from sglang_pic.eval.encoder import data, initial
from sglang_pic.eval.encoder.decoder import looking, seen_by
from sglang_pic.eval.encoder.sources import RUNGS, Curriculum, Source, Texts
from sglang_pic.eval.models.hybrid import task
from sglang_pic.eval.models.hybrid.train import Optimizers, kl, save_whole

SAVE_SECONDS = 120
WARM_UP = 50
MASKED = 0.15
DECAY = 0.3  # last share of the time


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
        self.source = self._source()
        self.step = self.on_stage = 0
        self.seconds = 0.0
        self.running: dict[str, float] = {}  # means of the present stage
        self.checkpoint = self.out / "checkpoint.pt"
        if self.checkpoint.exists():
            self._restore()
        elif options.start:
            state = torch.load(Path(options.start) / "checkpoint.pt", weights_only=True)
            self.modules.load_state_dict(state["modules"])
        if options.rung is not None:
            self.source.stage, self.on_stage, self.running = options.rung, 0, {}

    def _source(self) -> Source:
        options = self.options
        if options.data is None:
            return Curriculum(0, options.highest)
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        answers = self.out / "answers.jsonl"
        return Texts(
            options.data, self.model, tokenizer, answers, pool=options.pool, rows=options.rows
        )

    def _first_modules(self) -> EncoderModules:
        options, config = self.options, self.model.config
        torch.manual_seed(options.seed)
        places = options.cross or evenly(config.num_hidden_layers, options.layers)
        modules = EncoderModules(initial.sizes_beside(self.model, places, options.conv))
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
        for _ in range(self.options.accumulate):
            rows, counts = self.source.draw(rng)
            noted = self._learn_from(data.batch_of(rows, self.source.pad), rng)
            if counts:
                self._note(noted)
        nn.utils.clip_grad_norm_(self.modules.parameters(), 1.0)
        self.optimizers.step(scale)
        self.step += 1
        if self.source.advance(self.running, self.on_stage):
            self.on_stage, self.running = 0, {}
        if self.step % self.options.log_every == 0:
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
        (loss / options.accumulate).backward()
        found = data.exact(batch, logits.argmax(-1))
        return noted | {name: right / asked for name, (right, asked) in found.items()}

    def _logits(self, ids: Tensor, where: Tensor) -> Tensor:
        hidden = self.model.get_decoder()(ids, use_cache=False).last_hidden_state
        return self.model.lm_head(hidden[where])

    def _note(self, noted: dict[str, float]) -> None:
        self.on_stage += 1
        weight = max(0.05, 1 / self.on_stage)
        for name, value in noted.items():
            before = self.running.get(name, value)
            self.running[name] = before + weight * (value - before)

    def _log(self) -> None:
        gates = [round(b.attention_gate.tanh().item(), 3) for b in self.modules.cross]
        line = {
            "step": self.step,
            "minutes": round(self.seconds / 60, 2),
            "rung": self.source.label,
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
            "stage": self.source.stage,
            **{name: getattr(self, name) for name in self._counted},
        }
        save_whole(state, self.checkpoint)
        save(self.modules, self.out)

    _counted = ("step", "seconds", "on_stage", "running")

    def _restore(self) -> None:
        state: dict[str, Any] = torch.load(self.checkpoint, weights_only=True)
        self.modules.load_state_dict(state["modules"])
        self.optimizers.load_state_dict(state["optimizers"])
        self.source.stage = state["stage"]
        for name in self._counted:
            setattr(self, name, state[name])


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="directory of the frozen decoder")
    parser.add_argument("--out", required=True, help="directory of checkpoint and curve")
    parser.add_argument("--data", type=Path, help="questions over texts, as MuSiQue's")
    parser.add_argument("--pool", type=int, default=2000, help="rows made of --data (%(default)s)")
    parser.add_argument("--rows", type=int, default=4, help="of a batch of --data (%(default)s)")
    parser.add_argument("--accumulate", type=int, default=1, help="batches a step (%(default)s)")
    parser.add_argument("--start", help="directory whose checkpoint gives the first weights")
    parser.add_argument("--minutes", type=float, default=60, help="to train in this call")
    parser.add_argument("--layers", type=int, default=2, help="of the encoder")
    parser.add_argument("--cross", type=int, nargs="+", help="decoder layers, not the even ones")
    parser.add_argument("--conv", type=int, default=0, help="width, 0 for none (%(default)s)")
    parser.add_argument("--first", choices=("fresh", "decoder"), default="decoder")
    parser.add_argument("--gate", type=float, default=0.5, help="at first (%(default)s)")
    parser.add_argument("--distil", type=float, default=0.0, help="weight (%(default)s)")
    parser.add_argument("--masked", type=float, default=0.0, help="weight (%(default)s)")
    parser.add_argument("--rung", type=int, help=f"to begin at, 0 to {len(RUNGS) - 1}")
    parser.add_argument("--highest", type=int, default=len(RUNGS) - 1, help="rung to stop at")
    parser.add_argument("--lr", type=float, default=0.015, help="of Muon")
    parser.add_argument("--other-lr", type=float, default=3e-3, help="of AdamW")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--log-every", type=int, default=20, help="steps a point of the curve (%(default)s)"
    )
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    Training(options).run()


if __name__ == "__main__":
    main()
