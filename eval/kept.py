"""Rows of a run of hours, kept as they come: one that was cut off goes on where it was."""

from __future__ import annotations

import json
import pathlib
from typing import Any


class Kept:
    """Rows by a number, and in a file of JSON lines if there is one.

    Args:
        path: the file, or ``None``.
        config: what a row depends on; the file's first line.

    Raises:
        ValueError: the file is of a run with another configuration, or no such file.
    """

    def __init__(self, path: pathlib.Path | None, config: dict[str, Any]):
        self._path = path
        self._rows: dict[int, Any] = {}
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        if lines and not _is_json(lines[-1]):
            # It was cut off while it wrote.
            lines.pop()
            path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        try:
            found = [json.loads(line) for line in lines]
            self._rows = {row["number"]: row["row"] for row in found[1:]}
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path} holds no rows of a run: {error!r}") from error
        if not lines:
            self._append(config)
        elif found[0] != json.loads(json.dumps(config)):
            raise ValueError(f"{path} is of a run with another configuration: {found[0]}")

    def get(self, number: int) -> Any:
        """The row of this number, or ``None``."""
        return self._rows.get(number)

    def put(self, number: int, row: Any) -> None:
        """Keep a row."""
        self._rows[number] = row
        self._append({"number": number, "row": row})

    def _append(self, line: Any) -> None:
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except json.JSONDecodeError:
        return False
    return True
