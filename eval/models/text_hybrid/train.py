"""Trains the text hybrid on a CPU.

    python -m eval.models.text_hybrid.corpus DIR
    python -m eval.models.text_hybrid.train DIR --layers 4 --minutes 20
    python -m eval.models.text_hybrid.train DIR2 --text DIR --init DIR --minutes 35

The second call begins with the first one's layers twice over, which is cheaper than
training as many from the start. The corpus is in DIR. What is trained goes to the first
directory: ``checkpoint.pt`` (the same call goes on from it) and ``log.jsonl``, one line for
every ``LOG_EVERY`` steps. ``--minutes`` counts over all calls; rates fall to zero at its
end. A row is a stretch of text, three times in four cut into passages that stand in another
order, each behind a separator, as a prompt's segments do: what helps to foretell the next
token then stands anywhere before it.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen3_5ForCausalLM

from sglang_pic.eval.models.hybrid.model import new_model
from sglang_pic.eval.models.hybrid.train import Optimizers, save_whole
from sglang_pic.eval.models.text_hybrid.corpus import END_ID, SEPARATOR_ID
from sglang_pic.eval.models.text_hybrid.model import LAYERS, configuration, forward

STEP_TOKENS = 2048
SHORT, LONG = 512, 1024  # tokens a row, before and after ``SHORT_FOR`` of the time
SHORT_FOR = 0.2
AT_ONCE = 1024  # tokens a backward pass: larger ones leave the caches
IN_PASSAGES = 0.75
PASSAGE = (32, 160)  # tokens
LOG_EVERY, SAVE_EVERY, HELD_EVERY = 20, 60, 200
WARM_UP = 30
HELD_ROWS = 16
LESS = 0.3


class Text:
    """One part of the corpus: documents one behind the other, each with its end."""

    def __init__(self, path: Path):
        kept = np.load(path)
        self.ids = np.insert(kept["ids"].astype(np.int64), kept["starts"][1:], END_ID)

    def row(self, rng: np.random.Generator, tokens: int, shuffled: bool) -> np.ndarray:
        """A stretch of it, [tokens + 1], or its passages in another order."""
        at = int(rng.integers(len(self.ids) - tokens - 1))
        found = self.ids[at : at + tokens + 1]
        if not shuffled:
            return found
        length = int(rng.integers(*PASSAGE))
        passages = [found[i : i + length] for i in range(0, len(found), length)]
        pieces = [np.append(SEPARATOR_ID, passages[i]) for i in rng.permutation(len(passages))]
        return np.concatenate(pieces)[: tokens + 1]

    def rows(self, rng: np.random.Generator, count: int, tokens: int) -> Tensor:
        """[count, tokens + 1]."""
        drawn = [self.row(rng, tokens, rng.random() < IN_PASSAGES) for _ in range(count)]
        return torch.from_numpy(np.stack(drawn))


def loss_of(model: Qwen3_5ForCausalLM, rows: Tensor) -> Tensor:
    """Nats of every token but the first, [rows, tokens]."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = forward(model, rows[:, :-1])
    return F.cross_entropy(logits.float().transpose(1, 2), rows[:, 1:], reduction="none")


class Training:
    """A run and all that a checkpoint must hold to go on with it."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        options.out.mkdir(parents=True, exist_ok=True)
        corpus = options.text or options.out
        self.text = Text(corpus / "train.npz")
        self.held = Text(corpus / "held.npz").rows(np.random.default_rng(1), HELD_ROWS, LONG)
        self.model = new_model(options.seed, configuration(options.layers))
        self.optimizers = Optimizers(self.model, options.lr, options.other_lr)
        self.step = 0
        self.seconds = self.loss = 0.0
        self.checkpoint = options.out / "checkpoint.pt"
        if self.checkpoint.exists():
            self._restore()
        elif options.init is not None:
            self.model = twice(load_checkpoint(options.init))
            self.optimizers = Optimizers(self.model, options.lr, options.other_lr)

    def run(self) -> None:
        budget = self.options.minutes * 60
        rng = np.random.default_rng([self.options.seed, self.step])
        started, before = time.monotonic(), self.seconds
        session = 0
        while self.seconds < budget:
            left = 1 - self.seconds / budget
            scale = min(1.0, (session + 1) / WARM_UP, left / self.options.decay + 0.01)
            self._train_on_one(rng, SHORT if 1 - left < SHORT_FOR else LONG, scale)
            session += 1
            self.seconds = before + time.monotonic() - started
            if self.step % LOG_EVERY == 0:
                self._log()
            if self.step % SAVE_EVERY == 0:
                self._save()
        self._save()
        self._log(held=True)

    def _train_on_one(self, rng: np.random.Generator, tokens: int, scale: float) -> None:
        parts = STEP_TOKENS // AT_ONCE
        total = 0.0
        for _ in range(parts):
            loss = loss_of(self.model, self.text.rows(rng, AT_ONCE // tokens, tokens)).mean()
            (loss / parts).backward()
            total += loss.item() / parts
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizers.step(scale)
        self.step += 1
        self.loss += max(0.05, 1 / self.step) * (total - self.loss)

    def _log(self, held: bool = False) -> None:
        line = {
            "step": self.step,
            "minutes": round(self.seconds / 60, 2),
            "tokens": self.step * STEP_TOKENS,
            "loss": round(self.loss, 4),
        }
        if held or self.step % HELD_EVERY == 0:
            line |= self.held_out()
        with (self.options.out / "log.jsonl").open("a") as log:
            log.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)

    @torch.no_grad()
    def held_out(self) -> dict[str, float]:
        """Nats a token of held-out rows, and of their first and last eighth."""
        loss = torch.cat([loss_of(self.model, row[None]) for row in self.held])
        eighth = LONG // 8
        parts = {"held": loss, "held_first": loss[:, :eighth], "held_last": loss[:, -eighth:]}
        return {name: round(part.mean().item(), 4) for name, part in parts.items()}

    def _save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizers": self.optimizers.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "loss": self.loss,
        }
        save_whole(state, self.checkpoint)

    def _restore(self) -> None:
        state = torch.load(self.checkpoint, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizers.load_state_dict(state["optimizers"])
        for name in ("step", "seconds", "loss"):
            setattr(self, name, state[name])


def load_checkpoint(directory: Path) -> Qwen3_5ForCausalLM:
    """The model of a training directory."""
    state = torch.load(directory / "checkpoint.pt", weights_only=True)["model"]
    layers = 1 + max(int(name.split(".")[2]) for name in state if ".layers." in name)
    model = new_model(config=configuration(layers))
    model.load_state_dict(state)
    return model.eval()


@torch.no_grad()
def twice(model: Qwen3_5ForCausalLM, less: float = LESS) -> Qwen3_5ForCausalLM:
    """Its layers and, behind them, the same ones with less to say."""
    layers = len(model.model.layers)
    made = new_model(config=configuration(2 * layers))
    made.model.embed_tokens.load_state_dict(model.model.embed_tokens.state_dict())
    made.model.norm.load_state_dict(model.model.norm.state_dict())
    for i, layer in enumerate(made.model.layers):
        layer.load_state_dict(model.model.layers[i % layers].state_dict())
        for name, weight in layer.named_parameters():
            if i >= layers and any(part in name for part in ("out_proj", "o_proj", "down_proj")):
                weight.mul_(less)
    return made.train()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="directory of checkpoint and log")
    parser.add_argument("--text", type=Path, help="directory of the corpus, if another")
    parser.add_argument("--init", type=Path, help="directory of a training of half as many layers")
    parser.add_argument("--layers", type=int, default=LAYERS, help="without --init (%(default)s)")
    parser.add_argument("--minutes", type=float, default=70, help="to train, over all calls")
    parser.add_argument("--lr", type=float, default=0.015, help="of Muon")
    parser.add_argument("--other-lr", type=float, default=3e-3, help="of AdamW")
    parser.add_argument("--decay", type=float, default=0.6, help="last share of the time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    Training(options).run()


if __name__ == "__main__":
    main()
