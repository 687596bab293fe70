"""`wherry cp`, `diff` and `export`: files of containers, running or not."""

from __future__ import annotations

import argparse
import os
import posixpath
import sys
import tarfile
import tempfile
from typing import IO, TYPE_CHECKING

from wherry.cli.table import Command
from wherry.cli.terminal import is_terminal
from wherry.client import copies
from wherry.client.changes import changes
from wherry.client.finding import find
from wherry.core.errors import InvalidArgument, NotFound

if TYPE_CHECKING:
    from wherry.cli.session import Session
    from wherry.client.containers import Container
    from wherry.client.files import Root


def split(text: str) -> tuple[str, str]:
    """`CONTAINER:PATH` in two; a path of this host has no container ("")."""
    if text.startswith(("/", ".")) or text == "-" or ":" not in text:
        return "", text
    container, _, path = text.partition(":")
    return container, path


async def cp(session: Session, args: argparse.Namespace) -> None:
    """Copies between a container and this host."""
    source, target = split(args.source), split(args.target)
    if bool(source[0]) == bool(target[0]):
        raise InvalidArgument(
            "one of the two must be CONTAINER:PATH, the other one a path here, or - for a tar archive"
        )
    container = await find(session.client, source[0] or target[0])
    place = await copies.place_of(session.client, container)
    with place.root() as root:
        if source[0]:
            _out(root, _absolute(source[1]), target[1], follow=args.follow_link)
        else:
            _in(root, source[1], _absolute(target[1]), args)


def _absolute(path: str) -> str:
    """A path in a container, where relative ones begin at its root; a last `/` or `/.` means something and stays."""
    return path if path.startswith("/") else f"/{path}"


def _out(root: Root, path: str, target: str, *, follow: bool) -> None:
    contents = path.endswith(("/.", "/")) and path.strip("/.") != ""
    clean = posixpath.normpath(path)
    if target == "-":
        if is_terminal(1):
            raise InvalidArgument("an archive isn't for a terminal: send it on, as in 'wherry cp web:/etc - | tar t'")
        root.pack(clean, sys.stdout.buffer, follow=follow)
        sys.stdout.flush()
        return
    entry = root.stat(clean, follow=follow)
    into, name = _host_target(target, entry.name, is_dir=entry.is_dir, contents=path.endswith("/."))
    if contents and path.endswith("/.") and not entry.is_dir:
        raise InvalidArgument(f"{path} in the container is not a directory")
    with copies.packed(root, clean, follow=follow) as archive:
        _extract(archive, into, name)


def _host_target(target: str, name: str, *, is_dir: bool, contents: bool) -> tuple[str, str]:
    """docker's rule: the folder to unpack into, and what the archive's first name becomes there."""
    if os.path.isdir(target):
        return (os.path.dirname(os.path.abspath(target)), os.path.basename(os.path.abspath(target))) if contents else (
            target, name
        )  # fmt: skip
    parent = os.path.dirname(os.path.abspath(target.rstrip("/") or "/"))
    if not os.path.isdir(parent):
        raise NotFound(f"no such directory: {parent}")
    if target.endswith("/") and not is_dir:
        raise NotFound(f"no such directory: {target}")
    if is_dir and os.path.lexists(target):
        raise InvalidArgument(f"{target} is no directory: a directory can't be copied there")
    return parent, os.path.basename(os.path.abspath(target))


def _extract(archive: IO[bytes], folder: str, name: str) -> None:
    """Unpacks an archive whose first part of each name becomes `name`; nothing leaves the folder."""
    with tarfile.open(fileobj=archive, mode="r|", bufsize=1 << 16) as reader:
        for member in reader:
            first, slash, rest = member.name.partition("/")
            member.name = f"{name}{slash}{rest}"
            if member.islnk():
                member.linkname = f"{name}/{member.linkname.partition('/')[2]}" if "/" in member.linkname else name
            member.uname = member.gname = ""
            del first
            # `tar` refuses what would lie outside; owners are ours, as docker's cp has it without -a
            member.uid, member.gid = os.geteuid(), os.getegid()
            reader.extract(member, folder, numeric_owner=True, filter="tar")
    while archive.read(1 << 16):
        pass


def _in(root: Root, source: str, path: str, args: argparse.Namespace) -> None:
    if source == "-":
        root.unpack(posixpath.normpath(path), sys.stdin.buffer)
        return
    contents = source.endswith("/.")
    real = os.path.realpath(source) if args.follow_link else os.path.abspath(source)
    if not os.path.lexists(real):
        raise NotFound(f"{source}: no such file or directory")
    folder, name = _container_target(root, path, os.path.basename(os.path.abspath(source)), real, contents=contents)
    with tempfile.TemporaryFile() as spool:
        with tarfile.open(fileobj=spool, mode="w", format=tarfile.PAX_FORMAT) as archive:
            archive.add(real, arcname=name, filter=lambda member: _owned(member, keep=args.archive))
        spool.seek(0)
        root.unpack(folder, spool)


def _owned(member: tarfile.TarInfo, *, keep: bool) -> tarfile.TarInfo:
    member.uname = member.gname = ""
    if not keep:
        member.uid = member.gid = 0
    return member


def _container_target(root: Root, path: str, name: str, source: str, *, contents: bool) -> tuple[str, str]:
    """docker's rule, the other way round."""
    clean = posixpath.normpath(path)
    try:
        entry = root.stat(clean, follow=True)
    except NotFound:
        if path.endswith("/") and not os.path.isdir(source):
            raise NotFound(f"no such directory in the container: {path}") from None
        return posixpath.dirname(clean), posixpath.basename(clean)
    if not entry.is_dir:
        if os.path.isdir(source):
            raise InvalidArgument(
                f"{path} in the container is no directory: a directory can't be copied there"
            ) from None
        return posixpath.dirname(clean), posixpath.basename(clean)
    return clean, "." if contents and os.path.isdir(source) else name


async def diff(session: Session, args: argparse.Namespace) -> None:
    """Prints what a container changed in its files."""
    container: Container = await find(session.client, args.container)
    for change in await changes(session.client, container):
        print(f"{change.kind} {change.path}")


async def export(session: Session, args: argparse.Namespace) -> None:
    """Writes the whole file system of a container as a tar archive."""
    container = await find(session.client, args.container)
    if not args.output and is_terminal(1):
        raise InvalidArgument("an archive isn't for a terminal: name a file with -o, or send it on")
    place = await copies.place_of(session.client, container)
    # our own output isn't ours to close
    with place.root() as root, open(args.output or os.dup(1), "wb") as file:
        root.pack("/", file, one_filesystem=True)


def _cp_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-a", "--archive", action="store_true", help="keep owners")
    parser.add_argument("-L", "--follow-link", action="store_true", help="copy what a symbolic link points to")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress (there is none)")
    parser.add_argument("source", metavar="SOURCE", help="CONTAINER:PATH, a path here, or - for a tar archive")
    parser.add_argument("target", metavar="TARGET", help="the same; one of the two is in a container")


def _diff_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("container", metavar="CONTAINER")


def _export_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--output", default="", metavar="FILE", help="instead of the output")
    parser.add_argument("container", metavar="CONTAINER")


COMMANDS = [
    Command(("cp",), "copy files between a container and this host", cp, _cp_options, "wherry cp web:/etc/nginx ."),
    Command(("diff",), "list what a container changed in its files", diff, _diff_options, "wherry diff web"),
    Command(("export",), "write a container's file system as a tar archive", export, _export_options,
            "wherry export web | tar t"),
]  # fmt: skip
