"""The shipped hybrid: documents that state facts, questions, answers side by side.

    python -m eval.hybrid_demo [--json FILE]

Each prompt puts the same documents in another order, so that a prefix cache
finds nothing behind the opening. The hybrid is asked on plain SGLang, linked,
and linked in two ways that leave a part out: ``last`` forgets at each document
what stood before, ``naive`` computes no seam. The facts asked for are stated
once, so that they do not depend on the order of the documents.
"""

from __future__ import annotations

import argparse
import contextlib
import pathlib
import random
import tempfile
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from sglang_pic.eval.models.hybrid import task
from sglang_pic.eval.models.hybrid.weights import hybrid_path
from sglang_pic.eval.results import write_json
from sglang_pic.eval.serving import Server, serve

SEGMENTS, LENGTH = 8, 48
CATEGORIES = ("single", "copy", "twohop")
QUESTIONS = 6
SEAM = 4
POOL_TOKENS = 12000
WAYS: dict[str, dict[str, Any]] = {
    "linked": {},
    "last": {"state": "last"},
    "naive": {"policy": "none"},
}


def say(line: str) -> None:
    print(f"hybrid demo: {line}", flush=True)


def make_prompts() -> list[tuple[list[str], task.Question]]:
    """Texts of the documents in some order, and the question behind them."""
    rng = task.generator(held_out=True, stream=7)
    example = task.example(rng, SEGMENTS, LENGTH, QUESTIONS, categories=CATEGORIES)
    shuffle = random.Random(0)
    documents = [task.decode(segment) + " " for segment in example.segments]
    return [(shuffle.sample(documents, len(documents)), question) for question in example.questions]


def ask(
    server: Server, documents: Sequence[str], question: task.Question, pic: dict[str, Any] | None
) -> tuple[str, dict[str, Any]]:
    """Answer and report of one prompt; ``pic`` is ``None`` on plain SGLang."""
    opening, asked = task.decode(task.PREFIX) + " ", task.decode(question.prompt)
    sampling = {"max_new_tokens": len(question.answer), "temperature": 0}
    body: dict[str, Any] = {"sampling_params": sampling}
    if pic is None:
        body["text"] = "".join([opening, *documents, asked])
    else:
        marked = [{"segment": text} for text in documents]
        body["pic"] = {"parts": [opening, *marked, asked], "seam": SEAM, **pic}
    answer = server.generate(**body)
    meta = answer["meta_info"]
    reused = meta["cached_tokens"]
    return answer["text"].strip(), {
        "tokens_reused": reused,
        "tokens_computed": meta["prompt_tokens"] - reused,
    }


def run(ours: Server, stock: Server) -> list[dict[str, Any]]:
    """Ask everything in every way; returns flat rows, one a question and way."""
    rows = []
    for documents, question in make_prompts():
        right = task.decode(question.answer)
        for way in ("stock", *WAYS):
            server = stock if way == "stock" else ours
            text, counts = ask(server, documents, question, WAYS.get(way))
            rows.append(
                {
                    "question": task.decode(question.prompt),
                    "category": question.category,
                    "right": right,
                    "method": way,
                    "answer": text,
                    "is_right": text == right,
                    **counts,
                }
            )
    return rows


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print one line a question, then the tokens computed."""
    ways = ("stock", *WAYS)
    table = Table(title=f"hybrid: {SEGMENTS} documents of {LENGTH} tokens, shuffled")
    for name in ("question", "right", "plain SGLang", *WAYS):
        table.add_column(name)
    for start in range(0, len(rows), len(ways)):
        found = rows[start : start + len(ways)]
        table.add_row(
            found[0]["question"],
            found[0]["right"],
            *(row["answer"] if row["is_right"] else f"[red]{row['answer']}[/red]" for row in found),
        )
    Console(width=130).print(table)
    for way in ways:
        own = [row for row in rows if row["method"] == way][1:]  # the first one compiles
        computed = sum(row["tokens_computed"] for row in own) / len(own)
        total = computed + sum(row["tokens_reused"] for row in own) / len(own)
        say(f"{way}: {computed:.0f} of {total:.0f} tokens computed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=pathlib.Path, help="write the rows here")
    args = parser.parse_args()
    common = (f"--max-total-tokens={POOL_TOKENS}", "--disable-overlap-schedule")
    model = hybrid_path()
    with contextlib.ExitStack() as stack:
        logs = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        say("starting our server and plain SGLang with the shipped hybrid")
        ours = stack.enter_context(serve(model, logs / "ours.log", *common, "--pic-cold=link"))
        module = "sglang.launch_server"
        stock = stack.enter_context(serve(model, logs / "stock.log", *common, module=module))
        say(f"up after {ours.start_s:.0f} s and {stock.start_s:.0f} s; asking")
        say(f"plain SGLang has our {', '.join(stock.parts)}; ours {', '.join(ours.parts)}")
        rows = run(ours, stock)
    show(rows)
    if args.json:
        config = {
            "segments": SEGMENTS,
            "segment_tokens": LENGTH,
            "seam": SEAM,
            "dtype": "float32",
            "parts_of_ours": {"ours": ours.parts, "stock": stock.parts},
        }
        write_json(args.json, config, rows)


if __name__ == "__main__":
    main()
