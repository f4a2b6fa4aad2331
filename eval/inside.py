"""What a link does inside a model, as arrays and pictures.

For ``notebooks/inside_a_link.ipynb``. What is compared comes from ``eval.oracle``:
a linked forward and full recompute of the same prompt, computed without a server
and without the code that serves. The ``plot_`` functions draw into axes that the
caller made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from sglang_pic.eval.oracle.dense import Segment

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch import Tensor

# Kinds of tokens in a linked row; only those of a core are reused.
TEXT, HEAD, CORE, TAIL = "text", "head", "core", "tail"
COLOURS = {TEXT: "0.65", HEAD: "tab:orange", CORE: "tab:blue", TAIL: "gold"}
_LINES = ("tab:red", "tab:orange", "tab:blue", "black", "tab:green", "tab:purple")


class Piece(NamedTuple):
    """Tokens [start, end) of a prompt that are of one kind; ``row`` is where the
    first of them stands in the linked row, the others follow."""

    kind: str
    start: int
    end: int
    row: int


def pieces(
    n_tokens: int, segments: Sequence[Segment], cores: Sequence[frozenset[int]]
) -> list[Piece]:
    """The pieces of a linked prompt, in the prompt's order.

    A row holds the cores first, then all computed tokens, both in prompt order.

    Args:
        segments, cores: as in ``oracle.dense.layout`` and its result.
    """
    cuts: list[tuple[str, int, int]] = []
    at = 0
    for (start, end), core in zip(segments, cores, strict=True):
        first, last = (min(core), max(core) + 1) if core else (end, end)
        cuts += [(TEXT, at, start), (HEAD, start, first), (CORE, first, last), (TAIL, last, end)]
        at = end
    cuts.append((TEXT, at, n_tokens))
    reused, computed = 0, sum(len(core) for core in cores)
    made = []
    for kind, start, end in cuts:
        if start == end:
            continue
        made.append(Piece(kind, start, end, reused if kind == CORE else computed))
        if kind == CORE:
            reused += end - start
        else:
            computed += end - start
    return made


def relative(found: Tensor, reference: Tensor, dims: int = 1) -> np.ndarray:
    """Relative L2 distance, ‖found − reference‖ / ‖reference‖, over the last ``dims``
    dimensions."""
    axes = tuple(range(-dims, 0))
    difference = (found - reference).double().square().sum(axes).sqrt()
    return (difference / reference.double().square().sum(axes).sqrt()).numpy()


def paid(attention: Tensor, payers: range, receivers: range) -> np.ndarray:
    """Share of its attention that each payer pays to each receiver, mean over layers.

    Args:
        attention: [layers, tokens, tokens], as in ``oracle.dense.Inner``.
        payers, receivers: tokens of the prompt.

    Returns:
        [payers, receivers].
    """
    block = attention[:, payers.start : payers.stop, receivers.start : receivers.stop]
    return block.mean(0).numpy()


# -- pictures -----------------------------------------------------------------


def plot_row(axis: Axes, parts: Sequence[Piece], names: Sequence[str]) -> None:
    """The prompt above, its linked row below, and where each core went.

    Args:
        names: of the segments that have a core, in prompt order.
    """
    from matplotlib.patches import Patch

    n_tokens = parts[-1].end
    reused = sum(part.end - part.start for part in parts if part.kind == CORE)
    waiting = list(names)
    for part in parts:
        width, colour = part.end - part.start, COLOURS[part.kind]
        for left, bottom in ((part.start, 2.0), (part.row, 0.0)):
            axis.broken_barh([(left, width)], (bottom, 0.7), color=colour, ec="white", lw=0.8)
        if part.kind == CORE:
            name = waiting.pop(0)
            x = [part.start, part.end, part.row + width, part.row]
            axis.fill(x, [2.0, 2.0, 0.7, 0.7], color=colour, alpha=0.12, lw=0)
            for left, bottom in ((part.start, 2.0), (part.row, 0.0)):
                middle = left + width / 2
                axis.text(middle, bottom + 0.35, name, ha="center", va="center", color="white")
    for left, right, text in (
        (0, reused, f"reused: {reused} tokens"),
        (reused, n_tokens, f"computed: {n_tokens - reused}"),
    ):
        axis.annotate("", (left, -0.2), (right, -0.2), arrowprops={"arrowstyle": "<->"})
        axis.text((left + right) / 2, -0.35, text, ha="center", va="top")
    axis.set(
        xlim=(-0.5, n_tokens + 0.5),
        ylim=(-0.95, 2.9),
        yticks=(2.35, 0.35),
        yticklabels=("prompt order", "row order"),
        xlabel="tokens",
    )
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(left=False)
    kinds = {
        TEXT: "text outside of segments",
        HEAD: "head (computed)",
        CORE: "core (reused)",
        TAIL: "tail (computed)",
    }
    handles = [Patch(color=COLOURS[kind], label=label) for kind, label in kinds.items()]
    axis.legend(handles=handles, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))


def plot_by_token(
    axis: Axes, curves: Mapping[str, np.ndarray], tokens: range, *, border: int, **settings: Any
) -> None:
    """One line a method over some tokens of the prompt; a border between segments
    lies in front of token ``border``.

    Args:
        curves: [tokens of the prompt] each.
        settings: of the axis.
    """
    for (label, values), colour in zip(curves.items(), _LINES, strict=False):
        axis.plot(tokens, values[tokens.start : tokens.stop], marker=".", color=colour, label=label)
    axis.axvline(border - 0.5, color="0.5", linestyle="--", lw=1)
    axis.set(xlim=(tokens.start - 0.5, tokens.stop - 0.5), **settings)
    axis.grid(alpha=0.3)


def label_tokens(axis: Axes, words: Sequence[str], tokens: range) -> None:
    """Write each token under its place."""
    shown = [words[i].replace("\n", "\\n").strip() or "␣" for i in tokens]
    axis.set_xticks(tokens, shown, rotation=90, fontsize=8)


def plot_layers(
    axis: Axes, values: np.ndarray, tokens: range, *, border: int, limits: tuple[float, float]
) -> Any:
    """A deviation by layer and token on a logarithmic scale; returns the image.

    Args:
        values: [layers, tokens of the prompt].
        limits: of the scale.
    """
    image = axis.imshow(
        np.clip(values[:, tokens.start : tokens.stop], *limits),
        aspect="auto",
        origin="lower",
        norm="log",
        vmin=limits[0],
        vmax=limits[1],
        cmap="magma",
        extent=(tokens.start - 0.5, tokens.stop - 0.5, -0.5, len(values) - 0.5),
    )
    axis.axvline(border - 0.5, color="white", linestyle="--", lw=1)
    axis.set_xlabel("token of the prompt")
    return image


def plot_states(
    axes: Sequence[Axes], deviations: Mapping[str, np.ndarray], segments: Sequence[Segment]
) -> None:
    """The state's deviation behind each token, a panel for each layer; every other
    segment is shaded.

    Args:
        deviations: [layers, tokens] by method.
    """
    for layer, axis in enumerate(axes):
        for start, end in segments[::2]:
            axis.axvspan(start - 0.5, end - 0.5, color="0.93", lw=0)
        for (label, values), colour in zip(deviations.items(), _LINES, strict=False):
            axis.plot(values[layer], color=colour, label=label, lw=1.3)
        axis.set(ylim=(-0.05, 1.1), ylabel=f"linear layer {layer + 1}")
        axis.margins(x=0)
        axis.grid(alpha=0.3)
    axes[-1].set_xlabel("token of the prompt")
