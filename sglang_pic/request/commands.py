"""The commands that the front may send to a scheduler's cache, as typed records.

``manage.commands`` carries them out. On the wire each is a JSON object whose ``do``
names it.
"""

from __future__ import annotations

from typing import Union

import msgspec

# What has become of a segment that is to be written to the store.
WRITING, WRITTEN, UNWRITTEN = "writing", "written", "unwritten"


class _Command(msgspec.Struct, forbid_unknown_fields=True, tag_field="do"):
    pass


class Timer(_Command, tag="timer"):
    """Times by stage; ``on`` turns the timer on, from zero, or off."""

    on: bool | None = None


class Forest(_Command, tag="forest"):
    """Every segment, and what the integrity check says."""


class Stats(_Command, tag="stats"):
    """Counters and gauges."""


class Budgets(_Command, tag="budgets"):
    """Bytes by kind against the budgets."""


class Explain(_Command, tag="explain"):
    """What the link that comes with the command would do."""


class Missing(_Command, tag="missing"):
    """What the link that comes with the command needs compiled; it will come."""


class Key(_Command, tag="key"):
    """What prefixes of such a request are kept apart by, beside the salt."""


class List(_Command, tag="list"):
    """A tenant's segments, and its encoded documents."""


class Get(_Command, tag="get"):
    """One of them."""

    id: str


class Pin(_Command, tag="pin"):
    """Keep one; with a store also beyond this server's end, if it is ``lasting``."""

    id: str
    lasting: bool = True


class Unpin(_Command, tag="unpin"):
    """Let it go again."""

    id: str


class Delete(_Command, tag="delete"):
    """Forget one."""

    id: str


class Flush(_Command, tag="flush"):
    """Forget a tenant's."""


class Reserve(_Command, tag="reserve"):
    """Whether segments of so many tokens each could be held."""

    tokens: list[int]


class Save(_Command, tag="save"):
    """Write a tenant's segments to the store; all of them if ``segments`` is null."""

    segments: list[str] | None


class Restore(_Command, tag="restore"):
    """Load them."""


class Fetch(_Command, tag="fetch"):
    """Begin to read segments of the store, for links of a seam width: the prompt that comes
    with the command is their paths, of these lengths, compile context first."""

    lengths: list[int]
    seam: int
    named: bool


class FetchDocuments(_Command, tag="fetch_documents"):
    """The same for encoded documents, which the prompt is, one behind the other."""

    lengths: list[int]
    named: bool


class Fetched(_Command, tag="fetched"):
    """Go on with segments that come from the store, or with encoded documents, and what has
    become of them; or drop them."""

    segments: list[str]
    drop: bool = False
    documents: bool = False


class Lease(msgspec.Struct, forbid_unknown_fields=True):
    """Documents of one prompt that is on its way.

    Attributes:
        id: names the prompt; more of its documents may come under it.
        held: names of documents that were held lately.
        lengths: of those that come with the command.
        named: they are asked for by name, and no prompt will come.
    """

    id: str
    tenant: str | None
    held: list[str]
    lengths: list[int]
    named: bool = False


class Encode(_Command, tag="encode"):
    """Have an encoder read documents, unless they are held, and keep those of each prompt
    until that has come; of which prompts all are kept now, of the others none. The prompt
    that comes with the command is all of the documents, one behind the other.

    Attributes:
        now: seconds, monotonic, of the front's machine: each rank has a clock of its own.
    """

    leases: list[Lease]
    now: float


class Foretell(_Command, tag="foretell"):
    """Which of these documents the tenant has, and what of the row that comes with the
    command is cached behind them."""

    documents: list[str]


class Publish(_Command, tag="publish"):
    """What has become of segments of the tenant that are to be written to the store; from
    now on, if they ``begin``."""

    segments: list[str]
    begin: bool


class Held(_Command, tag="held"):
    """Which of these the tenant has, documents too."""

    segments: list[str]


class Companies(_Command, tag="companies"):
    """Of which of these companies all segments are held."""

    companies: list[str]


class Name(_Command, tag="name"):
    """Which of these the tenant has with all that links of a seam width need; they
    count as compiled by name."""

    segments: list[str]
    seam: int


class Selfcheck(_Command, tag="selfcheck"):
    """Compare a compile's states with those of its two parts, cut at token ``at``."""

    at: int
    seam: int


Command = Union[  # noqa: UP007  (msgspec reads it at run time, on Python 3.10 too)
    Timer,
    Forest,
    Stats,
    Budgets,
    Explain,
    Missing,
    Key,
    List,
    Get,
    Pin,
    Unpin,
    Delete,
    Flush,
    Reserve,
    Save,
    Restore,
    Fetch,
    FetchDocuments,
    Fetched,
    Encode,
    Foretell,
    Publish,
    Held,
    Companies,
    Name,
    Selfcheck,
]
