"""`wherry snapshots`: file systems of images and containers."""

from __future__ import annotations

import argparse
import os
import shlex
from typing import TYPE_CHECKING

from wherry.cli.arguments import pairs
from wherry.cli.output import Column, labels, listing, listing_options, now, print_json, size, when
from wherry.cli.table import Command
from wherry.client.snapshots import Snapshot
from wherry.core.errors import NotFound
from wherry.core.tuples import NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable

    from wherry.cli.session import Session
    from wherry.client.snapshots import Snapshots
    from wherry.client.values import Mount

COLUMNS = [
    Column[Snapshot]("KEY", "Key", lambda item: item.name),
    Column[Snapshot]("PARENT", "Parent", lambda item: item.parent),
    Column[Snapshot]("KIND", "Kind", lambda item: item.kind),
]
MORE = [
    Column[Snapshot]("LABELS", "Labels", lambda item: dict(item.labels), labels),
    Column[Snapshot]("CREATED", "CreatedAt", lambda item: when(item.created_at)),
]


class Used(NamedTuple):
    """A row of `usage`."""

    key: str
    size: int
    inodes: int


USAGE = [
    Column[Used]("KEY", "Key", lambda item: item.key),
    Column[Used]("SIZE", "Size", lambda item: item.size, size),
    Column[Used]("INODES", "Inodes", lambda item: item.inodes),
]


async def snapshots_of(session: Session, args: argparse.Namespace) -> Snapshots:
    """The snapshotter that was named, else the namespace's default."""
    name = args.snapshotter or await session.client.namespaces.default_snapshotter()
    return session.client.snapshots(name)


def mount_lines(mounts: Iterable[Mount], target: str) -> list[str]:
    """Mounts as commands that a shell runs."""
    lines = []
    for mount in mounts:
        place = os.path.join(target, mount.target.lstrip("/")) if mount.target else target
        words = ["mount", "-t", mount.type, mount.source, place]
        if mount.options:
            words += ["-o", ",".join(mount.options)]
        lines.append(shlex.join(words))
    return lines


def _print_mounts(mounts: list[Mount], args: argparse.Namespace) -> None:
    if args.target:
        print("\n".join(mount_lines(mounts, args.target)))
    elif args.mounts:
        print_json(
            [{"Type": m.type, "Source": m.source, "Target": m.target, "Options": list(m.options)} for m in mounts]
        )


async def list_(session: Session, args: argparse.Namespace) -> None:
    """Prints the snapshots."""
    snapshots = await snapshots_of(session, args)
    columns = COLUMNS + MORE if args.format == "json" else COLUMNS
    listing(args, columns, [item async for item in snapshots.list(args.filters)])


async def tree(session: Session, args: argparse.Namespace) -> None:
    """Draws which snapshot lies on which."""
    from wherry.cli.trees import depths

    snapshots = await snapshots_of(session, args)
    parents = {item.name: item.parent async for item in snapshots.list()}
    for depth, name in depths(parents):
        print(f" {'  ' * (depth - 1)}\\_ {name}" if depth else f" {name}")


async def info(session: Session, args: argparse.Namespace) -> None:
    """Prints a record."""
    item = await (await snapshots_of(session, args)).stat(args.key)
    document = {
        "Kind": item.kind,
        "Name": item.name,
        "Parent": item.parent,
        "Labels": dict(item.labels),
        "Created": when(item.created_at),
        "Updated": when(item.updated_at),
    }
    print_json({key: value for key, value in document.items() if value})


async def usage(session: Session, args: argparse.Namespace) -> None:
    """Prints what snapshots use."""
    snapshots = await snapshots_of(session, args)
    keys = args.keys or [item.name async for item in snapshots.list()]
    rows = []
    for key in keys:
        used = await snapshots.usage(key)
        rows.append(Used(key, used.size, used.inodes))
    listing(args, [USAGE[0], USAGE[1]._replace(show=str), USAGE[2]] if args.bytes else USAGE, rows)


async def prepare(session: Session, args: argparse.Namespace) -> None:
    """Makes a writable snapshot that stays until it is removed."""
    from wherry.core.labels import GC_ROOT

    snapshots = await snapshots_of(session, args)
    make = snapshots.view if args.read_only else snapshots.prepare
    _print_mounts(await make(args.key, args.parent, {GC_ROOT: now(), **pairs(args.label)}), args)


async def mounts(session: Session, args: argparse.Namespace) -> None:
    """Prints the commands that mount a snapshot."""
    found = await (await snapshots_of(session, args)).mounts(args.key)
    print("\n".join(mount_lines(found, args.target)))


async def commit(session: Session, args: argparse.Namespace) -> None:
    """Turns an active snapshot into a committed one that stays until it is removed."""
    from wherry.core.labels import GC_ROOT

    snapshots = await snapshots_of(session, args)
    await snapshots.commit(args.name, args.key, {GC_ROOT: now(), **pairs(args.label)})


async def delete(session: Session, args: argparse.Namespace) -> None:
    """Removes snapshots."""
    snapshots = await snapshots_of(session, args)
    for key in args.keys:
        await snapshots.remove(key)


async def label(session: Session, args: argparse.Namespace) -> None:
    """Sets labels and prints them all."""
    item = await (await snapshots_of(session, args)).label(args.key, pairs(args.labels))
    print(labels(item.labels))


async def unpack(session: Session, args: argparse.Namespace) -> None:
    """Makes the snapshots of an image's layers and prints the name of the topmost."""
    from wherry.client.manifests import picture
    from wherry.client.unpack import unpack as unpack_picture

    client = session.client
    snapshots = await snapshots_of(session, args)
    for image in await client.images.list():
        if args.image in {image.name, image.target.digest}:
            break
    else:
        raise NotFound(f"no image has the name or digest {args.image}")
    print(await unpack_picture(client, await picture(client.content, image.target), snapshots.snapshotter))


async def diff(session: Session, args: argparse.Namespace) -> None:
    """Writes the layer between two snapshots to the output (or keeps it as content, and prints its digest)."""
    import sys

    snapshots = await snapshots_of(session, args)
    async with session.client.lease() as client:
        upper = await snapshots.stat(args.first)
        lower_key, upper_key = (args.first, args.second) if args.second else (upper.parent, args.first)
        scope = client.snapshots(snapshots.snapshotter)
        views = [await _mounts(scope, key) for key in (lower_key, upper_key)]
        layer = await client.diff.compute(
            views[0][0], views[1][0], media_type=args.media_type, ref=args.ref, labels=pairs(args.label)
        )
        if args.keep:
            from wherry.core.labels import GC_ROOT

            await client.content.label(layer.digest, {GC_ROOT: now()})
            print(layer.digest)
        else:
            async for piece in client.content.read(layer.digest):
                sys.stdout.buffer.write(piece)
            sys.stdout.buffer.flush()
        for _, view in views:
            if view:
                await scope.remove(view)


async def _mounts(snapshots: Snapshots, key: str) -> tuple[list[Mount], str]:
    """How a snapshot is read, and the name of the view that was made for it ("" for none)."""
    if not key:
        return [], ""
    item = await snapshots.stat(key)
    if item.kind != "Committed":
        return await snapshots.mounts(key), ""
    view = f"diff-{os.urandom(6).hex()}"
    return await snapshots.view(view, key), view


def _common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--snapshotter", default=os.environ.get("CONTAINERD_SNAPSHOTTER", ""), metavar="NAME",
        help="snapshotter (CONTAINERD_SNAPSHOTTER)",
    )  # fmt: skip


def _list_options(parser: argparse.ArgumentParser) -> None:
    _common(parser)
    listing_options(parser, quiet="keys")
    parser.add_argument("filters", nargs="*", metavar="FILTER")


def _key_options(parser: argparse.ArgumentParser) -> None:
    _common(parser)
    parser.add_argument("key", metavar="KEY")


def _keys_options(parser: argparse.ArgumentParser) -> None:
    _common(parser)
    parser.add_argument("keys", nargs="+", metavar="KEY")


def _usage_options(parser: argparse.ArgumentParser) -> None:
    _common(parser)
    listing_options(parser, quiet="keys")
    parser.add_argument("-b", dest="bytes", action="store_true", help="sizes in bytes")
    parser.add_argument("keys", nargs="*", metavar="KEY")


def _prepare_options(parser: argparse.ArgumentParser) -> None:
    _common(parser)
    parser.add_argument("-t", "--target", default="", metavar="DIR", help="print the commands that mount it there")
    parser.add_argument("--mounts", action="store_true", help="print the mounts as JSON")
    parser.add_argument("--label", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("key", metavar="KEY")
    parser.add_argument("parent", nargs="?", default="", metavar="PARENT")
    parser.set_defaults(read_only=False)


def _view_options(parser: argparse.ArgumentParser) -> None:
    _prepare_options(parser)
    parser.set_defaults(read_only=True)


def _mounts_options(parser: argparse.ArgumentParser) -> None:
    _common(parser)
    parser.add_argument("target", metavar="TARGET")
    parser.add_argument("key", metavar="KEY")


def _commit_options(parser: argparse.ArgumentParser) -> None:
    _common(parser)
    parser.add_argument("--label", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("name", metavar="NAME", help="of the committed snapshot")
    parser.add_argument("key", metavar="KEY", help="of the active one")


def _label_options(parser: argparse.ArgumentParser) -> None:
    _key_options(parser)
    parser.add_argument("labels", nargs="+", metavar="KEY=VALUE", help="an empty value takes a label away")


def _unpack_options(parser: argparse.ArgumentParser) -> None:
    _common(parser)
    parser.add_argument("image", metavar="IMAGE|DIGEST", help="an image, or the digest that it stands for")


def _diff_options(parser: argparse.ArgumentParser) -> None:
    from wherry.core.mediatypes import OCI_LAYER_GZIP

    _common(parser)
    parser.add_argument("--media-type", default=OCI_LAYER_GZIP, metavar="TYPE", help="of the layer")
    parser.add_argument("--ref", default="", help="names the upload")
    parser.add_argument("--keep", action="store_true", help="keep it as content and print its digest")
    parser.add_argument("--label", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("first", metavar="A", help="alone: what it has over its parent")
    parser.add_argument("second", nargs="?", metavar="B", help="what B has over A")


COMMANDS = [
    Command(("list", "ls"), "list snapshots", list_, _list_options, example="wherry snapshots ls"),
    Command(("tree",), "draw which snapshot lies on which", tree, _common, example="wherry snapshots tree"),
    Command(("info",), "show a snapshot (JSON)", info, _key_options, example="wherry snapshots info cache"),
    Command(("usage",), "show what snapshots use", usage, _usage_options, example="wherry snapshots usage cache"),
    Command(
        ("prepare",),
        "make a writable snapshot",
        prepare,
        _prepare_options,
        "wherry snapshots prepare -t /mnt work sha256:… | sh",
    ),
    Command(
        ("view",), "make a read-only snapshot", prepare, _view_options, example="wherry snapshots view look sha256:…"
    ),
    Command(
        ("mounts", "m", "mount"),
        "print the commands that mount a snapshot",
        mounts,
        _mounts_options,
        example="wherry snapshots mounts /mnt cache",
    ),
    Command(
        ("commit",),
        "turn an active snapshot into a committed one",
        commit,
        _commit_options,
        example="wherry snapshots commit base cache",
    ),
    Command(
        ("unpack",),
        "make the snapshots of an image's layers",
        unpack,
        _unpack_options,
        example="wherry snapshots unpack alpine",
    ),
    Command(
        ("diff",),
        "compute the layer between two snapshots",
        diff,
        _diff_options,
        example="wherry snapshots diff cache > layer.tar.gz",
    ),
    Command(
        ("label",), "set and take away labels", label, _label_options, example="wherry snapshots label cache team=a"
    ),
    Command(
        ("delete", "del", "remove", "rm"),
        "remove snapshots",
        delete,
        _keys_options,
        example="wherry snapshots rm cache",
    ),
]
