"""Whether requests are linked at all: canary, audit or operator may switch it off.

This process alone knows. What runs already, and what is cached, stays as it is.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

from sglang_pic.metrics.front import counts

logger = logging.getLogger(__name__)

# A report's reason, while linking is off.
CANARY_FAILED = "canary_failed"
AUDIT_FAILED = "audit_failed"
SWITCHED_OFF = "switched_off"


@dataclasses.dataclass
class Gate:
    """Open while requests are linked.

    Attributes:
        reason: what closed it, as reports say it; ``None`` while it is open.
        why: the same in words.
    """

    reason: str | None = None
    why: str | None = None

    def close(self, reason: str, why: str) -> None:
        """Link nothing from now on."""
        self.reason, self.why = reason, why
        counts.linking_off = reason
        logger.warning("sglang_pic: linking is off (%s): %s", reason, why)

    def open(self) -> None:
        """Link again."""
        if self.reason is not None:
            logger.warning("sglang_pic: linking is on again, it was off (%s)", self.reason)
        self.reason = self.why = counts.linking_off = None

    def to_json(self) -> dict[str, Any]:
        """``{"on", "reason", "why"}``."""
        return {"on": self.reason is None, "reason": self.reason, "why": self.why}
