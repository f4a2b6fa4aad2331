"""Every metric: its name, what it means, and where in ``GET /pic/stats`` its value stands.

No Prometheus in here: ``prometheus`` shows them, the documentation and the Grafana
dashboard are held against them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

PREFIX = "sglang_pic:"


@dataclasses.dataclass(frozen=True)
class Metric:
    """One metric: a counter if its name ends in ``_total``, else a gauge.

    ``read`` finds its value in the JSON of the front, or of one rank: a number, or
    with ``label`` one number for each value of that label.
    """

    name: str
    meaning: str
    read: Callable[[dict[str, Any]], Any]
    label: str | None = None

    @property
    def is_counter(self) -> bool:
        return self.name.endswith("_total")

    def samples(self, numbers: dict[str, Any]) -> Iterator[tuple[dict[str, str], float]]:
        """Each value, with its own label if it has one."""
        value = self.read(numbers)
        if self.label is None:
            yield {}, float(value)
        else:
            for name, one in value.items():
                yield {self.label: name}, float(one)


def _prompt_tokens(front: dict[str, Any]) -> dict[str, int]:
    return {
        "link": front["tokens_reused"] - front["tokens_prefix"],
        "prefix": front["tokens_prefix"],
        "computed": front["tokens_computed"],
    }


def _only(numbers: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: numbers[name] for name in names}


# Of ``Counts.to_json``.
FRONT_METRICS = (
    Metric(
        PREFIX + "answers_total",
        "Answers to requests with segments.",
        lambda front: front["answers"],
        "exactness",
    ),
    Metric(
        PREFIX + "unlinked_total",
        "Answers to requests with segments that nothing was linked for.",
        lambda front: front["unlinked"],
        "reason",
    ),
    Metric(
        PREFIX + "named_segments_total",
        "Segments that requests named, by what became of them.",
        lambda front: front["segments"],
        "reason",
    ),
    Metric(
        PREFIX + "linked_segments_total",
        "Segments reused by links, by how they were compiled.",
        lambda front: front["variants"],
        "variant",
    ),
    Metric(
        PREFIX + "found_chunks_seen_total",
        "Chunks of prompts, beside segments that are named, by the rule that has cut them.",
        lambda front: front["chunks_seen"],
        "rule",
    ),
    Metric(
        PREFIX + "found_chunks_recurring_total",
        "Those of them that were seen again behind other tokens.",
        lambda front: front["chunks_recurring"],
        "rule",
    ),
    Metric(
        PREFIX + "found_chunks_compiled_total",
        "Those of them compiled in idle time.",
        lambda front: front["chunks_compiled"],
        "rule",
    ),
    Metric(
        PREFIX + "found_chunks_linked_total",
        "Links of such chunks.",
        lambda front: front["chunks_linked"],
        "rule",
    ),
    Metric(
        PREFIX + "found_tokens_total",
        "Tokens of such chunks reused by links.",
        lambda front: front["tokens_found"],
        "rule",
    ),
    Metric(
        PREFIX + "companies_made_total",
        "Sets of segments computed together, in both orders.",
        lambda front: front["companies"],
    ),
    Metric(
        PREFIX + "companies_queue",
        "Sets of segments that wait for an idle moment to be computed together.",
        lambda front: front["companies_waiting"],
    ),
    Metric(
        PREFIX + "documents_encoded_total",
        "Documents that a trained encoder was given to read.",
        lambda front: front["documents_encoded"],
    ),
    Metric(
        PREFIX + "encoded_tokens_total",
        "Their tokens.",
        lambda front: front["tokens_encoded"],
    ),
    Metric(
        PREFIX + "outside_tokens_total",
        "Tokens of prompts in encoded documents, which were in no row.",
        lambda front: front["tokens_outside"],
    ),
    Metric(
        PREFIX + "prompt_tokens_total",
        "Prompt tokens of requests with segments: reused by a link, from the prefix cache, "
        "or computed.",
        _prompt_tokens,
        "source",
    ),
    Metric(
        PREFIX + "compiled_tokens_total",
        "Tokens computed to compile segments, and the text that opens a prompt.",
        lambda front: front["tokens_compiled"],
    ),
    Metric(
        PREFIX + "compiles_total",
        "Segments and opening texts compiled, but for what was there already.",
        lambda front: front["compiles"],
    ),
    Metric(
        PREFIX + "compile_failures_total",
        "Segments and opening texts whose compile failed.",
        lambda front: front["compile_failures"],
    ),
    Metric(
        PREFIX + "compile_timeouts_total",
        "Segments and opening texts that a link did not wait for any longer.",
        lambda front: front["compile_timeouts"],
    ),
    Metric(
        PREFIX + "compiles_refused_total",
        "Segments and opening texts not compiled: too many of their tenant waited.",
        lambda front: front["compiles_refused"],
    ),
    Metric(
        PREFIX + "compile_seconds_total",
        "Wall time of compiles with anything new, queueing included.",
        lambda front: front["compile_seconds"],
    ),
    Metric(
        PREFIX + "compile_queue",
        "Segments and opening texts being compiled now, or waiting for it.",
        lambda front: front["compiling"],
    ),
    Metric(
        PREFIX + "segment_sources_total",
        "Segments that were missing, by where they came from.",
        lambda front: front["sources"],
        "source",
    ),
    Metric(
        PREFIX + "source_seconds_total",
        "Seconds that this took, each segment's by itself.",
        lambda front: front["source_seconds"],
        "source",
    ),
    Metric(
        PREFIX + "source_bytes_total",
        "Bytes that were read for it.",
        lambda front: front["source_bytes"],
        "source",
    ),
    Metric(
        PREFIX + "store_misses_total",
        "Segments computed though there is a store, by why.",
        lambda front: front["store_misses"],
        "reason",
    ),
    Metric(
        PREFIX + "peer_segments_total",
        "Segments that a peer has compiled for this server.",
        lambda front: front["peer_segments"],
        "peer",
    ),
    Metric(
        PREFIX + "peer_failures_total",
        "Segments that a peer was asked for in vain.",
        lambda front: front["peer_failures"],
        "peer",
    ),
    Metric(
        PREFIX + "peer_back_offs_total",
        "Times that a peer was left alone for a while.",
        lambda front: front["peer_back_offs"],
        "peer",
    ),
    Metric(
        PREFIX + "lent_segments_total",
        "Segments that were compiled here for peers.",
        lambda front: front["lent"],
    ),
    Metric(
        PREFIX + "seconds_saved",
        "Estimate of the computing spared since start, less what compiling took.",
        lambda front: front["seconds_saved"],
    ),
    Metric(
        PREFIX + "audits_total",
        "Composed answers computed again in full, to compare.",
        lambda front: front["audit"]["audits"],
    ),
    Metric(
        PREFIX + "audit_kl_nats_total",
        "Sum of the audits' KL divergences from full recompute.",
        lambda front: front["audit"]["kl_sum"],
    ),
    Metric(
        PREFIX + "audit_kl_nats_max",
        "Largest KL divergence that an audit has found since start.",
        lambda front: front["audit"]["kl_max"],
    ),
    Metric(
        PREFIX + "audit_agreements_total",
        "Audits in which both find the same token likeliest.",
        lambda front: front["audit"]["agreements"],
    ),
    Metric(
        PREFIX + "audits_dropped_total",
        "Answers to be audited that were not: too many waited, or what served them was gone.",
        lambda front: front["audit"]["dropped"],
    ),
    Metric(
        PREFIX + "linking_off",
        "1 if canary, audit or operator have switched linking off.",
        lambda front: front["linking_off"] is not None,
    ),
    Metric(
        PREFIX + "poll_failures_total",
        "Times that the schedulers did not tell their numbers.",
        lambda front: front["poll_failures"],
    ),
)

# Of one rank's answer to the command ``stats``.
RANK_METRICS = (
    Metric(
        PREFIX + "linking",
        "1 if the cache links, 0 if it refuses to.",
        lambda rank: rank["refusal"] is None,
    ),
    Metric(PREFIX + "segments", "Segments known.", lambda rank: rank["segments"]),
    Metric(
        PREFIX + "companies",
        "Sets of segments held as they were computed together.",
        lambda rank: rank["companies"],
    ),
    Metric(PREFIX + "pins", "Segments pinned.", lambda rank: rank["pins"]),
    Metric(
        PREFIX + "kv_bytes",
        "KV held, by kind; pinned is part of segment.",
        lambda rank: _only(rank["kv"], "segment", "company", "turn", "prefix", "pinned", "free"),
        "kind",
    ),
    Metric(
        PREFIX + "kv_capacity_bytes", "KV of the whole pool.", lambda rank: rank["kv"]["capacity"]
    ),
    Metric(
        PREFIX + "kv_budget_bytes",
        "KV that segments may hold.",
        lambda rank: rank["kv"]["budget"],
    ),
    Metric(
        PREFIX + "state_bytes",
        "Linear state held, by kind; pinned is part of segment.",
        lambda rank: _only(rank["state"], "segment", "turn", "checkpoint", "pinned"),
        "kind",
    ),
    Metric(
        PREFIX + "state_budget_bytes",
        "Linear state that may be held.",
        lambda rank: rank["state"]["budget"],
    ),
    Metric(
        PREFIX + "documents",
        "Encoded documents held.",
        lambda rank: rank["encoded"]["documents"],
    ),
    Metric(
        PREFIX + "document_bytes",
        "Keys and values that an encoder has made of them.",
        lambda rank: rank["encoded"]["bytes"],
    ),
    Metric(
        PREFIX + "documents_refused_total",
        "Documents that were encoded and found no room.",
        lambda rank: rank["encoded"]["no_room"],
    ),
    Metric(
        PREFIX + "checkpoints",
        "Checkpoints of ordinary prefixes held.",
        lambda rank: rank["checkpoints"]["held"],
    ),
    Metric(
        PREFIX + "checkpoints_placed_total",
        "Checkpoints kept.",
        lambda rank: rank["checkpoints"]["placed"],
    ),
    Metric(
        PREFIX + "checkpoint_plans_total",
        "Times that the places of a path's checkpoints were looked for.",
        lambda rank: rank["checkpoints"]["plans"],
    ),
    Metric(
        PREFIX + "shared_tokens_total",
        "Tokens of ordinary prefixes shared beyond SGLang's own states: resumed behind a "
        "checkpoint, or recomputed for want of one.",
        lambda rank: {
            "resumed": rank["checkpoints"]["tokens_resumed"],
            "recomputed": rank["checkpoints"]["tokens_recomputed"],
        },
        "fate",
    ),
    Metric(
        PREFIX + "evicted_tokens_total",
        "Tokens evicted, by kind.",
        lambda rank: _only(rank["evicted"], "segment", "turn", "prefix"),
        "kind",
    ),
    Metric(
        PREFIX + "evicted_states_total",
        "Linear states evicted.",
        lambda rank: rank["evicted"]["state"],
    ),
    Metric(
        PREFIX + "store_written_total",
        "Values that the store has taken.",
        lambda rank: rank["store"]["written"],
    ),
    Metric(
        PREFIX + "store_written_bytes_total",
        "Bytes of them.",
        lambda rank: rank["store"]["written_bytes"],
    ),
    Metric(
        PREFIX + "store_dropped_total",
        "Values not written: too much waited.",
        lambda rank: rank["store"]["dropped"],
    ),
    Metric(
        PREFIX + "store_failed_total",
        "Values that the store did not take.",
        lambda rank: rank["store"]["failed"],
        "reason",
    ),
    Metric(
        PREFIX + "store_waiting_bytes",
        "Copies on the host that wait to be written.",
        lambda rank: rank["store"]["waiting_bytes"],
    ),
    Metric(
        PREFIX + "store_reading_bytes",
        "Values being read, or not yet in pages.",
        lambda rank: rank["store"]["reading_bytes"],
    ),
    Metric(
        PREFIX + "fallback_evictions_total",
        "Evictions left to SGLang's own order.",
        lambda rank: rank["fallback_evictions"],
    ),
    Metric(
        PREFIX + "faults_total",
        "Faults of this plug-in that were contained, by place.",
        lambda rank: rank["faults"],
        "place",
    ),
    Metric(
        PREFIX + "refused_total",
        "Segments not kept, and pins not set.",
        lambda rank: rank["refused"],
        "reason",
    ),
)
METRICS = (*FRONT_METRICS, *RANK_METRICS)
