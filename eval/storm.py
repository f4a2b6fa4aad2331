"""Mixed traffic: everything that clients do to a server, well-behaved or hostile.

Each client is seeded and goes from one deed to the next; the server decides how they
interleave. Each deed knows which answers it may get.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import itertools
import json
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import aiohttp

from sglang_pic.eval.hostile import ATTACKS, SALTS, Forger, is_ambiguous
from sglang_pic.eval.recorded import (
    EXACT,
    PINNED,
    TOLERANCE,
    Answer,
    Sample,
    deviation,
    is_comparable,
)
from sglang_pic.eval.workloads import draw

TENANTS = ("north", "south", "west")
# Its segments are pinned all the while; nobody but samples asks there.
HELD = "held"
CLIENTS = 12
MAX_PROBLEMS = 50
LEAVE_S = 0.2

# Of forged requests: refused, of nothing that exists, or harmless.
HARMLESS = (200, 400, 403, 404, 405, 409, 413, 422, 507)
# Of segments that nobody has seen: just long enough to be compiled.
SMALL = (33, 48)

MALFORMED: tuple[tuple[str, Any], ...] = (
    ("generate", {"pic": 3}),
    ("generate", {"pic": {"segments": [{"start": 0, "end": 9999}]}}),
    ("generate", {"pic": {"segments": [{"start": 5, "end": 2}]}}),
    ("generate", {"pic": {"segments": [{"start": 0, "end": 9}, {"start": 5, "end": 12}]}}),
    ("generate", {"pic": {"segments": [], "seam": "wide"}}),
    ("generate", {"pic": {"unknown": 1}}),
    ("generate", {"pic": {}, "cache_salt": 17}),
    ("generate", {"cache_salt": "pic\x1fsomebody"}),
    ("generate", {"pic": [{}]}),
    ("pic/compile", {}),
    ("pic/compile", {"input_ids": "abc"}),
    ("pic/compile", {"input_ids": [[1, "2"]]}),
    ("pic/explain", {"input_ids": [1, 2, 3], "pic": {"segments": 7}}),
    ("pic/segments/none/pin", {}),
    ("pic/flush", {"tenant": "north"}),
)


@dataclasses.dataclass
class Seen:
    """What the clients saw.

    Attributes:
        answers: by deed and HTTP status; ``left`` for those not waited for.
        problems: answers that should not have been, the first of them.
        compared: answers held against recorded ones, by kind of sample.
        passed: answers to samples that were of another plan, and not compared.
        worst: largest deviation of those compared.
        retractions: of samples' answers.
    """

    answers: collections.Counter[tuple[str, str]] = dataclasses.field(
        default_factory=collections.Counter
    )
    problems: list[str] = dataclasses.field(default_factory=list)
    compared: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    passed: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    worst: float = 0.0
    retractions: int = 0

    def note_problem(self, text: str) -> None:
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(text)

    def check(self, sample: Sample, said: Answer) -> None:
        """Hold an answer against the recorded one."""
        self.retractions += said.retractions
        if not is_comparable(sample, said):
            self.passed[sample.kind] += 1
            if sample.kind == PINNED:
                self.note_problem(f"a pinned segment was not linked: {said.plan}")
            return
        self.compared[sample.kind] += 1
        apart = deviation(sample.answer, said)
        self.worst = max(self.worst, apart)
        if apart > TOLERANCE:
            self.note_problem(
                f"wrong answer: {sample.kind}, {apart:.2g} apart, "
                f"{said.retractions} times retracted: {json.dumps(sample.body['pic'])}"
            )


@dataclasses.dataclass(frozen=True)
class Material:
    """What requests are made of.

    Attributes:
        documents: the corpus, the r-th asked for with weight 1/r.
        openings: plain texts that ordinary and linked prompts share.
        samples: prompts with recorded answers.
        vocabulary: ordinary token ids.
    """

    documents: Sequence[list[int]]
    openings: Sequence[list[int]]
    samples: Sequence[Sample]
    vocabulary: range


def link_of(
    opening: list[int], documents: Sequence[list[int]], question: list[int]
) -> dict[str, Any]:
    """``input_ids`` and ``pic`` of a prompt that names these segments."""
    ids, segments = list(opening), []
    for document in documents:
        segments.append({"start": len(ids), "end": len(ids) + len(document)})
        ids += document
    return {"input_ids": ids + question, "pic": {"segments": segments}}


class Client:
    """One client: a session, a seed, and what it may do.

    Args:
        number: of the client: for its requests' ids, and for what it does first.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        url: str,
        material: Material,
        seen: Seen,
        rng: random.Random,
        number: int,
    ):
        self._session = session
        self._url = url
        self._material = material
        self._seen = seen
        self._rng = rng
        self._number = number
        self._forger = Forger(rng, material.vocabulary)
        self._rids = (f"soak-{number}-{i}" for i in itertools.count())

    async def run(self, until: float) -> None:
        """One deed after the other until this time of the event loop; all clients
        together begin with every deed once."""
        loop = asyncio.get_running_loop()
        names, weights = list(DEEDS), [weight for _, weight in DEEDS.values()]
        first = names[self._number :: CLIENTS]
        while loop.time() < until:
            name = first.pop() if first else self._rng.choices(names, weights)[0]
            deed, _ = DEEDS[name]
            try:
                await deed(self)
            except (aiohttp.ClientError, asyncio.TimeoutError) as error:
                self._seen.answers[name, "none"] += 1
                self._seen.note_problem(f"{name}: no answer: {error!r}")
                await asyncio.sleep(LEAVE_S)

    # -- sending --------------------------------------------------------------------

    async def _send(
        self,
        deed: str,
        path: str,
        body: Any = None,
        *,
        method: str = "POST",
        may: Sequence[int] = (200,),
    ) -> Any:
        """The JSON of an answer with status 200 that has any, else ``None``."""
        asked = self._session.request(method, f"{self._url}/{path}", json=body)
        async with asked as response:
            self._seen.answers[deed, str(response.status)] += 1
            if response.status not in may:
                text = (await response.text())[:300]
                self._seen.note_problem(f"{deed}: {method} {path}: {response.status} {text}")
            is_json = response.content_type == "application/json"
            return await response.json() if response.status == 200 and is_json else None

    # -- drawing --------------------------------------------------------------------

    def _tokens(self, low: int, high: int) -> list[int]:
        return self._rng.choices(self._material.vocabulary, k=self._rng.randint(low, high))

    def _documents(self, most: int) -> list[list[int]]:
        return draw(self._rng, self._material.documents, self._rng.randint(1, most))

    def _new(self, low: int, high: int) -> list[list[int]]:
        """Segments that nobody has sent before, each small."""
        return [self._tokens(*SMALL) for _ in range(self._rng.randint(low, high))]

    def _stranger(self) -> str:
        """A salt that nobody has used before, nor will again."""
        return f"stranger-{self._rng.getrandbits(64):x}"

    def _cold(self, low: int, high: int) -> dict[str, Any]:
        """A link of which no segment is compiled."""
        body = link_of(self._opening(), self._new(low, high), self._tokens(1, 8))
        salt = self._rng.choice([*TENANTS, self._stranger()])
        sampling = self._sampling()
        return {**body, "sampling_params": sampling, "cache_salt": salt, "rid": next(self._rids)}

    def _opening(self) -> list[int]:
        return self._rng.choice([[], *self._material.openings])

    def _sampling(self, low: int = 1, high: int = 24) -> dict[str, Any]:
        count = self._rng.randint(low, high)
        return {"max_new_tokens": count, "temperature": 0, "ignore_eos": True}

    def _linked(self, most: int = 4) -> dict[str, Any]:
        body = link_of(self._opening(), self._documents(most), self._tokens(1, 24))
        rng = self._rng
        body["pic"] |= {
            "seam": rng.choice([8, 16, 16]),
            "mode": rng.choice(["share", "share", "share", "relocate"]),
            "policy": rng.choice(["seam", "seam", "seam", "graded", "none"]),
            "turns": rng.choice([True, False]),
        }
        return {
            **body,
            "sampling_params": self._sampling(),
            "cache_salt": rng.choice(TENANTS),
            "rid": next(self._rids),
        }

    # -- deeds: well-behaved ------------------------------------------------------------

    async def link(self) -> None:
        await self._send("link", "generate", self._linked())

    async def sample(self) -> None:
        """A prompt whose answer is known."""
        sample = self._rng.choice(self._material.samples)
        salt = HELD if sample.kind == PINNED else self._rng.choice(TENANTS)
        output = await self._send("sample", "generate", {**sample.body, "cache_salt": salt})
        if output is not None:
            self._seen.check(sample, Answer.of(output))

    async def unlinked(self) -> None:
        """The prompt of an exact sample without ``pic``: the same answer."""
        exact = [sample for sample in self._material.samples if sample.kind == EXACT]
        sample = self._rng.choice(exact)
        body = {**sample.body, "cache_salt": self._rng.choice(TENANTS)}
        del body["pic"]
        output = await self._send("unlinked", "generate", body)
        if output is not None:
            self._seen.check(sample, Answer.of(output))

    async def converse(self) -> None:
        """Turns of one conversation; some bring a further segment."""
        body = self._linked(2)
        body["pic"]["turns"] = True
        for _ in range(self._rng.randint(2, 5)):
            output = await self._send("converse", "generate", body)
            if output is None:
                return
            ids = body["input_ids"] + output["output_ids"]
            segments = body["pic"]["segments"]
            if self._rng.random() < 0.3:
                (document,) = draw(self._rng, self._material.documents, 1)
                segments = [*segments, {"start": len(ids), "end": len(ids) + len(document)}]
                ids = ids + document
            body = {
                **body,
                "input_ids": ids + self._tokens(1, 24),
                "pic": {**body["pic"], "segments": segments},
                "sampling_params": self._sampling(),
                "rid": next(self._rids),
            }

    async def grow(self) -> None:
        """One segment, longer with each request."""
        (document,) = draw(self._rng, self._material.documents, 1)
        salt, length = self._rng.choice(TENANTS), 32
        while length < len(document):
            body = link_of(self._opening(), [document[:length]], self._tokens(1, 8))
            body |= {"sampling_params": self._sampling(1, 4), "cache_salt": salt}
            await self._send("grow", "generate", body)
            length += self._rng.randint(16, 64)

    async def several(self) -> None:
        """Several samples of one prompt."""
        body = self._linked()
        body["sampling_params"] |= {"n": self._rng.randint(2, 3), "temperature": 1.0}
        await self._send("several", "generate", body)

    async def batch(self) -> None:
        """Two prompts in one request, one of them without segments."""
        body = link_of([], self._documents(3), self._tokens(1, 9))
        await self._send(
            "batch",
            "generate",
            {
                "input_ids": [body["input_ids"], self._tokens(8, 64)],
                "pic": [body["pic"], None],
                "cache_salt": [self._rng.choice(TENANTS)] * 2,
                "sampling_params": self._sampling(),
            },
        )

    async def ordinary(self) -> None:
        """No segments, with a shared prefix or none."""
        body = {
            "input_ids": self._opening() + self._tokens(8, 200),
            "sampling_params": self._sampling(),
            "cache_salt": self._rng.choice(TENANTS),
        }
        await self._send("ordinary", "generate", body)

    async def find(self) -> None:
        """No segments are named, and some are found."""
        documents = [token for one in self._documents(4) for token in one]
        body = {
            "input_ids": self._opening() + documents + self._tokens(1, 24),
            "sampling_params": self._sampling(),
            "cache_salt": self._rng.choice(TENANTS),
            "pic": {"find": "content"},
        }
        await self._send("find", "generate", body)

    async def exact(self) -> None:
        body = self._linked()
        body["pic"]["require_exact"] = True
        await self._send("exact", "generate", body)

    # -- deeds: management ----------------------------------------------------------------

    async def compile(self) -> None:
        body = {"input_ids": self._documents(2), "cache_salt": self._rng.choice(TENANTS)}
        await self._send("compile", "pic/compile", body, may=(200, 507))

    async def meet(self) -> None:
        """Have segments compiled in company, and ask for them together."""
        opening, documents = self._opening(), self._documents(4)
        salt = self._rng.choice(TENANTS)
        body = {"input_ids": documents, "opening": opening, "company": True, "cache_salt": salt}
        await self._send("meet", "pic/compile", body, may=(200, 507))
        self._rng.shuffle(documents)
        linked = link_of(opening, documents, self._tokens(1, 24))
        linked |= {"sampling_params": self._sampling(), "cache_salt": salt}
        await self._send("link", "generate", {**linked, "rid": next(self._rids)})

    async def explain(self) -> None:
        body = self._linked()
        del body["sampling_params"], body["rid"]
        await self._send("explain", "pic/explain", body)

    async def manage(self) -> None:
        """Look at the segments of a tenant, and do something to one of them."""
        salt = self._rng.choice(TENANTS)
        listed = await self._send("manage", f"pic/segments?cache_salt={salt}", method="GET")
        if not listed or not listed["segments"]:
            return
        path = f"pic/segments/{self._rng.choice(listed['segments'])['id']}"
        match self._rng.choice(["pin", "pin", "unpin", "delete", "get"]):
            case "pin":
                body = {"cache_salt": salt, "ttl_s": self._rng.uniform(0.5, 8)}
                await self._send("pin", f"{path}/pin", body, may=(200, 404, 507))
            case "unpin":
                body = {"cache_salt": salt}
                await self._send("unpin", f"{path}/unpin", body, may=(200, 404))
            case "delete":
                path += f"?cache_salt={salt}"
                await self._send("delete", path, method="DELETE", may=(200, 404, 409))
            case "get":
                path += f"?cache_salt={salt}"
                await self._send("get", path, method="GET", may=(200, 404))

    async def flush(self) -> None:
        await self._send("flush", "pic/flush", {"cache_salt": self._rng.choice(TENANTS)})

    # -- deeds: ill-behaved -----------------------------------------------------------------

    async def malformed(self) -> None:
        path, body = self._rng.choice(MALFORMED)
        if path == "generate":
            body = {"input_ids": list(range(20)), "sampling_params": {"max_new_tokens": 1}, **body}
        await self._send("malformed", path, body, may=(400,))

    async def abort(self) -> None:
        """Ask, and take it back through ``/abort_request``."""
        body = self._linked()
        body["sampling_params"]["max_new_tokens"] = 48
        # Of a request that was not yet running SGLang makes a 400.
        asked = asyncio.create_task(self._send("abort", "generate", body, may=(200, 400)))
        await asyncio.sleep(self._rng.uniform(0, LEAVE_S))
        await self._send("abort_request", "abort_request", {"rid": body["rid"]})
        await asked

    async def leave(self) -> None:
        """Ask, and go before the answer comes."""
        asked = self._send("leave", "generate", self._linked())
        try:
            await asyncio.wait_for(asked, self._rng.uniform(0.01, LEAVE_S))
        except asyncio.TimeoutError:
            self._seen.answers["leave", "left"] += 1

    async def drop_stream(self) -> None:
        """Go when a part of the answer has come."""
        body = self._linked() | {"stream": True}
        body["sampling_params"]["max_new_tokens"] = 48
        async with self._session.post(f"{self._url}/generate", json=body) as response:
            if response.status != 200:
                self._seen.note_problem(f"drop_stream: {response.status}")
            for _ in range(self._rng.randint(1, 4)):
                with contextlib.suppress(ValueError):
                    await response.content.readline()
        self._seen.answers["drop_stream", "left"] += 1

    # -- deeds: hostile -----------------------------------------------------------------------

    async def forge(self) -> None:
        """Commands that only our own front may send."""
        hints = self._rng.choice(list(ATTACKS.values()))
        body = {"input_ids": self._tokens(8, 20), "sampling_params": self._sampling(1, 2)}
        await self._send("forge", "generate", body | {"kv_hints": hints}, may=(400, 403))

    async def ambiguous(self) -> None:
        """Names that could be taken for another tenant's."""
        name = self._rng.choice([salt for salt in SALTS if is_ambiguous(salt)])
        body = {**self._linked(), self._rng.choice(["cache_salt", "extra_key"]): name}
        await self._send("ambiguous", "generate", body, may=(400,))

    async def mutate(self) -> None:
        """Anything at all."""
        make = self._rng.choice([Forger.generate, Forger.management])
        path, body = make(self._forger)
        await self._send("mutate", path.removeprefix("/"), body, may=HARMLESS)

    async def many(self) -> None:
        """As many segments as a prompt can hold, none ever seen before or again."""
        await self._send("many", "generate", self._cold(16, 64))

    async def compile_many(self) -> None:
        body = {"input_ids": self._new(64, 300), "cache_salt": self._stranger()}
        await self._send("compile_many", "pic/compile", body, may=(200, 507))

    async def several_cold(self) -> None:
        """Several samples, or a batch, of what is not compiled yet."""
        body = self._cold(1, 4)
        if self._rng.random() < 0.5:
            body["sampling_params"] |= {"n": self._rng.randint(2, 3), "temperature": 1.0}
        else:
            del body["rid"]
            body |= {name: [body[name]] * 2 for name in ("input_ids", "pic", "cache_salt")}
        await self._send("several_cold", "generate", body)

    async def abort_compile(self) -> None:
        """Take a request back while its segments compile."""
        body = self._cold(4, 16)
        asked = asyncio.create_task(self._send("abort_compile", "generate", body, may=(200, 400)))
        await asyncio.sleep(self._rng.uniform(0, LEAVE_S / 4))
        await self._send("abort_request", "abort_request", {"rid": body["rid"]})
        await asked

    async def leave_compile(self) -> None:
        """Go while one's segments compile."""
        asked = self._send("leave_compile", "generate", self._cold(4, 16))
        try:
            await asyncio.wait_for(asked, self._rng.uniform(0.005, LEAVE_S / 2))
        except asyncio.TimeoutError:
            self._seen.answers["leave_compile", "left"] += 1


Deed = Callable[[Client], Awaitable[None]]

# By name: what a client does, and how often.
DEEDS: dict[str, tuple[Deed, float]] = {
    "link": (Client.link, 6),
    "sample": (Client.sample, 8),
    "unlinked": (Client.unlinked, 1),
    "converse": (Client.converse, 2),
    "grow": (Client.grow, 1),
    "several": (Client.several, 1),
    "batch": (Client.batch, 1),
    "ordinary": (Client.ordinary, 3),
    "find": (Client.find, 2),
    "exact": (Client.exact, 1),
    "compile": (Client.compile, 1),
    "meet": (Client.meet, 1),
    "explain": (Client.explain, 1),
    "manage": (Client.manage, 3),
    "flush": (Client.flush, 0.2),
    "malformed": (Client.malformed, 2),
    "abort": (Client.abort, 1.5),
    "leave": (Client.leave, 1.5),
    "drop_stream": (Client.drop_stream, 1.5),
    "forge": (Client.forge, 1),
    "ambiguous": (Client.ambiguous, 0.5),
    "mutate": (Client.mutate, 3),
    "many": (Client.many, 0.5),
    "compile_many": (Client.compile_many, 0.2),
    "several_cold": (Client.several_cold, 1),
    "abort_compile": (Client.abort_compile, 1),
    "leave_compile": (Client.leave_compile, 1),
}


async def storm(
    session: aiohttp.ClientSession, url: str, material: Material, seconds: float, seed: int
) -> Seen:
    """Run all clients for so long; what they saw."""
    seen = Seen()
    until = asyncio.get_running_loop().time() + seconds
    clients = [
        Client(session, url, material, seen, random.Random(f"{seed}-{i}"), i)
        for i in range(CLIENTS)
    ]
    await asyncio.gather(*(client.run(until) for client in clients))
    return seen
