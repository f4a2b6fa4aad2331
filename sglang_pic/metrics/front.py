"""What this process has counted since it started: answers, segments, tokens, compiles."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from sglang_pic.link.report import HIT


@dataclasses.dataclass
class AuditCounts:
    """Composed answers that were computed again in full, to see how far they are off.

    Attributes:
        audits: answers audited.
        kl_sum, kl_max: over the audits, of each one's KL divergence in nats.
        agreements: audits in which both find the same token likeliest, at every
            place compared.
        dropped: answers of the sample that were not audited: others came before
            there was time, or what served them was gone.
    """

    audits: int = 0
    kl_sum: float = 0.0
    kl_max: float = 0.0
    agreements: int = 0
    dropped: int = 0

    def observe(self, kl: float, agrees: bool) -> None:
        """Count one audit."""
        self.audits += 1
        self.kl_sum += kl
        self.kl_max = max(self.kl_max, kl)
        self.agreements += agrees

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclasses.dataclass
class Counts:
    """Counters of one front process; only those of what is under way or waits
    fall, and ``linking_off`` changes.

    Attributes:
        answers: answers to requests with segments, by exactness.
        unlinked: those of them that nothing was linked for, by the report's reason.
        segments: segments that requests named, by what became of them.
        variants: those reused by links, by how they were compiled: ``alone``, in
            ``company``, or among ``guests``.
        tokens_reused, tokens_computed: of those requests' prompts.
        tokens_prefix: those of ``tokens_reused`` from the ordinary prefix cache.
        tokens_compiled: computed ahead of a link, on demand or by ``/pic/compile``.
        tokens_opening: those of ``tokens_compiled`` in text that opens a prompt,
            which then counts as prefix.
        chunks_seen, chunks_recurring, chunks_compiled, chunks_linked: chunks of prompts,
            beside segments that are named, by the rule that has cut them: all; those seen again
            behind other tokens; those of them compiled in idle time; and links of them.
        tokens_found: tokens that those links have reused, by rule.
        companies: made, in both orders.
        companies_waiting: wanted for an idle moment, guests' included, and not made yet.
        documents_encoded, tokens_encoded: documents that a trained encoder has read.
        tokens_outside: of prompts, in encoded documents: they were in no row.
        compiles, compile_failures: segments and opening texts, by outcome.
        compile_timeouts: those that a link did not wait for any longer.
        compiles_refused: those not compiled since too many of their tenant waited.
        compiling: those under way now, queued or sent.
        compile_seconds, tokens_timed: wall time of the compiles that computed anything
            new, what ran beside each other counted once, and their tokens.
        sources: segments that were missing, by where they came from (``server.sources``).
        source_seconds, source_bytes: that this took, and read.
        store_misses: those that were computed though there is a store, by why.
        peer_segments, peer_failures: segments that a peer was asked for and that came, or did
            not, by its address.
        peer_back_offs: times that a peer was left alone for a while, by its address.
        lent: segments that were compiled here for peers.
        poll_failures: times the schedulers did not tell their numbers to ``/metrics``.
        linking_off: why linking is switched off (``server.gate``), or ``None``.
    """

    answers: dict[str, int] = dataclasses.field(default_factory=dict)
    unlinked: dict[str, int] = dataclasses.field(default_factory=dict)
    segments: dict[str, int] = dataclasses.field(default_factory=dict)
    variants: dict[str, int] = dataclasses.field(default_factory=dict)
    tokens_reused: int = 0
    tokens_prefix: int = 0
    tokens_computed: int = 0
    tokens_compiled: int = 0
    tokens_opening: int = 0
    chunks_seen: dict[str, int] = dataclasses.field(default_factory=dict)
    chunks_recurring: dict[str, int] = dataclasses.field(default_factory=dict)
    chunks_compiled: dict[str, int] = dataclasses.field(default_factory=dict)
    chunks_linked: dict[str, int] = dataclasses.field(default_factory=dict)
    tokens_found: dict[str, int] = dataclasses.field(default_factory=dict)
    companies: int = 0
    companies_waiting: int = 0
    documents_encoded: int = 0
    tokens_encoded: int = 0
    tokens_outside: int = 0
    compiles: int = 0
    compile_failures: int = 0
    compile_timeouts: int = 0
    compiles_refused: int = 0
    compiling: int = 0
    compile_seconds: float = 0.0
    tokens_timed: int = 0
    sources: dict[str, int] = dataclasses.field(default_factory=dict)
    source_seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    source_bytes: dict[str, int] = dataclasses.field(default_factory=dict)
    store_misses: dict[str, int] = dataclasses.field(default_factory=dict)
    peer_segments: dict[str, int] = dataclasses.field(default_factory=dict)
    peer_failures: dict[str, int] = dataclasses.field(default_factory=dict)
    peer_back_offs: dict[str, int] = dataclasses.field(default_factory=dict)
    lent: int = 0
    poll_failures: int = 0
    linking_off: str | None = None
    audit: AuditCounts = dataclasses.field(default_factory=AuditCounts)

    def observe(self, report: dict[str, Any]) -> None:
        """Count one report: one for each answer, of a batch one for each prompt, of
        several samples one for each sample, since each is linked."""
        _add(self.answers, report["exactness"])
        if report["reason"] is not None:
            _add(self.unlinked, report["reason"])
        for segment in report["segments"]:
            _add(self.segments, segment["reason"])
            if segment["reason"] == HIT:
                _add(self.variants, variant_of(segment))
        self.tokens_reused += report["tokens_reused"]
        self.tokens_prefix += report["prefix_tokens"]
        self.tokens_computed += report["tokens_computed"]
        self.tokens_outside += report.get("tokens_outside", 0)

    def observe_encode(self, tokens: Sequence[int]) -> None:
        """Count documents that the encoder has read, of so many tokens each."""
        self.documents_encoded += len(tokens)
        self.tokens_encoded += sum(tokens)

    def observe_chunks(self, seen: Mapping[str, int], recurring: Mapping[str, int]) -> None:
        """Count the chunks of one prompt, by rule."""
        for rule, n in seen.items():
            _add(self.chunks_seen, rule, n)
        for rule, n in recurring.items():
            _add(self.chunks_recurring, rule, n)

    def observe_found_compile(self, rule: str) -> None:
        """Count a chunk that was compiled in idle time."""
        _add(self.chunks_compiled, rule)

    def observe_found(self, rule: str, tokens: int) -> None:
        """Count a chunk that was linked, and its tokens that were reused."""
        _add(self.chunks_linked, rule)
        _add(self.tokens_found, rule, tokens)

    def observe_source(self, kind: str, reason: str, seconds: float, nbytes: int) -> None:
        """Count a segment that was missing (``server.sources.Source``)."""
        _add(self.sources, kind)
        self.source_seconds[kind] = self.source_seconds.get(kind, 0.0) + seconds
        _add(self.source_bytes, kind, nbytes)
        if kind == "computed" and reason != "no_store":
            _add(self.store_misses, reason)

    def observe_peer(self, url: str, came: bool) -> None:
        """Count a segment that a peer was asked for."""
        _add(self.peer_segments if came else self.peer_failures, url)

    def observe_back_off(self, url: str) -> None:
        """Count that a peer is left alone for a while."""
        _add(self.peer_back_offs, url)

    def observe_compile(
        self, computed: Sequence[int], of_segment: Sequence[bool], seconds: float, page_size: int
    ) -> None:
        """Count compiles that have ended.

        Args:
            computed: tokens that each item took. Of one that was there already SGLang
                computes the end again, up to a page.
            of_segment: whether it is a segment; else it is the text that opens a prompt.
            seconds: wall time they took.
            page_size: SGLang's.
        """
        tokens = sum(computed)
        new = sum(one > page_size for one in computed)
        self.compiles += new
        self.tokens_compiled += tokens
        self.tokens_opening += tokens - sum(itertools.compress(computed, of_segment))
        # Without anything new the time is no measure of what a token takes.
        if new:
            self.compile_seconds += seconds
            self.tokens_timed += tokens

    @property
    def seconds_saved(self) -> float:
        """Estimate of the computing that links have spared, less what compiling took.

        Tokens linked, less tokens compiled for it, at the seconds a token took in
        this server's own compile batches. That is wall time, queueing and what else
        ran included, so under load it is too high; a link's own overhead is not in
        it. Below zero while compiles have not paid off yet.
        """
        if not self.tokens_timed:
            return 0.0
        linked = self.tokens_reused - self.tokens_prefix
        compiled = self.tokens_compiled - self.tokens_opening
        return (linked - compiled) * self.compile_seconds / self.tokens_timed

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "seconds_saved": self.seconds_saved}


def variant_of(segment: dict[str, Any]) -> str:
    """How what a segment reuses was compiled, of a report's segment."""
    if not segment["company"]:
        return "alone"
    return "guests" if segment["guests"] else "company"


def _add(counter: dict[str, int], name: str, n: int = 1) -> None:
    counter[name] = counter.get(name, 0) + n


counts = Counts()
