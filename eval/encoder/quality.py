"""What encoded documents answer, beside the same documents as text and linked.

    python -m eval.encoder.quality [--model M] [--encoder DIR] [--quick] [--json FILE] [--plot FILE]

Held-out questions of the synthetic task, each alone behind its documents, on
modules of torch and transformers (no server):

    full      documents as text, all computed
    linked    documents compiled alone, the default seam (the oracle)
    encoded   documents read by the encoder, the decoder looks at them

``exact_match``: every token of the answer, and its end, is the most likely one.
``kv_bytes``: what the documents of a prompt take in float32, keys and values of the
decoder or of the encoder. ``update`` asks which of two statements is the later one: a
set of documents cannot say.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from sglang_pic.encoder.weights import EncoderModules, load
from sglang_pic.eval.command import Outcome, deliver, new_figure, parser_of
from sglang_pic.eval.encoder import data
from sglang_pic.eval.encoder.decoder import encode, looking, seen_by, shape_of
from sglang_pic.eval.models.dense.weights import dense_path
from sglang_pic.eval.models.hybrid import task
from sglang_pic.eval.oracle import dense, hybrid
from sglang_pic.eval.tables import Table

MODEL = dense_path()
ENCODER = Path(__file__).parent / "weights"
RUNGS = ("1x32", "2x32", "4x32")
EXAMPLES, QUICK_EXAMPLES = 60, 4
EACH = 10  # questions an example
SEAM = 4
ITEM = 4  # bytes of a float32


def held_out(documents: int, length: int, examples: int) -> list[data.Row]:
    """Rows that training never saw, the same ones for everybody who asks."""
    rng = task.generator(held_out=True, stream=1000 * documents + length)
    return [data.synthetic(rng, documents, length, EACH, task.CATEGORIES) for _ in range(examples)]


def _logits(model: Any, ids: Tensor, where: Tensor) -> Tensor:
    return model(ids, use_cache=False).logits[where]


def _full(model: Any, batch: data.Batch) -> Tensor:
    return _logits(model, batch.full, batch.full_where).argmax(-1)


def _encoded(model: Any, modules: EncoderModules, batch: data.Batch) -> Tensor:
    kv = encode(model, modules, batch.documents)
    lengths = [len(document) for document in batch.documents]
    with looking(model, modules, kv, seen_by(lengths, batch.owned)):
        return _logits(model, batch.encoded, batch.encoded_where).argmax(-1)


def _linked(model: Any, rows: Sequence[data.Row]) -> Tensor:
    said = []
    for row in rows:
        (asked,) = row.asked
        segments, at = [], len(row.before)
        for document in row.documents:
            segments.append((at, at + len(document)))
            at += len(document)
        prompt = [*row.before, *row.text, *asked.prompt]
        if type(model).__name__ == "Qwen3_5ForCausalLM":
            found = hybrid.linked_logprobs(
                model, prompt, segments, seam=SEAM, page=1, forced=asked.answer
            )
        else:
            count = len(asked.answer)
            found = dense.linked_logprobs(
                model, prompt, segments, seam=SEAM, page=1, n_new=count, forced=asked.answer
            ).full_logprobs
        said.append(found.argmax(-1))
    return torch.cat(said)


def decoder_bytes(model: Any) -> int:
    """A token's keys and values in the layers that keep them, in float32."""
    shape = shape_of(model)
    layers = sum(hasattr(layer, "self_attn") for layer in model.get_decoder().layers)
    return 2 * layers * shape.kv_heads * shape.head_dim * ITEM


@torch.no_grad()
def run(model: Any, modules: EncoderModules, rungs: Sequence[str], examples: int) -> Outcome:
    rows: list[dict[str, Any]] = []
    own = decoder_bytes(model)
    a_token = {"full": own, "linked": own, "encoded": modules.config.bytes_per_token(ITEM)}
    for rung in rungs:
        documents, length = map(int, rung.split("x"))
        methods: dict[str, Callable[[list[data.Row], data.Batch], Tensor]] = {
            "full": lambda some, batch: _full(model, batch),
            "linked": lambda some, batch: _linked(model, some),
            "encoded": lambda some, batch: _encoded(model, modules, batch),
        }
        asked = [one for row in held_out(documents, length, examples) for one in row.alone()]
        batch = data.batch_of(asked, task.PAD)
        for name, say in methods.items():
            for category, (right, count) in data.exact(batch, say(asked, batch)).items():
                rows.append(
                    {
                        "rung": rung,
                        "method": name,
                        "category": category,
                        "questions": count,
                        "exact_match": right / count,
                        "kv_bytes": a_token[name] * documents * length,
                    }
                )
    config = {"examples": examples, "seam": SEAM, "encoder": modules.config.to_json()}
    return Outcome(config, rows, [table_of(rows)], plot(rows))


def table_of(rows: Sequence[dict[str, Any]]) -> Table:
    lines = []
    for rung, method in dict.fromkeys((row["rung"], row["method"]) for row in rows):
        found = {r["category"]: r for r in rows if (r["rung"], r["method"]) == (rung, method)}
        kept = next(iter(found.values()))["kv_bytes"]
        shares = (
            f"{100 * found[c]['exact_match']:.1f}" if c in found else "" for c in task.CATEGORIES
        )
        asked = sum(row["questions"] for row in found.values())
        lines.append((f"{rung} {method}", str(asked), *shares, f"{kept:,}"))
    return Table(
        "Documents as text, linked and encoded: exact match in %",
        ("documents", "questions", *task.CATEGORIES, "KV bytes"),
        lines,
        "Held-out questions, each alone; KV bytes: of the prompt's documents, in float32.",
    )


def plot(rows: Sequence[dict[str, Any]]) -> Any:
    """Exact match by category, one panel for each size and one bar for each method."""
    rungs = list(dict.fromkeys(row["rung"] for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    figure, axes = new_figure(len(rungs), width=4)
    for axis, rung in zip(axes, rungs, strict=True):
        for i, method in enumerate(methods):
            found = {
                row["category"]: 100 * row["exact_match"]
                for row in rows
                if (row["rung"], row["method"]) == (rung, method)
            }
            at = [j + (i - 1) * 0.27 for j in range(len(task.CATEGORIES))]
            shares = [found.get(c, 0) for c in task.CATEGORIES]
            axis.bar(at, shares, width=0.27, label=method)
        axis.set(xticks=range(len(task.CATEGORIES)), xticklabels=task.CATEGORIES, title=rung)
    axes[0].set_ylabel("exact match, %")
    axes[0].legend(fontsize="small", loc="lower left")
    return figure


def main() -> None:
    parser = parser_of(__doc__, f"{QUICK_EXAMPLES} examples of each size")
    parser.add_argument("--model", type=Path, default=MODEL, help="the frozen decoder")
    parser.add_argument("--encoder", type=Path, default=ENCODER, help="trained beside it")
    parser.add_argument("--rungs", nargs="+", default=RUNGS, help="documents x tokens")
    parser.add_argument("--examples", type=int, default=EXAMPLES, help="of each (%(default)s)")
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    examples = QUICK_EXAMPLES if args.quick else args.examples
    deliver(run(model, load(args.encoder, shape_of(model)), args.rungs, examples), args)


if __name__ == "__main__":
    main()
