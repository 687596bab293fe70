"""`wherry containers`: records of what would run."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from wherry.cli import ctr_run, inspect, launching, system
from wherry.cli.arguments import pairs
from wherry.cli.output import Column, labels, listing, listing_options, print_json, when
from wherry.cli.table import Command
from wherry.client.containers import Container
from wherry.client.launch import create as create_container
from wherry.client.launch import remove
from wherry.core.errors import FailedPrecondition, NotFound

if TYPE_CHECKING:
    from wherry.cli.session import Session

COLUMNS = [
    Column[Container]("CONTAINER", "ID", lambda item: item.id),
    Column[Container]("IMAGE", "Image", lambda item: item.image, lambda value: value or "-"),
    Column[Container]("RUNTIME", "Runtime", lambda item: item.runtime),
]
MORE = [
    Column[Container]("LABELS", "Labels", lambda item: dict(item.labels), labels),
    Column[Container]("CREATED", "CreatedAt", lambda item: when(item.created_at)),
]


def describe(container: Container) -> dict[str, Any]:
    """A record as containerd's own client prints it."""
    options = container.runtime_options
    return {
        "ID": container.id,
        "Labels": dict(container.labels),
        "Image": container.image,
        "Runtime": {"Name": container.runtime, "Options": {"type_url": options.type_url} if options else None},
        "SnapshotKey": container.snapshot_key,
        "Snapshotter": container.snapshotter,
        "CreatedAt": when(container.created_at),
        "UpdatedAt": when(container.updated_at),
        "Extensions": {name: packed.type_url for name, packed in container.extensions.items()} or None,
        "Spec": container.spec,
    }


async def list_(session: Session, args: argparse.Namespace) -> None:
    """Prints the containers."""
    columns = COLUMNS + MORE if args.format == "json" else COLUMNS
    listing(args, columns, await session.client.containers.list(args.filters))


async def create(session: Session, args: argparse.Namespace) -> None:
    """Makes a container without starting it."""
    launched = await create_container(session.client, launching.launch(args))
    if not args.id:
        print(launched.container.id)


async def info(session: Session, args: argparse.Namespace) -> None:
    """Prints a record."""
    container = await session.client.containers.get(args.id)
    print_json(container.spec if args.spec else describe(container))


async def label(session: Session, args: argparse.Namespace) -> None:
    """Sets labels and prints them all."""
    container = await session.client.containers.label(args.id, pairs(args.labels))
    print(labels(container.labels))


async def delete(session: Session, args: argparse.Namespace) -> None:
    """Removes containers; the first that can't be removed ends it."""
    client = session.client
    for name in args.ids:
        container = await client.containers.get(name)
        try:
            task = await client.tasks.get(name)
        except NotFound:
            pass
        else:
            if task.status not in {"STOPPED", "CREATED", "UNKNOWN"}:
                raise FailedPrecondition(
                    f"cannot delete a non stopped container: {name} is {task.status.lower()} (wherry tasks kill {name})"
                )
            await client.tasks.delete(name)
        if args.keep_snapshot:
            await client.containers.delete(name)
        else:
            await remove(client, container)


def _list_options(parser: argparse.ArgumentParser) -> None:
    listing_options(parser)
    parser.add_argument("filters", nargs="*", metavar="FILTER", help='containerd\'s filters (id~=web, labels."a"==b)')


def _create_options(parser: argparse.ArgumentParser) -> None:
    launching.configure(parser)


def _info_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("id", metavar="CONTAINER")
    parser.add_argument("--spec", action="store_true", help="only the OCI specification")


def _label_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("id", metavar="CONTAINER")
    parser.add_argument("labels", nargs="+", metavar="KEY=VALUE", help="an empty value takes a label away")


def _delete_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("ids", nargs="+", metavar="CONTAINER")
    parser.add_argument("--keep-snapshot", action="store_true", help="leave its file system")


COMMANDS = [
    *ctr_run.COMMANDS,
    Command(("list", "ls"), "list containers", list_, _list_options, "wherry containers ls 'labels.app==web'"),
    Command(
        ("create",),
        "make a container without starting it",
        create,
        _create_options,
        "wherry containers create docker.io/library/redis:7 cache",
    ),
    inspect.command("container"),
    system.CONTAINER_PRUNE,
    Command(
        ("info",),
        "show everything about a container (JSON)",
        info,
        _info_options,
        example="wherry containers info --spec cache",
    ),
    Command(
        ("label",), "set and take away labels", label, _label_options, example="wherry containers label cache team=a"
    ),
    Command(
        ("delete", "del", "remove", "rm"),
        "remove containers and their file systems",
        delete,
        _delete_options,
        example="wherry containers rm cache",
    ),
]
