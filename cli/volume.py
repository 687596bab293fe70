"""`wherry volume`: folders that outlive containers."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from wherry.cli import inspect
from wherry.cli.arguments import pairs
from wherry.cli.formats import Headings, decimal_size, filters, labels_fit, listing_flags, show
from wherry.cli.saying import each
from wherry.cli.table import Command

if TYPE_CHECKING:
    from wherry.cli.session import Session

COLUMNS: Headings = {"Driver": "DRIVER", "Name": "VOLUME NAME"}


async def list_(session: Session, args: argparse.Namespace) -> None:
    """Prints the volumes."""
    found = filters(args.filter, ("name", "label", "dangling", "driver"))
    rows = []
    for item in await session.client.volumes.list():
        if not labels_fit(found.get("label", ()), item.labels):
            continue
        if "name" in found and not any(name in item.name for name in found["name"]):
            continue
        if "dangling" in found and (found["dangling"][0].lower() in {"true", "1"}) == bool(item.containers):
            continue
        rows.append(
            {
                "Driver": "local",
                "Name": item.name,
                "Mountpoint": item.mountpoint,
                "Scope": "local",
                "Labels": ",".join(f"{key}={value}" for key, value in sorted(item.labels.items())),
                "Links": len(item.containers),
                "Size": decimal_size(await session.client.volumes.usage(item.name)) if args.size else "N/A",
            }
        )
    show(args, rows, {**COLUMNS, "Size": "SIZE"} if args.size else COLUMNS, quiet="Name")


async def create(session: Session, args: argparse.Namespace) -> None:
    """Makes a volume and prints its name."""
    volume = await session.client.volumes.create(args.name, labels=pairs(args.label), options=pairs(args.opt))
    print(volume.name)


async def remove(session: Session, args: argparse.Namespace) -> int:
    """Removes volumes with what is in them."""
    return await each(args.names, session.client.volumes.remove, missing_ok=args.force)


async def prune(session: Session, args: argparse.Namespace) -> int:
    """Removes volumes that no container uses."""
    from wherry.cli.system import agreed

    what = "all volumes that no container uses" if args.all else "all nameless volumes that no container uses"
    if not agreed(args, what):
        return 1
    found = filters(args.filter, ("label",))
    names, freed = await session.client.volumes.prune(every=args.all, labels=found.get("label", ()))
    if names:
        print("Deleted Volumes:\n" + "\n".join(names) + "\n")
    print(f"Total reclaimed space: {decimal_size(freed)}")
    return 0


def _list_options(parser: argparse.ArgumentParser) -> None:
    listing_flags(parser, quiet="names", trunc=False)
    parser.add_argument("-s", "--size", action="store_true", help="what their files take")


def _create_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-d", "--driver", default="local", choices=("local",), help="there is one: local")
    parser.add_argument("-o", "--opt", action="append", default=[], metavar="KEY=VALUE", help="of the driver: none")
    parser.add_argument("--label", action="append", default=[], metavar="KEY=VALUE", help="a label")
    parser.add_argument("name", nargs="?", default="", metavar="NAME", help="made up when left out")


def _remove_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-f", "--force", action="store_true", help="no error where it isn't there")
    parser.add_argument("names", nargs="+", metavar="VOLUME")


def _prune_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-a", "--all", action="store_true", help="those with names too")
    parser.add_argument("-f", "--force", action="store_true", help="don't ask")
    parser.add_argument(
        "--filter", action="append", default=[], metavar="label=KEY[=VALUE]", help="only those that fit"
    )


COMMANDS = [
    Command(("list", "ls"), "list volumes", list_, _list_options, "wherry volume ls --filter dangling=true"),
    Command(("create",), "make a volume", create, _create_options, "wherry volume create --label app=shop data"),
    inspect.command("volume"),
    Command(("remove", "rm"), "remove volumes", remove, _remove_options, "wherry volume rm data"),
    Command(("prune",), "remove volumes that nobody uses", prune, _prune_options, "wherry volume prune -f"),
]
