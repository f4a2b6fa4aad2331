"""Command line and output that the example programs share."""

from __future__ import annotations

import argparse

from sglang.lang.interpreter import ProgramState

from sglang_pic.lang import PicRuntimeEndpoint, report_of


def connect(description: str | None) -> PicRuntimeEndpoint:
    """Read the command line and connect to the server that it names."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", default="http://127.0.0.1:30000", help="of a running server")
    parser.add_argument(
        "--chat-template",
        default="chatml",
        help="SGLang's name of the model's chat template (default: chatml, SmolLM2's)",
    )
    args = parser.parse_args()
    endpoint = PicRuntimeEndpoint(args.url, chat_template_name=args.chat_template)
    if endpoint.pic_info() is None:
        print("This is a plain SGLang server: the segments are ordinary text to it.\n")
    return endpoint


def show(state: ProgramState, name: str, title: str) -> None:
    """Print the answer kept under ``name``, and what it cost."""
    print(f"{title}\n  {' '.join(state[name].split())}")
    report = report_of(state, name)
    if report is not None:
        print(
            f"  [{report['tokens_reused']} tokens reused, {report['tokens_computed']} computed, "
            f"{report['exactness']}]"
        )
    print()
