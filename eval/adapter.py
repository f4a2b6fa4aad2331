"""What an adapter for linked requests brings, and what it learns from.

    python -m eval.adapter --write FILE
    python -m eval.adapter [--adapter DIR] [--questions N] [--kept DIR] [--json FILE]

The first makes the prompts for ``python -m sglang_pic.adapt``: of the questions of MuSiQue
behind the 50th and of the project's own passages. The second asks the first questions of
MuSiQue, none of whose passages are among those: linked without an adapter and with one,
compiled alone, among guests, in companies of three and all in one, against full recompute
of the frozen model along its greedy answer. Nothing is served: the forward is
``sglang_pic.adapt.linked``'s; the control, of segments computed where they stand, shows its
rounding. It takes minutes a question on two cores: ``--kept`` holds what is done.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import random
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoTokenizer

from sglang_pic.adapt.__main__ import DTYPES, load_model
from sglang_pic.adapt.data import Ids, Prompt, prompt_of
from sglang_pic.adapt.learning import CURVE, answers_of, divergence, refer
from sglang_pic.adapt.linked import (
    Layers,
    Way,
    begin,
    compile_segments,
    cores_of,
    local,
    prefill,
)
from sglang_pic.adapt.lora import Adapter
from sglang_pic.eval.command import Outcome, deliver, parser_of
from sglang_pic.eval.intervals import interval, ratio_interval
from sglang_pic.eval.kept import Kept
from sglang_pic.eval.models.smollm2 import ensure_model
from sglang_pic.eval.multihop import MUSIQUE, Example, own_examples, read_musique
from sglang_pic.eval.passages import CLOSING, GAP, JOIN, OPENING, Passage
from sglang_pic.eval.results import versions
from sglang_pic.eval.tables import Table
from sglang_pic.link.policy import Graded, RecomputePolicy, Seam
from sglang_pic.server.guests import Shipped

WORDS, ANSWER_TOKENS = 64, 32
HELD_OUT, QUESTIONS, QUICK_QUESTIONS = 50, 40, 2
LINES = 60
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
ALONE = Way(())


def line_of(documents: Sequence[Passage], questions: Sequence[str]) -> dict[str, Any]:
    """A prompt as ``sglang_pic.adapt`` reads it, laid out as the evaluations' are."""
    return {
        "opening": OPENING,
        "segments": [one.document for one in documents],
        "gap": GAP + JOIN,
        "question": [f"Question: {one}{CLOSING}" for one in questions],
    }


def lines_to_learn(examples: Sequence[Example], count: int, seed: int) -> list[dict[str, Any]]:
    """Prompts of three passages. Four fifths are of MuSiQue: an example's question over
    passages of its own, and what the documents say of words of two of them; the others
    the project's, with what is asked of them."""
    rng = random.Random(seed)
    banned = {one.text for example in examples[:HELD_OUT] for one in example.documents}
    pools = []
    for example in examples[HELD_OUT:]:
        left = {one.text: one for one in example.documents if one.text not in banned}
        if len(left) >= 3:
            pools.append((example.question, list(left.values())))
    own = list({one.documents[0].title: one.documents[0] for one in own_examples()}.values())
    lines = []
    for i in range(count):
        if i % 5:
            question, pool = rng.choice(pools)
            documents = rng.sample(pool, 3)
            questions = [question]
            for one in documents[:2]:
                words = one.text.split()
                at = rng.randrange(max(1, len(words) - 6))
                questions.append(ABOUT.format(" ".join(words[at : at + 6])))
        else:
            documents = rng.sample(own, 3)
            questions = [rng.choice(one.questions).text for one in documents]
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


def in_place(model: Any, prompt: Prompt) -> list[Layers]:
    """What is kept of each segment if it is computed where it stands."""
    ids = list(prompt.opening)
    for segment in prompt.segments:
        ids += [*segment, *prompt.gap]
    layers = prefill(model, ids, range(len(ids)))
    spans = zip(prompt.starts, prompt.segments, strict=True)
    return [local(model, layers, start, start + len(one), start) for start, one in spans]


@torch.no_grad()
def score(
    model: Any,
    adapter: Adapter | None,
    prompt: Prompt,
    answers: Sequence[Ids],
    ways: Sequence[str],
    shipped: Shipped,
    seed: int,
) -> dict[str, tuple[float, float, float]]:
    """KL, top-1 and the share computed, by method; without an adapter of the control too."""
    reference = refer(model, prompt, answers)
    every, at = torch.arange(len(reference.answered)), reference.answered
    total = sum(map(len, prompt.segments))

    def judge(way: Way, policy: RecomputePolicy, kept: Sequence[Layers]) -> Any:
        cores = cores_of(prompt, policy, way.company)
        walk = begin(model, prompt, kept, cores)
        found = walk.compute(reference.rows, every).log_softmax(-1)
        kl = float(divergence(reference, found)[at].mean())
        same = (found.argmax(-1) == reference.logprobs.argmax(-1))[at].float().mean()
        return kl, float(same), 1 - sum(b - a for a, b in cores) / total

    scores = {}
    with adapter.on(model) if adapter else contextlib.nullcontext():
        for name in ways:
            way = way_of(name, prompt, shipped, random.Random(seed))
            kept = compile_segments(model, prompt, way)
            for policy in POLICIES:
                scores[f"{name}, {policy}"] = judge(way, POLICIES[policy], kept)
    if not adapter:
        scores[CONTROL] = judge(ALONE, Seam(0), in_place(model, prompt))
    return scores


def prompts(tokenizer: Any, data: pathlib.Path, count: int) -> Iterator[Prompt]:
    """The first questions, each over its passages in another order."""
    rng = random.Random(0)
    for example in read_musique(data, WORDS)[:count]:
        documents = rng.sample(example.documents, len(example.documents))
        once = list({one.document: one for one in documents}.values())
        yield prompt_of(line_of(once, [example.question]), tokenizer)


def run(
    model_path: str,
    folder: pathlib.Path | None,
    *,
    count: int,
    ways: Sequence[str] = WAYS,
    data: pathlib.Path = MUSIQUE,
    answer: int = ANSWER_TOKENS,
    dtype: str = "bfloat16",
    path: pathlib.Path | None = None,
) -> Outcome:
    """Every method at every question, without an adapter and with one if there is one.

    Args:
        path: folder where scores are kept as they come.
    """
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model, shipped = load_model(model_path, DTYPES[dtype]), Shipped(tokenizer)
    config = {
        "model": pathlib.Path(model_path).name,
        "data": data.name,
        "words_a_passage": WORDS,
        "answer_tokens": answer,
        "dtype": dtype,
        "ways": list(ways),
    }
    asked = list(prompts(tokenizer, data, count))
    arms: dict[str, Adapter | None] = {PLAIN: None}
    steps = 0
    if folder is not None:
        arms[ADAPTED] = Adapter.load(model, folder)
        steps = len((folder / CURVE).read_text(encoding="utf-8").splitlines())
    found: dict[str, list[Any]] = {arm: [] for arm in arms}
    answers: list[Any] = []
    for arm, adapter in arms.items():
        told = {**config, "steps": steps} if adapter else config
        kept = Kept(path and path / f"{arm}.jsonl", told)
        for i, prompt in enumerate(tqdm(asked, desc=arm, unit="question")):
            row = kept.get(i)
            if row is None:
                said = answers[i] if adapter else answers_of(model, prompt, answer)
                scores = score(model, adapter, prompt, said, ways, shipped, i)
                row = {"answers": said, "scores": scores}
                kept.put(i, row)
            answers += [row["answers"]] if not adapter else []
            found[arm].append(row["scores"])
    rows = [
        row_of(arm, method, found) for method in found[PLAIN][0] for arm in arms
        if method in found[arm][0]
    ]  # fmt: skip
    config |= {**versions(), "questions": count, "steps": steps}
    return Outcome(config, rows, [table_of(rows, config)])


def row_of(arm: str, method: str, found: dict[str, list[Any]]) -> dict[str, Any]:
    """One method over all questions, its ratio to the same without the adapter and to
    today's default in pairs; intervals of 95 %."""

    def kl_of(arm: str, name: str) -> list[float]:
        return [row[name][0] for row in found[arm]]

    kl = kl_of(arm, method)
    row: dict[str, Any] = {"method": method, "adapter": arm == ADAPTED, "kl": statistics.fmean(kl)}
    row["kl_low"], row["kl_high"] = interval(kl)
    bases = {} if method == CONTROL else {"plain": method, "today": TODAY}
    for name, base in bases.items():
        plain = kl_of(PLAIN, base)
        if not any(plain):
            continue  # nothing was reused
        row[f"of_{name}"] = row["kl"] / statistics.fmean(plain)
        row[f"of_{name}_low"], row[f"of_{name}_high"] = ratio_interval(kl, plain)
    row["top1"] = statistics.fmean(one[method][1] for one in found[arm])
    row["share"] = statistics.fmean(one[method][2] for one in found[arm])
    row["kl_by_question"] = [round(one, 6) for one in kl]
    return row


def table_of(rows: Sequence[dict[str, Any]], config: dict[str, Any]) -> Table:
    def between(row: dict[str, Any], name: str) -> str:
        if name not in row:
            return ""
        return f"{row[name]:.2g} [{row[f'{name}_low']:.2g}, {row[f'{name}_high']:.2g}]"

    return Table(
        f"An adapter of {config['steps']} steps, {config['questions']} questions",
        (
            "method",
            "adapter",
            "computed",
            "KL (nats a token)",
            "of without",
            f"of {TODAY}",
            "top-1, %",
        ),
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
        f"Along {config['answer_tokens']} tokens of the greedy answer of full recompute; "
        "bootstrap intervals of 95 % over questions, ratios in pairs. Computed: of the "
        "segments' tokens.",
    )


def main() -> None:
    parser = parser_of(__doc__, f"{QUICK_QUESTIONS} questions")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--write", type=pathlib.Path, help="write prompts to learn from here")
    what.add_argument("--adapter", type=pathlib.Path, help="folder that sglang_pic.adapt wrote")
    parser.add_argument("--model", help="a directory; prompts are in ChatML (SmolLM2-135M)")
    parser.add_argument("--data", type=pathlib.Path, default=MUSIQUE, help="MuSiQue (%(default)s)")
    parser.add_argument("--questions", type=int, default=QUESTIONS, help="how many (%(default)s)")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, help="(all)")
    parser.add_argument("--answer", type=int, default=ANSWER_TOKENS, help="tokens (%(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="(%(default)s)")
    parser.add_argument("--kept", type=pathlib.Path, help="folder to keep each question's scores")
    args = parser.parse_args()
    if args.write:
        lines = lines_to_learn(read_musique(args.data, WORDS), LINES, 0)
        text = "".join(json.dumps(line) + "\n" for line in lines)
        args.write.write_text(text, encoding="utf-8")
        return
    outcome = run(
        args.model or str(ensure_model()),
        args.adapter,
        count=QUICK_QUESTIONS if args.quick else min(args.questions, HELD_OUT),
        ways=args.ways,
        data=args.data,
        answer=args.answer,
        dtype=args.dtype,
        path=args.kept,
    )
    deliver(outcome, args)


if __name__ == "__main__":
    main()
