"""Our own flags of ``python -m sglang_pic.launch_server``, and the settings they make."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import pathlib
from collections.abc import Iterable, Sequence

from sglang_pic.config import (
    AUDIT_ACTIONS,
    CHECKPOINTS,
    COLD,
    COMPANY_WHEN,
    GUESTS,
    STATE_DTYPES,
    STORE_WHEN,
    PicConfig,
)
from sglang_pic.errors import PicConfigError
from sglang_pic.find.base import FIND
from sglang_pic.link.policy import AUTO, COMPANIES, MODES, POLICIES, STATE_POLICIES

# As like one of our flags as none of SGLang's is.
ALIKE = 0.86


def pic_parser() -> argparse.ArgumentParser:
    """Parser of our own flags; everything else is SGLang's."""
    defaults = PicConfig()
    parser = argparse.ArgumentParser(
        prog="python -m sglang_pic.launch_server",
        usage="%(prog)s --model-path MODEL [--pic-...] [SGLang's flags]",
        description="Serve a model on stock SGLang with position-independent caching.",
        epilog="All other flags are SGLang's; see `sglang serve --help`.",
        allow_abbrev=False,
    )
    parser.add_argument("--model-path", required=True, help="model directory (SGLang's flag)")
    parser.add_argument(
        "--pic-seam",
        type=int,
        default=defaults.seam,
        metavar="W",
        help="tokens at the head of each segment that every link computes anew (%(default)s)",
    )
    parser.add_argument(
        "--pic-policy",
        choices=sorted(POLICIES),
        default=defaults.policy,
        help="recompute policy: seam, graded (seams, and the last segments whole), none (reuse "
        "all), full (reuse nothing) (%(default)s)",
    )
    parser.add_argument(
        "--pic-share",
        type=float,
        default=defaults.share,
        metavar="SHARE",
        help="of the segments' tokens that graded computes, from 0 to 1 (%(default)s)",
    )
    parser.add_argument(
        "--pic-company",
        choices=COMPANIES,
        default=defaults.company,
        help="compile segments that recur together in company too, and link them where the "
        "whole company stands in the prompt (subset), or wherever its tenant names one of it "
        "(tenant); off makes none (%(default)s)",
    )
    parser.add_argument(
        "--pic-company-when",
        choices=COMPANY_WHEN,
        default=defaults.company_when,
        help="make companies of what recurs while the server is idle, or only when asked "
        "for by POST /pic/compile (%(default)s)",
    )
    parser.add_argument(
        "--pic-guests",
        choices=GUESTS,
        default=defaults.guests,
        help="compile a segment that has no company behind passages of its kind too, with "
        "its ordinary seam: the project's own, or the tenant's with --pic-company tenant "
        "(%(default)s)",
    )
    parser.add_argument(
        "--pic-company-seam",
        type=int,
        default=defaults.company_seam,
        metavar="W",
        help="seam of segments compiled in company (%(default)s)",
    )
    parser.add_argument(
        "--pic-mode",
        choices=MODES,
        default=defaults.mode,
        help="share pages between requests, or relocate copies of them (%(default)s)",
    )
    context = parser.add_mutually_exclusive_group()
    context.add_argument(
        "--pic-compile-context",
        metavar="TEXT",
        help="compile every segment behind this text, usually the system prompt as the chat "
        "template renders it",
    )
    context.add_argument(
        "--pic-compile-context-file",
        type=pathlib.Path,
        metavar="FILE",
        help="the same, read from a UTF-8 file",
    )
    parser.add_argument(
        "--pic-find",
        choices=FIND,
        default=defaults.find,
        help="find segments that no request names: in the blocks that prompts are built of "
        "(structure), and by what their tokens are too (content) (%(default)s)",
    )
    parser.add_argument(
        "--pic-find-rules",
        metavar="FILE",
        help="JSON object of your own rules of structure: regular expressions by name",
    )
    parser.add_argument(
        "--pic-min-segment",
        type=int,
        default=defaults.min_segment,
        metavar="TOKENS",
        help="shorter segments are computed, not compiled (%(default)s)",
    )
    parser.add_argument(
        "--pic-cold",
        choices=COLD,
        default=defaults.cold,
        help="a request over documents that are not compiled gets an exact answer, and they "
        "are compiled behind it; or waits for them, and links (%(default)s)",
    )
    parser.add_argument(
        "--pic-compile-timeout",
        type=float,
        default=defaults.compile_timeout_s,
        metavar="SECONDS",
        help="how long a request waits for its segments to be compiled, whatever it costs "
        "(%(default)s)",
    )
    parser.add_argument(
        "--pic-compile-limit",
        type=float,
        default=defaults.compile_limit_s,
        metavar="SECONDS",
        help="the longest that it waits for what is sooner compiled than computed anew "
        "(%(default)s)",
    )
    parser.add_argument(
        "--pic-compiles",
        type=int,
        default=defaults.compiles,
        metavar="N",
        help="segments that SGLang is given to compile at a time (%(default)s)",
    )
    parser.add_argument(
        "--pic-tenant-compiles",
        type=int,
        default=defaults.tenant_compiles,
        metavar="N",
        help="the same of one tenant (%(default)s)",
    )
    parser.add_argument(
        "--pic-compile-queue",
        type=int,
        default=defaults.compile_queue,
        metavar="N",
        help="segments of one tenant that may wait to be compiled (%(default)s)",
    )
    parser.add_argument(
        "--pic-kv-mib",
        type=int,
        default=defaults.kv_mib,
        metavar="MIB",
        help="KV memory that compiled segments and conversations may take of the pool "
        "(nine tenths of it; half with a host tier)",
    )
    parser.add_argument(
        "--pic-pin-share",
        type=float,
        default=defaults.pin_share,
        metavar="SHARE",
        help="share of each memory budget that one tenant may pin (%(default)s)",
    )
    parser.add_argument(
        "--pic-store",
        metavar="STORE",
        help="where compiled segments are kept beyond this server: a directory, file:///DIR?mib=N "
        "or mooncake://MASTER:PORT?metadata=URL",
    )
    parser.add_argument(
        "--pic-store-key-file",
        metavar="FILE",
        help="key by which what goes there is signed; what is not signed by it is not used",
    )
    parser.add_argument(
        "--pic-store-when",
        choices=STORE_WHEN,
        default=defaults.store_when,
        help="read what the store has where that is sooner done than computing it, by what both "
        "took lately (pays), or always (%(default)s)",
    )
    parser.add_argument(
        "--pic-store-timeout",
        type=float,
        default=defaults.store_timeout_s,
        metavar="SECONDS",
        help="how long a segment is waited for that the store has; then it is compiled "
        "(%(default)s)",
    )
    parser.add_argument(
        "--pic-peers",
        metavar="URL,...",
        help="other servers of the same model and store that compile a cold prompt's segments "
        "beside this one; router+URL for the workers of SGLang's router",
    )
    parser.add_argument(
        "--pic-peer-timeout",
        type=float,
        default=defaults.peer_timeout_s,
        metavar="SECONDS",
        help="how long a peer may take for a segment; then it is compiled here (%(default)s)",
    )
    parser.add_argument(
        "--pic-tenants",
        metavar="FILE",
        help="JSON object of cache salts by API key: requests get the salt of their key, and "
        "none is served without one; needs --admin-api-key",
    )
    parser.add_argument(
        "--pic-encoder",
        metavar="DIR",
        help="a trained encoder for this model: requests may have it read their documents, "
        "which then are not in the prompt (mode: encode)",
    )
    check = parser.add_argument_group("self-check and audit")
    check.add_argument(
        "--pic-canary-kl",
        type=float,
        default=defaults.canary_kl,
        metavar="NATS",
        help="link nothing if the canary, linked, is further from full recompute (%(default)s)",
    )
    check.add_argument(
        "--pic-canary-timeout",
        type=float,
        default=defaults.canary_timeout_s,
        metavar="SECONDS",
        help="how long the canary may take before it is given up (%(default)s)",
    )
    parser.add_argument(
        "--pic-decode-graphs",
        action="store_true",
        help="capture CUDA graphs for decode with linked rows too, with --attention-backend "
        "flashinfer; without, such batches run eagerly (not yet run on a GPU)",
    )
    check.add_argument(
        "--pic-audit-rate",
        type=float,
        default=defaults.audit_rate,
        metavar="SHARE",
        help="share of composed answers computed again in full, in idle time (%(default)s)",
    )
    check.add_argument(
        "--pic-audit-kl",
        type=float,
        default=defaults.audit_kl,
        metavar="NATS",
        help="how far off they may be in the mean (%(default)s)",
    )
    check.add_argument(
        "--pic-audit-action",
        choices=AUDIT_ACTIONS,
        default=defaults.audit_action,
        help="above that, log it or turn linking off (%(default)s)",
    )
    hybrid = parser.add_argument_group("hybrid models (linear attention)")
    hybrid.add_argument(
        "--pic-state",
        choices=(*STATE_POLICIES, AUTO),
        default=defaults.state,
        help="compose a segment's state with what precedes it, let the last one stand alone, or "
        "measure both on the first linked prompts and take the better (%(default)s)",
    )
    hybrid.add_argument(
        "--pic-state-dtype",
        choices=STATE_DTYPES,
        default=defaults.state_dtype,
        help="how operators and end states are stored (%(default)s)",
    )
    hybrid.add_argument(
        "--pic-state-mib",
        type=int,
        default=defaults.state_mib,
        metavar="MIB",
        help="memory for them, and for documents that an encoder has read (%(default)s)",
    )
    hybrid.add_argument(
        "--pic-checkpoints",
        choices=CHECKPOINTS,
        default=defaults.checkpoints,
        help="keep states of ordinary prefixes too, where requests leave them (%(default)s)",
    )
    hybrid.add_argument(
        "--pic-operator-threshold",
        type=float,
        default=defaults.operator_threshold,
        metavar="NORM",
        help="operators of a smaller norm are taken for zero (%(default)s)",
    )
    return parser


def read_config(args: argparse.Namespace) -> PicConfig:
    """Settings from parsed flags.

    Raises:
        PicConfigError: a value is out of range, or the context cannot be read.
    """
    text = args.pic_compile_context
    if args.pic_compile_context_file is not None:
        try:
            text = args.pic_compile_context_file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PicConfigError(f"--pic-compile-context-file: {error}") from error
    context: tuple[int, ...] = ()
    if text:
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(args.model_path)
        except (OSError, ValueError) as error:
            raise PicConfigError(
                f"--pic-compile-context needs the tokenizer of {args.model_path}: {error}"
            ) from error
        context = tuple(tokenizer(text)["input_ids"])
    given = {name.removeprefix("pic_"): value for name, value in vars(args).items()}
    given |= {"compile_context": context}
    for name in ("model_path", "compile_context_file"):
        del given[name]
    # A setting in seconds says so, its flag in its help.
    settings = {field.name for field in dataclasses.fields(PicConfig)}
    return PicConfig(
        **{name if name in settings else f"{name}_s": value for name, value in given.items()}
    )


def did_you_mean(word: str, known: Iterable[str], *, alike: float = 0.6) -> str:
    """Which of the known words was meant, as the end of a sentence; empty if none is near.

    Args:
        alike: least likeness that counts, from 0 to 1.
    """
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=alike)
    return f", did you mean {near[0]}?" if near else ""


def check_rest(args: argparse.Namespace, rest: Sequence[str]) -> None:
    """Of the flags left for SGLang, none may be a mistyped one of ours.

    Args:
        args: what our parser made of the others.

    Raises:
        PicConfigError: one is; the message names the nearest.
    """
    ours = [f"--{name.replace('_', '-')}" for name in vars(args) if name.startswith("pic_")]
    for word in rest:
        given = word.partition("=")[0]
        if not given.startswith("-"):
            continue
        plain = "--" + given.lstrip("-").replace("_", "-").lower()
        longer = [flag for flag in ours if flag.startswith(plain)]
        if plain.startswith("--pic"):
            near = did_you_mean(plain, longer, alike=0) or did_you_mean(plain, ours)
        else:
            near = did_you_mean(plain, ours, alike=ALIKE)
        if near or plain.startswith("--pic"):
            raise PicConfigError(f"there is no {given}{near}")
