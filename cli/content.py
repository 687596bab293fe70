"""`wherry content`: blobs by digest, and uploads."""

from __future__ import annotations

import argparse
import os
import re
import sys
from typing import TYPE_CHECKING

from wherry.cli.arguments import pairs
from wherry.cli.output import Column, age, labels, listing, listing_options, now, size
from wherry.cli.saying import each
from wherry.cli.table import Command
from wherry.client.content import CHUNK, Info, Status
from wherry.core.errors import InvalidArgument
from wherry.core.labels import GC_REF_CONTENT, GC_ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator

    from wherry.cli.session import Session

COLUMNS = [
    Column[Info]("DIGEST", "Digest", lambda item: item.digest),
    Column[Info]("SIZE", "Size", lambda item: item.size, size),
    Column[Info]("AGE", "CreatedAt", lambda item: item.created_at, age),
    Column[Info]("LABELS", "Labels", lambda item: dict(item.labels), labels),
]
ACTIVE = [
    Column[Status]("REF", "Ref", lambda item: item.ref),
    Column[Status]("SIZE", "Offset", lambda item: item.offset, size),
    Column[Status]("TOTAL", "Total", lambda item: item.total, lambda v: size(v) if v else "-"),
    Column[Status]("AGE", "StartedAt", lambda item: item.started_at, age),
]


async def list_(session: Session, args: argparse.Namespace) -> None:
    """Prints the blobs."""
    listing(args, COLUMNS, [item async for item in session.client.content.list(args.filters)])


async def get(session: Session, args: argparse.Namespace) -> None:
    """Writes blobs to the output."""
    for digest in args.digests:
        async for piece in session.client.content.read(digest):
            sys.stdout.buffer.write(piece)
    sys.stdout.buffer.flush()


async def ingest(session: Session, args: argparse.Namespace) -> None:
    """Uploads what comes on the input; it stays until it is removed."""
    digest = await session.client.content.write(
        args.key, _input(), size=args.expected_size, digest=args.expected_digest, labels={GC_ROOT: now()}
    )
    if not args.expected_digest:
        print(digest)


def _input() -> Iterator[bytes]:
    while piece := sys.stdin.buffer.read(CHUNK):
        yield piece


async def active(session: Session, args: argparse.Namespace) -> None:
    """Prints the uploads on their way."""
    statuses = await session.client.content.statuses()
    listing(args, ACTIVE, [item for item in statuses if re.search(args.pattern, item.ref)])


async def abort(session: Session, args: argparse.Namespace) -> None:
    """Throws uploads away."""
    for ref in args.refs:
        await session.client.content.abort(ref)
        print(ref)


async def label(session: Session, args: argparse.Namespace) -> None:
    """Sets labels and prints them all."""
    info = await session.client.content.label(args.digest, pairs(args.labels))
    print(labels(info.labels))


async def delete(session: Session, args: argparse.Namespace) -> int:
    """Removes blobs and prints those that went; the others are told and make the exit code 1."""
    return await each(args.digests, session.client.content.delete)


async def edit(session: Session, args: argparse.Namespace) -> None:
    """Opens a blob in an editor, stores the result and prints its digest."""
    editor = args.editor or os.environ.get("EDITOR")
    if not editor:
        raise InvalidArgument("no editor: name one with --editor or EDITOR")
    data = _edited(editor, await session.client.content.blob(args.digest), args.validate)
    labelled = {GC_ROOT: now()}
    print(await session.client.content.write(f"edit-{args.digest}", [data], size=len(data), labels=labelled))


def _edited(editor: str, before: bytes, validate: str | None) -> bytes:
    import subprocess
    import tempfile

    with tempfile.NamedTemporaryFile(prefix="wherry-edit-") as file:
        file.write(before)
        file.flush()
        done = subprocess.run(["/bin/sh", "-c", f'{editor} "$0"', file.name], check=False)
        if done.returncode:
            raise InvalidArgument(f"the editor left with exit code {done.returncode}; nothing was stored")
        # editors replace files: what stands under the name counts
        with open(file.name, "rb") as edited:
            after = edited.read()
    if validate == "json":
        import json

        try:
            json.loads(after)
        except ValueError as error:
            raise InvalidArgument(f"what was edited is no JSON: {error}") from error
    return after


async def prune(session: Session, args: argparse.Namespace) -> None:
    """Takes references to layers away, so that layers whose snapshots are there may go."""
    content = session.client.content
    async for info in content.list():
        references = [
            name
            for name in info.labels
            if name.startswith(f"{GC_REF_CONTENT}.l.") or (args.all and name.startswith(GC_REF_CONTENT))
        ]
        if references:
            print(info.digest)
            if not args.dry:
                await content.label(info.digest, dict.fromkeys(references, ""))
    if not args.dry and not args.asynchronous:
        # ending a lease with `sync` returns after a collection
        lease = await session.client.leases.create(expires=60)
        await session.client.leases.delete(lease.id, sync=True)


def _list_options(parser: argparse.ArgumentParser) -> None:
    listing_options(parser, quiet="digests")
    parser.add_argument("filters", nargs="*", metavar="FILTER")


def _digests(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("digests", nargs="+", metavar="DIGEST")


def _ingest_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("key", metavar="KEY", help="names the upload; the same key goes on where it stopped")
    parser.add_argument("--expected-size", type=int, default=0, metavar="BYTES")
    parser.add_argument("--expected-digest", default="", metavar="DIGEST")


def _active_options(parser: argparse.ArgumentParser) -> None:
    listing_options(parser, quiet="refs")
    parser.add_argument("pattern", nargs="?", default="", metavar="REGEXP")


def _abort_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("refs", nargs="+", metavar="REF")


def _label_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("digest", metavar="DIGEST")
    parser.add_argument("labels", nargs="+", metavar="KEY=VALUE", help="an empty value takes a label away")


def _edit_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("digest", metavar="DIGEST")
    parser.add_argument("--editor", default="", metavar="COMMAND", help="the editor (EDITOR)")
    parser.add_argument("--validate", choices=("json",), help="check the result")


def _prune_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=("references",), metavar="references")
    parser.add_argument("--all", action="store_true", help="all references, not only those to layers")
    parser.add_argument("--dry", action="store_true", help="only say what would change")
    parser.add_argument("--async", dest="asynchronous", action="store_true", help="don't wait for the collection")


COMMANDS = [
    Command(("list", "ls"), "list blobs", list_, _list_options, example="wherry content ls"),
    Command(("get",), "write blobs to the output", get, _digests, "wherry content get sha256:… | jq ."),
    Command(
        ("ingest",),
        "store what comes on the input",
        ingest,
        _ingest_options,
        example="wherry content ingest my-blob < file",
    ),
    Command(("active",), "list uploads", active, _active_options, example="wherry content active"),
    Command(("abort",), "throw uploads away", abort, _abort_options, example="wherry content abort my-upload"),
    Command(
        ("edit",),
        "change a blob in an editor (it gets a new digest)",
        edit,
        _edit_options,
        example="wherry content edit sha256:…",
    ),
    Command(
        ("label",), "set and take away labels", label, _label_options, example="wherry content label sha256:… team=a"
    ),
    Command(
        ("prune",),
        "let layers go whose snapshots are there",
        prune,
        _prune_options,
        example="wherry content prune references",
    ),
    Command(("delete", "del", "remove", "rm"), "remove blobs", delete, _digests, example="wherry content rm sha256:…"),
]
