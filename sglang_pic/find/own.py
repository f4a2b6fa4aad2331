"""An operator's own rules, from a file."""

from __future__ import annotations

import json
import pathlib

from sglang_pic.errors import PicConfigError
from sglang_pic.find.structure import RULES, Rule, own_rules


def rules_with(path: str | None) -> tuple[Rule, ...]:
    """The rules of a JSON object of regular expressions by name, asked first, and the
    table's.

    Args:
        path: ``None`` for the table's alone.

    Raises:
        PicConfigError: the file is not such an object.
    """
    if path is None:
        return RULES
    try:
        patterns = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PicConfigError(f"{path}: {error}") from error
    if not isinstance(patterns, dict):
        raise PicConfigError(f"{path}: must be a JSON object of regular expressions by name")
    return (*own_rules(patterns), *RULES)
