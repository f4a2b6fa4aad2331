"""Encoded documents on a server, beside the same documents as text and linked.

    python -m eval.encoder.served [--quick] [--model M] [--encoder DIR] [--json FILE]

Held-out questions of the synthetic task, several about the same documents, which stand in
another order each time; one request at a time:

    full      stock SGLang, documents as text
    linked    documents compiled alone, the default seam
    encoded   documents read by the encoder, outside the row

The first question about a set of documents makes what is reused, and is not timed.
``kv_bytes``: of keys and values in float32 while all questions of a set run at once, from
what every answer says that its row holds of its own; documents linked or encoded count once.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import AutoModelForCausalLM

from sglang_pic.encoder.weights import load
from sglang_pic.eval.bench import Bench, bench
from sglang_pic.eval.command import Outcome, deliver, parser_of
from sglang_pic.eval.encoder.data import Asked, Row
from sglang_pic.eval.encoder.decoder import shape_of
from sglang_pic.eval.encoder.quality import ENCODER, ITEM, MODEL, decoder_bytes, held_out
from sglang_pic.eval.intervals import share_interval
from sglang_pic.eval.tables import Table

# What can be asked of documents in any order.
CATEGORIES = ("single", "copy", "twohop")
RUNGS = ("2x32", "4x32")
SETS, QUICK_SETS = 12, 6
PIC: dict[str, dict[str, Any] | None] = {
    "full": None,
    "linked": {"turns": False},
    "encoded": {"mode": "encode"},
}


def body_of(
    row: Row, asked: Asked, order: Sequence[int], pic: dict[str, Any] | None, salt: str
) -> Any:
    """A question behind its documents in an order, as ``/generate`` takes it."""
    ids, segments = list(row.before), []
    for i in order:
        segments.append({"start": len(ids), "end": len(ids) + len(row.documents[i])})
        ids += row.documents[i]
    body: dict[str, Any] = {
        "input_ids": ids + asked.prompt,
        "cache_salt": salt,
        "sampling_params": {
            "max_new_tokens": len(asked.answer), "temperature": 0, "ignore_eos": True,
        },
    }  # fmt: skip
    return body if pic is None else {**body, "pic": {"segments": segments, **pic}}


def ask(pair: Bench, method: str, rows: Sequence[Row], seed: int, progress: Any) -> dict[str, Any]:
    """All questions of all sets by one method."""
    server = pair.stock if method == "full" else pair.ours
    rng, seconds, own, shared = random.Random(seed), [], [], []
    right = [0] * len(rows)
    for i, row in enumerate(rows):
        held = 0
        for j, asked in enumerate(row.asked):
            order = rng.sample(range(len(row.documents)), len(row.documents))
            body = body_of(row, asked, order, PIC[method], f"{method}-{i}")
            taken, out = server.first_token(**body)
            meta = out["meta_info"]
            out = server.generate(**body)
            right[i] += out["output_ids"] == asked.answer
            reused = 0
            if method == "linked":
                reused = sum(one["tokens_reused"] for one in meta["pic"]["segments"])
            held = max(held, reused)
            own.append(meta["prompt_tokens"] - reused)
            if j:
                seconds.append(taken)
            progress.update()
        shared.append(held if method != "encoded" else sum(map(len, row.documents)))
    counts = [len(row.asked) for row in rows]
    low, high = share_interval(right, counts)
    return {
        "questions": sum(counts),
        "exact_match": sum(right) / sum(counts),
        "exact_match_low": low,
        "exact_match_high": high,
        "ttft_s": statistics.median(seconds),
        "tokens_of_a_row": statistics.fmean(own),
        "tokens_shared": statistics.fmean(shared),
    }


def run(pair: Bench, encoder: Path, rungs: Sequence[str], sets: int, seed: int = 0) -> Outcome:
    """Every method at every size."""
    model = AutoModelForCausalLM.from_pretrained(pair.model)
    token = decoder_bytes(model)
    encoded = load(encoder, shape_of(model)).config.bytes_per_token(ITEM)
    rows: list[dict[str, Any]] = []
    for rung in rungs:
        documents, length = map(int, rung.split("x"))
        drawn = []
        for one in held_out(documents, length, sets):
            asked = [question for question in one.asked if question.category in CATEGORIES]
            if len(asked) > 1:
                drawn.append(Row(one.before, one.documents, asked))
        total = len(PIC) * sum(len(row.asked) for row in drawn)
        with tqdm(total=total, desc=rung, unit="question") as progress:
            for method in PIC:
                found = ask(pair, method, drawn, seed, progress)
                many = found["questions"] / len(drawn)
                kept = found["tokens_shared"] * (encoded if method == "encoded" else token)
                found["kv_bytes"] = round(many * found["tokens_of_a_row"] * token + kept)
                rows.append({"rung": rung, "method": method, **found})
    config = {**pair.config, "sets": sets, "seed": seed, "categories": list(CATEGORIES)}
    return Outcome(config, rows, [table_of(rows)])


def table_of(rows: Sequence[dict[str, Any]]) -> Table:
    return Table(
        "On servers: documents as text, linked and encoded",
        ("documents", "questions", "exact match, %", "first token, ms", "tokens a row", "KV bytes"),
        [
            (
                f"{row['rung']} {row['method']}",
                str(row["questions"]),
                f"{100 * row['exact_match']:.0f} [{100 * row['exact_match_low']:.0f}, "
                f"{100 * row['exact_match_high']:.0f}]",
                f"{1000 * row['ttft_s']:.0f}",
                f"{row['tokens_of_a_row']:.0f}",
                f"{row['kv_bytes']:,}",
            )
            for row in rows
        ],
        "Tokens a row: of its own, beside what is shared. KV bytes: of a set's questions at once, "
        "in float32.",
    )


def measure(
    *,
    quick: bool,
    model: Path = MODEL,
    encoder: Path = ENCODER,
    rungs: Sequence[str] = RUNGS,
    sets: int = SETS,
) -> Outcome:
    """Start both servers and run."""
    with bench(str(model), ours=(f"--pic-encoder={encoder}",)) as pair:
        return run(pair, encoder, rungs, QUICK_SETS if quick else sets)


def main() -> None:
    parser = parser_of(__doc__, f"{QUICK_SETS} sets of documents of each size")
    parser.add_argument("--model", type=Path, default=MODEL, help="the frozen decoder")
    parser.add_argument("--encoder", type=Path, default=ENCODER, help="trained beside it")
    parser.add_argument("--rungs", nargs="+", default=RUNGS, help="documents x tokens")
    parser.add_argument("--sets", type=int, default=SETS, help="of documents (%(default)s)")
    args = parser.parse_args()
    deliver(
        measure(
            quick=args.quick,
            model=args.model,
            encoder=args.encoder,
            rungs=args.rungs,
            sets=args.sets,
        ),
        args,
    )


if __name__ == "__main__":
    main()
