"""What an adapter for linked requests brings, and what it learns from.

    python -m eval.adapter --write FILE
    python -m eval.adapter --adapter DIR [--questions N] [--kept FILE] [--json FILE]

The first makes the prompts for ``python -m sglang_pic.adapt``: of the questions of MuSiQue
behind the 50th and of the project's own passages. The second asks the first questions of
MuSiQue, none of whose passages are among those: linked with and without the adapter,
compiled alone, among guests, in companies of three and all in one, against full recompute
of the frozen model along its greedy answer of 32 tokens. Nothing is served: the forward is
``sglang_pic.adapt.linked``'s, in bfloat16; the control, of segments that are computed
whole, shows its rounding.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import pathlib
import random
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoTokenizer

from sglang_pic.adapt.__main__ import DTYPES, load_model
from sglang_pic.adapt.data import Prompt, prompt_of
from sglang_pic.adapt.learning import answers_of, divergence, refer
from sglang_pic.adapt.linked import Way, begin, compile_segments, cores_of
from sglang_pic.adapt.lora import Adapter
from sglang_pic.eval.command import Outcome, deliver, parser_of
from sglang_pic.eval.intervals import interval, ratio_interval
from sglang_pic.eval.kept import Kept
from sglang_pic.eval.models.smollm2 import ensure_model
from sglang_pic.eval.multihop import MUSIQUE, Example, own_examples, read_musique
from sglang_pic.eval.passages import CLOSING, GAP, JOIN, OPENING, Passage
from sglang_pic.eval.results import versions
from sglang_pic.eval.tables import Table
from sglang_pic.link.policy import Full, Graded, RecomputePolicy, Seam
from sglang_pic.server.guests import Shipped

WORDS, ANSWER_TOKENS = 64, 32
HELD_OUT, QUESTIONS, QUICK_QUESTIONS = 50, 40, 2
LINES = 100
ABOUT = 'What else do the documents say where they say "{}"?'
POLICIES: dict[str, RecomputePolicy] = {
    "seam 0": Seam(0, 0),
    "seam 16": Seam(16, 16),
    "graded 25%": Graded(Seam(4, 0), 0.25),
}
CONTROL = "control"
WAYS = ("alone", "guests", "groups of 3", "all")
TODAY = "alone, seam 16"
PLAIN, ADAPTED = "without", "with"


def line_of(documents: Sequence[Passage], questions: Sequence[str]) -> dict[str, Any]:
    """A prompt as ``sglang_pic.adapt`` reads it, laid out as the evaluations' are."""
    return {
        "opening": OPENING,
        "segments": [one.document for one in documents],
        "gap": GAP + JOIN,
        "question": [f"Question: {one}{CLOSING}" for one in questions],
    }


def lines_to_learn(examples: Sequence[Example], count: int, seed: int) -> list[dict[str, Any]]:
    """Prompts of 4 to 8 passages. Four fifths are of MuSiQue: an example's question over
    passages of its own, and what the documents say of words of two of them; the others the
    project's, with what is asked of three of them."""
    rng = random.Random(seed)
    banned = {one.text for example in examples[:HELD_OUT] for one in example.documents}
    pools = []
    for example in examples[HELD_OUT:]:
        left = {one.text: one for one in example.documents if one.text not in banned}
        if len(left) >= 4:
            pools.append((example.question, list(left.values())))
    own = list({one.documents[0].title: one.documents[0] for one in own_examples()}.values())
    lines = []
    for i in range(count):
        if i % 5:
            question, pool = rng.choice(pools)
            documents = rng.sample(pool, rng.randint(4, min(8, len(pool))))
            questions = [question]
            for one in documents[:2]:
                words = one.text.split()
                at = rng.randrange(max(1, len(words) - 6))
                questions.append(ABOUT.format(" ".join(words[at : at + 6])))
        else:
            documents = rng.sample(own, rng.randint(4, 8))
            questions = [rng.choice(one.questions).text for one in documents[:3]]
        lines.append(line_of(rng.sample(documents, len(documents)), questions))
    return lines


def way_of(name: str, prompt: Prompt, shipped: Shipped, rng: random.Random) -> Way:
    """Companies are drawn; guests are of the kind that most of the segments are like."""
    n = len(prompt.segments)
    order = rng.sample(range(n), n)
    size = {"groups of 3": 3, "all": n}.get(name, 1)
    groups = [tuple(order[i : i + size]) for i in range(0, n, size)]
    if size > 1 and len(groups) > 1 and len(groups[-1]) == 1:
        groups[-2:] = [groups[-2] + groups[-1]]
    guests: tuple[Any, ...] = ()
    if name == "guests":
        kinds = [shipped.of(b"", segment).texts for segment in prompt.segments]
        guests = max(set(kinds), key=kinds.count)
    return Way(tuple(groups), guests)


@torch.no_grad()
def score(model: Any, adapter: Adapter, prompt: Prompt, shipped: Shipped, seed: int) -> dict[str, Any]:
    """KL and top-1 by ``with`` or ``without``, way and policy, and the share computed."""
    reference = refer(model, prompt, answers_of(model, prompt, ANSWER_TOKENS))
    total = sum(map(len, prompt.segments))
    scores: dict[str, Any] = {}

    def judge(label: str, way: Way, policy: RecomputePolicy, kept: Any) -> None:
        cores = cores_of(prompt, policy, way.company)
        walk = begin(model, prompt, kept, cores)
        found = walk.compute(reference.rows, torch.arange(len(reference.answered))).log_softmax(-1)
        at = reference.answered
        same = (found.argmax(-1) == reference.logprobs.argmax(-1))[at].float().mean()
        share = 1 - sum(b - a for a, b in cores) / total
        scores[label] = float(divergence(reference, found)[at].mean()), float(same), share

    alone = Way(tuple((i,) for i in range(len(prompt.segments))))
    judge(CONTROL, alone, Full(), [])
    for name in WAYS:
        way = way_of(name, prompt, shipped, random.Random(seed))
        for which, on in ((PLAIN, contextlib.nullcontext()), (ADAPTED, adapter.on(model))):
            with on:
                kept = compile_segments(model, prompt, way)
                for policy in POLICIES:
                    judge(f"{which}: {name}, {policy}", way, POLICIES[policy], kept)
    return scores


def run(
    model_path: str,
    folder: pathlib.Path,
    *,
    count: int,
    data: pathlib.Path = MUSIQUE,
    dtype: str = "bfloat16",
    path: pathlib.Path | None = None,
) -> Outcome:
    """Every way at every question."""
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = load_model(model_path, DTYPES[dtype])
    adapter, shipped = Adapter.load(model, folder), Shipped(tokenizer)
    curve = (folder / "curve.jsonl").read_text(encoding="utf-8").splitlines()
    config = {
        "model": pathlib.Path(model_path).name,
        "data": data.name,
        "words_a_passage": WORDS,
        "answer_tokens": ANSWER_TOKENS,
        "dtype": dtype,
        "steps": len(curve),
        "adapter": dataclasses.asdict(adapter.shape),
    }
    kept = Kept(path, config)
    rng = random.Random(0)
    found = []
    for i, example in enumerate(tqdm(read_musique(data, WORDS)[:count], unit="question")):
        documents = rng.sample(example.documents, len(example.documents))
        line = line_of(list({one.document: one for one in documents}.values()), [example.question])
        row = kept.get(i)
        if row is None:
            row = score(model, adapter, prompt_of(line, tokenizer), shipped, i)
            kept.put(i, row)
        found.append(row)
    rows = [row_of(label, found) for label in found[0]]
    return Outcome({**config, **versions(), "questions": len(found)}, rows, [table_of(rows, config)])


def row_of(label: str, found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One way over all questions, its ratio to the same without the adapter and to
    today's default in pairs; intervals of 95 %."""
    which, _, method = label.rpartition(": ")

    def kl_of(name: str) -> list[float]:
        return [row[name][0] for row in found]

    kl = kl_of(label)
    row = {"method": method, "adapter": which == ADAPTED, "kl": statistics.fmean(kl)}
    row["kl_low"], row["kl_high"] = interval(kl)
    for name, base in (("plain", f"{PLAIN}: {method}"), ("today", f"{PLAIN}: {TODAY}")):
        if method != CONTROL:
            row[f"of_{name}"] = row["kl"] / statistics.fmean(kl_of(base))
            row[f"of_{name}_low"], row[f"of_{name}_high"] = ratio_interval(kl, kl_of(base))
    row["top1"] = statistics.fmean(one[label][1] for one in found)
    row["share"] = statistics.fmean(one[label][2] for one in found)
    row["kl_by_question"] = [round(one, 6) for one in kl]
    return row


def table_of(rows: Sequence[dict[str, Any]], config: dict[str, Any]) -> Table:
    def between(row: dict[str, Any], name: str) -> str:
        if name not in row:
            return ""
        return f"{row[name]:.2g} [{row[f'{name}_low']:.2g}, {row[f'{name}_high']:.2g}]"

    return Table(
        f"An adapter of {config['steps']} steps, {len(rows[0]['kl_by_question'])} questions",
        ("method", "adapter", "computed", "KL (nats a token)", "of without", f"of {TODAY}", "top-1, %"),
        [
            (
                row["method"],
                ADAPTED if row["adapter"] else PLAIN,
                f"{row['share']:.0%}",
                between(row, "kl"),
                between(row, "of_plain") if row["adapter"] else "",
                between(row, "of_today"),
                f"{100 * row['top1']:.1f}",
            )
            for row in rows
        ],
        "Bootstrap intervals of 95 % over questions, ratios in pairs.",
    )


def main() -> None:
    parser = parser_of(__doc__, f"{QUICK_QUESTIONS} questions")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--write", type=pathlib.Path, help="write prompts to learn from here")
    what.add_argument("--adapter", type=pathlib.Path, help="folder that sglang_pic.adapt wrote")
    parser.add_argument("--model", help="a directory; prompts are in ChatML (SmolLM2-135M)")
    parser.add_argument("--data", type=pathlib.Path, default=MUSIQUE, help="MuSiQue (%(default)s)")
    parser.add_argument("--questions", type=int, default=QUESTIONS, help="how many (%(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="(%(default)s)")
    parser.add_argument("--kept", type=pathlib.Path, help="keep each question's scores here")
    args = parser.parse_args()
    if args.write:
        lines = lines_to_learn(read_musique(args.data, WORDS), LINES, 0)
        text = "".join(json.dumps(line) + "\n" for line in lines)
        args.write.write_text(text, encoding="utf-8")
        return
    count = QUICK_QUESTIONS if args.quick else min(args.questions, HELD_OUT)
    outcome = run(
        args.model or str(ensure_model()),
        args.adapter,
        count=count,
        data=args.data,
        dtype=args.dtype,
        path=args.kept,
    )
    deliver(outcome, args)


if __name__ == "__main__":
    main()
