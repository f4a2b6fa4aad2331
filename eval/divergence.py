"""How far a linked answer is from a full recompute, with and without a compile context.

    python -m eval.divergence [--quick] [--json FILE] [--plot FILE]

Each question is asked over four passages in random order. The reference is
the same prompt computed in full (``require_exact``), continued greedily. Each
method is then made to follow the reference's first eight tokens: after every
one of them its next-token distribution is compared with the reference's.

    full    full recompute again, made to follow in the same way: the noise
    naive   everything of a segment reused, policy ``none``
    seam    the first 4, 16 or 32 tokens of each segment computed anew

``kl`` is KL(reference || linked) in nats a token, over the reference's 64
likeliest tokens and all others taken together as one class. Lumping the
others makes it a lower bound of the divergence over the whole vocabulary. The
linked log-probabilities of just these 64 tokens are asked for by id, so none
of them has to be guessed from a list that it is missing from.

``top1`` is the share of steps at which both would pick the same token,
``answer_right`` the share of questions whose own greedy answer, of 24 tokens,
holds an accepted one. ``tokens_reused`` and ``tokens_computed`` are means of
one prompt, its segments compiled already; those of ``full`` nothing cached.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import pathlib
import random
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from sglang_pic.eval.models.smollm2 import ensure_model
from sglang_pic.eval.passages import OPENING, Passage, Question, load_passages, prompt_pieces
from sglang_pic.eval.results import write_json
from sglang_pic.eval.serving import Server, serve
from sglang_pic.link.divergence import kl_with_remainder

DOCUMENTS = 4
STEPS = 8
TOP = 64
ANSWER_TOKENS = 24
QUICK_QUESTIONS = 12
SEAMS = (4, 16, 32)
POOL_TOKENS = 24000


@dataclasses.dataclass(frozen=True, eq=False)
class Method:
    """One way to answer: its name, its seam, and what it adds to ``pic``."""

    name: str
    seam: int
    pic: dict[str, Any]


FULL = Method("full", 0, {"require_exact": True})
METHODS = (
    Method("naive", 0, {"policy": "none"}),
    *(Method("seam", width, {"policy": "seam", "seam": width}) for width in SEAMS),
)


@dataclasses.dataclass(frozen=True)
class Prompt:
    """Token ids and the segments' token ranges, tokenised piece by piece."""

    ids: list[int]
    segments: list[dict[str, int]]


@dataclasses.dataclass(frozen=True)
class Step:
    """The reference's likeliest next tokens and their log-probabilities, [TOP]."""

    tokens: list[int]
    logprobs: list[float]


@dataclasses.dataclass(frozen=True)
class Reference:
    """What full recompute says: ``chosen[t]`` is what it picked from ``steps[t]``."""

    chosen: list[int]
    steps: list[Step]


@dataclasses.dataclass(frozen=True)
class Followed:
    """One method at one question: means over the steps, its own answer and report."""

    kl: float
    top1: float
    answer: str
    report: dict[str, Any]


def tokenize(tokenizer: Any, pieces: Sequence[tuple[str, bool]]) -> Prompt:
    """Token ids of a prompt given in pieces, each tokenised alone."""
    ids: list[int] = []
    segments = []
    for text, is_segment in pieces:
        start = len(ids)
        ids += tokenizer(text, add_special_tokens=False)["input_ids"]
        if is_segment:
            segments.append({"start": start, "end": len(ids)})
    return Prompt(ids, segments)


def make_tasks(
    passages: Sequence[Passage], count: int | None, rng: random.Random
) -> Iterator[tuple[list[Passage], Question]]:
    """Questions with the passages each is asked over; first one of every passage."""
    most = max(len(passage.questions) for passage in passages)
    asked = [
        (passage, passage.questions[i])
        for i in range(most)
        for passage in passages
        if i < len(passage.questions)
    ]
    for passage, question in asked[:count]:
        others = [other for other in passages if other is not passage]
        documents = [passage, *rng.sample(others, DOCUMENTS - 1)]
        rng.shuffle(documents)
        yield documents, question


def _body(prompts: Sequence[Prompt], methods: Sequence[Method], new: Sequence[int]) -> Any:
    """A batch: one prompt, method and number of new tokens each."""
    return {
        "input_ids": [prompt.ids for prompt in prompts],
        "pic": [
            {"segments": prompt.segments, **method.pic}
            for prompt, method in zip(prompts, methods, strict=True)
        ],
        # A full recompute leaves an ordinary prefix behind, which no link shall find.
        "cache_salt": ["full" if method is FULL else "linked" for method in methods],
        "sampling_params": [{"max_new_tokens": n, "temperature": 0} for n in new],
        "return_logprob": True,
    }


def ask_reference(server: Server, prompt: Prompt) -> Reference:
    """Answer by full recompute and keep the distributions of its first steps."""
    (answer,) = server.generate(**_body([prompt], [FULL], [ANSWER_TOKENS]), top_logprobs_num=[TOP])
    meta = answer["meta_info"]
    steps = [
        Step([token for _, token, _ in top], [logprob for logprob, _, _ in top])
        for top in meta["output_top_logprobs"][:STEPS]
    ]
    chosen = [token for _, token, _ in meta["output_token_logprobs"][: len(steps)]]
    return Reference(chosen, steps)


def follow(
    server: Server, prompt: Prompt, methods: Sequence[Method], reference: Reference
) -> list[Followed]:
    """Make each method follow the reference, all methods in one batch.

    As long as a method picks the reference's token by itself, its own answer
    follows. Where it picks another, it is asked again behind that token.
    """
    wanted = sorted({token for step in reference.steps for token in step.tokens})
    count = len(reference.steps)
    first: dict[Method, Any] = {}
    kl: dict[Method, list[float]] = {method: [] for method in methods}
    same: dict[Method, list[bool]] = {method: [] for method in methods}
    while behind := [method for method in methods if len(kl[method]) < count]:
        done = [len(kl[method]) for method in behind]
        outputs = server.generate(
            **_body(
                [Prompt(prompt.ids + reference.chosen[:t], prompt.segments) for t in done],
                behind,
                [count - t if t else ANSWER_TOKENS for t in done],
            ),
            token_ids_logprob=[wanted] * len(behind),
        )
        for method, t, output in zip(behind, done, outputs, strict=True):
            first.setdefault(method, output)
            meta = output["meta_info"]
            picked = [token for _, token, _ in meta["output_token_logprobs"]]
            for token, found in zip(picked, meta["output_token_ids_logprobs"], strict=True):
                step, chosen = reference.steps[t], reference.chosen[t]
                listed = {token: logprob for logprob, token, _ in found}
                q = [listed[token] for token in step.tokens]
                kl[method].append(kl_with_remainder(step.logprobs, q))
                same[method].append(token == chosen)
                t += 1
                if token != chosen or t == count:
                    break
    return [
        Followed(
            statistics.fmean(kl[method]),
            statistics.fmean(same[method]),
            first[method]["text"],
            first[method]["meta_info"]["pic"],
        )
        for method in methods
    ]


def run(plain: Server, context: Server, tokenizer: Any, count: int | None) -> list[dict[str, Any]]:
    """Ask ``count`` questions (all if ``None``); returns flat rows, one a method.

    Args:
        plain: compiles segments from nothing.
        context: compiles them behind ``OPENING``.
    """
    variants = [(FULL, False), *((method, c) for c in (False, True) for method in METHODS)]
    results: list[list[dict[str, Any]]] = [[] for _ in variants]
    tasks = list(make_tasks(load_passages(), count, random.Random(0)))
    for documents, question in tqdm(tasks, desc="divergence", unit="question"):
        prompt = tokenize(tokenizer, prompt_pieces(documents, question.text))
        reference = ask_reference(plain, prompt)
        followed = [
            *follow(plain, prompt, [FULL, *METHODS], reference),
            *follow(context, prompt, METHODS, reference),
        ]
        for (method, _), one, found in zip(variants, followed, results, strict=True):
            reused = 0 if method is FULL else one.report["tokens_reused"]
            found.append(
                {
                    "kl": one.kl,
                    "top1": one.top1,
                    "answer_right": question.is_answered(one.answer),
                    "tokens_reused": reused,
                    "tokens_computed": len(prompt.ids) - reused,
                }
            )
    return [
        {
            "method": method.name,
            "seam": method.seam,
            "context": has_context,
            "questions": len(found),
            **{name: statistics.fmean(one[name] for one in found) for name in found[0]},
        }
        for (method, has_context), found in zip(variants, results, strict=True)
    ]


def label(row: dict[str, Any]) -> str:
    """``seam 16``, ``naive`` or ``full``."""
    return f"seam {row['seam']}" if row["method"] == "seam" else row["method"]


def show(rows: list[dict[str, Any]]) -> None:
    """Print one line a method."""
    table = Table(title=f"linked against full recompute, {rows[0]['questions']} questions")
    table.add_column("method")
    for name in ("context", "KL (nats)", "top-1", "right", "reused", "computed"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            label(row),
            "yes" if row["context"] else "no",
            f"{row['kl']:.2g}",
            f"{row['top1']:.0%}",
            f"{row['answer_right']:.0%}",
            f"{row['tokens_reused']:.0f}",
            f"{row['tokens_computed']:.0f}",
        )
    Console().print(table)


def plot(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Bars of the divergence by method, with and without a context."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    linked = [row for row in rows if row["method"] != "full"]
    names = list(dict.fromkeys(label(row) for row in linked))
    figure, axis = plt.subplots(figsize=(6, 4))
    for has_context, offset, text in ((False, -0.2, "from nothing"), (True, 0.2, "with context")):
        found = {label(row): row["kl"] for row in linked if row["context"] is has_context}
        x = [names.index(name) + offset for name in found]
        axis.bar(x, list(found.values()), width=0.4, label=f"compiled {text}")
    axis.set(
        xticks=range(len(names)),
        xticklabels=names,
        yscale="log",
        ylabel="KL(full || linked), nats a token",
    )
    axis.grid(alpha=0.3, axis="y")
    axis.legend()
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_QUESTIONS} questions")
    parser.add_argument("--model", type=pathlib.Path, help="model directory (SmolLM2-135M)")
    parser.add_argument("--json", type=pathlib.Path, help="write the rows here")
    parser.add_argument("--plot", type=pathlib.Path, help="write a PNG here")
    args = parser.parse_args()
    model = args.model or ensure_model()

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    common = f"--max-total-tokens={POOL_TOKENS}"
    with contextlib.ExitStack() as stack:
        logs = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        print("starting two servers, without and with a compile context ...", flush=True)
        plain = stack.enter_context(serve(model, logs / "plain.log", common))
        context = stack.enter_context(
            serve(model, logs / "context.log", common, "--pic-compile-context", OPENING)
        )
        print(f"up after {plain.start_s:.0f} s and {context.start_s:.0f} s", flush=True)
        rows = run(plain, context, tokenizer, QUICK_QUESTIONS if args.quick else None)
    show(rows)
    if args.json:
        config = {
            "model": str(model),
            "dtype": "float32",
            "documents": DOCUMENTS,
            "steps": STEPS,
            "classes": TOP + 1,
            "answer_tokens": ANSWER_TOKENS,
            "compile_context": OPENING,
            "start_s": {"plain": plain.start_s, "context": context.start_s},
        }
        write_json(args.json, config, rows)
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
