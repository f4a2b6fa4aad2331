"""One forward pass of linked rows as the tables that GPU kernels walk.

Everything that depends on lengths and plans alone, once a step: layers only launch.
Keys are named by row entries, not by slots, so that a step ships a few integers a
span and reads SGLang's own request-to-token table on the device.

Rows with several new tokens *walk* their spans (``RowTable``). So do rows that decode,
unless they share spans: then every distinct span is a *part*, read once for all
requests that see it (``PartTable``). In layers whose queries see a window of positions
alone all rows walk, over runs of positions (``Within``).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence

import torch

from sglang_pic.attention.ship import ship
from sglang_pic.attention.step import StepRow
from sglang_pic.kernels.rows import PartTable, RowTable

# Keys read by all requests, for each key read once: from here on parts are worth
# their partial results. Estimated; on an H100 two rows that share all are enough (docs/gpu.md).
SHARING = 1.1
# Query heads of a tile: rows of its matrix products.
TILE_ROWS = 64
# Keys of one piece of work, at least and at most.
MIN_CHUNK, MAX_CHUNK = 128, 8192


@dataclasses.dataclass(frozen=True)
class Walkers:
    """Rows that walk: their table, int64 [spans] ``offset`` of every span, into how many
    ``splits`` a GPU cuts the keys of each tile; on the host ``lengths`` of the spans, and of each
    row's ``last`` span its index and the rank of its first token."""

    table: RowTable
    offset: torch.Tensor
    splits: int
    lengths: list[int]
    last: list[tuple[int, int]]

    def grown(self, rows: Sequence[StepRow], shape: Shape) -> Walkers | None:
        """For the same rows one step on, or ``None`` if they must be cut anew."""
        if _splits(rows, 1, shape) != self.splits:
            return None
        lengths, done = list(self.lengths), []
        for row, (at, rank) in zip(rows, self.last, strict=True):
            assert row.plan is not None
            done.append(row.prefix - row.plan.reused)
            lengths[at] = done[-1] + 1 - rank
        shipped = _ship({"span_len": lengths, "done": done}, self.table.done.device)
        return dataclasses.replace(
            self, table=dataclasses.replace(self.table, **shipped), lengths=lengths
        )


@dataclasses.dataclass(frozen=True)
class SharedParts:
    """Rows that decode together: their table, int64 [n] ``offset`` of the span of every
    gathered query, ``lengths`` of the parts on the host, and each row's ``own`` part."""

    table: PartTable
    offset: torch.Tensor
    lengths: list[int]
    own: list[int]

    def grown(self, rows: Sequence[StepRow], shape: Shape) -> SharedParts | None:
        """As ``Walkers.grown``."""
        lengths, chunk = list(self.lengths), self.table.chunk
        for part, row in zip(self.own, rows, strict=True):
            assert row.plan is not None
            lengths[part] = row.prefix + 1 - row.plan.reused
            if math.ceil(lengths[part] / chunk) != math.ceil(self.lengths[part] / chunk):
                return None
        shipped = _ship({"kv_len": lengths}, self.table.kv_len.device)
        return dataclasses.replace(
            self, table=dataclasses.replace(self.table, **shipped), lengths=lengths
        )


@dataclasses.dataclass(frozen=True)
class Within:
    """The same rows in layers with a window: ``links`` have several new tokens, ``decodes``
    one."""

    links: Walkers | None
    decodes: Walkers | None

    def grown(self, rows: Sequence[StepRow], shape: Shape) -> Within | None:
        """As ``Walkers.grown``."""
        assert self.links is None and self.decodes is not None
        decodes = self.decodes.grown(rows, shape)
        return None if decodes is None else Within(None, decodes)


@dataclasses.dataclass(frozen=True)
class TableStep:
    """Tables of one forward pass, valid until the next one.

    Attributes:
        links: rows with several new tokens.
        decodes: rows with one that share too little.
        parts: rows with one that share spans.
        within: of layers with a window, in a model that has such.
        linked: indices of the batch's linked rows.
        ordinary: whether there are others.
        settled: every linked row sees all its spans.
        rows: the batch's.
    """

    links: Walkers | None
    decodes: Walkers | None
    parts: SharedParts | None
    within: Within | None
    linked: list[int]
    ordinary: bool
    settled: bool
    rows: Sequence[StepRow]

    def grown(self, rows: Sequence[StepRow], shape: Shape) -> TableStep | None:
        """One step on: while the same rows decode, only their own keys have grown.

        Returns:
            ``None`` if anything else has changed.
        """
        if not self.settled or len(rows) != len(self.rows):
            return None
        for row, before in zip(rows, self.rows, strict=True):
            same = row.plan is before.plan and row.first_query == before.first_query
            if not same or row.extend > 1 or before.extend > 1:
                return None
        linked = [rows[i] for i in self.linked]
        made = {
            name: held.grown(linked, shape)
            for name in ("decodes", "parts", "within")
            if (held := getattr(self, name)) is not None
        }
        if None in made.values():
            return None
        return dataclasses.replace(self, **made, rows=rows)


@dataclasses.dataclass(frozen=True)
class Shape:
    """What tables depend on beside the rows.

    Attributes:
        tile: queries of a tile of several.
        kv_heads: of a layer; of latent attention, whose key is one, the programs that share
            a token's heads.
        programs: pieces of work that keep the device busy.
        windows: whether some layers see a window of positions alone.
    """

    tile: int
    kv_heads: int
    programs: int
    windows: bool = False


def tile_of(heads: int, kv_heads: int) -> int:
    """Queries of a tile, all heads that share a key head included."""
    return max(1, TILE_ROWS * kv_heads // heads)


def sharing_degree(rows: Sequence[StepRow]) -> float:
    """Keys of reused spans that these rows read, for each distinct one; 1 if none."""
    seen: dict[tuple[int, int], int] = {}
    read = 0
    for row in rows:
        assert row.plan is not None
        for span in row.plan.spans:
            read += span.n_tokens
            seen[span.place] = span.n_tokens
    return read / sum(seen.values()) if read else 1.0


def build_tables(
    rows: Sequence[StepRow], shape: Shape, device: torch.device | str
) -> TableStep | None:
    """Arrange one batch.

    Args:
        rows: every row of the batch, in its order; ``row`` is not read.
        shape: of layers and device.
        device: where the tables are needed.

    Returns:
        The tables, or ``None`` if no row is linked.
    """
    linked = [i for i, row in enumerate(rows) if row.plan is not None]
    if not linked:
        return None
    links = [i for i in linked if rows[i].extend > 1]
    singles = [i for i in linked if rows[i].extend == 1]
    # A tile of one query reads the keys for it alone: parts would save nothing.
    shared = shape.tile > 1 and sharing_degree([rows[i] for i in singles]) > SHARING
    splits = _splits([rows[i] for i in singles], 1, shape)
    cut = _splits([rows[i] for i in links], shape.tile, shape)

    def within(some: list[int], tile: int, splits: int) -> Walkers | None:
        return walkers(rows, some, tile, splits, device, by_position=True) if some else None

    return TableStep(
        links=walkers(rows, links, shape.tile, cut, device) if links else None,
        decodes=(walkers(rows, singles, 1, splits, device) if singles and not shared else None),
        parts=parts(rows, singles, shape, device) if shared else None,
        within=(
            Within(within(links, shape.tile, 1), within(singles, 1, splits))
            if shape.windows
            else None
        ),
        linked=linked,
        ordinary=len(linked) < len(rows),
        settled=not links and all(_sees_all(rows[i]) for i in singles),
        rows=rows,
    )


def _sees_all(row: StepRow) -> bool:
    plan = row.plan
    assert plan is not None
    return all(span.first_seer <= row.prefix - plan.reused for span in plan.spans)


def _splits(rows: Sequence[StepRow], tile: int, shape: Shape) -> int:
    """Into how many pieces to cut the keys of each tile of so many queries, so that the
    device is kept busy. Of several new tokens the first see few of a row's keys and the last
    all of them: their programs count half."""
    if not rows:
        return 1
    longest = max(row.prefix + row.extend for row in rows)
    tiles = sum(math.ceil(row.extend / tile) for row in rows)
    wanted = shape.programs / (tiles * shape.kv_heads)
    if tile > 1:
        wanted *= 2
    return max(1, min(math.ceil(wanted), math.ceil(longest / MIN_CHUNK)))


def _ship(
    columns: Mapping[str, Sequence[int]], device: torch.device | str
) -> dict[str, torch.Tensor]:
    return ship({name: torch.tensor(column) for name, column in columns.items()}, device)


def walkers(
    rows: Sequence[StepRow],
    chosen: Sequence[int],
    tile: int,
    splits: int,
    device: torch.device | str,
    *,
    by_position: bool = False,
) -> Walkers:
    """The chosen rows of a batch, each to walk its own spans; cut into runs of positions,
    where they are told ``by_position``."""
    columns: dict[str, list[int]] = {
        field.name: [] for field in dataclasses.fields(RowTable) if field.name != "tile"
    }
    columns["span_indptr"].append(0)
    offset: list[int] = []
    last: list[tuple[int, int]] = []
    queries = 0
    for i, index in enumerate(chosen):
        row = rows[index]
        plan = row.plan
        assert plan is not None
        columns["batch_row"].append(index)
        columns["q_start"].append(row.first_query)
        columns["q_len"].append(row.extend)
        columns["q_at"].append(queries)
        queries += row.extend
        if splits > 1:
            columns["token"] += range(row.first_query, row.first_query + row.extend)
        columns["done"].append(row.prefix - plan.reused)
        total = row.prefix + row.extend
        found = [
            (span.row_start, span.n_tokens, span.first_seer, 0, span.offset) for span in plan.spans
        ]
        found.append((plan.reused, total - plan.reused, 0, 1, 0))
        position = plan.positions(total) if by_position else None
        for start, length, seer, step, by in found:
            for first, count, at in _runs(start, length, position):
                columns["span_start"].append(start + first)
                columns["span_len"].append(count)
                columns["span_seer"].append(seer + step * first)
                columns["span_step"].append(step)
                columns["span_at"].append(at)
                offset.append(by)
        last.append((len(offset) - 1, columns["span_seer"][-1]))
        columns["span_indptr"].append(len(offset))
        for first in range(0, row.extend, tile):
            columns["tile_row"].append(i)
            columns["tile_first"].append(first)
    shipped = _ship({**columns, "offset": offset}, device)
    offsets = shipped.pop("offset").to(torch.int64)
    return Walkers(RowTable(**shipped, tile=tile), offsets, splits, columns["span_len"], last)


def _runs(start: int, length: int, position: torch.Tensor | None) -> list[tuple[int, int, int]]:
    """Runs of positions among row entries ``[start, start + length)``: first entry, counted
    from ``start``, entries, first position; one of all where positions are not told."""
    if position is None:
        return [(0, length, 0)]
    own = position[start : start + length]
    breaks = (own.diff() != 1).nonzero().squeeze(1) + 1
    bounds = [0, *breaks.tolist(), length]
    return [(first, end - first, int(own[first])) for first, end in itertools.pairwise(bounds)]


class _Part:
    """Keys of one part, and the queries that see them."""

    def __init__(self, batch_row: int, start: int, length: int):
        self.batch_row, self.start, self.length = batch_row, start, length
        self.queries: list[int] = []
        self.offsets: list[int] = []


def parts(
    rows: Sequence[StepRow], chosen: Sequence[int], shape: Shape, device: torch.device | str
) -> SharedParts:
    """The chosen rows of a batch, each with one new token, by distinct span."""
    made: list[_Part] = []
    own: list[int] = []
    shared: dict[tuple[int, int], _Part] = {}
    for i, index in enumerate(chosen):
        row = rows[index]
        plan = row.plan
        assert plan is not None
        done = row.prefix - plan.reused
        for span in plan.spans:
            if done < span.first_seer:
                continue
            part = shared.get(span.place)
            if part is None:
                part = shared[span.place] = _Part(index, span.row_start, span.n_tokens)
                made.append(part)
            part.queries.append(i)
            part.offsets.append(span.offset)
        private = _Part(index, plan.reused, done + 1)
        private.queries.append(i)
        private.offsets.append(0)
        own.append(len(made))
        made.append(private)

    tile = shape.tile
    tiles = [math.ceil(len(part.queries) / tile) for part in made]
    read = sum(n * part.length for n, part in zip(tiles, made, strict=True))
    chunk = math.ceil(read * shape.kv_heads / shape.programs)
    chunk = min(MAX_CHUNK, max(MIN_CHUNK, math.ceil(chunk / MIN_CHUNK) * MIN_CHUNK))
    tokens = [rows[index].first_query for index in chosen]
    columns: dict[str, list[int]] = {
        field.name: []
        for field in dataclasses.fields(PartTable)
        if field.name not in ("tile", "chunk")
    }
    columns["token"] = tokens
    columns["qo_indptr"].append(0)
    offset: list[int] = []
    of_query: list[list[int]] = [[] for _ in chosen]
    partials = 0
    for number, part in enumerate(made):
        columns["query"] += [tokens[i] for i in part.queries]
        offset += part.offsets
        columns["qo_indptr"].append(len(offset))
        columns["batch_row"].append(part.batch_row)
        columns["kv_start"].append(part.start)
        columns["kv_len"].append(part.length)
        for first in range(0, len(part.queries), tile):
            seers = part.queries[first : first + tile]
            for kv in range(0, part.length, chunk):
                columns["item_part"].append(number)
                columns["item_first"].append(first)
                columns["item_kv"].append(kv)
                columns["item_out"].append(partials)
                for i in seers:
                    of_query[i].append(partials)
                    partials += 1
    columns["merge_indptr"].append(0)
    for found in of_query:
        columns["merge_index"] += found
        columns["merge_indptr"].append(len(columns["merge_index"]))
    shipped = _ship({**columns, "offset": offset}, device)
    offsets = shipped.pop("offset").to(torch.int64)
    return SharedParts(
        PartTable(**shipped, tile=tile, chunk=chunk), offsets, columns["kv_len"], own
    )
