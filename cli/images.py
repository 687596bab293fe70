"""`wherry images`: names for what can be run."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from wherry.cli import image_changes, image_files, pull, push, registries, system
from wherry.cli.arguments import pairs
from wherry.cli.output import Column, labels, listing, listing_options, size, when
from wherry.cli.saying import each
from wherry.cli.table import Command
from wherry.client.images import Image
from wherry.client.manifests import Picture, picture, walk
from wherry.client.unpack import unpacked
from wherry.core.errors import AlreadyExists, NotFound, WherryError
from wherry.core.mediatypes import is_index
from wherry.core.tuples import NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

    from wherry.cli.session import Session
    from wherry.client.api import Client


class Row(NamedTuple):
    """An image with what the store has of it."""

    image: Image
    size: int
    platforms: list[str]


class Checked(NamedTuple):
    """A row of `check`: bytes there of all, and whether it is unpacked."""

    image: Image
    status: str
    have: int
    all: int
    unpacked: bool


COLUMNS = [
    Column[Row]("REF", "Name", lambda row: row.image.name),
    Column[Row]("TYPE", "MediaType", lambda row: row.image.target.media_type),
    Column[Row]("DIGEST", "Digest", lambda row: str(row.image.target.digest)),
    Column[Row]("SIZE", "Size", lambda row: row.size, size),
    Column[Row]("PLATFORMS", "Platforms", lambda row: row.platforms, lambda v: ",".join(v) or "-"),
    Column[Row]("LABELS", "Labels", lambda row: dict(row.image.labels), labels),
]
TIMES = [Column[Row]("CREATED", "CreatedAt", lambda row: when(row.image.created_at))]
CHECK = [
    Column[Checked]("REF", "Name", lambda row: row.image.name),
    Column[Checked]("TYPE", "MediaType", lambda row: row.image.target.media_type),
    Column[Checked]("DIGEST", "Digest", lambda row: str(row.image.target.digest)),
    Column[Checked]("STATUS", "Status", lambda row: row.status),
    Column[Checked]("SIZE", "Size", lambda row: [row.have, row.all], lambda v: f"{size(v[0])}/{size(v[1])}"),
    Column[Checked]("UNPACKED", "Unpacked", lambda row: row.unpacked, lambda v: str(v).lower()),
]


async def list_(session: Session, args: argparse.Namespace) -> None:
    """Prints the images."""
    client = session.client
    images = await client.images.list(args.filters)
    if args.quiet and args.format == "table":
        for image in images:
            print(image.name)
        return
    rows = [await _row(client, image) for image in sorted(images, key=lambda image: image.name)]
    listing(args, COLUMNS + TIMES if args.format == "json" else COLUMNS, rows)


async def _row(client: Client, image: Image) -> Row:
    """What an image has for this host; one whose content is damaged or missing is listed all the same."""
    try:
        look = await picture(client.content, image.target)
        platforms = await _platforms(client, image, look)
    except WherryError as error:
        sys.stderr.write(f"wherry: {image.name}: {error.message}\n")
        return Row(image, image.target.size, [])
    return Row(image, _size(look), platforms)


def _size(look: Picture) -> int:
    return look.manifest.size + look.config.size + sum(layer.size for layer in look.layers)


async def _platforms(client: Client, image: Image, look: Picture) -> list[str]:
    if not is_index(image.target.media_type):
        return [str(look.platform)]
    from wherry.client.manifests import read_json
    from wherry.core.descriptor import Descriptor

    document = await read_json(client.content, image.target)
    found = [Descriptor.from_json(item).platform for item in document.get("manifests") or ()]
    named = sorted({str(item) for item in found if item is not None and item.os not in {"", "unknown"}})
    return named or [str(look.platform)]


async def check(session: Session, args: argparse.Namespace) -> None:
    """Prints what is there of each image."""
    client = session.client
    snapshotter = args.snapshotter or await client.namespaces.default_snapshotter()
    rows = [await _check(client, image, snapshotter) for image in await client.images.list(args.filters)]
    if args.quiet:
        rows = [row for row in rows if row.status.startswith("complete") and row.unpacked]
    listing(args, CHECK, rows)


async def _check(client: Client, image: Image, snapshotter: str) -> Checked:
    try:
        look = await picture(client.content, image.target)
    except WherryError:
        return Checked(image, "incomplete", 0, image.target.size, False)
    parts = [look.manifest, look.config, *look.layers]
    there = []
    for part in parts:
        try:
            there.append((await client.content.info(part.digest)).size)
        except NotFound:
            continue
    word = "complete" if len(there) == len(parts) else "incomplete"
    total = sum(part.size for part in parts)
    done = await unpacked(client, look, snapshotter)
    return Checked(image, f"{word} ({len(there)}/{len(parts)})", sum(there), total, done)


async def tag(session: Session, args: argparse.Namespace) -> None:
    """Gives an image further names and prints them."""
    images = session.client.images
    source = await images.find(args.source)
    for name in args.targets:
        image = Image(name, source.target, source.labels)
        try:
            await images.create(image)
        except AlreadyExists:
            if not args.force:
                raise
            await images.update(image, ["target", "labels"])
        print(name)


async def delete(session: Session, args: argparse.Namespace) -> int:
    """Removes names and prints them; one that isn't there is told and makes the exit code 1."""
    images, last = session.client.images, args.names[-1]
    return await each(args.names, lambda name: images.delete(name, sync=args.sync and name == last))


async def label(session: Session, args: argparse.Namespace) -> None:
    """Sets labels and prints them all."""
    image = await session.client.images.label(args.name, pairs(args.labels), replace_all=args.replace_all)
    print(labels(image.labels))


async def usage(session: Session, args: argparse.Namespace) -> None:
    """Prints what an image uses as content and unpacked."""
    from wherry.cli.output import print_json

    client = session.client
    image = await client.images.find(args.name)
    sizes: Mapping[str, int] = {item.digest: item.size for item in await walk(client.content, image.target)}
    look = await picture(client.content, image.target)
    snapshots = client.snapshots(args.snapshotter or await client.namespaces.default_snapshotter())
    unpacked_size, key = 0, look.chain_id
    while key:
        try:
            unpacked_size += (await snapshots.usage(key)).size
            key = (await snapshots.stat(key)).parent
        except NotFound:
            break
    values = {"Name": image.name, "Content": sum(sizes.values()), "Unpacked": unpacked_size}
    if args.format == "json":
        print_json(values)
    else:
        print(f"content:  {size(values['Content'])}\nunpacked: {size(values['Unpacked'])}")  # type: ignore[arg-type]


def _list_options(parser: argparse.ArgumentParser) -> None:
    listing_options(parser, quiet="names")
    parser.add_argument("filters", nargs="*", metavar="FILTER", help="containerd's filters (name~=busybox)")


def _check_options(parser: argparse.ArgumentParser) -> None:
    _list_options(parser)
    image_files.snapshotter_option(parser)


def _tag_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--force", action="store_true", help="take the name from the image that has it")
    parser.add_argument("source", metavar="IMAGE")
    parser.add_argument("targets", nargs="+", metavar="NAME")


def _delete_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sync", action="store_true", help="return when nothing is left of them")
    parser.add_argument("names", nargs="+", metavar="IMAGE")


def _label_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-r", "--replace-all", action="store_true", help="all other labels go")
    parser.add_argument("name", metavar="IMAGE")
    parser.add_argument("labels", nargs="*", metavar="KEY=VALUE", help="an empty value takes a label away")


def _usage_options(parser: argparse.ArgumentParser) -> None:
    image_files.snapshotter_option(parser)
    parser.add_argument("--format", choices=("table", "json"), default="table")
    parser.add_argument("name", metavar="IMAGE")


COMMANDS = [
    Command(("list", "ls"), "list images", list_, _list_options, "wherry images ls --format json"),
    *pull.COMMANDS,
    *push.COMMANDS,
    *registries.COMMANDS,
    Command(
        ("check",), "say whether images are complete and unpacked", check, _check_options, example="wherry images check"
    ),
    Command(
        ("tag",),
        "give an image further names",
        tag,
        _tag_options,
        example="wherry images tag docker.io/library/alpine:latest registry.example/alpine:1",
    ),
    Command(
        ("label",),
        "set and take away labels",
        label,
        _label_options,
        example="wherry images label docker.io/library/alpine:latest team=a",
    ),
    Command(("usage",), "show what an image uses", usage, _usage_options, example="wherry images usage alpine"),
    *image_files.COMMANDS,
    *image_changes.COMMANDS,
    Command(
        ("delete", "del", "remove", "rm"),
        "remove images",
        delete,
        _delete_options,
        example="wherry images rm --sync docker.io/library/alpine:latest",
    ),
    system.IMAGE_PRUNE,
]
