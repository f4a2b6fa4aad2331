"""Stock SGLang and ours, side by side: what evaluations run on.

Stock SGLang runs without this plug-in, but for the platform that lets it start on a
CPU. A hybrid cannot: SGLang has no kernels for linear layers on this platform but
ours, so there the plug-in is loaded and not asked for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import random
import tempfile
from collections.abc import Iterator
from typing import Any

from transformers import AutoConfig

from sglang_pic.eval.models.hybrid.weights import hybrid_path
from sglang_pic.eval.models.smollm2 import ensure_model
from sglang_pic.eval.serving import Server, serve

POOL_TOKENS = 24000
STOCK_MODULE = "sglang.launch_server"
# SGLang's list of plug-ins to load: the CPU platform alone.
WITHOUT_US = {"SGLANG_PLUGINS": "sglang_pic_cpu"}
# So that what SGLang says of its load is what holds at that step.
COMMON = ("--load-snapshot-publish-interval=1", "--enable-cache-report")


# Of what recurs among the methods that are compared nothing is to be made, and what is
# asked once is linked.
AS_ASKED = ("--pic-company-when=asked", "--pic-cold=link")


@dataclasses.dataclass(frozen=True)
class Bench:
    """Two servers with one model and the same flags.

    Attributes:
        model: its directory.
        name: ``smollm2``, ``hybrid`` or the directory's name.
        vocabulary: token ids to draw documents from.
        context: tokens a request may have.
        pool: tokens of KV that each server holds.
    """

    model: pathlib.Path
    name: str
    stock: Server
    ours: Server
    vocabulary: range
    context: int
    pool: int

    @property
    def config(self) -> dict[str, Any]:
        """What goes into every result."""
        return {
            "model": self.name,
            "dtype": "float32",
            "pool_tokens": self.pool,
            "start_s": {"stock": self.stock.start_s, "ours": self.ours.start_s},
            "parts_of_ours": {"stock": self.stock.parts, "ours": self.ours.parts},
        }

    def tokens(self, rng: random.Random, count: int) -> list[int]:
        """Random ordinary tokens."""
        return rng.choices(self.vocabulary, k=count)

    def flush(self) -> None:
        """Empty both caches.

        Raises:
            RuntimeError: a server is not idle.
        """
        for server in (self.stock, self.ours):
            response = server.post("/flush_cache", {})
            if response.status_code != 200:
                raise RuntimeError(f"{server.url}: {response.text[:500]}")


def model_path(name: str) -> pathlib.Path:
    """Directory of ``smollm2``, of the shipped ``hybrid``, or of any other model."""
    if name == "smollm2":
        return ensure_model()
    return hybrid_path() if name == "hybrid" else pathlib.Path(name)


def linear_layers(config: Any) -> int:
    """How many layers of a model are linear attention."""
    kinds = getattr(config, "layer_types", None) or []
    return sum(kind == "linear_attention" for kind in kinds)


def ordinary_tokens(size: int) -> range:
    """Token ids of a vocabulary without the first and last ones, which are often special."""
    return range(size // 32, size - size // 32)


@contextlib.contextmanager
def bench(
    name: str, *flags: str, ours: tuple[str, ...] = (), pool: int = POOL_TOKENS
) -> Iterator[Bench]:
    """Start both servers, one after the other, and stop them at the end.

    Args:
        name: as for ``model_path``.
        flags: for both servers.
        ours: for ours alone.
        pool: tokens of KV that each holds.
    """
    model = model_path(name)
    config = AutoConfig.from_pretrained(model)
    common = (*COMMON, f"--max-total-tokens={pool}", *flags)
    env = {} if linear_layers(config) else WITHOUT_US
    with contextlib.ExitStack() as stack:
        logs = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        print(f"starting stock SGLang and ours with {name} ...", flush=True)
        stock = stack.enter_context(
            serve(model, logs / "stock.log", *common, module=STOCK_MODULE, env=env)
        )
        linking = stack.enter_context(serve(model, logs / "ours.log", *common, *AS_ASKED, *ours))
        print(f"up after {stock.start_s:.0f} s and {linking.start_s:.0f} s", flush=True)
        print(f"parts of ours in stock: {', '.join(stock.parts) or 'none'}", flush=True)
        yield Bench(
            model,
            name,
            stock,
            linking,
            ordinary_tokens(config.vocab_size),
            config.max_position_embeddings,
            pool,
        )


@contextlib.contextmanager
def further(name: str, model: pathlib.Path, *flags: str) -> Iterator[Server]:
    """One of our servers more, which only a full form needs."""
    with tempfile.TemporaryDirectory() as logs:
        print(f"starting the {name} server ...", flush=True)
        log = pathlib.Path(logs) / f"{name}.log"
        pool = f"--max-total-tokens={POOL_TOKENS}"
        with serve(model, log, pool, *AS_ASKED, *flags) as server:
            yield server
