"""How urgent a request is, as SGLang schedules it."""

from __future__ import annotations

import sys
from typing import Any

from sglang.srt.runtime_context import get_schedule


def urgency(manager: Any, priority: int | None) -> int:
    """Of a request's priority; the lowest goes first."""
    schedule = get_schedule()
    if not schedule.enable_priority_scheduling:
        return 0
    if priority is None:
        priority = manager.default_priority_value
    if priority is None:
        return sys.maxsize
    return priority if schedule.schedule_low_priority_values_first else -priority
