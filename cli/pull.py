"""`wherry pull`: the daemon brings an image from a registry and unpacks it."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from wherry.cli.arguments import pairs
from wherry.cli.table import Command
from wherry.cli.transfers import explained, full_name, progress_options, registry, registry_options, result, show
from wherry.core.platforms import host, parse

if TYPE_CHECKING:
    from wherry.cli.session import Session


async def pull(session: Session, args: argparse.Namespace) -> None:
    """Brings the image and prints its name."""
    client = session.client
    name = full_name(args.reference)
    platforms = [parse(text) for text in args.platform]
    snapshotter = args.snapshotter or await client.namespaces.default_snapshotter()
    progress = client.transfer.pull(
        registry(args, name),
        # without a platform, all are fetched; named ones, or the host's, else
        platforms=[] if args.all_platforms else platforms or [host()],
        labels=pairs(args.label),
        all_metadata=args.all_metadata,
        unpack=() if args.no_unpack else [(platform, snapshotter) for platform in platforms or [host()]],
    )
    with explained():
        await show(progress, quiet=args.quiet, style=args.format)
    result(args, name)


def _configure(parser: argparse.ArgumentParser) -> None:
    registry_options(parser)
    progress_options(parser)
    parser.add_argument("--platform", action="append", default=[], metavar="OS/ARCH", help="platforms (the host's)")
    parser.add_argument("--all-platforms", action="store_true", help="everything of every platform")
    parser.add_argument("--all-metadata", action="store_true", help="the manifests of every platform")
    parser.add_argument("--no-unpack", action="store_true", help="don't make snapshots")
    parser.add_argument("--label", action="append", default=[], metavar="KEY=VALUE", help="a label of the image")
    parser.add_argument(
        "--snapshotter", default=os.environ.get("CONTAINERD_SNAPSHOTTER", ""), metavar="NAME",
        help="snapshotter (CONTAINERD_SNAPSHOTTER)",
    )  # fmt: skip
    parser.add_argument("reference", metavar="IMAGE", help="docker.io/library/alpine:latest, or short: alpine")


COMMANDS = [
    Command(
        ("pull",), "bring an image from a registry", pull, _configure, "wherry pull --plain-http localhost:5000/app:1"
    )
]
