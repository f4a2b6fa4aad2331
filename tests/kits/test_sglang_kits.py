"""SGLang's own test kits, as its package has them: what stock passes, ours passes.

Each kit runs three times with SmolLM2-135M, on a server of its own: on stock SGLang (of
ours only the platform that lets it start on a CPU is loaded), on ours, and on ours with
linked traffic beside. What stock does not pass is no kit for this model, and is named in
``NOT_FOR_US``; what stock does not pass this time (a kit's own clock may be too fast for the
machine) is not asked of ours (``tests/conftest``).
"""

from __future__ import annotations

import contextlib
import itertools
import json
import pathlib
import threading
import unittest
from collections.abc import Iterator
from typing import Any

import openai
import psutil
import pytest
from conftest import serve
from sglang.test.kits.abort_timeout_kit import AbortAllMixin, RunningTimeoutTwoWaveMixin
from sglang.test.kits.anthropic_messages_kit import AnthropicMessagesMixin
from sglang.test.kits.basic_api_contract_kit import BasicAPIContractMixin
from sglang.test.kits.basic_decode_correctness_kit import BasicDecodeCorrectnessMixin
from sglang.test.kits.basic_scheduler_stress_kit import BasicSchedulerStressMixin
from sglang.test.kits.cache_hit_kit import run_multiturn_cache_hit_test
from sglang.test.kits.ebnf_constrained_kit import EBNFConstrainedMixin
from sglang.test.kits.json_constrained_kit import JSONConstrainedMixin
from sglang.test.kits.json_mode_kit import JSONModeMixin
from sglang.test.kits.matched_stop_kit import MatchedStopMixin
from sglang.test.kits.pause_generation_kit import PauseResumeInPlaceMixin
from sglang.test.kits.radix_cache_server_kit import gen_radix_tree
from sglang.test.kits.regex_constrained_kit import RegexConstrainedMixin
from sglang.test.kits.streaming_session_kit import StreamingSessionKitMixin
from transformers import AutoTokenizer

from sglang_pic.eval.bench import STOCK_MODULE, WITHOUT_US
from sglang_pic.eval.models.smollm2 import ensure_model
from sglang_pic.eval.passages import load_passages
from sglang_pic.eval.serving import Server

pytestmark = [pytest.mark.kits, pytest.mark.server, pytest.mark.timeout(1800)]

RUNS = ("stock", "ours", "linked")
FLAGS = (
    "--max-total-tokens=32768",
    "--max-running-requests=48",
    "--enable-streaming-session",
)
# Below the minute that the kit of this waits for an answer.
TIMEOUT = {"SGLANG_REQ_RUNNING_TIMEOUT": "50"}

NOT_FOR_US = {
    "test_basic_math": "a model of 135M cannot multiply",
    "test_color_completion": "nor does it know its colours",
    "test_no_repetition_blowup": "it repeats itself",
    "test_count_tokens_with_system": "its template has a system message of its own",
}


# -- kits that are functions ----------------------------------------------------------


class CacheHitMixin:
    def test_multiturn_cache_hit(self: Any) -> None:
        texts = [
            f"{passage.document} {question.text}"
            for passage in load_passages()
            for question in passage.questions
        ]
        dataset = pathlib.Path(self.folder) / "conversations.json"
        turns = [{"conversations": [{"value": text}, {"value": "yes"}]} for text in texts]
        dataset.write_text(json.dumps(turns))
        found = run_multiturn_cache_hit_test(
            self.base_url, self.model, request_length=96, output_length=8, dataset_path=str(dataset)
        )
        assert found["overall"]["cache_hit_rate"] > 0.4


class RadixTreeMixin:
    def test_radix_attention(self: Any) -> None:
        """``run_radix_attention_test`` over a tree that a CPU can walk."""
        nodes = gen_radix_tree(num_nodes=40, chunk_len=32)
        sampling = [{"max_new_tokens": node["decode_len"] % 32, "temperature": 0} for node in nodes]
        body = {"input_ids": [node["input_ids"] for node in nodes], "sampling_params": sampling}
        assert self.server.post("/generate", body).status_code == 200


KITS = (
    BasicAPIContractMixin,
    BasicDecodeCorrectnessMixin,
    BasicSchedulerStressMixin,
    MatchedStopMixin,
    RegexConstrainedMixin,
    EBNFConstrainedMixin,
    JSONConstrainedMixin,
    JSONModeMixin,
    AnthropicMessagesMixin,
    StreamingSessionKitMixin,
    CacheHitMixin,
    RadixTreeMixin,
    PauseResumeInPlaceMixin,
    AbortAllMixin,
    RunningTimeoutTwoWaveMixin,
)
# How much of it a CPU can do.
LESS: dict[type, dict[str, Any]] = {
    BasicDecodeCorrectnessMixin: {"sanity_max_new_tokens_long": 64},
    PauseResumeInPlaceMixin: {"pause_num_requests": 8, "pause_max_new_tokens": 128},
}


# -- servers ----------------------------------------------------------------------------


class Alive:
    """What kits ask of a server's process."""

    def __init__(self, pid: int):
        self._process = psutil.Process(pid)

    def poll(self) -> int | None:
        alive = self._process.is_running() and self._process.status() != psutil.STATUS_ZOMBIE
        return None if alive else 1


class Traffic:
    """Linked requests from two threads, all the while: the passages in ever other orders."""

    def __init__(self, server: Server):
        self._server = server
        self._done = threading.Event()
        self._orders = itertools.permutations(range(len(load_passages())), 3)
        self.answered = self.linked = 0
        self.problems: list[str] = []

    def _ask(self, orders: Any) -> None:
        passages = load_passages()
        for order in orders:
            if self._done.is_set():
                return
            parts = [{"segment": passages[i].document} for i in order]
            question = passages[order[0]].questions[0].text
            body = {
                "pic": {"parts": ["Read. ", *parts, question]},
                "sampling_params": {"max_new_tokens": 8, "temperature": 0},
                "cache_salt": "traffic",
            }
            answer = self._server.post("/generate", body)
            # A kit may abort everything that runs.
            if answer.status_code not in (200, 400):
                self.problems.append(answer.text[:500])
                continue
            self.answered += 1
            report = answer.json().get("meta_info", {}).get("pic", {})
            self.linked += bool(report.get("tokens_reused"))

    @contextlib.contextmanager
    def beside(self) -> Iterator[None]:
        pairs = [itertools.islice(self._orders, at, None, 2) for at in (0, 1)]
        threads = [threading.Thread(target=self._ask, args=(list(pair),)) for pair in pairs]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._done.set()
            for thread in threads:
                thread.join()


class Servers:
    """One at a time: the runs come one after the other, and in each the kit of requests that
    run for too long is the last."""

    def __init__(self, logs: pathlib.Path):
        self._logs = logs
        self._open = contextlib.ExitStack()
        self._run: tuple[str, bool] | None = None
        self.server: Any = None

    def of(self, run: str, *, limited: bool) -> Server:
        """The server of a run.

        Args:
            limited: requests may run for so long only.
        """
        if (run, limited) != self._run:
            self.close()
            env = TIMEOUT if limited else {}
            how: dict[str, Any] = {"env": env}
            if run == "stock":
                how = {"module": STOCK_MODULE, "env": {**env, **WITHOUT_US}}
            log = self._logs / f"kits_{run}{'_limited' if limited else ''}.log"
            self.server = self._open.enter_context(serve(ensure_model(), log, *FLAGS, **how))
            self._run = run, limited
        return self.server

    def close(self) -> None:
        self._open.close()


@pytest.fixture(scope="module")
def servers(logs: pathlib.Path) -> Iterator[Servers]:
    made = Servers(logs)
    yield made
    made.close()


@pytest.fixture(scope="class", autouse=True)
def placed(
    request: pytest.FixtureRequest, servers: Servers, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """Give a kit its server, and what else it asks of its class."""
    kit: Any = request.cls
    server = servers.of(kit.which, limited=issubclass(kit, RunningTimeoutTwoWaveMixin))
    kit.server, kit.base_url, kit.process = server, server.url, Alive(server.pid)
    kit.model, kit.api_key = str(ensure_model()), "none"
    kit.tokenizer = AutoTokenizer.from_pretrained(kit.model)
    kit.client = openai.Client(api_key="none", base_url=f"{server.url}/v1")
    kit.folder = tmp_path_factory.mktemp("kit")
    if kit.which != "linked":
        yield
        return
    traffic = Traffic(server)
    with traffic.beside():
        yield
    assert not traffic.problems, traffic.problems[:3]
    assert traffic.linked > 0.5 * traffic.answered > 0


def _define() -> None:
    for run in RUNS:
        for kit in KITS:
            made: dict[str, Any] = {"which": run, **LESS.get(kit, {})}
            for name, why in NOT_FOR_US.items():
                if hasattr(kit, name):
                    made[name] = unittest.skip(why)(getattr(kit, name))
            name = f"Test_{run}_{kit.__name__.removesuffix('Mixin')}"
            globals()[name] = type(name, (kit, unittest.TestCase), made)


_define()
