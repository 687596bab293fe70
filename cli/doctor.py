"""`wherry doctor`: what this host allows, and what to do about what it doesn't. `wherry unshare`: into one's own."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from wherry.cli.output import Column, listing, listing_options
from wherry.cli.table import Command
from wherry.client.doctor import FAILURE, WARNING, Finding, examine

if TYPE_CHECKING:
    from wherry.cli.session import Session

COLUMNS = [
    Column[Finding]("CHECK", "Name", lambda row: row.name),
    Column[Finding]("STATUS", "Status", lambda row: row.status),
    Column[Finding]("FOUND", "Found", lambda row: row.found),
]
ADVICE = Column[Finding]("ADVICE", "Advice", lambda row: row.advice)


async def doctor(session: Session, args: argparse.Namespace) -> int:
    """Prints what was found; exit code 1 where containers can't run."""
    del session
    found = examine()
    listing(args, [*COLUMNS, ADVICE] if args.format == "json" else COLUMNS, found)
    failures = [item for item in found if item.status == FAILURE]
    if args.format == "table" and not args.quiet:
        for item in found:
            if item.status in {WARNING, FAILURE}:
                print(f"\n{item.status}: {item.name}: {item.found}\n  → {item.advice}")
        if not failures:
            print("\nContainers can run here.")
    if failures and args.format == "table":
        sys.stderr.write(f"wherry: containers can't run here: {', '.join(item.name for item in failures)}\n")
    return 1 if failures else 0


def _configure(parser: argparse.ArgumentParser) -> None:
    listing_options(parser, quiet="checks")


COMMANDS = [
    Command(("doctor",), "check what this host allows, and say what to do", doctor, _configure, "wherry doctor")
]
