"""One finding of a self-check, against what it may be at most."""

from __future__ import annotations

import dataclasses
import math
from typing import Any


@dataclasses.dataclass(frozen=True)
class Check:
    """``found`` passes if it is at most ``bound``; what is no number does not."""

    found: float
    bound: float

    @property
    def passed(self) -> bool:
        return self.found <= self.bound

    def to_json(self) -> dict[str, Any]:
        """``found`` is ``null`` where it is no number."""
        return {"found": self.found if math.isfinite(self.found) else None, "bound": self.bound}

    @classmethod
    def of_json(cls, value: dict[str, Any]) -> Check:
        """The check that ``to_json`` wrote."""
        found = value["found"]
        return cls(math.nan if found is None else found, value["bound"])
