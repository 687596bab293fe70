"""Images made of images and containers: convert, commit."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from wherry.cli.output import size
from wherry.cli.table import Command
from wherry.cli.transfers import full_name
from wherry.client.commit import Changes, commit
from wherry.core.platforms import host, parse

if TYPE_CHECKING:
    from wherry.cli.session import Session
    from wherry.core.descriptor import Descriptor


async def convert(session: Session, args: argparse.Namespace) -> None:
    """Converts an image and prints the name of what it became."""
    from wherry.client.convert import Form
    from wherry.client.convert import convert as to_form

    client = session.client
    image = await client.images.find(args.source)
    only = () if args.all_platforms else tuple(parse(text) for text in args.platform) or (host(),)
    form = Form("zstd" if args.zstd else args.compression, args.oci, only, args.level)

    def told(old: Descriptor, new: Descriptor) -> None:
        if not args.quiet:
            sys.stderr.write(f"{old.digest[:19]} {size(old.size)} -> {new.digest[:19]} {size(new.size)}\n")

    made = await to_form(client, image, full_name(args.target), form, told)
    print(made.name)


async def commit_(session: Session, args: argparse.Namespace) -> None:
    """Makes an image of a container and prints its digest."""
    changes = Changes(args.author, args.message, tuple(args.change), not args.no_pause)
    made = await commit(session.client, args.container, full_name(args.image), changes)
    print(made.target.digest)


def _convert_options(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--zstd", action="store_true", help="layers compressed by zstd")
    kinds.add_argument("--compression", default="", choices=("zstd", "gzip", "none"), help="how layers are compressed")
    parser.add_argument(
        "--level", type=int, default=0, metavar="N", help="how hard to compress (3 for zstd, 6 for gzip)"
    )
    parser.add_argument("--oci", action="store_true", help="OCI's media types instead of Docker's (zstd needs them)")
    parser.add_argument("--platform", action="append", default=[], metavar="OS/ARCH", help="what stays (the host's)")
    parser.add_argument("--all-platforms", action="store_true", help="all platforms that are here stay")
    parser.add_argument("-q", "--quiet", action="store_true", help="no line for each layer")
    parser.add_argument("source", metavar="IMAGE")
    parser.add_argument("target", metavar="NAME", help="the name of what it becomes")


def _commit_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-a", "--author", default="", metavar="NAME", help="who made it")
    parser.add_argument("-m", "--message", default="", metavar="TEXT", help="what changed")
    parser.add_argument(
        "-c", "--change", action="append", default=[], metavar="INSTRUCTION", help='as in a Dockerfile: CMD ["sh"]'
    )
    parser.add_argument("--no-pause", action="store_true", help="let the container run meanwhile")
    parser.add_argument("container", metavar="CONTAINER")
    parser.add_argument("image", metavar="NAME", help="the new image's name")


COMMANDS = [
    Command(
        ("convert",), "make another form of an image: zstd, OCI, fewer platforms", convert, _convert_options,
        "wherry images convert --zstd alpine registry.example/alpine:zstd",
    ),
    Command(
        ("commit",), "make an image of a container's file system", commit_, _commit_options,
        "wherry images commit -c 'CMD [\"serve\"]' web registry.example/web:2",
    ),
]  # fmt: skip
