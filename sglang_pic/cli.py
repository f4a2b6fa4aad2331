"""``sglang-pic``: serve a model, watch a server, find out what reaches one, which, or would pay."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from sglang_pic import doctor, estimate, launch_server, route, top
from sglang_pic.flags import did_you_mean

USAGE = """\
sglang-pic serve --model-path MODEL [flags]   a server; `serve` may be left out
sglang-pic top [--url URL] [flags]            what a running server does, live
sglang-pic doctor URL [flags]                 what of a request reaches it, and links
sglang-pic route ROUTER [flags]               which worker has most of a request
sglang-pic estimate LOG [flags]               what segments would save of recorded requests

Each with --help lists its flags."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run what the first argument names; a flag there is one of ``serve``."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
    elif argv[0] == "top":
        top.main(argv[1:])
    elif argv[0] == "doctor":
        doctor.main(argv[1:])
    elif argv[0] == "route":
        route.main(argv[1:])
    elif argv[0] == "estimate":
        estimate.main(argv[1:])
    elif argv[0] == "serve" or argv[0].startswith("-"):
        launch_server.main(argv[1:] if argv[0] == "serve" else argv)
    else:
        near = did_you_mean(argv[0], ("serve", "top", "doctor", "route", "estimate"))
        print(f"sglang-pic: there is no command {argv[0]}{near}\n{USAGE}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
