"""Quality of linked answers on real text: questions over ten passages.

    python -m eval.text_quality [--quick] [--data FILE] [--json FILE] [--plot FILE]

Every method is asked the same prompts. Two things are compared with stock SGLang
computing the whole prompt:

    the gold answer's first tokens (at most four), scored on both: KL(full ||
    method) in nats a token, over the 64 tokens that full recompute finds likeliest and
    all others as one class; top-1, the share of steps at which both would pick the same
    token; and the gold answer's log-likelihood a token
    the greedy answer of 16 tokens: F1 and exact match with the gold answers, after
    the usual normalisation (case, punctuation, articles)

    full          stock SGLang, nothing cached: the reference
    prefix_cache  stock SGLang, the same prompt a second time, asked the way that linked
                  methods are: shows what the comparison itself costs
    naive         linked, every segment reused whole (policy none)
    seam          linked, the first w tokens of each segment computed anew
    page_block    pages of 16 tokens, the first of each segment computed anew (MEPIC)

``context``: segments compiled behind the prompts' fixed opening. ``--quick`` runs
what needs no further servers: no context, no pages of 16. CacheBlend's selection is
not offered by this project (docs/ideas/seams.md).
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import pathlib
import re
import statistics
import string
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm
from transformers import AutoTokenizer

from sglang_pic.eval.bench import Bench, bench, further
from sglang_pic.eval.command import Outcome, deliver, new_figure, parser_of
from sglang_pic.eval.intervals import interval
from sglang_pic.eval.multihop import MUSIQUE, Example, load_examples, source_of
from sglang_pic.eval.passages import OPENING, plain_pieces, prompt_pieces, tokenize
from sglang_pic.eval.scored import score as score_answer
from sglang_pic.eval.serving import Server
from sglang_pic.eval.tables import Table
from sglang_pic.link.divergence import kl_with_remainder

SEAMS = (4, 8, 16, 32)
TOP = 64
ANSWER_TOKENS = 16
GOLD_TOKENS = 4  # of the gold answer, at most
WORDS = 64
QUICK_QUESTIONS = 6
PAGE = 16
CHAT = "<|im_start|>"
# Servers that only the full form needs, beside stock SGLang and ours.
FURTHER = {
    "context": ("--pic-compile-context", OPENING),
    "page16": (f"--page-size={PAGE}",),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Method:
    """One way to answer: on which server, its seam, and what it adds to ``pic``;
    ``None`` on stock SGLang."""

    name: str
    server: str
    seam: int
    pic: dict[str, Any] | None = None

    @property
    def label(self) -> str:
        return f"seam {self.seam}" if self.name == "seam" else self.name.replace("_", " ")


def _linked(server: str) -> tuple[Method, ...]:
    return (
        Method("naive", server, 0, {"policy": "none"}),
        *(Method("seam", server, width, {"policy": "seam", "seam": width}) for width in SEAMS),
    )


FULL = Method("full", "stock", 0)
METHODS = (
    Method("prefix_cache", "stock", 0),
    *_linked("ours"),
    *_linked("context"),
    Method("page_block", "page16", PAGE, {"policy": "seam", "seam": PAGE}),
)


@dataclasses.dataclass(frozen=True)
class Asked:
    """One example as the servers get it: the prompt, its segments' token ranges, the
    gold answer's first tokens."""

    example: Example
    ids: list[int]
    segments: list[dict[str, int]]
    gold: list[int]


@dataclasses.dataclass(frozen=True)
class Reference:
    """Full recompute along the gold answer: at each step its likeliest tokens with
    their log-probabilities, and the gold token's."""

    steps: list[dict[int, float]]
    gold: list[float]


@dataclasses.dataclass(frozen=True)
class Scores:
    """One method at one example; means over the gold answer's tokens."""

    kl: float
    top1: float
    gold_logprob: float
    f1: float
    exact_match: float
    tokens_reused: int
    tokens_computed: int


# -- answers ----------------------------------------------------------------------


def normalise(text: str) -> list[str]:
    """Words in lower case, without punctuation and articles."""
    bare = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def f1_of(answer: str, gold: str) -> float:
    """Harmonic mean of precision and recall over words."""
    said, right = normalise(answer), normalise(gold)
    common = sum((collections.Counter(said) & collections.Counter(right)).values())
    return 2 * common / (len(said) + len(right)) if common else 0.0


def best(answer: str, golds: Sequence[str]) -> tuple[float, float]:
    """F1 and exact match with the gold answer that fits best."""
    exact = max(float(normalise(answer) == normalise(gold)) for gold in golds)
    return max(f1_of(answer, gold) for gold in golds), exact


# -- asking -----------------------------------------------------------------------


def prepare(tokenizer: Any, example: Example) -> Asked:
    """Token ids of an example, each piece tokenised alone: in ChatML, or as plain text for a
    tokenizer that does not know it."""
    pieces = prompt_pieces if CHAT in tokenizer.get_vocab() else plain_pieces
    prompt = tokenize(tokenizer, pieces(example.documents, example.question))
    gold = tokenizer(next(iter(example.answers), ""), add_special_tokens=False)["input_ids"]
    return Asked(example, prompt.ids, prompt.segments, gold[:GOLD_TOKENS])


def _greedy(count: int) -> dict[str, Any]:
    return {"max_new_tokens": count, "temperature": 0}


def _refer(server: Server, asked: Asked, salt: str) -> Reference:
    """The gold answer scored on stock SGLang as part of the prompt.

    Raises:
        RuntimeError: part of it was cached.
    """
    meta = server.generate(
        input_ids=asked.ids + asked.gold,
        sampling_params=_greedy(1),
        cache_salt=salt,
        return_logprob=True,
        logprob_start_len=len(asked.ids) - 1,
        top_logprobs_num=TOP,
    )["meta_info"]
    if meta["cached_tokens"]:
        raise RuntimeError(f"the reference found {meta['cached_tokens']} tokens cached")
    # The first entry is the prompt's last token, whose own probability is not asked.
    gold = [logprob for logprob, *_ in meta["input_token_logprobs"][1:]]
    steps = [
        {token: logprob for logprob, token, *_ in top} for top in meta["input_top_logprobs"][1:]
    ]
    return Reference(steps, gold)


def _score(
    reference: Reference,
    found: Sequence[dict[int, float]],
    picked: Sequence[int],
    answer: str,
    asked: Asked,
    reused: int,
) -> Scores:
    """``found``: by step, log-probabilities of at least the reference's tokens and
    the gold one; ``picked``: the token the method would choose there."""
    kl, same, gold = [], [], []
    steps = zip(reference.steps, found, picked, asked.gold, strict=True)
    for step, listed, own, token in steps:
        kl.append(kl_with_remainder(list(step.values()), [listed[t] for t in step]))
        same.append(own == max(step, key=lambda t: step[t]))
        gold.append(listed[token])
    f1, exact = best(answer, asked.example.answers)
    return Scores(
        statistics.fmean(kl),
        statistics.fmean(same),
        statistics.fmean(gold),
        f1,
        exact,
        reused,
        len(asked.ids) - reused,
    )


def ask_full(stock: Server, asked: Asked, salt: str) -> tuple[Reference, Scores]:
    """The reference, and its own scores: its KL is 0 by definition. Leaves the prompt
    cached under ``salt``."""
    reference = _refer(stock, asked, f"{salt}-scored")
    body = {"input_ids": asked.ids, "sampling_params": _greedy(ANSWER_TOKENS)}
    answer = stock.generate(**body, cache_salt=salt)["text"]
    listed = [
        {**step, token: logprob}
        for step, token, logprob in zip(reference.steps, asked.gold, reference.gold, strict=True)
    ]
    picked = [max(step, key=lambda t: step[t]) for step in reference.steps]
    return reference, _score(reference, listed, picked, answer, asked, 0)


def ask(server: Server, asked: Asked, method: Method, reference: Reference, salt: str) -> Scores:
    """The greedy answer, and the gold one scored.

    Raises:
        RuntimeError: the method reused nothing.
    """
    wanted = sorted({token for step in reference.steps for token in step} | set(asked.gold))
    body: dict[str, Any] = {"input_ids": asked.ids, "cache_salt": salt}
    if method.pic is not None:
        body["pic"] = {"segments": asked.segments, **method.pic}
    output = server.generate(**body, sampling_params=_greedy(ANSWER_TOKENS))
    meta = output["meta_info"]
    reused = meta.get("pic", meta).get("tokens_reused", meta["cached_tokens"])
    if not reused:
        raise RuntimeError(f"{method.label} reused nothing")
    steps, _ = score_answer(server, body, asked.gold, wanted)
    return _score(
        reference,
        [step.listed for step in steps],
        [step.likeliest for step in steps],
        output["text"],
        asked,
        reused,
    )


# -- all of it --------------------------------------------------------------------


def row_of(method: Method, scores: Sequence[Scores], full: Sequence[Scores]) -> dict[str, Any]:
    """One method over all questions, each figure with its bootstrap interval of 95 %."""
    row: dict[str, Any] = {
        "method": method.name,
        "seam": method.seam,
        "context": method.server == "context",
        "questions": len(scores),
    }
    for field in dataclasses.fields(Scores):
        values = [float(getattr(one, field.name)) for one in scores]
        row[field.name] = statistics.fmean(values)
        if not field.name.startswith("tokens"):
            row[f"{field.name}_low"], row[f"{field.name}_high"] = interval(values)
    lost = [a.gold_logprob - b.gold_logprob for a, b in zip(full, scores, strict=True)]
    row["gold_lost"] = statistics.fmean(lost)
    row["gold_lost_low"], row["gold_lost_high"] = interval(lost)
    return row


def run(
    pair: Bench,
    *,
    quick: bool,
    data: pathlib.Path = MUSIQUE,
    count: int | None = None,
    seed: int = 0,
) -> Outcome:
    """Ask everything; in its quick form on the two servers alone.

    Raises:
        ValueError: a question has no gold answer.
    """
    count = count or (QUICK_QUESTIONS if quick else None)
    source = source_of(data, WORDS)
    examples = load_examples(data, WORDS, count, seed)
    if not all(example.answers for example in examples):
        raise ValueError(f"{source.name}: questions without answers, which eval.pareto takes")
    pair.flush()
    tokenizer = AutoTokenizer.from_pretrained(pair.model)
    asked = [prepare(tokenizer, example) for example in examples]
    scores: dict[Method, list[Scores]] = {FULL: []}
    references = []
    for i, one in enumerate(tqdm(asked, desc="full", unit="question")):
        reference, score = ask_full(pair.stock, one, f"{i}")
        references.append(reference)
        scores[FULL].append(score)
        # At once, while its prompt is cached.
        for method in METHODS:
            if method.server == "stock":
                found = ask(pair.stock, one, method, reference, f"{i}")
                scores.setdefault(method, []).append(found)
    for name in ("ours",) if quick else ("ours", *FURTHER):
        shared = (
            contextlib.nullcontext(pair.ours)
            if name == "ours"
            else further(name, pair.model, *FURTHER[name])
        )
        with shared as server:
            for i, one in enumerate(tqdm(asked, desc=name, unit="question")):
                for method in METHODS:
                    if method.server == name:
                        found = ask(server, one, method, references[i], f"{i}-linked")
                        scores.setdefault(method, []).append(found)
    rows = [row_of(method, found, scores[FULL]) for method, found in scores.items()]
    config = {
        **pair.config,
        "data": source.name,
        "data_sha256": source.sha256,
        "words_a_passage": WORDS,
        "questions": len(asked),
        "prompt_tokens": statistics.fmean(len(one.ids) for one in asked),
        "classes": TOP + 1,
        "gold_tokens": GOLD_TOKENS,
        "answer_tokens": ANSWER_TOKENS,
        "seed": seed,
        "compile_context": OPENING,
    }
    return Outcome(config, rows, [table_of(rows, config)], plot(rows))


def label(row: dict[str, Any]) -> str:
    """``seam 16``, ``naive``, ``seam 16, context``."""
    name = f"seam {row['seam']}" if row["method"] == "seam" else row["method"].replace("_", " ")
    return f"{name}, context" if row["context"] else name


def table_of(rows: Sequence[dict[str, Any]], config: dict[str, Any]) -> Table:
    """One line a method, means with their intervals."""

    def between(row: dict[str, Any], name: str, form: str, scale: float = 1) -> str:
        mean, low, high = (scale * row[name + end] for end in ("", "_low", "_high"))
        # No minus in front of a zero.
        return f"{mean:{form}} [{low:{form}}, {high:{form}}]".replace("-0.00", "0.00")

    return Table(
        f"{config['questions']} questions over ten passages ({config['data']}), "
        f"prompts of {config['prompt_tokens']:.0f} tokens",
        (
            "method",
            "KL (nats)",
            "top-1, %",
            "gold log-likelihood lost",
            "F1, %",
            "EM, %",
            "computed",
        ),
        [
            (
                label(row),
                between(row, "kl", ".2g"),
                between(row, "top1", ".0f", 100),
                between(row, "gold_lost", ".2f"),
                between(row, "f1", ".1f", 100),
                f"{100 * row['exact_match']:.0f}",
                f"{row['tokens_computed']:.0f}",
            )
            for row in rows
        ],
        "Means over questions, with bootstrap intervals of 95 %. KL and log-likelihood are a "
        "token of the gold answer, scored on both; lost: against full recompute, which is the "
        "reference. Prefix cache: the control, asked the way that linked methods are.",
    )


def plot(rows: Sequence[dict[str, Any]]) -> Any:
    """KL and lost log-likelihood by method, with intervals."""
    figure, axes = new_figure(2)
    shown = [row for row in rows if row["method"] not in ("full", "prefix_cache")]
    names = [label(row) for row in shown]
    panels = (("kl", "KL(full || method), nats a token"), ("gold_lost", "log-likelihood lost"))
    for axis, (name, text) in zip(axes, panels, strict=True):
        mean = [row[name] for row in shown]
        low = [row[name] - row[f"{name}_low"] for row in shown]
        high = [row[f"{name}_high"] - row[name] for row in shown]
        axis.errorbar(mean, range(len(shown)), xerr=[low, high], fmt="o", capsize=3)
        axis.set(yticks=range(len(shown)), yticklabels=names, xlabel=text)
        axis.invert_yaxis()
    axes[1].axvline(0, color="grey", linewidth=1)
    return figure


def main() -> None:
    parser = parser_of(__doc__, f"{QUICK_QUESTIONS} questions, no further servers")
    parser.add_argument("--data", type=pathlib.Path, default=MUSIQUE, help="MuSiQue (%(default)s)")
    parser.add_argument(
        "--model", default="smollm2", help="a directory; prompts are in ChatML (SmolLM2-135M)"
    )
    parser.add_argument("--questions", type=int, help="how many, at least 2 (all)")
    parser.add_argument("--seed", type=int, default=0, help="order of passages (%(default)s)")
    args = parser.parse_args()
    with bench(args.model) as pair:
        outcome = run(pair, quick=args.quick, data=args.data, count=args.questions, seed=args.seed)
    deliver(outcome, args)


if __name__ == "__main__":
    main()
