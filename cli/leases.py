"""`wherry leases`: what the garbage collector spares."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from wherry.cli.arguments import duration, pairs
from wherry.cli.output import Column, labels, listing, listing_options, when
from wherry.cli.table import Command
from wherry.client.leases import Lease, Resource

if TYPE_CHECKING:
    from wherry.cli.session import Session

COLUMNS = [
    Column[Lease]("ID", "ID", lambda item: item.id),
    Column[Lease]("CREATED AT", "CreatedAt", lambda item: when(item.created_at)),
    Column[Lease]("LABELS", "Labels", lambda item: dict(item.labels), labels),
]
RESOURCES = [
    Column[Resource]("ID", "ID", lambda item: item.id),
    Column[Resource]("TYPE", "Type", lambda item: item.type),
]


async def list_(session: Session, args: argparse.Namespace) -> None:
    """Prints the leases."""
    listing(args, COLUMNS, await session.client.leases.list(args.filters))


async def create(session: Session, args: argparse.Namespace) -> None:
    """Makes a lease and prints its id."""
    lease = await session.client.leases.create(args.id, labels=pairs(args.labels), expires=args.expires)
    print(lease.id)


async def delete(session: Session, args: argparse.Namespace) -> None:
    """Ends leases and prints their ids; only the last one waits for the collection."""
    for name in args.ids:
        await session.client.leases.delete(name, sync=args.sync and name == args.ids[-1])
        print(name)


async def resources(session: Session, args: argparse.Namespace) -> None:
    """Prints what a lease holds."""
    listing(args, RESOURCES, await session.client.leases.resources(args.id))


def _list_options(parser: argparse.ArgumentParser) -> None:
    listing_options(parser)
    parser.add_argument("filters", nargs="*", metavar="FILTER")


def _create_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--id", default="", help="its id (made up when left out)")
    parser.add_argument("-x", "--expires", type=duration, default=24 * 3600.0, help="life time, 0 for no end (24h)")
    parser.add_argument("labels", nargs="*", metavar="KEY=VALUE")


def _delete_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sync", action="store_true", help="return when nothing is left of what they held")
    parser.add_argument("ids", nargs="+", metavar="LEASE")


def _resources_options(parser: argparse.ArgumentParser) -> None:
    listing_options(parser)
    parser.add_argument("id", metavar="LEASE")


COMMANDS = [
    Command(("list", "ls"), "list leases", list_, _list_options, example="wherry leases ls"),
    Command(("create",), "make a lease", create, _create_options, "wherry leases create --id build -x 1h"),
    Command(("delete", "del", "remove", "rm"), "end leases", delete, _delete_options, example="wherry leases rm build"),
    Command(
        ("resources",),
        "list what a lease holds",
        resources,
        _resources_options,
        example="wherry leases resources build",
    ),
]
