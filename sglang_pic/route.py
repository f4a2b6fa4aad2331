"""``sglang-pic route ROUTER``: which of a router's workers would compute least of a request.

SGLang's router chooses workers by the text that opens a prompt, or by a key, and knows
nothing of segments. Each worker foretells what it would reuse (``/pic/explain``) and tells
what waits there (``/pic/load``); the one with the least to compute is named by a header that
the router obeys with ``--policy consistent_hashing``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import requests

HEADER = "X-SMG-Target-Worker"
TIMEOUT_S = 5.0


class NoWorkerError(RuntimeError):
    """No worker can be chosen; the message says why."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """A worker.

    Attributes:
        index: among the router's workers.
        url: of the worker.
        reused: prompt tokens that it would reuse.
        computed: that it would compute, compiles included.
        waiting: tokens that wait there.
    """

    index: int
    url: str
    reused: int
    computed: int
    waiting: int

    @property
    def headers(self) -> dict[str, str]:
        """By which the router takes this worker."""
        return {HEADER: str(self.index)}


def choose(router: str, body: Mapping[str, Any], api_key: str | None = None) -> Choice:
    """The worker that has the least to compute until this request's first token.

    Args:
        router: its address.
        body: of a request to ``/v1/chat/completions``, ``/v1/completions`` or ``/generate``.
        api_key: the workers' admin key, or their key if they have no other.

    Raises:
        NoWorkerError: the router lists none, or none of them links.
    """
    with requests.Session() as session:
        if api_key is not None:
            session.headers["Authorization"] = f"Bearer {api_key}"
        workers = _asked(session, "GET", router.rstrip("/") + "/workers").get("workers")
        if not isinstance(workers, list) or not workers:
            raise NoWorkerError(f"{router} lists no workers")
        try:
            urls = [
                (i, str(one["url"])) for i, one in enumerate(workers) if one.get("is_healthy", True)
            ]
        except (KeyError, TypeError, AttributeError) as error:
            raise NoWorkerError(f"{router} lists no workers: {error!r}") from error
        with ThreadPoolExecutor(len(urls) or 1) as threads:
            found = list(threads.map(lambda at: _weighed(session, at[0], at[1], body), urls))
    choices = [one for one in found if isinstance(one, Choice)]
    if not choices:
        raise NoWorkerError(f"no worker of {router} foretells a link: {found!r:.500}")
    return min(choices, key=lambda one: (one.computed + one.waiting, one.index))


def _weighed(
    session: requests.Session, index: int, url: str, body: Mapping[str, Any]
) -> Choice | NoWorkerError:
    try:
        told = _asked(session, "POST", f"{url}/pic/explain", json=body)
        load = _asked(session, "GET", f"{url}/pic/load")
        computed = told["tokens_computed"] + told["tokens_to_compile"]
        return Choice(index, url, told["tokens_reused"], computed, load["tokens"])
    except (NoWorkerError, KeyError, TypeError) as error:
        return NoWorkerError(f"{url}: {error}")


def _asked(session: requests.Session, method: str, url: str, **content: Any) -> dict[str, Any]:
    try:
        response = session.request(method, url, timeout=TIMEOUT_S, **content)
        found = response.json()
    except requests.RequestException as error:
        raise NoWorkerError(f"{url}: {error}") from error
    if not response.ok or not isinstance(found, dict):
        raise NoWorkerError(f"{response.status_code} from {url}: {response.text[:300]}")
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Print the header for one request, and on standard error what it rests on."""
    parser = argparse.ArgumentParser(
        prog="sglang-pic route",
        description="Which of a router's workers would compute least of a request.",
    )
    parser.add_argument("router", metavar="ROUTER", help="its address")
    parser.add_argument(
        "--file", type=pathlib.Path, help="JSON body of the request (standard input)"
    )
    parser.add_argument("--api-key", help="the workers' admin key, or their key")
    args = parser.parse_args(argv)
    try:
        body = json.loads(sys.stdin.read() if args.file is None else args.file.read_text("utf-8"))
        if not isinstance(body, dict):
            raise ValueError("a request is a JSON object")
        choice = choose(args.router, body, args.api_key)
    except (OSError, ValueError, NoWorkerError) as error:
        sys.exit(f"sglang-pic route: {error}")
    print("\n".join(f"{name}: {value}" for name, value in choice.headers.items()))
    told = f"{choice.reused} tokens reused, {choice.computed} computed, {choice.waiting} wait there"
    print(f"{choice.url}: {told}", file=sys.stderr)
