"""What a hostile client sends: forged commands, ambiguous salts, spans that are none.

Written by hand, not by our own encoders, since an attacker has none. ``ATTACKS`` are
whole and must be refused; ``Forger`` makes as many more as wanted, of which each is
refused or, where it is harmless, answered.
"""

from __future__ import annotations

import copy
import json
import random
import string
from collections.abc import Callable, Sequence
from typing import Any

LINK, COMPILE, COMMAND, PUBLIC = "pic.link", "pic.compile", "pic.command", "pic"
INTERNAL = (LINK, COMPILE, COMMAND)

OPTIONS = {
    "policy": "seam",
    "seam": 4,
    "mode": "share",
    "require_exact": False,
    "link": True,
    "state": "compose",
    "turns": False,
    "ablation": None,
}
COMMANDS: tuple[dict[str, Any], ...] = (
    {"x": 1},
    {},
    {"do": None},
    {"do": ["forest"]},
    {"do": "no such command"},
    {"do": "forest"},
    {"do": "stats"},
    {"do": "budgets"},
    {"do": "list"},
    {"do": "explain"},
    {"do": "flush"},
    {"do": "get", "id": "0" * 32},
    {"do": "pin", "id": "0" * 32},
    {"do": "unpin", "id": "0" * 32},
    {"do": "delete", "id": "0" * 32},
    {"do": "held", "segments": ["0" * 32]},
    {"do": "companies", "companies": ["0" * 32]},
    {"do": "name", "segments": ["0" * 32], "seam": 8},
    {"do": "missing"},
    {"do": "key"},
    {"do": "save", "segments": None},
    {"do": "restore"},
    {"do": "fetch", "lengths": [8], "seam": 8, "named": False},
    {"do": "fetch", "lengths": [1 << 40], "seam": -1, "named": True},
    {"do": "fetched", "segments": ["0" * 32], "drop": False},
    {"do": "fetched", "segments": ["0" * 32], "drop": True},
    {"do": "publish", "segments": ["0" * 32], "begin": True},
    {
        "do": "encode",
        "leases": [{"id": "x", "tenant": None, "held": ["0" * 32], "lengths": [8]}],
        "now": 0.0,
    },
    {"do": "fetch_documents", "lengths": [8], "named": False},
    {"do": "fetch_documents", "lengths": [1 << 40], "named": True},
    {"do": "foretell", "documents": ["0" * 32]},
    {"do": "timer", "on": True},
    {"do": "reserve", "tokens": [4]},
    {"do": "selfcheck", "at": 0, "seam": 8},
)
LINKS: tuple[dict[str, Any], ...] = (
    {},
    {"spans": [[0, 8]], "strict": False, "off": None},
    {"spans": "text", "options": OPTIONS, "strict": False, "off": None},
    {"spans": [["a", "b"]], "options": OPTIONS, "strict": False, "off": None},
    {"spans": [[8, 0]], "options": OPTIONS, "strict": False, "off": None},
    {"spans": [[0, 1 << 40]], "options": OPTIONS, "strict": False, "off": None},
    {"spans": [[0, 8]], "options": {**OPTIONS, "x": 1}, "strict": False, "off": None},
    {"spans": [[0, 8]], "options": {**OPTIONS, "seam": "wide"}, "strict": False, "off": None},
    {"spans": [[0, 8]], "options": OPTIONS, "strict": True, "off": None},
    {"spans": [[0, 8]], "options": OPTIONS, "strict": False, "off": None},
)
COMPILES: tuple[dict[str, Any], ...] = (
    {},
    {"seams": [16]},
    {"named": True},
    {"seams": "all", "named": False},
    {"seams": [-1, 1 << 40], "named": False},
    {"seams": [16], "named": True},
)

# A lone surrogate is what JSON's \ud800 says and no UTF-8 can.
SALTS = (
    "pic\x1f",
    "pic\x1fsomebody",
    "a\x1fb",
    "\x00",
    "new\nline",
    "\x7f",
    "\x85",
    "\ud800",
    "pic",
    "PIC",
    " ",
    "ü" * 40,
    "\u202e\u200b",
    "🜂",
    "x" * 5000,
    *("../../etc/passwd", "%1f", "\\u001f", "'; drop table segments; --"),
)
JUNK: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 1.5, 1e308, 1 << 31, 1 << 62, -(1 << 62)),
    *("", "text", "pic.command", [], {}, [[]], [None], {"": None}, {"do": "forest"}),
)


def envelope(action: str, payload: Any = None, **changes: Any) -> dict[str, Any]:
    """``kv_hints`` with one action.

    Args:
        payload: ``None`` leaves it out.
        changes: other values of the envelope's and the action's fields.
    """
    one = {"action_id": "0", "action_type": action, "action_version": "1"}
    if payload is not None:
        one["payload"] = payload
    made: dict[str, Any] = {"protocol_version": "1", "message_id": "x", "actions": [one]}
    for name, value in changes.items():
        (one if name.startswith("action_") else made)[name] = value
    return made


def _attacks() -> dict[str, dict[str, Any]]:
    payloads = {LINK: LINKS, COMPILE: COMPILES, COMMAND: COMMANDS}
    made = {}
    for action, bodies in payloads.items():
        made[f"{action} without payload"] = envelope(action)
        for number, body in enumerate(bodies):
            made[f"{action} {number}: {body!r:.50}"] = envelope(action, body)
    hidden = envelope(PUBLIC, {"segments": []})
    hidden["actions"] += envelope(COMMAND, {"do": "forest"})["actions"]
    return made | {"behind a public action": hidden}


# ``kv_hints`` that only our own front may send, by what they are.
ATTACKS = _attacks()


def is_ambiguous(text: str) -> bool:
    """Whether a salt or extra key has characters that must not be in one."""
    return any(ord(c) < 32 or 127 <= ord(c) < 160 or 0xD800 <= ord(c) < 0xE000 for c in text)


class Forger:
    """Endless variants, the same for the same seed.

    Args:
        rng: what chooses.
        vocabulary: token ids that the model has.
        words: pieces of text; ``None`` where the server has no tokenizer.
    """

    def __init__(self, rng: random.Random, vocabulary: range, words: Sequence[str] | None = None):
        self._rng = rng
        self._vocabulary = vocabulary
        self._words = words

    # -- parts --------------------------------------------------------------------------

    def ids(self, low: int = 8, high: int = 90) -> list[int]:
        return self._rng.choices(self._vocabulary, k=self._rng.randint(low, high))

    def text(self) -> str:
        return "".join(self._rng.choices(self._words or string.ascii_letters, k=12))

    def mutated(self, value: Any, times: int = 1) -> Any:
        """A copy with so many things in it changed, lost, doubled or wrapped."""
        made = copy.deepcopy(value)
        for _ in range(times):
            made = self._mutate(made)
        return made

    def _mutate(self, value: Any) -> Any:
        rng = self._rng
        if not isinstance(value, (dict, list)) or not value or rng.random() < 0.15:
            return self._instead_of(value)
        keys = list(value) if isinstance(value, dict) else range(len(value))
        key = rng.choice(keys)
        match rng.randrange(5):
            case 0:
                del value[key]
            case 1 if isinstance(value, list):
                value.insert(key, copy.deepcopy(value[key]))
            case 1 if isinstance(value, dict):
                name = str(key) + rng.choice(["", "s", " ", "\x00"])
                value[name] = copy.deepcopy(rng.choice(JUNK))
            case _:
                value[key] = self._mutate(value[key])
        return value

    def _instead_of(self, value: Any) -> Any:
        rng = self._rng
        match rng.randrange(6):
            case 0:
                return [value]
            case 1:
                return {"payload": value}
            case 2 if isinstance(value, int) and not isinstance(value, bool):
                return value + rng.choice([-1, 1, 1 << 33, -(1 << 33)])
            case 2 if isinstance(value, str):
                return value + rng.choice(["\x1f", "\x00", "0", " ", "é"])
            case 3:
                return self._nested(rng.choice([3, 60, 300]))
            case _:
                return copy.deepcopy(rng.choice(JUNK))

    def _nested(self, depth: int) -> Any:
        made: Any = "end"
        for _ in range(depth):
            made = [made] if self._rng.random() < 0.5 else {"actions": made}
        return made

    def salt(self) -> Any:
        rng = self._rng
        if rng.random() < 0.1:
            return copy.deepcopy(rng.choice(JUNK))
        made = rng.choice(SALTS)
        return made if rng.random() < 0.6 else made + rng.choice(SALTS)

    def hints(self) -> Any:
        """``kv_hints``: internal actions as they are, as if sealed, and mutated."""
        rng = self._rng
        action = rng.choice(INTERNAL)
        payload = rng.choice({LINK: LINKS, COMPILE: COMPILES, COMMAND: COMMANDS}[action])
        match rng.randrange(6):
            case 0:
                made = envelope(action, payload)
            case 1:
                made = envelope(action, {**payload, **self._signature()})
            case 2:
                # What our front sends looks like this.
                body = json.dumps(payload) + rng.choice(["", "", " ", "\ud800"])
                seal = rng.choice([self._hex(64), self._hex(64), "", "\ud800", "é"])
                made = envelope(action, {"body": body, "seal": seal})
            case 3:
                versions = {"protocol_version": rng.choice(["2", "", "0", 1, None])}
                made = envelope(action, payload, **versions, action_version=rng.choice(["2", ""]))
            case 4:
                made = envelope(PUBLIC, self.mutated(self.pic(90), rng.randrange(3)))
            case _:
                kind = rng.choice([action.upper(), action + " ", "pic.", "pic.other", "", "Ｐic"])
                made = envelope(kind, payload)
        return self.mutated(made, rng.choice([0, 0, 1, 2, 4]))

    def _hex(self, digits: int) -> str:
        return f"{self._rng.getrandbits(4 * digits):0{digits}x}"

    def _signature(self) -> dict[str, Any]:
        name = self._rng.choice(["seal", "mac", "signature", "secret", "token", "auth"])
        return {name: self._rng.choice([self._hex(64), self._hex(32), "", None, 0, ["", ""]])}

    def pic(self, length: int) -> dict[str, Any]:
        """A ``pic`` object that is nearly right for a prompt of so many tokens."""
        rng = self._rng
        ends = sorted(rng.randint(0, length) for _ in range(2 * rng.randint(0, 3)))
        segments = [{"start": a, "end": b} for a, b in zip(ends[::2], ends[1::2], strict=True)]
        made: dict[str, Any] = {"segments": segments}
        for name, values in {
            "seam": (0, 4, 16, 1 << 20),
            "mode": ("share", "relocate"),
            "policy": ("seam", "none", "full"),
            "state": ("compose", "last", "auto"),
            "tokenize": ("pieces", "whole"),
            "turns": (True, False),
            "find": ("off", "structure", "content"),
            "require_exact": (True, False),
        }.items():
            if rng.random() < 0.3:
                made[name] = rng.choice(values)
        return made

    # -- requests ------------------------------------------------------------------------

    def _keys(self) -> dict[str, Any]:
        made = {}
        for name in ("cache_salt", "extra_key"):
            if self._rng.random() < 0.35:
                made[name] = self.salt()
        return made

    def _maybe_pic(self, length: int) -> dict[str, Any]:
        pic = self.mutated(self.pic(length), self._rng.choice([0, 0, 1, 1, 2, 4]))
        return {"pic": pic} if self._rng.random() < 0.7 else {}

    def generate(self) -> tuple[str, Any]:
        """Path and body for ``/generate``: one prompt or a batch."""
        rng = self._rng
        sampling = {"max_new_tokens": rng.randint(0, 3), "temperature": 0}
        body: dict[str, Any] = {"sampling_params": sampling, **self._keys()}
        if rng.random() < 0.75:
            ids = self.ids()
            body |= {"input_ids": ids, **self._maybe_pic(len(ids))}
            if rng.random() < 0.6:
                body["kv_hints"] = self.hints()
            if rng.random() < 0.1:
                body["stream"] = True
        else:
            prompts = [self.ids() for _ in range(2)]
            body["input_ids"] = prompts
            if rng.random() < 0.5:
                body["kv_hints"] = [self.hints() for _ in range(rng.choice([1, 2, 2, 2, 3]))]
            if rng.random() < 0.5:
                body["pic"] = [self.mutated(self.pic(len(ids))) for ids in prompts]
            if rng.random() < 0.4:
                body["cache_salt"] = [self.salt(), self.salt()]
        return "/generate", body

    def completion(self) -> tuple[str, Any]:
        """For ``/v1/completions``: a text or token ids, and all that one should not send."""
        rng = self._rng
        prompt: Any = self.text() if rng.random() < 0.7 else self.ids()
        body = {"model": "m", "prompt": prompt, "max_tokens": 2, "temperature": 0, **self._keys()}
        body |= self._maybe_pic(len(prompt))
        if rng.random() < 0.3:
            parts = [self.text(), {"segment": self.text()}, self.text()]
            body["pic"] = self.mutated({"parts": parts}, rng.randrange(3))
            body["prompt"] = rng.choice(["", self.text()])
        return "/v1/completions", self._with_hints(body)

    def chat(self) -> tuple[str, Any]:
        """For ``/v1/chat/completions``: parts marked rightly or not."""
        rng = self._rng
        parts: list[Any] = [
            {"type": "text", "text": self.text(), "pic_segment": rng.choice([True, True, False])}
            for _ in range(rng.randint(1, 3))
        ]
        parts.append({"type": "text", "text": self.text()})
        if rng.random() < 0.4:
            parts = self.mutated(parts)
        messages = [{"role": "user", "content": parts}]
        body = {"model": "m", "messages": messages, "max_tokens": 2, "temperature": 0}
        body |= self._keys()
        if rng.random() < 0.4:
            pic = self.pic(0)
            pic.pop("segments")
            body["pic"] = self.mutated(pic, rng.randrange(3))
        return "/v1/chat/completions", self._with_hints(body)

    def _with_hints(self, body: dict[str, Any]) -> dict[str, Any]:
        if self._rng.random() < 0.4:
            body["kv_hints"] = self.hints()
        return body

    def management(self) -> tuple[str, Any]:
        """For a route of ``/pic`` that looks at, compiles or changes somebody's segments."""
        rng = self._rng
        salt = {"cache_salt": self.salt()}
        name = rng.choice([self._hex(32), "forest", "\x1f", "%1f", "..", "x" * 300])
        path, body = rng.choice(
            [
                ("/pic/compile", {"input_ids": self.ids(), **salt, "extra_key": self.salt()}),
                ("/pic/compile", {"input_ids": [self.ids(), self.mutated(self.ids(1, 9))]}),
                ("/pic/explain", {"input_ids": self.ids(90, 90), "pic": self.pic(90), **salt}),
                ("/pic/flush", salt),
                (f"/pic/segments/{name}/pin", {**salt, "ttl_s": rng.choice([1, 0.5, -1, 1e308])}),
                (f"/pic/segments/{name}/unpin", salt),
            ]
        )
        return path, self.mutated(body, rng.choice([0, 0, 1, 2]))


Make = Callable[[Forger], tuple[str, Any]]
