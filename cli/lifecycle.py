"""The verbs that change what a container does: start, stop, restart, kill, rm, pause, unpause, wait, rename, update."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING

from wherry.cli.arguments import signal_number
from wherry.cli.saying import complain
from wherry.cli.table import Command
from wherry.client import lifecycle
from wherry.client.finding import find, find_some
from wherry.core.errors import InvalidArgument, WherryError

if TYPE_CHECKING:
    from wherry.cli.session import Session
    from wherry.client.api import Client
    from wherry.client.containers import Container


async def each(
    client: Client,
    references: Sequence[str],
    work: Callable[[Container], Awaitable[object]],
    *,
    missing_ok: bool = False,
) -> int:
    """Does something to each container and prints what it was called by; the exit code is 1 where one went wrong.

    The others are done all the same, as docker has it.
    """
    failed = 0
    for reference, found in zip(references, await find_some(client, references), strict=True):
        try:
            if isinstance(found, WherryError):
                if not missing_ok:
                    raise found
                continue
            await work(found)
            print(reference)
        except WherryError as error:
            complain(error)
            failed = 1
    return failed


async def start(session: Session, args: argparse.Namespace) -> int:
    """Starts containers that were created or have ended."""
    if args.attach or args.interactive:
        if len(args.containers) != 1:
            raise InvalidArgument("only one container can be started and attached to at once")
        from wherry.cli.attaching import start_attached

        return await start_attached(session, await find(session.client, args.containers[0]), args)
    return await each(session.client, args.containers, lambda item: lifecycle.start(session.client, item))


async def stop(session: Session, args: argparse.Namespace) -> int:
    """Stops containers: their stop signal, then SIGKILL."""
    return await each(session.client, args.containers, lambda item: _stop(session.client, item, args))


async def _stop(client: Client, container: Container, args: argparse.Namespace) -> None:
    seconds = lifecycle.stop_seconds(container) if args.time is None else args.time
    name = args.signal or lifecycle.stop_signal(container)
    try:
        number = signal_number(name)
    except argparse.ArgumentTypeError as error:
        raise InvalidArgument(f"container {container.id}: {error}") from None
    await lifecycle.stop(client, container, signal=number, seconds=seconds)


async def restart(session: Session, args: argparse.Namespace) -> int:
    """Stops and starts containers."""
    client = session.client

    async def again(container: Container) -> None:
        await _stop(client, container, args)
        await lifecycle.start(client, container)

    return await each(client, args.containers, again)


async def kill(session: Session, args: argparse.Namespace) -> int:
    """Sends a signal, SIGKILL unless another is named."""
    client = session.client

    async def send(container: Container) -> None:
        await lifecycle.require(client, container, {"running", "paused"}, "is not running")
        if args.signal == lifecycle.SIGKILL:
            # a person wants it to end, and stay so
            await lifecycle.meant_to(client, container, "stopped")
        await client.tasks.kill(container.id, args.signal)

    return await each(client, args.containers, send)


async def remove(session: Session, args: argparse.Namespace) -> int:
    """Removes containers."""
    client = session.client
    return await each(
        client,
        args.containers,
        lambda item: lifecycle.remove(client, item, force=args.force, volumes=args.volumes),
        missing_ok=args.force,
    )


async def pause(session: Session, args: argparse.Namespace) -> int:
    """Freezes containers."""
    return await each(session.client, args.containers, lambda item: lifecycle.pause(session.client, item))


async def unpause(session: Session, args: argparse.Namespace) -> int:
    """Lets paused containers go on."""
    return await each(session.client, args.containers, lambda item: lifecycle.unpause(session.client, item))


async def wait(session: Session, args: argparse.Namespace) -> int:
    """Waits for the end of containers and prints their exit codes."""
    client, failed = session.client, 0
    for found in await find_some(client, args.containers):
        if isinstance(found, WherryError):
            sys.stderr.write(f"wherry: {found.message}\n")
            failed = 1
            continue
        print(await lifecycle.wait(client, found), flush=True)
    return failed


async def rename(session: Session, args: argparse.Namespace) -> None:
    """Gives a container another name."""
    await lifecycle.rename(session.client, await find(session.client, args.container), args.name)


def containers_argument(parser: argparse.ArgumentParser) -> None:
    """One container or more."""
    parser.add_argument("containers", nargs="+", metavar="CONTAINER", help="name, id, or the beginning of an id")


def _start_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-a", "--attach", action="store_true", help="show its output, pass signals and exit code on")
    parser.add_argument("-i", "--interactive", action="store_true", help="pass our input on")
    parser.add_argument("--detach-keys", default="", metavar="KEYS", help="keys that leave it running (ctrl-p,ctrl-q)")
    containers_argument(parser)


def _stop_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-s", "--signal", default="", metavar="SIGNAL", help="in place of the container's stop signal")
    parser.add_argument(
        "-t", "--time", "--timeout", type=float, metavar="SECONDS", help="until SIGKILL (10; -1: never)"
    )
    containers_argument(parser)


def _kill_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-s", "--signal", type=signal_number, default=9, metavar="SIGNAL", help="name or number (KILL)")
    containers_argument(parser)


def _remove_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-f", "--force", action="store_true", help="kill it where it runs; no error where it isn't there"
    )
    parser.add_argument("-v", "--volumes", action="store_true", help="its nameless volumes too")
    containers_argument(parser)


def _rename_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("container", metavar="CONTAINER")
    parser.add_argument("name", metavar="NAME")


COMMANDS = [
    Command(("start",), "start containers that were created or have ended", start, _start_options, "wherry start web"),
    Command(("stop",), "stop containers", stop, _stop_options, "wherry stop -t 30 web"),
    Command(("restart",), "stop and start containers", restart, _stop_options, "wherry restart web"),
    Command(("kill",), "send a signal to containers (KILL)", kill, _kill_options, "wherry kill -s HUP web"),
    Command(("rm",), "remove containers", remove, _remove_options, "wherry rm -f web"),
    Command(("pause",), "freeze containers", pause, containers_argument, "wherry pause web"),
    Command(("unpause",), "let paused containers go on", unpause, containers_argument, "wherry unpause web"),
    Command(("wait",), "wait for containers to end, print exit codes", wait, containers_argument, "wherry wait web"),
    Command(("rename",), "give a container another name", rename, _rename_options, "wherry rename web shop"),
]
