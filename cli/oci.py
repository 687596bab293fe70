"""`wherry oci`: tools for OCI specifications."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from wherry.cli.output import print_json
from wherry.cli.table import Command
from wherry.client.spec_defaults import default_spec

if TYPE_CHECKING:
    from wherry.cli.session import Session


async def spec(session: Session, _: argparse.Namespace) -> None:
    """Prints the specification that a container gets by default; no daemon is asked."""
    print_json(default_spec(session.namespace, "ID"))


COMMANDS = [
    Command(("spec",), "print the default specification", spec, example="wherry oci spec >config.json"),
]
