"""Loss against recomputed tokens: every policy, compiled alone and in company.

    python -m eval.pareto [--quick] [--data FILE] [--questions N] [--documents N] [--words N]
                               [--methods M ...] [--kept FILE] [--json FILE] [--plot FILE]

Questions over ten passages, each prompt linked by every method. Stock SGLang computes the
whole prompt and answers greedily (32 tokens); along that answer (``eval.scored``) a method's
next-token distributions are compared with its own: KL(full || method) in nats a token, over
the 64 tokens that full recompute finds likeliest and all others as one class, and top-1, the
share of steps at which both would pick the same.

    alone        every segment compiled by itself (EPIC, MEPIC)
    guests       each behind three passages that ship with the project
    groups of k  the prompt's segments, k at a time, compiled in each other's company
    all          all of them in one company

each with seams of several widths, and with ``graded``'s budgets; ``exact prefix`` is the
control: stock SGLang, the prompt cached, asked the same way. A prompt's segments stand in
another order than any that they were computed in. The full form takes hours: with ``--kept``
one that was cut off goes on where it was.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import pathlib
import random
import statistics
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer

from sglang_pic.eval.bench import Bench, bench, linear_layers
from sglang_pic.eval.command import Outcome, deliver, new_figure, parser_of
from sglang_pic.eval.intervals import interval, ratio_interval
from sglang_pic.eval.kept import Kept
from sglang_pic.eval.multihop import DOCUMENTS, MUSIQUE, load_examples, source_of
from sglang_pic.eval.results import versions
from sglang_pic.eval.scored import score as score_answer
from sglang_pic.eval.serving import Server
from sglang_pic.eval.tables import Table
from sglang_pic.eval.text_quality import TOP, Asked, prepare
from sglang_pic.link.divergence import kl_with_remainder

WORDS = 64
ANSWER_TOKENS, QUICK_ANSWER_TOKENS = 32, 8
QUICK_QUESTIONS = 4
ALONE, AMONG, ALL, CONTROL = "alone", "guests", "all", "exact prefix"
# Segments a company; of ``ALL`` as many as the prompt has, if a company may have them.
GROUPS = {"groups of 2": 2, "groups of 3": 3, "groups of 5": 5, ALL: 10}
# In the plot; companies of two lie on those of three.
LABELS = {
    ALONE: "compiled alone",
    AMONG: "among guests",
    "groups of 3": "in companies of three",
    "groups of 5": "in companies of five",
    ALL: "all in one company",
}
TODAY = "alone, seam 16"
# Ways to link that are the default, and where the plot names them.
DEFAULTS = (
    (TODAY, "default, alone", (10, 9)),
    (f"{ALL}, nothing", "default, in company", (-8, -28)),
)


@dataclasses.dataclass(frozen=True)
class Method:
    """One way to link.

    Attributes:
        compiled: ``alone``, among ``guests``, or a name of ``GROUPS``.
        policy: in words.
        pic: what it adds to a request's ``pic``.
        quick: asked in the quick form too.
    """

    compiled: str
    policy: str
    pic: dict[str, Any]
    quick: bool = False

    @property
    def label(self) -> str:
        return f"{self.compiled}, {self.policy}"


def _methods() -> Iterator[Method]:
    pic: dict[str, Any]
    for width in (0, 4, 16, 32):
        pic = {"policy": "seam", "seam": width, "company": "off"}
        yield Method(ALONE, f"seam {width}", pic, quick=width in (0, 16))
    for share in (0.15, 0.25):
        pic = {"policy": "graded", "seam": 4, "share": share, "company": "off"}
        yield Method(ALONE, f"graded {share:.0%}", pic)
    for width in (0, 4, 16):
        yield Method(AMONG, f"seam {width}", {"policy": "seam", "seam": width}, quick=width == 16)
    for share in (0.15, 0.25):
        pic = {"policy": "graded", "seam": 4, "share": share}
        yield Method(AMONG, f"graded {share:.0%}", pic)
    for compiled in GROUPS:
        quick = compiled == ALL
        pic = {"policy": "seam", "company_seam": 0}
        yield Method(compiled, "nothing", pic, quick)
        yield Method(compiled, "seam 4", {"policy": "seam", "company_seam": 4})
        yield Method(compiled, "seam 16", {"policy": "seam", "company_seam": 16})
        for share in (0.15, 0.25):
            pic = {"policy": "graded", "company_seam": 0, "share": share}
            yield Method(compiled, f"graded {share:.0%}", pic, quick and share == 0.15)


METHODS = tuple(_methods())


def methods_of(
    model: pathlib.Path, quick: bool, labels: Sequence[str] | None = None
) -> list[Method]:
    """Those that a model's segments may be linked by: a hybrid has no guests, and companies
    for one seam width.

    Args:
        labels: of those that are wanted, today's default beside them; all if ``None``.

    Raises:
        ValueError: one that is wanted is none of them.
    """
    hybrid = linear_layers(AutoConfig.from_pretrained(model)) > 0

    def serves(method: Method) -> bool:
        if not hybrid or method.compiled == ALONE:
            return True
        return method.compiled in GROUPS and not method.pic["company_seam"]

    served = [method for method in METHODS if serves(method)]
    if labels is None:
        return [method for method in served if method.quick or not quick]
    unknown = set(labels) - {method.label for method in served}
    if unknown:
        raise ValueError(f"not of this model: {', '.join(sorted(unknown))}")
    return [method for method in served if method.label in (TODAY, *labels)]


@dataclasses.dataclass(frozen=True)
class Score:
    """One method at one question; means over the answer's tokens."""

    kl: float
    top1: float
    share: float  # computed of the segments' tokens


@dataclasses.dataclass(frozen=True)
class Reference:
    """Stock SGLang's greedy answer to a prompt, with each step's likeliest tokens and
    their log-probabilities."""

    answer: list[int]
    steps: list[dict[int, float]]

    @property
    def told(self) -> set[int]:
        return {token for step in self.steps for token in step}


def _greedy(count: int) -> dict[str, Any]:
    return {"max_new_tokens": count, "temperature": 0, "ignore_eos": True}


def refer(stock: Server, asked: Asked, tokens: int, salt: str) -> Reference:
    """Raises:
    RuntimeError: part of the prompt was cached.
    """
    out = stock.generate(
        input_ids=asked.ids,
        sampling_params=_greedy(tokens),
        cache_salt=salt,
        return_logprob=True,
        top_logprobs_num=TOP,
    )
    meta = out["meta_info"]
    if meta["cached_tokens"]:
        raise RuntimeError(f"the reference found {meta['cached_tokens']} tokens cached")
    steps = [{token: logprob for logprob, token, *_ in top} for top in meta["output_top_logprobs"]]
    return Reference([token for _, token, *_ in meta["output_token_logprobs"]], steps)


def follow(
    server: Server,
    asked: Asked,
    reference: Reference,
    salt: str,
    pic: dict[str, Any] | None,
) -> Score:
    """A server along the reference's answer."""
    body: dict[str, Any] = {"input_ids": asked.ids, "cache_salt": salt}
    if pic is not None:
        body["pic"] = {"segments": asked.segments, **pic}
    found, meta = score_answer(server, body, reference.answer, sorted(reference.told))
    kl, same, share = [], [], 1.0
    for step, own in zip(reference.steps, found, strict=True):
        listed = [own.listed[token] for token in step]
        kl.append(kl_with_remainder(list(step.values()), listed))
        same.append(own.likeliest == max(step, key=lambda token: step[token]))
    if pic is not None:
        segments = meta["pic"]["segments"]
        computed = sum(one["tokens_computed"] for one in segments)
        share = computed / sum(one["end"] - one["start"] for one in segments)
    return Score(statistics.fmean(kl), statistics.fmean(same), share)


def compile_groups(
    server: Server, asked: Asked, compiled: str, salt: str, rng: random.Random
) -> None:
    """Compile a prompt's segments as a method wants them.

    Raises:
        RuntimeError: the server made something else of it.
    """
    # A passage may stand in a prompt twice.
    texts = {tuple(asked.ids[one["start"] : one["end"]]) for one in asked.segments}
    segments = [list(text) for text in sorted(texts)]
    if compiled == ALONE:
        _compiled(server, {"input_ids": segments, "cache_salt": salt})
        return
    size = GROUPS.get(compiled, 1)
    rng.shuffle(segments)
    groups = [segments[i : i + size] for i in range(0, len(segments), size)]
    if compiled != AMONG and len(groups[-1]) == 1:
        groups[-2].extend(groups.pop())
    opening = asked.ids[: asked.segments[0]["start"]]
    for group in groups:
        body = {"input_ids": group, "cache_salt": salt, "company": True, "opening": opening}
        made = [len(one["segments"]) for one in _compiled(server, body)["companies"]]
        if made != [len(group)]:
            raise RuntimeError(f"of {len(group)} segments companies of {made} were made")


def _compiled(server: Server, body: dict[str, Any]) -> dict[str, Any]:
    answer = server.post("/pic/compile", body)
    if not answer.ok:
        raise RuntimeError(f"{answer.status_code}: {answer.text[:500]}")
    found: dict[str, Any] = answer.json()
    return found


def score(
    pair: Bench, asked: Asked, methods: Sequence[Method], tokens: int, name: str, rng: random.Random
) -> dict[str, Score]:
    """Every method, and the control, at one question."""
    reference = refer(pair.stock, asked, tokens, name)
    scores = {CONTROL: follow(pair.stock, asked, reference, name, None)}
    for compiled in dict.fromkeys(method.compiled for method in methods):
        salt = f"{name}-{compiled}"
        compile_groups(pair.ours, asked, compiled, salt, rng)
        ways = [method for method in methods if method.compiled == compiled]
        # In one batch, which costs little more than one of them.
        with ThreadPoolExecutor(len(ways)) as threads:
            asking = functools.partial(follow, pair.ours, asked, reference, salt)
            found = list(threads.map(asking, [method.pic for method in ways]))
        scores.update(zip((method.label for method in ways), found, strict=True))
        pair.ours.post("/pic/flush", {"cache_salt": salt}).raise_for_status()
    return scores


def run(
    pair: Bench,
    *,
    quick: bool,
    data: pathlib.Path = MUSIQUE,
    count: int | None = None,
    words: int = WORDS,
    documents: int = DOCUMENTS,
    seed: int = 0,
    labels: Sequence[str] | None = None,
    path: pathlib.Path | None = None,
) -> Outcome:
    """Every method at every question.

    Args:
        labels: as for ``methods_of``.
        path: where the scores of each question are kept as they come.

    Raises:
        ValueError: what is kept there is of another run.
    """
    pair.flush()
    tokenizer = AutoTokenizer.from_pretrained(pair.model)
    count = count or (QUICK_QUESTIONS if quick else None)
    tokens = QUICK_ANSWER_TOKENS if quick else ANSWER_TOKENS
    source = source_of(data, words)
    examples = load_examples(data, words, count, seed, documents)
    asked = [prepare(tokenizer, one) for one in examples]
    methods = methods_of(pair.model, quick, labels)
    settled = {
        "model": pair.name,
        "data": source.name,
        "data_sha256": source.sha256,
        "words_a_passage": words,
        "documents": documents,
        "classes": TOP + 1,
        "answer_tokens": tokens,
        "seed": seed,
    }
    kept = Kept(path, {**settled, "methods": [method.label for method in methods]})
    commit = versions().get("commit")
    scores: dict[str, list[Score]] = {CONTROL: [], **{method.label: [] for method in methods}}
    commits = set()
    for i, one in enumerate(tqdm(asked, desc="pareto", unit="question")):
        row = kept.get(i)
        if row is None:
            made = score(pair, one, methods, tokens, f"pareto-{i}", random.Random(seed + i))
            row = {"commit": commit, **{k: dataclasses.astuple(v) for k, v in made.items()}}
            kept.put(i, row)
        commits.add(row["commit"])
        for label in scores:
            scores[label].append(Score(*row[label]))
    rows = [row_of(label, scores[label], scores[TODAY], methods) for label in scores]
    config = {
        **pair.config,
        **settled,
        "commits": sorted(commit for commit in commits if commit),
        "questions": len(asked),
        "prompt_tokens": statistics.fmean(len(one.ids) for one in asked),
        "segment_tokens": statistics.fmean(
            s["end"] - s["start"] for one in asked for s in one.segments
        ),
    }
    return Outcome(config, rows, [table_of(rows, config)], plot(rows))


def row_of(
    label: str, scores: Sequence[Score], today: Sequence[Score], methods: Sequence[Method]
) -> dict[str, Any]:
    """One method over all questions, with bootstrap intervals of 95 %; its ratio to
    today's default is of the same questions, drawn in pairs."""
    method = next((one for one in methods if one.label == label), None)
    kl, base = [one.kl for one in scores], [one.kl for one in today]
    low, high = interval(kl)
    ratio_low, ratio_high = ratio_interval(kl, base)
    top1 = [one.top1 for one in scores]
    top1_low, top1_high = interval(top1)
    return {
        "method": label,
        "compiled": method.compiled if method is not None else None,
        "policy": method.policy if method is not None else None,
        "questions": len(scores),
        "kl": statistics.fmean(kl),
        "kl_low": low,
        "kl_high": high,
        "ratio": statistics.fmean(kl) / statistics.fmean(base),
        "ratio_low": ratio_low,
        "ratio_high": ratio_high,
        "top1": statistics.fmean(top1),
        "top1_low": top1_low,
        "top1_high": top1_high,
        "share": statistics.fmean(one.share for one in scores),
        "kl_by_question": kl,
    }


def table_of(rows: Sequence[dict[str, Any]], config: dict[str, Any]) -> Table:
    return Table(
        f"{config['questions']} questions over {config['documents']} passages of "
        f"{config['segment_tokens']:.0f} "
        f"tokens ({config['data']})",
        ("method", "computed", "KL (nats a token)", f"of {TODAY}", "top-1, %"),
        [
            (
                row["method"],
                f"{row['share']:.0%}",
                f"{row['kl']:.2g} [{row['kl_low']:.2g}, {row['kl_high']:.2g}]",
                f"{row['ratio']:.2f} [{row['ratio_low']:.2f}, {row['ratio_high']:.2f}]",
                f"{100 * row['top1']:.1f}",
            )
            for row in rows
        ],
        f"Along {config['answer_tokens']} tokens of the greedy answer of full recompute; "
        "bootstrap intervals of 95 % over questions, ratios in pairs. Computed: of the "
        "segments' tokens.",
    )


def plot(rows: Sequence[dict[str, Any]]) -> Any:
    """KL against the share of segment tokens computed: a mark for each way to link, with its
    interval; a line for each way to compile, along those that no cheaper one beats."""
    figure, axes = new_figure(width=8, height=5)
    axis = axes[0]
    for compiled, label in LABELS.items():
        ways = [row for row in rows if row["compiled"] == compiled]
        if not ways:
            continue
        ways.sort(key=lambda row: row["share"])
        share, kl, low, high = (
            [row[name] for row in ways] for name in ("share", "kl", "kl_low", "kl_high")
        )
        (marks,) = axis.plot(share, kl, "o")
        color = marks.get_color()
        axis.vlines(share, low, high, color=color, alpha=0.35, linewidth=1)
        best = list(itertools.accumulate(kl, min))
        front = [(x, y) for x, y, least in zip(share, kl, best, strict=True) if y == least]
        axis.plot(*zip(*front, strict=True), color=color)
        axis.annotate(
            label, front[-1], textcoords="offset points", xytext=(10, 0), va="center", color=color
        )
    for way, label, place in DEFAULTS:
        for row in rows:
            if row["method"] == way:
                at = row["share"], row["kl"]
                axis.plot(*at, marker="o", markersize=13, fillstyle="none", color="black")
                axis.annotate(label, at, textcoords="offset points", xytext=place)
    drawn = [row for row in rows if row["compiled"] in LABELS]
    axis.set(
        xlabel="segment tokens computed when a request is linked",
        ylabel="KL(full recompute || linked), nats a token",
        yscale="log",
        xlim=(-0.01, 1.35 * max(row["share"] for row in drawn)),
        ylim=(min(row["kl"] for row in drawn) / 2, 1.5 * max(row["kl"] for row in drawn)),
    )
    axis.xaxis.set_major_formatter("{x:.0%}")
    for which in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
        which("{x:g}")
    return figure


def main() -> None:
    parser = parser_of(__doc__, f"{QUICK_QUESTIONS} questions, the methods that matter most")
    parser.add_argument(
        "--data",
        type=pathlib.Path,
        default=MUSIQUE,
        help="MuSiQue, or `docstrings`: Python's own documentation (%(default)s)",
    )
    parser.add_argument(
        "--model",
        default="smollm2",
        help="a directory; a hybrid has no guests, and companies of one width (SmolLM2-135M)",
    )
    parser.add_argument("--questions", type=int, help="how many, at least 2 (all)")
    parser.add_argument("--words", type=int, default=WORDS, help="of a passage (%(default)s)")
    parser.add_argument(
        "--documents", type=int, default=DOCUMENTS, help="passages a question (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="order of passages (%(default)s)")
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=[method.label for method in METHODS],
        metavar="METHOD",
        help=f"which, beside `{TODAY}`, by the names that tables give them (all)",
    )
    parser.add_argument("--kept", type=pathlib.Path, help="keep each question's scores here")
    args = parser.parse_args()
    with bench(args.model) as pair:
        outcome = run(
            pair,
            quick=args.quick,
            data=args.data,
            count=args.questions,
            words=args.words,
            documents=args.documents,
            seed=args.seed,
            labels=args.methods,
            path=args.kept,
        )
    deliver(outcome, args)


if __name__ == "__main__":
    main()
