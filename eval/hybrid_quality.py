"""Which links of a hybrid answer rightly: every method against full recompute.

    python -m eval.hybrid_quality [--quick] [--ranks N] [--json FILE] [--plot FILE]

Asks questions of the shipped hybrid's held-out task (``eval.models.hybrid``),
each alone behind a prefix and segments, and compares what the servers answer:

    full            stock SGLang, nothing cached: the reference
    stock_prefix    stock SGLang, the same prompts again, its prefix cache warm
    seam            the default: operators composed, the first w tokens of each
                    segment computed anew
    last            S <- B at each core: what stood before is forgotten there
    naive           nothing computed anew, the convolution included (policy none)
    identity        S <- S + B: operators left out
    no_conv_tail    no history for the convolution behind a core
    float16_pairs   operators and end states rounded to float16
    context         segments compiled behind the prompt's fixed prefix
    page16          pages of 16 tokens, hence heads of 16

``exact_match``: the greedy answer is the right one, word for word. ``kl``:
KL(full || method) in nats a token over the whole vocabulary, both made to follow
the reference's own answer. ``loss`` is the exact match that a method loses
against full recompute, with a paired bootstrap interval of 95 % over examples. The default and
``full`` answer all questions, the others the first of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from sglang_pic.eval.bench import Bench, bench, further
from sglang_pic.eval.command import Outcome, deliver, new_figure, parser_of
from sglang_pic.eval.intervals import clustered
from sglang_pic.eval.models.hybrid import task
from sglang_pic.eval.serving import Server
from sglang_pic.eval.tables import Table

DEFAULT_SEAM = 4
SEAMS = (1, 2, 4, 8, 16)
QUESTIONS = 2000
FEW_QUESTIONS = 400
QUICK_QUESTIONS, QUICK_FEW_QUESTIONS = 300, 100
SEGMENTS, LENGTH = 4, 48
EACH = 10  # questions an example
BATCH = 40
OURS = ("--pic-min-segment=1",)  # of the shared server
ALL = "all"
VOCABULARY = list(range(task.VOCABULARY))


@dataclasses.dataclass(frozen=True)
class Method:
    """``server``: ``stock``, ``linked`` or one of ``FURTHER``; ``pic``: its fields, ``None``
    on stock SGLang."""

    name: str
    server: str
    seam: int = DEFAULT_SEAM
    pic: dict[str, Any] | None = None

    @property
    def label(self) -> str:
        return f"seam {self.seam}" if self.name == "seam" else self.name

    @property
    def is_default(self) -> bool:
        return self.name == "seam" and self.seam == DEFAULT_SEAM


# Servers that only the full form needs, beside stock SGLang and ours.
FURTHER: dict[str, tuple[str, ...]] = {
    "context": ("--pic-compile-context", task.decode(task.PREFIX)),
    "page16": ("--page-size=16",),
}
FULL = Method("full", "stock", 0)
PREFIX = Method("stock_prefix", "stock", 0)
METHODS = (
    FULL,
    PREFIX,
    *(Method("seam", "linked", width, {}) for width in SEAMS),
    Method("last", "linked", pic={"state": "last"}),
    Method("naive", "linked", 0, {"policy": "none"}),
    Method("identity", "linked", pic={"ablation": "identity_operator"}),
    Method("no_conv_tail", "linked", pic={"ablation": "no_conv_tail"}),
    Method("float16_pairs", "linked", pic={"ablation": "float16_pairs"}),
    Method("context", "context", pic={}),
    Method("page16", "page16", 16, {}),
)


@dataclasses.dataclass(frozen=True)
class Asked:
    """One question as the servers get it: prompt, the segments' token ranges, the
    namespace of its example, one of its own, and what is right."""

    category: str
    ids: list[int]
    segments: list[dict[str, int]]
    salt: str
    own_salt: str
    answer: list[int]


@dataclasses.dataclass(frozen=True)
class Said:
    """A greedy answer, the distributions along the reference's: float32 [answer
    tokens, vocabulary], log-probabilities; and the prompt's tokens reused for it."""

    answer: list[int]
    logprobs: np.ndarray
    reused: int


def make_questions(count: int, segments: int, length: int) -> list[Asked]:
    """Questions of the held-out task, some to an example."""
    rng = task.generator(held_out=True)
    asked: list[Asked] = []
    while len(asked) < count:
        example = task.example(rng, segments, length, EACH)
        ids = example.context()
        first = len(example.prefix)
        ranges = [
            {"start": first + i * length, "end": first + (i + 1) * length} for i in range(segments)
        ]
        salt = f"example-{len(asked)}"
        asked += [
            Asked(
                question.category,
                [*ids, *question.prompt],
                ranges,
                salt,
                f"{salt}-{i}",
                question.answer,
            )
            for i, question in enumerate(example.questions)
        ]
    return asked[:count]


def _batches(items: Sequence[int]) -> Iterator[Sequence[int]]:
    for start in range(0, len(items), BATCH):
        yield items[start : start + BATCH]


def _generate(
    server: Server, method: Method, asked: Sequence[Asked], forced: Sequence[list[int]]
) -> Any:
    """One batch: each question behind ``forced`` tokens of its answer."""
    body: dict[str, Any] = {
        "input_ids": [[*one.ids, *prefix] for one, prefix in zip(asked, forced, strict=True)],
        # Nothing is cached for full recompute, not even the example's other questions.
        "cache_salt": [one.own_salt if method is FULL else one.salt for one in asked],
        "sampling_params": [
            {
                "max_new_tokens": len(one.answer) - len(prefix),
                "temperature": 0,
                "ignore_eos": True,
            }
            for one, prefix in zip(asked, forced, strict=True)
        ],
        "return_logprob": True,
        "token_ids_logprob": [VOCABULARY for _ in asked],
    }
    if method.pic is not None:
        fields = {"seam": method.seam, "turns": False, **method.pic}
        body["pic"] = [{"segments": one.segments, **fields} for one in asked]
    return server.generate(**body)


def ask(
    server: Server, method: Method, questions: Sequence[Asked], reference: Sequence[Said] | None
) -> list[Said]:
    """Ask everything; without a reference the method follows its own answers.

    As long as a method picks the reference's token by itself its own answer
    follows; where it picks another it is asked again behind that token.
    """
    own: list[list[int]] = [[] for _ in questions]
    reused = [0] * len(questions)
    seen: list[list[np.ndarray]] = [[] for _ in questions]
    pending = list(range(len(questions)))
    bar = tqdm(total=len(questions), desc=f"{method.label:14s}", unit="question")
    while pending:
        again = []
        for batch in _batches(pending):
            asked = [questions[i] for i in batch]
            forced = [
                reference[i].answer[: len(seen[i])] if reference is not None else [] for i in batch
            ]
            if method is PREFIX:
                _generate(server, method, asked, forced)
            for i, output in zip(batch, _generate(server, method, asked, forced), strict=True):
                meta = output["meta_info"]
                if not own[i]:
                    own[i] = output["output_ids"]
                    reused[i] = meta.get("pic", meta).get("tokens_reused", meta["cached_tokens"])
                follow = reference[i].answer if reference is not None else output["output_ids"]
                for token, row in zip(
                    output["output_ids"], meta["output_token_ids_logprobs"], strict=True
                ):
                    seen[i].append(np.array([value for value, *_ in row], dtype=np.float32))
                    if token != follow[len(seen[i]) - 1]:
                        break
                if len(seen[i]) < len(follow):
                    again.append(i)
                else:
                    bar.update()
        pending = again
    bar.close()
    if (method is FULL) == any(reused):
        raise RuntimeError(f"{method.label}: {reused.count(0)} of {len(reused)} reused nothing")
    return [
        Said(answer, np.stack(rows), count)
        for answer, rows, count in zip(own, seen, reused, strict=True)
    ]


def _kl(full: Said, linked: Said) -> float:
    p = full.logprobs.astype(np.float64)
    return float((np.exp(p) * (p - linked.logprobs)).sum(-1).mean())


def rows_of(
    method: Method,
    questions: Sequence[Asked],
    full: Sequence[Said],
    said: Sequence[Said],
) -> list[dict[str, Any]]:
    """Flat rows, one a category and one for all."""
    right = np.array([one.answer == q.answer for one, q in zip(said, questions, strict=True)])
    base = np.array([one.answer == q.answer for one, q in zip(full, questions, strict=True)])
    kl = np.array([_kl(one, other) for one, other in zip(full, said, strict=True)])
    categories = np.array([q.category for q in questions])
    examples = np.array([q.salt for q in questions])
    reused = np.array([one.reused for one in said])
    total = np.array([len(q.ids) for q in questions])
    rows = []
    for category in (ALL, *task.CATEGORIES):
        chosen = categories == category if category != ALL else np.ones(len(questions), bool)
        if not chosen.any():
            continue
        lost = base[chosen].astype(float) - right[chosen]
        clusters = [lost[examples[chosen] == one] for one in dict.fromkeys(examples[chosen])]
        low, high = clustered([c.sum() for c in clusters], [len(c) for c in clusters])
        rows.append(
            {
                "method": method.name,
                "seam": method.seam,
                "category": category,
                "exact_match": float(right[chosen].mean()),
                "kl": float(kl[chosen].mean()),
                "questions": int(chosen.sum()),
                "tokens_reused": float(reused[chosen].mean()),
                "tokens_computed": float((total - reused)[chosen].mean()),
                "loss": float(lost.mean()),
                "loss_low": low,
                "loss_high": high,
            }
        )
    return rows


def run(
    pair: Bench,
    *,
    quick: bool,
    count: int | None = None,
    segments: int = SEGMENTS,
    length: int = LENGTH,
) -> Outcome:
    """All methods, in the quick form those of the two servers; flat rows, one a
    method and category."""
    count = count or (QUICK_QUESTIONS if quick else QUESTIONS)
    pair.flush()
    questions = make_questions(count, segments, length)
    few = QUICK_FEW_QUESTIONS if quick else FEW_QUESTIONS
    rows: list[dict[str, Any]] = []
    full: list[Said] = []
    shared = {"stock": pair.stock, "linked": pair.ours}
    for name in shared if quick else (*shared, *FURTHER):
        started = (
            contextlib.nullcontext(shared[name])
            if name in shared
            else further(name, pair.model, *OURS, *FURTHER[name])
        )
        with started as server:
            for method in METHODS:
                if method.server != name:
                    continue
                everything = method is FULL or method.is_default
                asked = questions if everything else questions[:few]
                said = ask(server, method, asked, full[: len(asked)] or None)
                full = full or said
                rows += rows_of(method, asked, full[: len(asked)], said)
    config = {
        **pair.config,
        "segments": segments,
        "segment_tokens": length,
        "questions": count,
        "held_out_seed": task.HELD_OUT_SEED,
        "default_seam": DEFAULT_SEAM,
    }
    return Outcome(config, rows, [table_of(rows, config)], plot(rows))


NAMES = {
    "full": "stock SGLang, full",
    "stock_prefix": "stock SGLang, prefix cache warm",
    "last": "last: S ← B",
    "naive": "naive: nothing computed anew",
    "identity": "S ← S + B",
    "no_conv_tail": "no conv tail",
    "float16_pairs": "float16 pairs",
    "context": f"seam {DEFAULT_SEAM} behind a compile context",
    "page16": "pages of 16, seam 16",
}


def table_of(rows: Sequence[dict[str, Any]], config: dict[str, Any]) -> Table:
    """Exact match by category and KL, one line a method."""
    lines = []
    for method, seam in dict.fromkeys((row["method"], row["seam"]) for row in rows):
        found = {
            row["category"]: row for row in rows if (row["method"], row["seam"]) == (method, seam)
        }
        every = found[ALL]
        default = " (default here)" if seam == DEFAULT_SEAM else ""
        lines.append(
            (
                NAMES.get(method, f"seam {seam}{default}"),
                str(every["questions"]),
                f"{every['tokens_computed']:.0f}",
                *(
                    f"{100 * found[c]['exact_match']:.1f}" if c in found else ""
                    for c in task.CATEGORIES
                ),
                f"{every['kl']:.2g}",
                f"{100 * every['loss']:.1f} [{100 * every['loss_low']:.1f}, "
                f"{100 * every['loss_high']:.1f}]",
            )
        )
    return Table(
        f"The shipped hybrid, {config['segments']} documents of {config['segment_tokens']} tokens: "
        "exact match in %",
        ("link", "questions", "computed", *task.CATEGORIES, "KL (nats)", "points lost [95 %]"),
        lines,
        "Held-out questions, server against server; computed: tokens of a prompt; lost: against "
        "stock SGLang's full recompute, paired bootstrap over examples (of no loss at all, the "
        "binomial bound).",
    )


def plot(rows: Sequence[dict[str, Any]]) -> Any:
    """Exact match by category, one bar a method."""
    shown = ("full", "seam", "last", "naive", "identity", "no_conv_tail")
    width = 0.8 / len(shown)
    figure, (axis,) = new_figure(width=8)
    for i, method in enumerate(shown):
        found = {
            row["category"]: 100 * row["exact_match"]
            for row in rows
            if row["method"] == method and row["seam"] in (0, DEFAULT_SEAM)
        }
        x = [j + (i - (len(shown) - 1) / 2) * width for j in range(len(task.CATEGORIES))]
        axis.bar(x, [found.get(c, 0) for c in task.CATEGORIES], width=width, label=method)
    axis.set(
        xticks=range(len(task.CATEGORIES)), xticklabels=task.CATEGORIES, ylabel="exact match, %"
    )
    axis.legend(fontsize="small", ncols=3, loc="lower center")
    return figure


def main() -> None:
    parser = parser_of(__doc__, f"{QUICK_QUESTIONS} questions, no further servers")
    parser.add_argument("--questions", type=int, help=f"how many ({QUESTIONS})")
    parser.add_argument("--segments", type=int, default=SEGMENTS, help="a prompt (%(default)s)")
    parser.add_argument("--length", type=int, default=LENGTH, help="tokens each (%(default)s)")
    parser.add_argument(
        "--ranks", type=int, default=1, help="of tensor parallelism, of both servers (%(default)s)"
    )
    args = parser.parse_args()
    flags = []
    if args.ranks > 1:
        flags.append(f"--tp-size={args.ranks}")
        # On a CPU each rank is bound to a core of its own.
        os.environ.setdefault("SGLANG_CPU_OMP_THREADS_BIND", "|".join(map(str, range(args.ranks))))
    with bench("hybrid", *flags, ours=OURS) as pair:
        outcome = run(
            pair,
            quick=args.quick,
            count=args.questions,
            segments=args.segments,
            length=args.length,
        )
    deliver(outcome, args)


if __name__ == "__main__":
    main()
