"""Does company help a hybrid? Its segments compiled in several ways, offline in torch.

    python -m eval.hybrid_company [--model DIR] [--text FILE] [--quick] [--prompts N]
                                  [--kept FILE] [--json FILE] [--plot FILE]

No server: the linked forward of ``eval.models.hybrid.block``. A prompt is an opening, ten
passages of 100 tokens and a question; of each segment a link takes keys and values, the
pair of each linear layer and the convolution's last inputs. These were computed

    alone        by the segment itself
    opening      behind the prompt's opening
    guests       behind the opening and three passages of another document
    groups of k  behind the opening among others of the prompt: the mean of two prefills,
                 in an order that is not the prompt's and in its reverse
    all          the same, the whole prompt one company

``one order``: of the first prefill alone; ``KV`` and ``states``: only the keys and values,
or only the pairs and tails, are those of the company, the others compiled alone.
``no passages`` answers from the opening and the question: what the passages are worth.

KL(full || method) and top-1 are along the greedy answer of full recompute; *lost* is the
log-likelihood of the true continuation, full recompute less method; all in nats a token.

The shipped text hybrid is asked about held-out documents (``--text``, made by
``eval.models.text_hybrid.corpus``) or, without a file, about the project's own passages;
the shipped retrieval hybrid (``--model hybrid``) about its own language.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import itertools
import pathlib
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm
from transformers import Qwen3_5ForCausalLM

from sglang_pic.eval.command import Outcome, deliver, new_figure, parser_of
from sglang_pic.eval.intervals import interval, ratio_interval
from sglang_pic.eval.kept import Kept
from sglang_pic.eval.models.hybrid import model as parts
from sglang_pic.eval.models.hybrid import task
from sglang_pic.eval.models.hybrid.block import (
    Compiled,
    CompiledAttention,
    CompiledLinear,
    Layout,
    compile_in,
    linked,
)
from sglang_pic.eval.models.hybrid.evaluate import load
from sglang_pic.eval.models.hybrid.train import kl
from sglang_pic.eval.models.hybrid.weights import hybrid_path
from sglang_pic.eval.models.text_hybrid.corpus import END_ID, SEPARATOR_ID
from sglang_pic.eval.models.text_hybrid.weights import text_hybrid_path
from sglang_pic.eval.multihop import own_examples
from sglang_pic.eval.oracle.company import first_order
from sglang_pic.eval.tables import Table
from sglang_pic.kernels.operators.pair import Pair

SEGMENTS, LENGTH = 10, 100
OPENING, ASKED, ANSWER = 16, 16, 32  # tokens
PROMPTS, QUICK_PROMPTS = 60, 4
NOTHING = 3  # the convolution's: a seam that repairs no edge
ALONE, BEHIND, AMONG, ALL = "alone", "opening", "guests", "all"
GROUPS = {"groups of 3": 3, "groups of 5": 5, ALL: None}
FURTHER = (0, 4, 32)  # seams of segments compiled alone, beside ``NOTHING`` and 16
IN_PARTS = ("groups of 3", ALL)
TODAY, BARE = "alone, seam 16", "no passages"
GUESTS = 3

Held = list[Compiled]  # of every layer, of one segment or of several one behind the other


@dataclasses.dataclass(frozen=True)
class Prompt:
    """Token ids; all segments of one length; ``answer`` is the true continuation."""

    opening: list[int]
    segments: list[list[int]]
    question: list[int]
    answer: list[int]
    guests: list[list[int]]


@dataclasses.dataclass(frozen=True)
class Score:
    """One method at one prompt; means over the answer's tokens."""

    kl: float
    top1: float
    lost: float
    share: float  # computed of the segments' tokens


# -- prompts ----------------------------------------------------------------------


def of_documents(path: pathlib.Path, count: int, seed: int) -> list[Prompt]:
    """Passages of one held-out document each, in another order than they stand in it; the
    question is the beginning of a further one of its passages, the answer how it goes on."""
    rng = np.random.default_rng(seed)
    kept = np.load(path)
    bounds = itertools.pairwise(kept["starts"])
    documents = [kept["ids"][first:last].tolist() for first, last in bounds]
    body = LENGTH - 1
    wanted = OPENING + (SEGMENTS + 1) * body
    long = [one for one in documents if len(one) >= wanted]
    made: list[Prompt] = []
    while len(made) < count:
        for which in rng.permutation(len(long))[: count - len(made)]:
            document = long[which]
            at = int(rng.integers(OPENING, len(document) - (SEGMENTS + 1) * body + 1))
            cuts = [document[at + i * body : at + (i + 1) * body] for i in range(SEGMENTS + 1)]
            *passages, last = (cuts[i] for i in rng.permutation(len(cuts)))
            other = long[(which + 1) % len(long)]
            made.append(
                Prompt(
                    [END_ID, SEPARATOR_ID, *document[: OPENING - 2]],
                    [[SEPARATOR_ID, *one] for one in passages],
                    [SEPARATOR_ID, *last[: ASKED - 1]],
                    last[ASKED - 1 : ASKED - 1 + ANSWER],
                    [[SEPARATOR_ID, *other[i * body :][:body]] for i in range(GUESTS)],
                )
            )
    return made


def of_passages(tokenizer: Tokenizer, count: int, seed: int) -> list[Prompt]:
    """The project's own passages, cut; a question about one of them and its answer."""
    rng = np.random.default_rng(seed)

    def ids(text: str) -> list[int]:
        return tokenizer.encode(text).ids

    made: list[Prompt] = []
    for example in own_examples():
        cut = [[SEPARATOR_ID, *ids(one.document)][:LENGTH] for one in example.documents]
        segments = [cut[i] for i in rng.permutation(len(cut)) if len(cut[i]) == LENGTH]
        if len(segments) != SEGMENTS or len(made) == count:
            continue
        made.append(
            Prompt(
                [END_ID, *ids("Documents of plain facts and questions about them.\n")],
                segments,
                [SEPARATOR_ID, *ids(f"{example.question}\n")],
                ids(example.answers[0]),
                made[-1].segments[:GUESTS] if made else segments[:GUESTS],
            )
        )
    return made


def of_task(count: int, seed: int) -> list[Prompt]:
    """Held-out examples of the retrieval hybrid's language, a question each."""
    rng = task.generator(held_out=True, stream=seed)
    drawn = [task.example(rng, 8, 128) for _ in range(count + 1)]
    made = []
    for one, other in itertools.pairwise(drawn):
        asked = one.questions[int(rng.integers(len(one.questions)))]
        answer = [*asked.answer, task.END]
        guests = other.segments[:GUESTS]
        made.append(Prompt(one.prefix, one.segments, asked.prompt, answer, guests))
    return made


# -- compiling --------------------------------------------------------------------


def combine(how: Callable[[Sequence[Tensor]], Tensor], held: Sequence[Held]) -> Held:
    """Layer by layer and tensor by tensor."""
    made: Held = []
    for layer in zip(*held, strict=True):
        if isinstance(layer[0], CompiledAttention):
            made.append(CompiledAttention(*(how(xs) for xs in zip(*layer, strict=True))))
        else:
            tensors = ((one.pair.A, one.pair.B, one.tail) for one in layer)
            A, B, tail = (how(xs) for xs in zip(*tensors, strict=True))
            made.append(CompiledLinear(Pair(A, B), tail))
    return made


def joined(held: Sequence[Held]) -> Held:
    return combine(lambda xs: torch.cat(list(xs)), held)


def mean(held: Sequence[Held]) -> Held:
    return combine(lambda xs: torch.stack(list(xs)).mean(0), held)


def picked(held: Held, places: Sequence[int]) -> Held:
    """Of several segments those at ``places``, in that order."""
    return combine(lambda xs: xs[0][list(places)], [held])


def mixed(attention: Held, linear: Held) -> Held:
    """Keys and values of one, pairs and tails of the other."""
    return [
        a if isinstance(a, CompiledAttention) else b for a, b in zip(attention, linear, strict=True)
    ]


class Compiler:
    """One prompt's segments compiled in every way, each for all ``seams`` at once; what
    comes back is by seam."""

    def __init__(self, model: Qwen3_5ForCausalLM, prompt: Prompt, seams: Sequence[int]):
        self._model, self._prompt = model, prompt
        self._cores = [slice(seam, len(prompt.segments[0]) - 1) for seam in seams]

    def alone(self, *before: Sequence[int]) -> list[Held]:
        """Every segment by itself, behind ``before``."""
        front = [token for part in before for token in part]
        ids = torch.tensor([[*front, *one] for one in self._prompt.segments])
        return compile_in(self._model, ids, [len(front)], self._cores)

    def guests(self) -> list[Held]:
        return self.alone(self._prompt.opening, *self._prompt.guests)

    def together(self, members: Sequence[Sequence[int]]) -> list[Held]:
        """One prefill of some of them behind the opening, in that order."""
        opening, length = self._prompt.opening, len(members[0])
        ids = torch.tensor([[*opening, *(token for one in members for token in one)]])
        starts = [len(opening) + i * length for i in range(len(members))]
        return compile_in(self._model, ids, starts, self._cores)

    def groups(self, size: int, rng: np.random.Generator) -> tuple[list[Held], list[Held]]:
        """In companies of ``size``: the mean of both orders, and the first alone."""
        segments = self._prompt.segments
        shuffled = rng.permutation(len(segments)).tolist()
        groups = [shuffled[i : i + size] for i in range(0, len(segments), size)]
        if len(groups[-1]) == 1 and len(groups) > 1:
            groups[-2].extend(groups.pop())
        orders, both, once = [], [], []
        for group in groups:
            texts = first_order([segments[i] for i in group])
            orders += sorted(group, key=lambda i: texts.index(segments[i]))
            forth, back = self.together(texts), self.together(texts[::-1])
            once.append(forth)
            both.append(
                [
                    mean([x, picked(y, range(len(group))[::-1])])
                    for x, y in zip(forth, back, strict=True)
                ]
            )
        places = [orders.index(i) for i in range(len(segments))]
        return (
            [picked(joined(one), places) for one in zip(*both, strict=True)],
            [picked(joined(one), places) for one in zip(*once, strict=True)],
        )

    def all_ways(self, rng: np.random.Generator, quick: bool) -> dict[str, list[Held]]:
        """By name."""
        ways = {ALONE: self.alone()}
        if not quick:
            ways[BEHIND] = self.alone(self._prompt.opening)
        ways[AMONG] = self.guests()
        for name, size in GROUPS.items():
            if quick and name == "groups of 5":
                continue
            both, once = self.groups(size or len(self._prompt.segments), rng)
            ways[name] = both
            if name in IN_PARTS:
                pairs = list(zip(both, ways[ALONE], strict=True))
                ways[f"{name}, one order"] = once
                ways[f"{name}, KV"] = [mixed(own, alone) for own, alone in pairs]
                ways[f"{name}, states"] = [mixed(alone, own) for own, alone in pairs]
        ways["the prompt's own order"] = self.together(self._prompt.segments)
        return ways


# -- asking -----------------------------------------------------------------------


class Asked:
    """A prompt answered in full, and what a method makes of the same answers."""

    def __init__(self, model: Qwen3_5ForCausalLM, prompt: Prompt):
        self._model, self._prompt = model, prompt
        self._context = [*prompt.opening, *(token for one in prompt.segments for token in one)]
        full = self._full(self._context)
        greedy: list[int] = []
        for _ in prompt.answer:
            greedy.append(int(self._ask(full, self._context, [greedy])[0, -1].argmax()))
        self._answers = [greedy, prompt.answer]
        self._reference = self._ask(full, self._context, self._answers)[:, -len(greedy) - 1 : -1]

    def _full(self, context: list[int]) -> list[parts.Memory]:
        ids, kept = torch.tensor([context]), list[parts.Memory]()
        parts.forward(self._model, ids, torch.zeros_like(ids, dtype=torch.bool), kept)
        return kept

    def _ask(
        self, kept: list[parts.Memory], context: list[int], answers: Sequence[list[int]]
    ) -> Tensor:
        """Logits [answers, question and answer, vocabulary]."""
        rows = torch.tensor([[*self._prompt.question, *answer] for answer in answers])
        owner = torch.zeros(len(rows), dtype=torch.int64)
        return parts.ask(self._model, rows, kept, owner, len(context))

    def _score(self, kept: list[parts.Memory], context: list[int], share: float) -> Score:
        found = self._ask(kept, context, self._answers)[:, -len(self._answers[0]) - 1 : -1]
        (full, truth), (own, own_truth) = self._reference, found
        right = torch.tensor(self._answers[1])[:, None]
        lost = [x.log_softmax(-1).gather(1, right).mean().item() for x in (truth, own_truth)]
        same = (full.argmax(-1) == own.argmax(-1)).float().mean().item()
        return Score(kl(full, own).mean().item(), same, lost[0] - lost[1], share)

    def linked(self, held: Held, seam: int) -> Score:
        segments = self._prompt.segments
        layout = Layout(
            len(self._prompt.opening), len(segments), len(segments[0]), seam, len(self._context)
        )
        ids, kept = torch.tensor([self._context]), list[parts.Memory]()
        where = torch.zeros_like(ids, dtype=torch.bool)
        linked(self._model, ids, layout, where, keep=kept, compiled=held)
        return self._score(kept, self._context, (seam + 1) / len(segments[0]))

    def bare(self) -> Score:
        """Without the segments."""
        return self._score(self._full(self._prompt.opening), self._prompt.opening, 0.0)


def label_of(way: str, seam: int) -> str:
    return f"{way}, nothing" if seam == NOTHING else f"{way}, seam {seam}"


@torch.no_grad()
def score(
    model: Qwen3_5ForCausalLM, prompt: Prompt, quick: bool, rng: np.random.Generator
) -> dict[str, Score]:
    """Every method at one prompt."""
    seams = (NOTHING, 16)
    asked = Asked(model, prompt)
    scores = {BARE: asked.bare()}

    def ask(way: str, seams: Sequence[int], found: Sequence[Held]) -> None:
        for seam, held in zip(seams, found, strict=True):
            scores[label_of(way, seam)] = asked.linked(held, seam)

    if not quick:
        ask(ALONE, FURTHER, Compiler(model, prompt, FURTHER).alone())
    for way, found in Compiler(model, prompt, seams).all_ways(rng, quick).items():
        few = len(seams) if way in (ALONE, BEHIND, AMONG, *GROUPS) else 1
        ask(way, seams[:few], found[:few])
    return scores


def run(
    model: Qwen3_5ForCausalLM,
    prompts: Sequence[Prompt],
    settled: dict[str, Any],
    *,
    quick: bool,
    path: pathlib.Path | None = None,
    seed: int = 0,
) -> Outcome:
    """Every method at every prompt.

    Args:
        settled: what the run depends on beside its prompts.
        path: where the scores of each prompt are kept as they come.

    Raises:
        ValueError: what is kept there is of another run.
    """
    kept = Kept(path, {**settled, "quick": quick, "seed": seed})
    scores: dict[str, list[Score]] = {}
    for i, prompt in enumerate(tqdm(prompts, desc="hybrid company", unit="prompt")):
        row = kept.get(i)
        if row is None:
            made = score(model, prompt, quick, np.random.default_rng([seed, i]))
            row = {label: dataclasses.astuple(one) for label, one in made.items()}
            kept.put(i, row)
        for label, values in row.items():
            scores.setdefault(label, []).append(Score(*values))
    rows = [row_of(label, found, scores[TODAY]) for label, found in scores.items()]
    config = {
        **settled,
        "prompts": len(prompts),
        "segments": len(prompts[0].segments),
        "segment_tokens": len(prompts[0].segments[0]),
        "answer_tokens": statistics.fmean(len(one.answer) for one in prompts),
        "seed": seed,
    }
    return Outcome(config, rows, [table_of(rows, config)], plot(rows))


def row_of(label: str, scores: Sequence[Score], today: Sequence[Score]) -> dict[str, Any]:
    """One method over all prompts, with bootstrap intervals of 95 %; the ratio to segments
    compiled alone with a seam of 16 is of the same prompts, drawn in pairs."""
    row: dict[str, Any] = {"method": label, "prompts": len(scores)}
    for field in ("kl", "top1", "lost"):
        values = [getattr(one, field) for one in scores]
        row[field] = statistics.fmean(values)
        row[f"{field}_low"], row[f"{field}_high"] = interval(values)
    values, base = [one.kl for one in scores], [one.kl for one in today]
    row["ratio"] = row["kl"] / statistics.fmean(base)
    row["ratio_low"], row["ratio_high"] = ratio_interval(values, base)
    row["share"] = statistics.fmean(one.share for one in scores)
    row["kl_by_prompt"] = values
    return row


def table_of(rows: Sequence[dict[str, Any]], config: dict[str, Any]) -> Table:
    def between(row: dict[str, Any], name: str, form: str) -> str:
        return "{:{f}} [{:{f}}, {:{f}}]".format(
            *(row[f"{name}{end}"] for end in ("", "_low", "_high")), f=form
        )

    return Table(
        f"{config['prompts']} prompts of {config['segments']} passages of "
        f"{config['segment_tokens']} tokens ({config['model']}, {config['text']})",
        ("method", "computed", "KL (nats a token)", f"of {TODAY}", "top-1, %", "lost"),
        [
            (
                row["method"],
                f"{row['share']:.0%}",
                between(row, "kl", ".2g"),
                between(row, "ratio", ".2f"),
                f"{100 * row['top1']:.1f}",
                between(row, "lost", ".3f"),
            )
            for row in rows
        ],
        "KL and top-1 along full recompute's greedy answer, lost: nats a token of the true "
        "continuation; bootstrap intervals of 95 % over prompts, ratios in pairs. Computed: of "
        f"the segments' tokens; nothing: the convolution's {NOTHING} and the last token.",
    )


def plot(rows: Sequence[dict[str, Any]]) -> Any:
    """KL against the share of segment tokens computed, one line a way of compiling."""
    figure, (axis,) = new_figure(width=7)
    found: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        way = row["method"].rpartition(", ")[0]
        if way in (ALONE, BEHIND, AMONG, *GROUPS):
            found.setdefault(way, []).append((100 * row["share"], row["kl"]))
    for way, points in found.items():
        points.sort()
        (line,) = axis.plot(*zip(*points, strict=True), marker="o")
        axis.annotate(
            way, points[-1], textcoords="offset points", color=line.get_color(),
            xytext=(8, 0), va="top" if way == ALL else "center",
        )  # fmt: skip
    axis.set(xlabel="segment tokens computed, %", ylabel="KL(full || method), nats a token")
    axis.set(ylim=(0, None), xlim=(0, 42))
    return figure


def prepare(args: argparse.Namespace) -> tuple[Qwen3_5ForCausalLM, list[Prompt], dict[str, Any]]:
    """The model, its prompts, and what says which they are."""
    shipped = {"hybrid": hybrid_path(), "text_hybrid": text_hybrid_path()}
    directory = shipped.get(args.model) or pathlib.Path(args.model)
    count = args.prompts or (QUICK_PROMPTS if args.quick else PROMPTS)
    if args.model == "hybrid":
        prompts, text = of_task(count, args.seed), "its task"
    elif args.text is not None:
        prompts, text = of_documents(args.text, count, args.seed), "held-out documents"
    else:
        tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        prompts, text = of_passages(tokenizer, count, args.seed), "the project's own passages"
    model = load(directory)
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.contiguous().numpy().tobytes())
    asked = hashlib.sha256(repr(prompts).encode()).hexdigest()
    return model, prompts, {
        "model": args.model,
        "weights_sha256": digest.hexdigest(),
        "text": text,
        "prompts_sha256": asked,
    }  # fmt: skip


def main() -> None:
    parser = parser_of(__doc__, f"{QUICK_PROMPTS} prompts, the ways that matter most")
    parser.add_argument(
        "--model", default="text_hybrid", help="text_hybrid, hybrid, or a directory (%(default)s)"
    )
    parser.add_argument("--text", type=pathlib.Path, help="held-out documents (held.npz)")
    parser.add_argument("--prompts", type=int, help=f"how many, at least 2 ({PROMPTS})")
    parser.add_argument("--kept", type=pathlib.Path, help="scores as they come, to go on from")
    parser.add_argument("--threads", type=int, default=2, help="of torch (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn (%(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, prompts, settled = prepare(args)
    outcome = run(model, prompts, settled, quick=args.quick, path=args.kept, seed=args.seed)
    deliver(outcome, args)


if __name__ == "__main__":
    main()
