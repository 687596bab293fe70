"""`wherry tasks`: containers that run, and the processes in them."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING, Any

from wherry.cli import task_reports
from wherry.cli.arguments import byte_size, pairs, signal_number, switch
from wherry.cli.attach import Waiter
from wherry.cli.following import coded, follow, kill_task, run_task, stream_options, streams
from wherry.cli.output import Column, listing, listing_options
from wherry.cli.table import Command
from wherry.client.fifos import Fifos, discard
from wherry.client.further import process_of
from wherry.client.launch import Launched
from wherry.client.tasks import Process
from wherry.core.errors import FailedPrecondition, InvalidArgument, WherryError

if TYPE_CHECKING:
    from wherry.cli.session import Session
    from wherry.client.api import Client

COLUMNS = [
    Column[Process]("TASK", "ID", lambda item: item.container_id),
    Column[Process]("PID", "PID", lambda item: item.pid),
    Column[Process]("STATUS", "Status", lambda item: item.status),
]
ENDED = [Column[Process]("EXIT", "ExitStatus", lambda item: item.exit_status)]


async def list_(session: Session, args: argparse.Namespace) -> None:
    """Prints the tasks."""
    listing(args, COLUMNS + ENDED if args.format == "json" else COLUMNS, await session.client.tasks.list())


async def start(session: Session, args: argparse.Namespace) -> int:
    """Starts a container that was created."""
    client = session.client
    container = await client.containers.get(args.id)
    mounts = []
    if container.snapshot_key:
        mounts = await client.snapshots(container.snapshotter).mounts(container.snapshot_key)
    return await run_task(session, Launched(container, tuple(mounts)), args)


async def exec_(session: Session, args: argparse.Namespace) -> int:
    """Runs a further process in a container."""
    with coded():
        client = session.client
        container = await client.containers.get(args.id)
        command = args.command[1:] if args.command[:1] == ["--"] else args.command
        process = await process_of(client, container, command, tty=args.tty, env=args.env, cwd=args.cwd, user=args.user)
        name = args.exec_id or f"e{os.urandom(6).hex()}"
        fifos, stdio = streams(name, args, tty=args.tty)
    detached = False
    try:
        with coded():
            await client.tasks.exec(args.id, name, process, stdio)
        try:
            waiter = None if args.detach else Waiter(client, args.id, name)
            with coded():
                await client.tasks.start(args.id, name)
            if waiter is None:
                detached = True
                return 0
            return follow(session, fifos, waiter, args.id, name, tty=args.tty, signals=args.sig_proxy) or 0
        finally:
            if not detached:
                await kill_task(client, args.id, name)
    finally:
        if fifos is not None:
            fifos.release() if detached else fifos.close()


async def attach(session: Session, args: argparse.Namespace) -> int:
    """Follows a container that runs, and removes its task when it has ended."""
    client = session.client
    task = await client.tasks.get(args.id)
    fifos = Fifos.existing(task.stdio)
    try:
        waiter = Waiter(client, args.id)
        status = follow(session, fifos, waiter, args.id, tty=task.stdio.terminal, signals=args.sig_proxy) or 0
    finally:
        fifos.close()
    await client.tasks.delete(args.id)
    discard(task.stdio)
    return status


async def kill(session: Session, args: argparse.Namespace) -> None:
    """Sends a signal."""
    client = session.client
    number = args.signal
    if number is None:
        container = await client.containers.get(args.id)
        number = signal_number(container.labels.get("io.containerd.image.config.stop-signal") or "SIGTERM")
    await client.tasks.kill(args.id, number, args.exec_id, every=args.all)


async def pause(session: Session, args: argparse.Namespace) -> None:
    """Freezes a task."""
    await session.client.tasks.pause(args.id)


async def resume(session: Session, args: argparse.Namespace) -> None:
    """Thaws a task."""
    await session.client.tasks.resume(args.id)


async def delete(session: Session, args: argparse.Namespace) -> int:
    """Removes ended tasks; the exit code is that of the (last) one removed, as ctr has it."""
    client, status = session.client, 0
    for name in args.ids:
        try:
            task = await client.tasks.get(name, args.exec_id)
            status = await _delete(client, task, name, args)
            discard(task.stdio)
        except WherryError as error:
            if len(args.ids) == 1:
                raise
            sys.stderr.write(f"wherry: {name}: {error.message}\n")
            status = 1
    return status


async def _delete(client: Client, task: Process, name: str, args: argparse.Namespace) -> int:
    if args.force and task.status not in {"STOPPED", "UNKNOWN"}:
        await kill_task(client, name, args.exec_id)
        return 0
    if task.status not in {"STOPPED", "UNKNOWN"}:
        raise FailedPrecondition(f"task {name} is {task.status.lower()}: stop it first, or use --force")
    return (await client.tasks.delete(name, args.exec_id)).status


async def update(session: Session, args: argparse.Namespace) -> None:
    """Changes limits of a running container."""
    resources: dict[str, Any] = {}
    if args.memory:
        resources["memory"] = {"limit": args.memory}
    if args.cpus:
        resources["cpu"] = {"quota": int(args.cpus * 100_000), "period": 100_000}
    if args.pids_limit:
        resources["pids"] = {"limit": args.pids_limit}
    if not resources:
        raise InvalidArgument("nothing to change: name --memory, --cpus or --pids-limit")
    await session.client.tasks.update(args.id, resources, pairs(args.annotation))


def _id(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("id", metavar="CONTAINER")


def _start_options(parser: argparse.ArgumentParser) -> None:
    stream_options(parser)
    parser.add_argument("--null-io", action="store_true", help="no input, output thrown away")
    parser.add_argument("--pid-file", default="", metavar="FILE", help="write the process id there")
    _id(parser)


def _exec_options(parser: argparse.ArgumentParser) -> None:
    stream_options(parser)
    parser.add_argument("--exec-id", default="", metavar="ID", help="its id (made up when left out)")
    parser.add_argument("-t", "--tty", action="store_true", help="give it a terminal")
    parser.add_argument("-w", "--cwd", default="", metavar="DIR", help="working directory")
    parser.add_argument("-u", "--user", default="", metavar="USER[:GROUP]", help="names of the image, or numbers")
    parser.add_argument("-e", "--env", action="append", default=[], metavar="NAME=VALUE", help="set a variable")
    _id(parser)
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND [ARG...]")


def _attach_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sig-proxy", default=True, type=switch, metavar="BOOL", help="pass signals on (true)")
    _id(parser)


def _kill_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-s", "--signal", type=signal_number, metavar="SIGNAL", help="TERM, or the image's stop signal")
    parser.add_argument("--exec-id", default="", metavar="ID", help="a further process")
    parser.add_argument("-a", "--all", action="store_true", help="every process in the container")
    _id(parser)


def _delete_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-f", "--force", action="store_true", help="kill it where it runs")
    parser.add_argument("--exec-id", default="", metavar="ID", help="a further process")
    parser.add_argument("ids", nargs="+", metavar="CONTAINER")


def _update_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-m", "--memory", type=byte_size, default=0, metavar="SIZE", help="memory limit")
    parser.add_argument("--cpus", type=float, default=0.0, metavar="N", help="CPU time in whole CPUs")
    parser.add_argument("--pids-limit", type=int, default=0, metavar="N", help="most processes at once")
    parser.add_argument("--annotation", action="append", default=[], metavar="KEY=VALUE", help="for the runtime")
    _id(parser)


COMMANDS = [
    Command(("list", "ls"), "list tasks", list_, listing_options, example="wherry tasks ls"),
    Command(
        ("start",), "start a container that was created", start, _start_options, example="wherry tasks start -d cache"
    ),
    Command(("exec",), "run a further process in a container", exec_, _exec_options, "wherry tasks exec -t cache sh"),
    Command(("attach",), "follow a container that runs", attach, _attach_options, example="wherry tasks attach cache"),
    Command(("kill",), "send a signal (TERM)", kill, _kill_options, "wherry tasks kill -s HUP web"),
    Command(("pause",), "freeze a container", pause, _id, example="wherry tasks pause cache"),
    Command(("resume",), "go on after pause", resume, _id, example="wherry tasks resume cache"),
    *task_reports.COMMANDS,
    Command(
        ("update",),
        "change a container's limits",
        update,
        _update_options,
        example="wherry tasks update --memory 512m cache",
    ),
    Command(
        ("delete", "del", "remove", "rm"),
        "remove tasks that ended",
        delete,
        _delete_options,
        example="wherry tasks rm -f cache",
    ),
]
