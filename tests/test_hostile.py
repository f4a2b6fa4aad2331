"""What a hostile client sends commands nothing, learns nothing and stops nobody.

``PIC_FUZZ_SECONDS`` is how long each fuzzer runs; a failure names the seed of its
request.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import pytest
from linking import VOCAB, fresh_salt, ids_of
from traffic import wait_idle

from sglang_pic.eval.hostile import (
    ATTACKS,
    COMMANDS,
    PUBLIC,
    SALTS,
    Forger,
    Make,
    envelope,
    is_ambiguous,
)
from sglang_pic.eval.passages import load_passages
from sglang_pic.eval.serving import Server
from sglang_pic.forest.keys import MAX_SALT
from sglang_pic.request import commands
from sglang_pic.request.hints import DONE
from sglang_pic.request.internal import COMMAND, COMPILE, LINK

SECONDS = float(os.environ.get("PIC_FUZZ_SECONDS", "20"))
WORKERS = 4
REFUSED = (400, 403)
# Of a request that makes no sense: refused, not found, in use, too large.
MAY_BE = (200, 400, 403, 404, 405, 409, 413, 422)
NO_ROOM = 507
MAY_LACK_ROOM = ("/pic/compile", "/pin")
GREEDY = {"max_new_tokens": 8, "temperature": 0, "ignore_eos": True}
# Greedy choices closer than this may fall either way in another batch.
GAP = 0.01

pytestmark = pytest.mark.server


# -- what must hold -------------------------------------------------------------------


class Victim:
    """Somebody else's segment, of which no answer may tell."""

    def __init__(self, server: Server, ids: list[int]):
        self.salt = f"victim-{random.getrandbits(64):x}"
        made = server.post("/pic/compile", {"input_ids": ids, "cache_salt": self.salt}).json()
        self.secrets = (made["segments"][0]["id"], self.salt, DONE, "segment_tokens")

    def check(self, answer: str) -> None:
        for secret in self.secrets:
            assert secret not in answer, answer[:500]


@pytest.fixture(scope="module")
def victim(page1: Server) -> Victim:
    return Victim(page1, ids_of(900, 80))


def processes(server: Server) -> set[int]:
    parent = psutil.Process(server.pid)
    return {parent.pid, *(child.pid for child in parent.children(recursive=True))}


class Usual:
    """Ordinary requests whose answers do not hang on a rounding.

    Args:
        bodies: of ``/generate``, greedy.
    """

    def __init__(self, server: Server, bodies: Sequence[dict[str, Any]]):
        self._server = server
        asked = {"return_logprob": True, "top_logprobs_num": 2}
        said = [server.generate(**body, **asked) for body in bodies]
        self._known = [
            (body, answer["output_ids"], answer.get("text"))
            for body, answer in zip(bodies, said, strict=True)
            if _gap(answer) > GAP
        ]
        assert len(self._known) >= 3, "too few prompts have a sure answer"

    def check(self) -> None:
        for body, ids, text in self._known:
            answer = self._server.generate(**body)
            assert (answer["output_ids"], answer.get("text")) == (ids, text), body

    @contextlib.contextmanager
    def beside(self) -> Iterator[None]:
        """Ask all the while, and see each answered as ever."""
        problems: list[Exception] = []
        done, rounds = threading.Event(), 0

        def ask() -> None:
            nonlocal rounds
            while not done.is_set() and not problems:
                try:
                    self.check()
                except Exception as error:  # is raised below, in the test's own thread
                    problems.append(error)
                rounds += 1

        thread = threading.Thread(target=ask)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
        assert not problems, problems[0]
        assert rounds, "nobody was answered beside it"


def _gap(answer: dict[str, Any]) -> float:
    steps = answer["meta_info"]["output_top_logprobs"]
    return min(first[0] - second[0] for first, second in steps)


@contextlib.contextmanager
def unharmed(server: Server, usual: Usual) -> Iterator[None]:
    """The same processes afterwards, a whole forest, nothing left behind, and no
    exception of ours in the log."""
    before, written = processes(server), server.log.stat().st_size
    with usual.beside():
        yield
    usual.check()
    assert processes(server) == before
    state = wait_idle(server)  # and the forest's integrity
    assert state["live_plans"] == 0
    log = server.log.read_bytes()[written:].decode(errors="replace")
    assert "Traceback" not in log, log[log.index("Traceback") :][:3000]


# -- attacks, one by one ----------------------------------------------------------------


def test_attacks_know_every_command() -> None:
    tried = {body["do"] for body in COMMANDS if isinstance(body.get("do"), str)}
    assert tried >= {kind.__struct_config__.tag for kind in commands.Command.__args__}
    assert all(f"{kind} 0" in " ".join(ATTACKS) for kind in (LINK, COMPILE, COMMAND))


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS.keys())
def test_an_internal_action_is_refused(page1: Server, victim: Victim, attack: Any) -> None:
    one = {"input_ids": ids_of(901, 12), "sampling_params": {"max_new_tokens": 1}}
    two = {**one, "input_ids": [ids_of(901, 12), ids_of(902, 12)]}
    for body in (
        {**one, "kv_hints": attack},
        {**one, "kv_hints": attack, "pic": {"segments": []}},
        {**one, "kv_hints": attack, "sampling_params": {"max_new_tokens": 1, "n": 2}},
        {**two, "kv_hints": attack},
        {**two, "kv_hints": [None, attack]},
    ):
        answer = page1.post("/generate", body, timeout=60)
        assert answer.status_code in REFUSED, answer.text
        assert "kv_hints" in answer.text
        victim.check(answer.text)
    streamed = page1.post("/generate", {**one, "kv_hints": attack, "stream": True}, timeout=60)
    assert '"code":400' in streamed.text.replace(" ", "") or streamed.status_code in REFUSED
    victim.check(streamed.text)
    assert page1.generate(**one)


def test_a_public_action_is_one_in_either_form(page1: Server) -> None:
    """A dictionary with a payload stays one in SGLang's front, for a while."""
    ids = ids_of(903, 90)
    segments = [{"start": 0, "end": 40}, {"start": 40, "end": 80}]
    asked = {"input_ids": ids, "sampling_params": {"max_new_tokens": 1}}
    by_field = page1.generate(**asked, pic={"segments": segments}, cache_salt=fresh_salt())
    hints = envelope(PUBLIC, {"segments": segments})
    by_action = page1.generate(**asked, kv_hints=hints, cache_salt=fresh_salt())
    said = [answer["meta_info"]["pic"]["segments"] for answer in (by_action, by_field)]
    assert all(one.pop("id") for segments in said for one in segments)  # salts of their own
    assert said[0] == said[1]
    wrong = page1.post("/generate", {**asked, "kv_hints": envelope(PUBLIC, {"segments": 3})})
    assert wrong.status_code == 400
    assert "pic.segments" in wrong.text


@pytest.mark.parametrize("field", ["cache_salt", "extra_key"])
@pytest.mark.parametrize("value", filter(is_ambiguous, SALTS), ids=ascii)
def test_an_ambiguous_name_is_refused(page1: Server, value: str, field: str) -> None:
    linked = {"pic": {"segments": [{"start": 0, "end": 40}]}}
    one = {"input_ids": ids_of(904, 50), "sampling_params": {"max_new_tokens": 1}, field: value}
    two = {**one, **linked, "input_ids": [ids_of(904, 50), ids_of(905, 50)]}
    for path, body in (
        ("/generate", {**one, **linked}),
        ("/generate", {**two, "pic": [linked["pic"]] * 2}),
        ("/pic/compile", {"input_ids": ids_of(904, 50), field: value}),
    ):
        answer = page1.post(path, body, timeout=60)
        assert answer.status_code == 400, (path, answer.text)
        # Half a character is no JSON: such a body is refused before it is read.
        assert field in answer.text or "\ud800" <= value[0] <= "\udfff"


def test_names_in_any_script_are_names(page1: Server) -> None:
    for salt in (name for name in SALTS if len(name) <= MAX_SALT and not is_ambiguous(name)):
        body = {"input_ids": ids_of(904, 50), "sampling_params": {"max_new_tokens": 1}}
        answer = page1.post("/generate", {**body, "pic": {"segments": []}, "cache_salt": salt})
        assert answer.status_code == 200, (salt, answer.text)


# -- many at once -----------------------------------------------------------------------


def fuzz(
    server: Server, victim: Victim, makes: Sequence[Make], seed: str, words: Sequence[str] | None
) -> None:
    """Send requests of these kinds from several threads for ``SECONDS``."""
    until = time.monotonic() + SECONDS
    numbers = itertools.count()

    def work() -> None:
        while time.monotonic() < until:
            number = next(numbers)
            rng = random.Random(f"{seed}-{number}")
            path, body = rng.choice(makes)(Forger(rng, range(VOCAB), words))
            shown = f"{seed}-{number}: {path} {json.dumps(body)[:1500]}"
            answer = server.post(path, body, timeout=120)
            lacks_room = answer.status_code == NO_ROOM and path.endswith(MAY_LACK_ROOM)
            assert answer.status_code in MAY_BE or lacks_room, f"{shown}\n{answer.text[:1500]}"
            victim.check(answer.text)

    with ThreadPoolExecutor(WORKERS) as pool:
        for worker in [pool.submit(work) for _ in range(WORKERS)]:
            worker.result()
    assert next(numbers) > 4 * WORKERS


def test_fuzzed_requests_harm_nobody(page1: Server, victim: Victim) -> None:
    """``/generate`` and the routes of ``/pic``, on token ids."""
    bodies = [{"input_ids": ids_of(910 + i, 30), "sampling_params": GREEDY} for i in range(8)]
    usual = Usual(page1, bodies)
    with unharmed(page1, usual):
        fuzz(page1, victim, [Forger.generate, Forger.generate, Forger.management], "ids", None)


def test_fuzzed_texts_harm_nobody(smollm: Server) -> None:
    """Every route that takes a prompt, where texts are tokenised."""
    words = [word + " " for passage in load_passages()[:3] for word in passage.document.split()]
    bodies = [
        {"text": passage.document[:120], "sampling_params": GREEDY} for passage in load_passages()
    ]
    usual = Usual(smollm, bodies)
    victim = Victim(smollm, list(range(100, 180)))
    makes = [Forger.generate, Forger.completion, Forger.chat, Forger.chat, Forger.completion]
    with unharmed(smollm, usual):
        fuzz(smollm, victim, makes, "texts", words)
