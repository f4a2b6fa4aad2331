"""``python -m sglang_pic.launch_server``: SGLang's server, linking.

Takes every flag of ``sglang serve`` and a few of its own, starting with
``--pic-`` (``flags``); hands these to SGLang's processes and starts the stock server.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import sys
from collections.abc import Sequence

from sglang_pic.errors import PicConfigError
from sglang_pic.find.own import rules_with
from sglang_pic.flags import check_rest, pic_parser, read_config
from sglang_pic.server.roster import check_peers
from sglang_pic.store.address import check_address, read_key


def check_files(args: argparse.Namespace) -> None:
    """Refuse now what would be refused when SGLang has loaded the model.

    Raises:
        PicConfigError: ``--pic-tenants``, ``--pic-store``, its key, ``--pic-peers`` or
            ``--pic-find-rules`` is not what it must be.
    """
    try:
        rules_with(args.pic_find_rules)
    except PicConfigError as error:
        raise PicConfigError(f"--pic-find-rules: {error}") from error
    if args.pic_tenants is not None:
        from sglang_pic.server.tenants import read_salts

        read_salts(args.pic_tenants)
    if args.pic_store is not None:
        try:
            check_address(args.pic_store)
        except PicConfigError as error:
            raise PicConfigError(f"--pic-store: {error}") from error
    elif args.pic_store_key_file is not None:
        raise PicConfigError("--pic-store-key-file: signs what goes to a --pic-store")
    if args.pic_peers is not None:
        if args.pic_store is None:
            raise PicConfigError("--pic-peers: peers need a --pic-store that all of them share")
        try:
            check_peers(args.pic_peers)
        except PicConfigError as error:
            raise PicConfigError(f"--pic-peers: {error}") from error
    if args.pic_encoder is not None:
        try:
            check_encoder(args.pic_encoder, args.model_path)
        except PicConfigError as error:
            raise PicConfigError(f"--pic-encoder: {error}") from error
    try:
        read_key(args.pic_store_key_file)
    except PicConfigError as error:
        raise PicConfigError(f"--pic-store-key-file: {error}") from error


def check_encoder(directory: str, model_path: str) -> None:
    """Refuse what is no encoder for this model.

    Raises:
        PicConfigError: it cannot be read, or was trained for another model.
    """
    from transformers import AutoConfig

    from sglang_pic.encoder.config import decoder_shape, fingerprint
    from sglang_pic.encoder.weights import load

    served = fingerprint(pathlib.Path(model_path))
    try:
        text = AutoConfig.from_pretrained(model_path).get_text_config()
    except (OSError, ValueError) as error:
        raise PicConfigError(f"cannot read the model's configuration: {error}") from error
    load(pathlib.Path(directory), decoder_shape(text, served))


def with_defaults(flags: Sequence[str], *, cuda: bool, tenants: bool = False) -> list[str]:
    """SGLang's flags, and what linking needs of them unless they say otherwise.

    Args:
        cuda: SGLang would choose among attention backends that cannot link.
        tenants: it could not warm its own server up, having no tenant's key; and its model
            is not called by where it lies.
    """
    given = {flag.split("=")[0] for flag in flags}
    made = list(flags)
    if "--radix-cache-backend" not in given:
        made += ["--radix-cache-backend", "pic"]
    if tenants:
        made += ["--skip-server-warmup"]
        model = pathlib.PurePath(flags[flags.index("--model-path") + 1])
        if "--served-model-name" not in given and model.is_absolute():
            made += ["--served-model-name", model.name]
    named = {f"--{kind}attention-backend" for kind in ("", "prefill-", "decode-")}
    if cuda and not named & given:
        made += ["--attention-backend", "triton"]
    return made


def main(argv: Sequence[str] | None = None) -> None:
    """Start the server; returns when it stops."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = pic_parser()
    args, rest = parser.parse_known_args(argv)
    try:
        check_rest(args, rest)
        check_files(args)
        read_config(args).to_env()
    except PicConfigError as error:
        parser.error(str(error))
    import torch

    rest = with_defaults(
        ["--model-path", args.model_path, *rest],
        cuda=torch.cuda.is_available(),
        tenants=args.pic_tenants is not None,
    )

    from sglang.launch_server import run_server
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    load_plugins()
    server_args = prepare_server_args(rest)
    if args.pic_tenants is not None:
        from sglang_pic.server.tenants import Tenants

        try:
            Tenants.read(args.pic_tenants, server_args)
        except PicConfigError as error:
            parser.error(str(error))
    try:
        run_server(server_args)
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


if __name__ == "__main__":
    main()
