"""What ``GET /pic/stats`` of an imagined server says, for tests that read it."""

from __future__ import annotations

from typing import Any

MIB = 1 << 20


def rank_stats(**changes: Any) -> dict[str, Any]:
    """One rank's answer to the command ``stats``; ``changes`` replace fields of it."""
    return {
        "clock": 90,
        "segments": 12,
        "companies": 2,
        "pins": 1,
        "page_size": 16,
        "refusal": None,
        "checkpoints": {
            "held": 3,
            "placed": 9,
            "plans": 40,
            "tokens_resumed": 12_000,
            "tokens_recomputed": 900,
        },
        "kv": {
            "capacity": 100 * MIB,
            "budget": 75 * MIB,
            "segment": 40 * MIB,
            "company": 4 * MIB,
            "turn": 5 * MIB,
            "prefix": 10 * MIB,
            "pinned": 8 * MIB,
            "free": 26 * MIB,
        },
        "state": {
            "budget": 64 * MIB,
            "segment": 16 * MIB,
            "turn": 0,
            "checkpoint": 8 * MIB,
            "pinned": 4 * MIB,
        },
        "quota": {"pinned_share": 0.5},
        "evicted": {"segment": 700, "prefix": 20, "turn": 3, "state": 5},
        "refused": {"admission": 6, "budget": 1, "quota": 2, "company": 3},
        "encoded": {
            "encoder": None,
            "documents": 5,
            "bytes": 2 * MIB,
            "in_use": 1,
            "budget": 64 * MIB,
            "encoded": 9,
            "encoded_tokens": 900,
            "no_room": 1,
        },
        "store": {
            "waiting_bytes": MIB,
            "reading_bytes": 0,
            "written": 6,
            "written_bytes": 60 * MIB,
            "present": 2,
            "dropped": 1,
            "failed": {"store_failed": 1},
        },
        "fallback_evictions": 4,
        "faults": {"match": 1},
        **changes,
    }


def report(**changes: Any) -> dict[str, Any]:
    """The report of an answer that linked one segment and computed another."""
    segment = {
        "start": 0,
        "end": 60,
        "id": "a",
        "tokens_reused": 40,
        "tokens_computed": 20,
        "company": 0,
    }
    return {
        "exactness": "composed",
        "reason": None,
        "tokens_reused": 50,
        "tokens_computed": 70,
        "prefix_tokens": 10,
        "segments": [
            {**segment, "hit": True, "reason": "hit"},
            {**segment, "hit": False, "reason": "not_compiled"},
        ],
        "tokens_compiled": 60,
        **changes,
    }
