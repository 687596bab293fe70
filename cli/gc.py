"""`wherry gc`: collect what nothing references, or say what keeps a thing."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from wherry.cli.output import Column, listing, listing_options, print_json, size
from wherry.cli.table import Command
from wherry.client.gc import Explanation, Thing

if TYPE_CHECKING:
    from wherry.cli.session import Session

COLUMNS = [
    Column[Thing]("KEY", "Key", lambda item: item.key),
    Column[Thing]("KIND", "Kind", lambda item: item.kind),
    Column[Thing]("NAMESPACE", "Namespace", lambda item: item.namespace),
    Column[Thing]("SIZE", "Size", lambda item: item.size, lambda value: size(value) if value else "-"),
]


async def collect(session: Session, args: argparse.Namespace) -> None:
    """Prints what went, would go, or why something stays."""
    if args.explain:
        explained = await session.client.gc.explain(args.explain)
        if args.format == "json":
            print_json([_json(each) for each in explained])
        else:
            print("\n".join(line for each in explained for line in lines(each)))
        return
    collected = await session.client.gc.collect(dry_run=args.dry_run)
    listing(args, COLUMNS, collected.things)
    if args.format == "table" and not args.quiet:
        total = size(sum(thing.size for thing in collected.things))
        took = "" if args.dry_run else f" in {collected.seconds * 1000:.0f} ms"
        done = "would be removed" if args.dry_run else "removed"
        print(f"{len(collected.things)} {done}, {total}{took}")


def lines(each: Explanation) -> list[str]:
    """An explanation for people: each chain as a staircase from its root down to the thing."""
    what = f"{each.thing.kind} {each.thing.key}"
    if not each.chains:
        return [f"{what}: nothing keeps it, the next collection removes it"]
    out = [f"{what} is kept by"]
    for chain in each.chains:
        for depth, link in enumerate(chain):
            step = f"{'   ' * (depth - 1)}└─ " if depth else ""
            out.append(f"  {step}{link.thing.kind} {link.thing.key} ({link.how})")
    if each.more:
        out.append(f"  and {each.more} more")
    return out


def _json(each: Explanation) -> dict[str, Any]:
    return {
        "Kind": each.thing.kind,
        "Key": each.thing.key,
        "Size": each.thing.size,
        "Chains": [
            [{"Kind": link.thing.kind, "Key": link.thing.key, "How": link.how} for link in chain]
            for chain in each.chains
        ],
        "More": each.more,
    }


def _configure(parser: argparse.ArgumentParser) -> None:
    listing_options(parser, quiet="keys")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    which.add_argument("--explain", metavar="REF", help="say what keeps an image, a digest, a snapshot … alive")


COMMANDS = [
    Command(("gc",), "remove what nothing references any more", collect, _configure, "wherry gc --explain alpine")
]
