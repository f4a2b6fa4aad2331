"""``sglang-pic doctor URL``: what of a request survives the way to a server, and whether it links.

Whatever stands at the address, a server or a gateway in front of some, gets a handful of
marked requests of one token each, over documents that nobody else has.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import pathlib
import random
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import requests

from sglang_pic.client import through_gateway

TIMEOUT_S = 120.0
# A first answer may be exact, and its documents compiled behind it.
TRIES, PAUSE_S = 5, 1.0
WORDS = ("stone", "river", "lamp", "bread", "copper", "north", "winter", "harbour", "letter")
WORDS_A_DOCUMENT = 160
GOOD, BAD, KNOWN = "ok", "!!", ".."

Body = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line: ``state`` is ``GOOD``, ``BAD``, or ``KNOWN`` for what is only told."""

    state: str
    about: str
    text: str


class NoAnswer(RuntimeError):
    """The address did not do what was asked; the message says what it said."""


def told(response: requests.Response, kind: type = dict) -> Any:
    """What an answer holds: JSON of that kind.

    Raises:
        NoAnswer: it is another status, or something else, such as a proxy's page.
    """
    try:
        found = response.json() if response.ok else None
    except requests.JSONDecodeError:
        found = None
    if not isinstance(found, kind):
        raise NoAnswer(f"{response.status_code} from {response.url}: {response.text[:300]}")
    return found


class Patient:
    """A server, or a gateway, and what is asked of it."""

    def __init__(self, url: str, api_key: str | None = None):
        self.url = url.rstrip("/")
        self._headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._draw = random.Random()
        self.model = "default"

    def get(self, path: str, *, key: bool = True) -> requests.Response:
        return self._send("GET", path, key=key)

    def post(self, path: str, body: Body, *, key: bool = True) -> requests.Response:
        return self._send("POST", path, key=key, json=body)

    def _send(self, method: str, path: str, *, key: bool, **content: Any) -> requests.Response:
        headers = self._headers if key else {}
        try:
            return requests.request(
                method, self.url + path, headers=headers, timeout=TIMEOUT_S, **content
            )
        except requests.RequestException as error:
            raise NoAnswer(f"{self.url}{path}: {error}") from error

    def documents(self) -> list[str]:
        """Two that nobody has."""
        return [
            " ".join(self._draw.choice(WORDS) for _ in range(WORDS_A_DOCUMENT)) + "\n"
            for _ in range(2)
        ]

    def chat(self, documents: Sequence[str], salt: str | None = None, **more: Any) -> Body:
        parts: list[Body] = [
            {"type": "text", "text": text, "pic_segment": True} for text in documents
        ]
        content = [*parts, {"type": "text", "text": "Which word comes first?"}]
        body = {"model": self.model, "messages": [{"role": "user", "content": content}]}
        tenant = {} if salt is None else {"cache_salt": salt}
        return {**body, "max_tokens": 1, "temperature": 0, **tenant, **more}

    def report(self, path: str, body: Body) -> Body | None:
        """The report in an answer, ``None`` where it has none.

        Raises:
            NoAnswer: it is no answer.
        """
        found = (told(self.post(path, body)).get("usage") or {}).get("pic")
        return found if isinstance(found, dict) else None


def as_fields(body: Body) -> Body:
    """As a client without a gateway writes it."""
    return body


def in_template_kwargs(body: Body) -> Body:
    """What ``through_gateway`` puts into ``metadata``, in ``chat_template_kwargs``."""
    carried = through_gateway(body)
    metadata = carried["metadata"]
    ours = {name: metadata.pop(name) for name in ("pic", "pic_salt") if name in metadata}
    if "pic" in ours:
        ours["pic"] = json.loads(ours["pic"])
    return {**carried, "chat_template_kwargs": {**carried.get("chat_template_kwargs", {}), **ours}}


FORMS: dict[str, Callable[[Body], Body]] = {
    "pic_segment in the messages": as_fields,
    "metadata": through_gateway,
    "chat_template_kwargs": in_template_kwargs,
}
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def examine(patient: Patient) -> Iterator[Finding]:
    """All findings, as they come.

    Raises:
        NoAnswer: nothing answers there.
    """
    models = told(patient.get("/v1/models"))
    names = [one["id"] for one in models.get("data", [])]
    patient.model = names[0] if names else patient.model
    yield Finding(GOOD, "answers", f"serves {', '.join(names) or 'a model without a name'}")
    yield from _management(patient)
    yield from _workers(patient)
    forms = []
    for name, form in FORMS.items():
        finding = _links(patient, f"chat, {name}", CHAT, functools.partial(_chat, patient, form))
        forms += [form] if finding.state == GOOD else []
        yield finding
    yield _links(patient, "completions", COMPLETIONS, functools.partial(_completion, patient))
    if forms:
        yield _salts(patient, forms[0])
        yield _streams(patient, forms[0])
    yield _keys(patient)


def _chat(patient: Patient, form: Callable[[Body], Body], documents: Sequence[str]) -> Body:
    return form(patient.chat(documents))


def _completion(patient: Patient, documents: Sequence[str]) -> Body:
    parts = [*({"segment": text} for text in documents), "Which word comes first?"]
    return {"model": patient.model, "prompt": "", "pic": {"parts": parts}, "max_tokens": 1}


def _management(patient: Patient) -> Iterator[Finding]:
    try:
        info = told(patient.get("/pic/info"))
    except NoAnswer as error:
        why = "a gateway drops them, or the server is not ours"
        yield Finding(BAD, "/pic routes", f"{why}: {error}")
        return
    yield Finding(GOOD, "/pic routes", f"sglang-pic {info['version']}")
    linking = info["linking"]
    if not linking["on"]:
        yield Finding(BAD, "linking", f"is off: {linking['reason']}")
    with contextlib.suppress(NoAnswer):  # which is the operator's to see
        ranks = told(patient.get("/pic/forest"), list)
        for refusal in sorted({rank["refusal"] for rank in ranks} - {None}):
            yield Finding(BAD, "linking", f"this server does not link: {refusal}")


def _workers(patient: Patient) -> Iterator[Finding]:
    try:
        workers = [one["url"] for one in told(patient.get("/workers"))["workers"]]
    except (NoAnswer, KeyError, TypeError):
        return
    yield Finding(KNOWN, "gateway", f"in front of {len(workers)} workers: {', '.join(workers)}")
    for url in workers:
        try:
            version = f"sglang-pic {told(Patient(url).get('/pic/info'))['version']}"
        except (NoAnswer, KeyError):
            version = "cannot be asked from here"
        yield Finding(KNOWN, "worker", f"{url}: {version}")


def _links(
    patient: Patient, about: str, path: str, body_of: Callable[[Sequence[str]], Body]
) -> Finding:
    documents = patient.documents()
    try:
        report = patient.report(path, body_of(documents))
        for _ in range(TRIES):
            if report is None or report["tokens_reused"] > report["prefix_tokens"]:
                break
            time.sleep(PAUSE_S)
            report = patient.report(path, body_of(documents[::-1]))
    except NoAnswer as error:
        return Finding(BAD, about, str(error))
    if report is None:
        return Finding(BAD, about, "answered without a report: the marks did not arrive")
    if report["reason"] is not None:
        return Finding(BAD, about, f"arrived, and is not linked: {report['reason']}")
    total = report["tokens_reused"] + report["tokens_computed"]
    if not report["tokens_reused"]:
        reasons = ", ".join(sorted({one["reason"] for one in report["segments"]}))
        return Finding(BAD, about, f"arrived, and nothing was reused: {reasons}")
    return Finding(GOOD, about, f"linked: {report['tokens_reused']} of {total} tokens reused")


def _salts(patient: Patient, form: Callable[[Body], Body]) -> Finding:
    documents = patient.documents()
    mine, other = (f"doctor-{random.random()}" for _ in range(2))
    try:
        for _ in range(TRIES):
            report = patient.report(CHAT, form(patient.chat(documents, mine)))
            if report is not None and report["tokens_reused"]:
                break
            time.sleep(PAUSE_S)
        else:
            return Finding(BAD, "cache_salt", "nothing was reused under a salt of its own")
        report = patient.report(CHAT, form(patient.chat(documents, other)))
    except NoAnswer as error:
        return Finding(BAD, "cache_salt", str(error))
    # Linked at once, its documents have been compiled for it.
    if report is not None and report["tokens_reused"] and not report["tokens_compiled"]:
        return Finding(BAD, "cache_salt", "does not arrive: tenants would share one cache")
    return Finding(GOOD, "cache_salt", "one tenant's documents are not another's")


def _streams(patient: Patient, form: Callable[[Body], Body]) -> Finding:
    body = form(patient.chat(patient.documents()))
    stream = {"stream": True, "stream_options": {"include_usage": True}}
    try:
        response = patient.post(CHAT, {**body, **stream})
    except NoAnswer as error:
        return Finding(BAD, "stream", str(error))
    chunks = [line[6:] for line in response.text.splitlines() if line.startswith("data: {")]
    found = any((json.loads(chunk).get("usage") or {}).get("pic") for chunk in chunks)
    if not found:
        return Finding(BAD, "stream", f"{len(chunks)} chunks, no report in any")
    return Finding(GOOD, "stream", "the report comes with the usage")


def _keys(patient: Patient) -> Finding:
    try:
        response = patient.post(CHAT, patient.chat(patient.documents()), key=False)
    except NoAnswer as error:
        return Finding(BAD, "keys", str(error))
    if response.status_code in (401, 403):
        return Finding(GOOD, "keys", "no answer without one")
    return Finding(KNOWN, "keys", "anyone may ask: no key is needed here")


def main(argv: Sequence[str] | None = None) -> None:
    """Examine what stands at an address; ends with 1 if no chat request links."""
    parser = argparse.ArgumentParser(prog="sglang-pic doctor", description=__doc__)
    parser.add_argument("url", help="of a server, or of the gateway in front")
    parser.add_argument("--api-key", help="the key that clients send")
    parser.add_argument("--json", type=pathlib.Path, help="write the findings here too")
    args = parser.parse_args(argv)
    findings = []
    try:
        for finding in examine(Patient(args.url, args.api_key)):
            print(f"{finding.state}  {finding.about}: {finding.text}", flush=True)
            findings.append(finding)
    except NoAnswer as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    if args.json is not None:
        rows = [dataclasses.asdict(one) for one in findings]
        args.json.write_text(json.dumps({"url": args.url, "findings": rows}, indent=1) + "\n")
    if not any(one.state == GOOD and one.about.startswith("chat, ") for one in findings):
        parser.exit(1)
