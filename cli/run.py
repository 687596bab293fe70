"""`wherry run` and `wherry create`: a container made from an image, and started."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from typing import TYPE_CHECKING

from wherry.cli import container_flags
from wherry.cli.arguments import switch
from wherry.cli.attaching import DETACHED, detach_keys, start_followed
from wherry.cli.following import OURS, coded, interruptible, patiently
from wherry.cli.table import Command
from wherry.client import lifecycle
from wherry.client.recipe import make
from wherry.core.errors import InvalidArgument, NotFound, WherryError
from wherry.core.labels import AUTO_REMOVE

if TYPE_CHECKING:
    from wherry.cli.session import Session
    from wherry.client.launch import Launched


async def run(session: Session, args: argparse.Namespace) -> int:
    """Makes, starts and, unless it is detached, follows a container."""
    interruptible()
    with coded(OURS):
        keys = detach_keys(args.detach_keys)
        launched = await _make(session, args, running=True)
    client, container = session.client, launched.container
    try:
        if args.detach:
            with coded():
                await lifecycle.start_new(client, container, launched.mounts)
            print(container.id)
            return 0
        streams = set(args.attach)
        interactive = args.interactive and (not streams or "stdin" in streams)
        # another daemon's runtimes may mount it twice
        ours = getattr(client.calls.transport, "ours", False)
        mounts = lifecycle.passing(launched.mounts) if args.rm and ours else launched.mounts
        status = await start_followed(
            session, container, mounts, interactive=interactive, signals=args.sig_proxy, keys=keys,
            streams=streams,
        )  # fmt: skip
    except BaseException:
        if args.rm:
            # what went wrong first is what a person wants to know
            with contextlib.suppress(WherryError):
                await lifecycle.remove(client, container, force=True, volumes=True)
        raise
    if status is DETACHED:
        if args.rm:
            await client.containers.label(container.id, {AUTO_REMOVE: "true"})
        return 0
    if args.rm:
        await patiently(lambda: lifecycle.remove_ended(client, container, volumes=True))
    return status


async def create(session: Session, args: argparse.Namespace) -> None:
    """Makes a container and prints its id."""
    with coded(1):
        args.detach = True
        launched = await _make(session, args, running=False)
    print(launched.container.id)


async def _make(session: Session, args: argparse.Namespace, *, running: bool) -> Launched:
    client = session.client
    if args.cidfile and os.path.exists(args.cidfile):
        raise InvalidArgument(f"the file {args.cidfile} of --cidfile is there: remove it, or name another")
    recipe = container_flags.recipe(
        args,
        running=running,
        auto_remove="" if not args.rm else "true" if args.detach else "attached",
        log_uri=container_flags.log_uri(args, lifecycle.default_log(client.namespace)),
    )
    if args.pull == "always":
        await _pull(session, args)
    try:
        launched = await make(client, recipe)
    except NotFound as error:
        if not recipe.image or not (args.platform or await _missing(session, recipe.image)):
            raise
        if args.pull == "never":
            platform = f"--platform {args.platform} " if args.platform else ""
            raise NotFound(f"{error.message}: 'wherry pull {platform}{args.image}' brings it") from None
        await _pull(session, args)
        launched = await make(client, recipe)
    if args.cidfile:
        with open(args.cidfile, "w", encoding="ascii") as file:
            file.write(launched.container.id)
    return launched


async def _missing(session: Session, image: str) -> bool:
    try:
        await session.client.images.find(image)
    except NotFound:
        return True
    return False


async def _pull(session: Session, args: argparse.Namespace) -> None:
    from wherry.cli.fetching import fetch

    if not args.quiet:
        kind = f" for {args.platform}" if args.platform else ""
        sys.stderr.write(f"Unable to find image '{args.image}'{kind} locally\n" if args.pull == "missing" else "")
    await fetch(session, args.image, args.platform, args.snapshotter, quiet=args.quiet)


def _run_options(parser: argparse.ArgumentParser) -> None:
    own = parser.add_argument_group("running")
    own.add_argument(
        "-a", "--attach", action="append", default=[], type=str.lower, choices=("stdin", "stdout", "stderr"),
        metavar="STREAM", help="follow this stream alone: stdin, stdout or stderr",
    )  # fmt: skip
    own.add_argument("-d", "--detach", action="store_true", help="leave it running, and print its id")
    own.add_argument(
        "--sig-proxy", default=True, type=switch, nargs="?", const=True, metavar="BOOL", help="pass signals on (true)"
    )
    own.add_argument("--detach-keys", default="", metavar="KEYS", help="keys that leave it running (ctrl-p,ctrl-q)")
    container_flags.configure(parser)


ABOUT = """run a command in a new container

Unless it is detached, the container's output is this command's (with -i its input too), signals go to it, and its exit
code is passed on (125: an error of ours, 126: a command that can't be run, 127: no such command)."""

COMMANDS = [
    Command(("run",), ABOUT, run, _run_options, "wherry run -d --name web -p 8080:80 -v data:/srv nginx", OURS),
    Command(
        ("create",), "make a container without starting it", create, container_flags.configure,
        "wherry create --name db -e POSTGRES_PASSWORD=secret postgres:16", OURS,
    ),
]  # fmt: skip
