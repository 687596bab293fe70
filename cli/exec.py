"""`wherry exec` and `wherry attach`: a further process in a container, and the first one followed."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING, Any

from wherry.cli.arguments import switch
from wherry.cli.attaching import attach as attach_to
from wherry.cli.attaching import detach_keys
from wherry.cli.container_flags import environment
from wherry.cli.following import OURS, coded, follow, interruptible, kill_task
from wherry.cli.table import Command
from wherry.client import lifecycle
from wherry.client.fifos import Fifos
from wherry.client.finding import find
from wherry.client.further import process_of
from wherry.client.spec import capability, own_capabilities
from wherry.client.spec_defaults import capabilities
from wherry.client.tasks import Stdio

if TYPE_CHECKING:
    from wherry.cli.session import Session
    from wherry.client.api import Client
    from wherry.client.containers import Container


async def exec_(session: Session, args: argparse.Namespace) -> int:
    """Runs a further process in a container that runs."""
    interruptible()
    with coded(1):
        client = session.client
        keys = detach_keys(args.detach_keys)
        container = await find(client, args.container)
        await lifecycle.require(client, container, {"running"}, "is not running: it is {status}{help}")
        process = await _process(client, container, args)
    name = f"e{os.urandom(8).hex()}"
    if args.detach:
        with coded():
            await client.tasks.exec(container.id, name, process, Stdio(terminal=args.tty))
            await client.tasks.start(container.id, name)
        return 0
    fifos = Fifos(name, stdin=args.interactive, terminal=args.tty)
    left = False
    try:
        with coded():
            await client.tasks.exec(container.id, name, process, fifos.stdio)
            from wherry.cli.attach import Waiter

        try:
            waiter = Waiter(client, container.id, name)
            with coded():
                await client.tasks.start(container.id, name)
            status = follow(
                session, fifos, waiter, container.id, name, tty=args.tty, signals=False, keys=keys if args.tty else b"",
                stdin=args.interactive,
            )  # fmt: skip
            left = status is None
            return status or 0
        finally:
            if not left:
                await kill_task(client, container.id, name)
    finally:
        fifos.release() if left else fifos.close()


async def _process(client: Client, container: Container, args: argparse.Namespace) -> dict[str, Any]:
    """The process of the container's specification with what the options change."""
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    process = await process_of(
        client, container, command, tty=args.tty, env=environment(args), cwd=args.workdir, user=args.user
    )
    if args.privileged:
        process["capabilities"] = capabilities(own_capabilities())
        process.pop("apparmorProfile", None)
    if args.cap_add:
        names = list((process.get("capabilities") or {}).get("bounding") or ())
        process["capabilities"] = capabilities(list(dict.fromkeys([*names, *map(capability, args.cap_add)])))
    return process


async def attach(session: Session, args: argparse.Namespace) -> int:
    """Follows a container that runs."""
    with coded(1):
        container = await find(session.client, args.container)
        keys = detach_keys(args.detach_keys)
        return await attach_to(session, container, keys=keys, stdin=not args.no_stdin, signals=args.sig_proxy)


def _exec_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-d", "--detach", action="store_true", help="leave it running in the background")
    parser.add_argument("-i", "--interactive", action="store_true", help="pass our input on")
    parser.add_argument("-t", "--tty", action="store_true", help="give it a terminal")
    parser.add_argument("-u", "--user", default="", metavar="USER[:GROUP]", help="names of the container, or numbers")
    parser.add_argument("-w", "--workdir", default="", metavar="DIR", help="working directory")
    parser.add_argument("-e", "--env", action="append", default=[], metavar="NAME[=VALUE]", help="set a variable")
    parser.add_argument("--env-file", action="append", default=[], metavar="FILE", help="set variables, one a line")
    parser.add_argument("--privileged", action="store_true", help="all capabilities")
    parser.add_argument("--cap-add", action="append", default=[], metavar="CAP", help="add a capability")
    parser.add_argument("--detach-keys", default="", metavar="KEYS", help="keys that leave it running (ctrl-p,ctrl-q)")
    parser.add_argument("container", metavar="CONTAINER")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND [ARG...]")


def _attach_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--no-stdin", action="store_true", help="don't pass our input on")
    parser.add_argument(
        "--sig-proxy", default=True, type=switch, nargs="?", const=True, metavar="BOOL", help="pass signals on (true)"
    )
    parser.add_argument("--detach-keys", default="", metavar="KEYS", help="keys that leave it running (ctrl-p,ctrl-q)")
    parser.add_argument("container", metavar="CONTAINER")


COMMANDS = [
    Command(("exec",), "run a further process in a container", exec_, _exec_options, "wherry exec -it web sh", OURS),
    Command(("attach",), "follow a container that runs", attach, _attach_options, "wherry attach web"),
]
