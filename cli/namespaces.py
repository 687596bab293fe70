"""`wherry namespaces`: the daemon's tenants."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from wherry.cli.arguments import pairs
from wherry.cli.output import Column, labels, listing, listing_options
from wherry.cli.table import Command
from wherry.client.namespaces import Namespace

if TYPE_CHECKING:
    from wherry.cli.session import Session

COLUMNS = [
    Column[Namespace]("NAME", "Name", lambda item: item.name),
    Column[Namespace]("LABELS", "Labels", lambda item: dict(item.labels), lambda value: labels(value).strip("-")),
]


async def list_(session: Session, args: argparse.Namespace) -> None:
    """Prints the namespaces."""
    listing(args, COLUMNS, await session.client.namespaces.list())


async def create(session: Session, args: argparse.Namespace) -> None:
    """Makes a namespace."""
    await session.client.namespaces.create(args.name, pairs(args.labels))


async def label(session: Session, args: argparse.Namespace) -> None:
    """Sets labels."""
    await session.client.namespaces.label(args.name, pairs(args.labels))


async def remove(session: Session, args: argparse.Namespace) -> None:
    """Removes namespaces and prints their names."""
    for name in args.names:
        await session.client.namespaces.delete(name)
        print(name)


def _label_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME")
    parser.add_argument("labels", nargs="*", metavar="KEY=VALUE")


def _remove_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("names", nargs="+", metavar="NAME")


COMMANDS = [
    Command(("create", "c"), "make a namespace", create, _label_options, "wherry namespaces create team-a owner=ann"),
    Command(
        ("list", "ls"),
        "list namespaces",
        list_,
        lambda p: listing_options(p, quiet="names"),
        example="wherry namespaces ls",
    ),
    Command(
        ("remove", "rm"), "remove empty namespaces", remove, _remove_options, example="wherry namespaces rm team-a"
    ),
    Command(
        ("label",), "set and take away labels", label, _label_options, example="wherry namespaces label team-a owner=b"
    ),
]
