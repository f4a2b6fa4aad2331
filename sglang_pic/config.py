"""Settings of one server, the same in every one of its processes.

SGLang's ``ServerArgs`` cannot carry a plug-in's fields, so the launcher hands
the settings to SGLang's sub-processes as JSON in ``SGLANG_PIC_CONFIG``. Under
plain ``sglang serve --radix-cache-backend pic`` the same variable may be set
by hand; without it the defaults hold.
"""

from __future__ import annotations

import dataclasses
import json
import os

from sglang_pic.errors import PicConfigError
from sglang_pic.find.base import FIND
from sglang_pic.link.policy import AUTO, COMPANIES, MODES, POLICIES, STATE_POLICIES, LinkOptions

ENV_NAME = "SGLANG_PIC_CONFIG"
STATE_DTYPES = ("float32", "float16")
EXACT = "exact"
COLD = (EXACT, "link")
IDLE = "idle"
COMPANY_WHEN = (IDLE, "asked")
ON, OFF = "on", "off"
GUESTS = (ON, OFF)
PAYS = "pays"
STORE_WHEN = (PAYS, "always")
CHECKPOINTS = (AUTO, OFF)
AUDIT_ACTIONS = ("log", "off")


@dataclasses.dataclass(frozen=True)
class PicConfig:
    """Server-wide settings.

    Attributes:
        seam: seam width w in tokens: how many tokens at the head of a segment
            every link computes anew (EPIC's k, MEPIC's first block).
        policy: default recompute policy, one of ``none``, ``seam``, ``graded``, ``full``.
        company: whose company a segment may have been computed in: ``subset``, of
            segments that all stand in the prompt behind the same opening; ``tenant``, of
            any of its tenant behind that; ``off``, none is made.
        company_when: companies are made of what recurs, when the server is ``idle``, and
            when they are ``asked`` for.
        guests: whether a segment that has been linked as compiled alone is computed
            behind passages of its kind as well (``server.guests``): ``on`` or ``off``.
        company_seam: seam width of a segment that was computed in company.
        share: of the segments' tokens that ``graded`` may compute.
        mode: ``share`` reads one physical copy of a segment's pages for every
            request and position; ``relocate`` copies them into the request
            with K rotated to its true position.
        compile_context: token ids behind which every segment is compiled;
            empty compiles a segment from nothing.
        find: where segments are looked for that no request names: nowhere (``off``),
            in the blocks that prompts are built of (``structure``), and by what their tokens
            are too (``content``).
        find_rules: JSON file of an operator's own rules of structure, regular expressions
            by name; ``None`` for none.
        min_segment: a segment shorter than this many tokens is computed, not
            compiled.
        cold: what a request gets that would wait for more than it gains, since none or
            little of it is compiled: an ``exact`` answer at once, or a ``link``.
        compile_timeout_s: how long a link waits for its segments to be compiled
            whatever it costs; from then on it waits for what is sooner compiled than
            computed anew.
        compile_limit_s: the longest such wait in all; then a link goes on without them.
        compiles, tenant_compiles: segments given to SGLang to be compiled at a time,
            of all tenants and of one; the others wait in the front.
        compile_queue: segments of one tenant that may wait there; a link goes on
            without what is more.
        kv_mib: budget in MiB for KV pages of compiled segments and conversations;
            ``None`` for nine tenths of the pool, half with a host tier. Ordinary prefixes
            and running requests have what is left of the pool, or whatever is unused.
        pin_share: how much of each budget the pins of one tenant may take, from
            0 to 1. All pins together take at most the larger of it and a half.
        store: address of the store of segments (``store.address``); ``None`` for none.
        store_key_file: file of the operator's key, by which values are signed; ``None``
            for none.
        store_when: what the store has is read where that is sooner done than computing it
            (``pays``), or ``always``.
        store_timeout_s: how long a segment is waited for that the store has; then it is
            compiled.
        peers: addresses of other servers of the same model that compile segments for this
            one, separated by commas, or ``router+URL`` of SGLang's router before them; they
            share the store. ``None`` for none.
        peer_timeout_s: how long a peer may take for a segment; then it is compiled here.
        tenants: JSON file of salts by API key; ``None`` lets clients name theirs.
        state: default state policy of hybrid models: ``compose``, ``last``, or
            ``auto`` to choose by ``server.calibrate``.
        state_dtype: how operators and end states are stored.
        state_mib: budget for them, and for documents that an encoder has read, in MiB.
        checkpoints: states of ordinary prefixes of hybrid models are kept where requests
            leave them: ``auto``, or ``off``.
        operator_threshold: an operator whose norm is below this is not stored
            but taken for zero: the segment outlived the layer's memory.
        encoder: directory of a trained encoder, and its cross blocks, for this model
            (``sglang_pic.encoder``); ``None`` for none.
        decode_graphs: capture CUDA graphs for decode with linked rows too.
        canary_kl: how far from full recompute the canary may be linked, in nats; above
            it nothing is.
        canary_timeout_s: how long the canary may take; then nothing is known, and linked.
        audit_rate: share of composed answers that are computed again in full.
        audit_kl: how far off they may be in the mean, in nats.
        audit_action: what to do above that: ``log`` it, or turn linking ``off``.
    """

    seam: int = 16
    policy: str = "seam"
    company: str = "subset"
    company_when: str = IDLE
    guests: str = ON
    company_seam: int = 0
    share: float = 0.15
    mode: str = "share"
    compile_context: tuple[int, ...] = ()
    find: str = OFF
    find_rules: str | None = None
    min_segment: int = 32
    cold: str = EXACT
    compile_timeout_s: float = 60.0
    compile_limit_s: float = 300.0
    compiles: int = 64
    tenant_compiles: int = 32
    compile_queue: int = 4096
    kv_mib: int | None = None
    pin_share: float = 0.25
    store: str | None = None
    store_key_file: str | None = None
    store_when: str = PAYS
    store_timeout_s: float = 5.0
    peers: str | None = None
    peer_timeout_s: float = 60.0
    tenants: str | None = None
    state: str = "compose"
    state_dtype: str = "float32"
    state_mib: int = 1024
    checkpoints: str = AUTO
    operator_threshold: float = 1e-6
    decode_graphs: bool = False
    encoder: str | None = None
    canary_kl: float = 1.0
    canary_timeout_s: float = 300.0
    audit_rate: float = 0.0
    audit_kl: float = 0.5
    audit_action: str = "log"

    def __post_init__(self) -> None:
        for name in ("seam", "company_seam"):
            if getattr(self, name) < 0:
                raise PicConfigError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.company not in COMPANIES:
            raise PicConfigError(f"company must be one of {COMPANIES}, got {self.company!r}")
        if self.find not in FIND:
            raise PicConfigError(f"find must be one of {FIND}, got {self.find!r}")
        if self.cold not in COLD:
            raise PicConfigError(f"cold must be one of {COLD}, got {self.cold!r}")
        if self.guests not in GUESTS:
            raise PicConfigError(f"guests must be one of {GUESTS}, got {self.guests!r}")
        if self.company_when not in COMPANY_WHEN:
            raise PicConfigError(
                f"company_when must be one of {COMPANY_WHEN}, got {self.company_when!r}"
            )
        if not 0 <= self.share <= 1:
            raise PicConfigError(f"share must be from 0 to 1, got {self.share}")
        if self.min_segment < 1:
            raise PicConfigError(f"min_segment must be at least 1, got {self.min_segment}")
        if self.compile_timeout_s <= 0:
            raise PicConfigError(f"compile_timeout_s must be above 0, got {self.compile_timeout_s}")
        if self.compile_limit_s < self.compile_timeout_s:
            raise PicConfigError(
                f"compile_limit_s must be at least compile_timeout_s, got {self.compile_limit_s}"
            )
        for name in ("compiles", "tenant_compiles", "compile_queue"):
            if getattr(self, name) < 1:
                raise PicConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.store_when not in STORE_WHEN:
            raise PicConfigError(f"store_when must be one of {STORE_WHEN}, got {self.store_when!r}")
        if self.store_timeout_s <= 0:
            raise PicConfigError(f"store_timeout_s must be above 0, got {self.store_timeout_s}")
        if self.peer_timeout_s <= 0:
            raise PicConfigError(f"peer_timeout_s must be above 0, got {self.peer_timeout_s}")
        if self.canary_timeout_s <= 0:
            raise PicConfigError(f"canary_timeout_s must be above 0, got {self.canary_timeout_s}")
        if self.policy not in POLICIES:
            raise PicConfigError(f"policy must be one of {sorted(POLICIES)}, got {self.policy!r}")
        if self.state not in (*STATE_POLICIES, AUTO):
            choices = (*STATE_POLICIES, AUTO)
            raise PicConfigError(f"state must be one of {choices}, got {self.state!r}")
        if self.state_dtype not in STATE_DTYPES:
            raise PicConfigError(
                f"state_dtype must be one of {STATE_DTYPES}, got {self.state_dtype!r}"
            )
        if self.checkpoints not in CHECKPOINTS:
            raise PicConfigError(
                f"checkpoints must be one of {CHECKPOINTS}, got {self.checkpoints!r}"
            )
        if self.kv_mib is not None and self.kv_mib < 1:
            raise PicConfigError(f"kv_mib must be at least 1, got {self.kv_mib}")
        if not 0 <= self.pin_share <= 1:
            raise PicConfigError(f"pin_share must be from 0 to 1, got {self.pin_share}")
        if self.state_mib < 1 or self.operator_threshold < 0:
            raise PicConfigError("state_mib must be at least 1, operator_threshold at least 0")
        if not 0 <= self.audit_rate <= 1:
            raise PicConfigError(f"audit_rate must be from 0 to 1, got {self.audit_rate}")
        if self.canary_kl < 0 or self.audit_kl < 0:
            raise PicConfigError("canary_kl and audit_kl must be at least 0")
        if self.audit_action not in AUDIT_ACTIONS:
            raise PicConfigError(
                f"audit_action must be one of {AUDIT_ACTIONS}, got {self.audit_action!r}"
            )
        if self.mode not in MODES:
            raise PicConfigError(f"mode must be one of {sorted(MODES)}, got {self.mode!r}")

    @property
    def link_defaults(self) -> LinkOptions:
        """What a request gets that names no option of its own."""
        return LinkOptions(
            policy=self.policy,
            seam=self.seam,
            company=self.company,
            company_seam=self.company_seam,
            share=self.share,
            mode=self.mode,
            state=self.state,
        )

    def to_env(self) -> None:
        """Publish the settings to this process and the children it will start."""
        os.environ[ENV_NAME] = json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_env(cls) -> PicConfig:
        """Settings of this process; defaults where the variable is unset.

        Raises:
            PicConfigError: the variable is not a JSON object of known settings.
        """
        text = os.environ.get(ENV_NAME)
        if not text:
            return cls()
        try:
            values = json.loads(text)
            values["compile_context"] = tuple(values.get("compile_context", ()))
            return cls(**values)
        except (TypeError, AttributeError, json.JSONDecodeError) as error:
            raise PicConfigError(f"{ENV_NAME} is not a valid configuration: {error}") from error
