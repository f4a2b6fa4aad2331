"""Exact match of a hybrid on held-out prompts, recomputed in full and linked.

    python -m eval.models.hybrid.evaluate DIR [--rungs 2x32 4x32] [--examples 40]

DIR holds weights or a training checkpoint. Every question is asked alone
behind its segments; a question counts when all tokens of its answer, and the
end after it, are the most likely ones. The result goes to ``evaluation.json`` in DIR.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3_5ForCausalLM

from sglang_pic.eval.models.hybrid import task
from sglang_pic.eval.models.hybrid.batches import IGNORED, Batch, Score, questions_alone
from sglang_pic.eval.models.hybrid.block import Layout, Policy, linked
from sglang_pic.eval.models.hybrid.model import Memory, ask, forward
from sglang_pic.eval.models.hybrid.train import RUNGS, kl, load_checkpoint

SEAM = 4
EXAMPLES_AT_ONCE = 8


def load(directory: Path) -> Qwen3_5ForCausalLM:
    """Weights as shipped, or the checkpoint of a training."""
    if (directory / "checkpoint.pt").exists():
        return load_checkpoint(directory)
    return Qwen3_5ForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def held_out(segments: int, length: int, examples: int) -> list[task.Example]:
    """Examples that training never saw, the same ones for everybody who asks."""
    rng = task.generator(held_out=True, stream=1000 * segments + length)
    return [task.example(rng, segments, length) for _ in range(examples)]


@torch.no_grad()
def evaluate(
    model: Qwen3_5ForCausalLM,
    segments: int,
    length: int,
    examples: int,
    seam: int = SEAM,
    policies: Sequence[Policy] = ("compose",),
) -> dict[str, Any]:
    """Exact match by category, in full and per policy, and the mean KL from full in nats."""
    scores: dict[str, Score] = {}
    divergence = dict.fromkeys(policies, 0.0)
    targets = 0
    start = task.PREFIX_LENGTH + segments * length
    layout = Layout(task.PREFIX_LENGTH, segments, length, seam, start)
    drawn = held_out(segments, length, examples)
    for first in range(0, examples, EXAMPLES_AT_ONCE):
        some = drawn[first : first + EXAMPLES_AT_ONCE]
        contexts = torch.tensor([example.context() for example in some])
        questions, owner = questions_alone(some)
        where = questions.targets != IGNORED
        nowhere = torch.zeros_like(contexts, dtype=torch.bool)
        memories: list[Memory] = []
        forward(model, contexts, nowhere, memories)
        full = ask(model, questions.ids, memories, owner, start)[where]
        targets += full.shape[0]
        _add(scores, "full", questions, full)
        for policy in policies:
            memories = []
            linked(model, contexts, layout, nowhere, policy, memories)
            answer = ask(model, questions.ids, memories, owner, start)[where]
            _add(scores, policy, questions, answer)
            divergence[policy] += kl(full, answer).sum().item()
    asked = zip(task.CATEGORIES, scores["full"].asked.tolist(), strict=True)
    return {
        "questions": {name: count for name, count in asked if count},
        "exact": {
            name: {category: round(share, 4) for category, share in score.share().items()}
            for name, score in scores.items()
        },
        "kl": {policy: round(total / targets, 5) for policy, total in divergence.items()},
    }


def _add(scores: dict[str, Score], name: str, batch: Batch, logits: Tensor) -> None:
    score = Score.of(batch, logits.argmax(-1))
    scores[name] = scores[name].plus(score) if name in scores else score


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--rungs", nargs="+", default=[str(rung) for rung in RUNGS])
    parser.add_argument("--examples", type=int, default=40)
    parser.add_argument("--seam", type=int, default=SEAM)
    parser.add_argument("--wrong", action="store_true", help="also link with A = 1 and A = 0")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = load(options.directory)
    policies: list[Policy] = ["compose", "add", "last"] if options.wrong else ["compose"]
    result: dict[str, Any] = {"seam": options.seam, "rungs": {}}
    for rung in options.rungs:
        segments, length = map(int, rung.split("x"))
        measured = evaluate(model, segments, length, options.examples, options.seam, policies)
        result["rungs"][rung] = measured
        print(rung, json.dumps(measured), flush=True)
        (options.directory / "evaluation.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
