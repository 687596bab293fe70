"""Images as files: import, export, mount."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING

from wherry.cli.output import now
from wherry.cli.table import Command
from wherry.client.archive import Naming, load, save
from wherry.client.manifests import picture
from wherry.client.unpack import unpack
from wherry.core.errors import FailedPrecondition, NotFound, WherryError

if TYPE_CHECKING:
    from wherry.cli.session import Session
    from wherry.client.values import Mount
    from wherry.core.platforms import Platform


def snapshotter_option(parser: argparse.ArgumentParser) -> None:
    """The option that names a snapshotter."""
    parser.add_argument(
        "--snapshotter", default=os.environ.get("CONTAINERD_SNAPSHOTTER", ""), metavar="NAME",
        help="snapshotter (CONTAINERD_SNAPSHOTTER)",
    )  # fmt: skip


def platform_of(text: str | None) -> Platform | None:
    """A platform that was named, None where none was; raises InvalidArgument."""
    from wherry.core.platforms import parse

    return parse(text) if text else None


@contextmanager
def _open(path: str) -> Iterator[IO[bytes]]:
    """The archive as a stream: a file, or the input."""
    if path == "-":
        yield sys.stdin.buffer
        return
    with open(path, "rb") as file:
        yield file


async def import_(session: Session, args: argparse.Namespace) -> None:
    """Reads an archive, unpacks its images and prints their names."""
    client = session.client
    naming = Naming(args.base_name, args.digests, args.index_name)
    with _open(args.source) as source:
        images = await load(client, source, naming)
    snapshotter = args.snapshotter or await client.namespaces.default_snapshotter()
    for image in images:
        if not args.no_unpack:
            try:
                look = await picture(client.content, image.target, platform_of(args.platform))
            except NotFound as error:
                # an image for other platforms only is kept, and can't be unpacked here
                sys.stderr.write(f"wherry: {image.name}: {error.message}\n")
            else:
                if look.is_image:
                    await unpack(client, look, snapshotter)
        print(f"{image.name} ({image.target.digest})")


async def export(session: Session, args: argparse.Namespace) -> None:
    """Writes images to an archive; a file that couldn't be finished is removed."""
    client = session.client
    images = [await client.images.find(name) for name in args.images]
    platform = platform_of(args.platform)
    if args.target == "-":
        await save(client, images, sys.stdout.buffer, platform=platform, whole=args.all_platforms)
        sys.stdout.buffer.flush()
        return
    with _replacing(args.target) as target:
        await save(client, images, target, platform=platform, whole=args.all_platforms)


@contextmanager
def _replacing(path: str) -> Iterator[IO[bytes]]:
    """A file that takes the place of `path` when the block ends well, and leaves nothing otherwise."""
    beside = f"{path}.part"
    try:
        with open(beside, "wb") as file:
            yield file
        os.replace(beside, path)
    except BaseException:
        if os.path.exists(beside):
            os.unlink(beside)
        raise


def _absolute(path: str) -> str:
    return os.path.abspath(path)


def _run_mount(mount: Mount, target: str) -> None:
    place = os.path.join(target, mount.target.lstrip("/")) if mount.target else target
    command = ["mount", "-t", mount.type, mount.source, place]
    if mount.type in {"bind", "rbind"}:
        command = ["mount", "--rbind" if mount.type == "rbind" or "rbind" in mount.options else "--bind",
                   mount.source, place]  # fmt: skip
    options = [option for option in mount.options if option not in {"bind", "rbind"}]
    if options:
        command += ["-o", ",".join(options)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise FailedPrecondition(f"mounting on {place} failed: {done.stderr.strip()}")


async def mount_(session: Session, args: argparse.Namespace) -> None:
    """Mounts an image's file system on a folder; the snapshot behind it has the folder's name."""
    from wherry.core.labels import GC_ROOT

    client = session.client
    target = _absolute(args.target)
    image = await client.images.find(args.image)
    look = await picture(client.content, image.target, platform_of(args.platform))
    snapshotter = args.snapshotter or await client.namespaces.default_snapshotter()
    chain = await unpack(client, look, snapshotter)
    snapshots = client.snapshots(snapshotter)
    make = snapshots.prepare if args.rw else snapshots.view
    mounts = await make(target, chain, {GC_ROOT: now()})
    try:
        for mount in mounts:
            _run_mount(mount, target)
    except BaseException:
        await snapshots.remove(target)
        raise
    print(target)


async def unmount(session: Session, args: argparse.Namespace) -> None:
    """Unmounts a folder, and with `--rm` removes the snapshot behind it."""
    target = _absolute(args.target)
    _umount(target)
    if args.rm:
        client = session.client
        snapshotter = args.snapshotter or await client.namespaces.default_snapshotter()
        await client.snapshots(snapshotter).remove(target)
    print(target)


def _umount(target: str) -> None:
    done = subprocess.run(["umount", target], check=False, capture_output=True, text=True)
    if done.returncode:
        raise WherryError(f"unmounting {target} failed: {done.stderr.strip()}")


def _import_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base-name", default="", metavar="NAME", help="completes names that are only tags")
    parser.add_argument("--digests", action="store_true", help="also make a name by digest for each image")
    parser.add_argument("--index-name", default="", metavar="NAME", help="keep the archive's index under this name")
    parser.add_argument("--platform", metavar="OS/ARCH", help="unpack for this platform")
    parser.add_argument("--all-platforms", action="store_true", help="import all platforms (always done)")
    parser.add_argument("--no-unpack", action="store_true", help="don't make snapshots")
    snapshotter_option(parser)
    parser.add_argument("source", metavar="FILE", help="an OCI layout or docker's archive, - for the input")


def _export_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--platform", metavar="OS/ARCH", help="the platform to export (the host's)")
    parser.add_argument("--all-platforms", action="store_true", help="all platforms")
    parser.add_argument("target", metavar="FILE", help="the archive, - for the output")
    parser.add_argument("images", nargs="+", metavar="IMAGE")


def _mount_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rw", action="store_true", help="what is written lands in a snapshot of its own")
    parser.add_argument("--platform", metavar="OS/ARCH", help="the platform of the image")
    snapshotter_option(parser)
    parser.add_argument("image", metavar="IMAGE")
    parser.add_argument("target", metavar="DIR")


def _unmount_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rm", action="store_true", help="remove the snapshot as well")
    snapshotter_option(parser)
    parser.add_argument("target", metavar="DIR")


COMMANDS = [
    Command(("import",), "read images from an archive", import_, _import_options, "wherry images import box.tar"),
    Command(("export",), "write images to an archive", export, _export_options, "wherry images export box.tar box"),
    Command(("mount",), "mount an image on a folder", mount_, _mount_options, "wherry images mount busybox /mnt"),
    Command(("unmount",), "undo mount", unmount, _unmount_options, example="wherry images unmount /mnt"),
]
