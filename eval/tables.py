"""A table of results: printed to a terminal, or written as Markdown."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import rich.table
from rich.console import Console


@dataclasses.dataclass(frozen=True)
class Table:
    """``rows`` hold a cell for each of ``columns``; the first column is text, the
    others are set flush right. ``note`` stands below."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def print(self) -> None:
        """To the terminal."""
        table = rich.table.Table(title=self.title, caption=self.note or None)
        for i, name in enumerate(self.columns):
            table.add_column(name, justify="left" if i == 0 else "right")
        for row in self.rows:
            table.add_row(*row)
        Console(width=130).print(table)

    def markdown(self) -> str:
        """As a paragraph, a table and a note."""
        rules = ["---", *("---:" for _ in self.columns[1:])]
        lines = [self.columns, rules, *self.rows]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return f"**{self.title}**\n\n{table}\n" + (f"\n{self.note}\n" if self.note else "")
