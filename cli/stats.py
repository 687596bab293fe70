"""`wherry stats`, `top` and `port`: what running containers use, run, and publish."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from functools import partial
from typing import TYPE_CHECKING, Any

from wherry.cli.formats import Headings, binary_size, cut, decimal_size, format_option, show
from wherry.cli.output import table
from wherry.cli.table import Command
from wherry.cli.terminal import is_terminal
from wherry.client import lifecycle
from wherry.client.figures import Figures, Sample, between, by_container, sample
from wherry.client.finding import find, find_all, name_of, short_id
from wherry.client.unshare import look_from
from wherry.core import places
from wherry.core.errors import InvalidArgument, NotFound, Unimplemented

if TYPE_CHECKING:
    from wherry.cli.session import Session
    from wherry.client.containers import Container

COLUMNS: Headings = {
    "ID": "CONTAINER ID",
    "Name": "NAME",
    "CPUPerc": "CPU %",
    "MemUsage": "MEM USAGE / LIMIT",
    "MemPerc": "MEM %",
    "NetIO": "NET I/O",
    "BlockIO": "BLOCK I/O",
    "PIDs": "PIDS",
}
# seconds between two samples
INTERVAL = 1.0
# what waits here is the whole command
pause = time.sleep


async def stats(session: Session, args: argparse.Namespace) -> None:
    """Prints what containers use: once, or again every second."""
    chosen = await find_all(session.client, args.containers)
    before = await _samples(session, chosen, every=args.all)
    live = not args.no_stream
    clear = live and is_terminal(1) and args.format in {"", "table"}
    while True:
        pause(INTERVAL)
        after = await _samples(session, chosen, every=args.all)
        rows = [_row(item, figures, whole=args.no_trunc) for item, figures in _figures(before, after)]
        if clear:
            # home, and clear what is below: no flicker
            sys.stdout.write("\x1b[H\x1b[J")
        show(args, rows, COLUMNS)
        sys.stdout.flush()
        if not live:
            return
        before = after


Samples = dict[str, tuple["Container", "Sample | None"]]


async def _samples(session: Session, chosen: list[Container], *, every: bool) -> Samples:
    client = session.client
    containers = chosen or await client.containers.list()
    pids = {task.container_id: task.pid for task in await client.tasks.list() if task.status in {"RUNNING", "PAUSED"}}
    running = [item for item in containers if item.id in pids]
    metrics = by_container(await client.tasks.metrics([item.id for item in running])) if running else {}
    found: Samples = {}
    for item in containers:
        if item.id in metrics:
            found[item.id] = (item, sample(metrics[item.id], pids[item.id]))
        elif chosen or every:
            found[item.id] = (item, None)
    return found


def _figures(before: Samples, after: Samples) -> list[tuple[Container, Figures | None]]:
    found: list[tuple[Container, Figures | None]] = []
    for key, (item, now) in after.items():
        first = before.get(key, (item, None))[1]
        found.append((item, between(first, now) if now is not None else None))
    return found


def _row(item: Container, figures: Figures | None, *, whole: bool) -> dict[str, Any]:
    identity = item.id if whole else short_id(item.id)
    row = {"ID": identity, "Container": identity, "Name": name_of(item)}
    if figures is None:
        return {**row, **{key: "--" for key in COLUMNS if key not in row}}
    now = figures.sample
    return {
        **row,
        "CPUPerc": f"{figures.cpu:.2f}%",
        "MemUsage": f"{binary_size(now.memory)} / {binary_size(now.limit)}",
        "MemPerc": f"{figures.memory_share:.2f}%",
        "NetIO": f"{decimal_size(now.received)} / {decimal_size(now.sent)}",
        "BlockIO": f"{decimal_size(now.read)} / {decimal_size(now.written)}",
        "PIDs": now.processes,
    }


async def top(session: Session, args: argparse.Namespace) -> None:
    """Prints the processes of a container, as the host's ps(1) sees them; an ordinary user's with the ids inside."""
    client = session.client
    container = await find(client, args.container)
    await lifecycle.require(client, container, {"running", "paused"}, "is not running")
    pids = {pid for pid, _ in await client.tasks.pids(container.id)}
    options = args.options or ["-ef"]
    inside = partial(look_from, min(pids)) if pids and places.is_users() else None
    try:
        done = subprocess.run(
            ["ps", *options],
            capture_output=True,
            text=True,
            check=False,
            preexec_fn=inside,
        )
    except FileNotFoundError:
        table(("PID", "CMD"), [(str(pid), cut(_command(pid), 100)) for pid in sorted(pids)])
        return
    if done.returncode:
        raise InvalidArgument(f"ps {' '.join(options)}: {done.stderr.strip().splitlines()[0]}")
    for line in _of_container(done.stdout.splitlines(), pids):
        print(line)


def _of_container(lines: list[str], pids: set[int]) -> list[str]:
    """The lines of ps about these processes."""
    heading = lines[0].split() if lines else []
    if "PID" not in heading:
        raise InvalidArgument("the options of ps must let it show the column PID")
    at = heading.index("PID")
    return [lines[0], *(line for line in lines[1:] if _number(line, at) in pids)]


def _number(line: str, at: int) -> int:
    fields = line.split(None, at + 1)
    return int(fields[at]) if len(fields) > at and fields[at].isdigit() else -1


def _command(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


async def port(session: Session, args: argparse.Namespace) -> None:
    """Prints the ports that a container publishes."""
    client = session.client
    container = await find(client, args.container)
    try:
        found = [item for status in await client.networks.status([container.id]) for item in status.ports]
    except Unimplemented:
        raise Unimplemented(
            "this daemon has no networks of its own (is it containerd?), so it publishes no ports"
        ) from None
    wanted, _, protocol = args.port.partition("/")
    if args.port and not wanted.isdigit():
        raise InvalidArgument(f"{args.port!r} is no port: expected PORT[/PROTOCOL], as in 80/tcp")
    shown = 0
    for item in found:
        if args.port and (item.container_port != int(wanted) or item.protocol != (protocol or "tcp")):
            continue
        host = item.host_ip or "0.0.0.0"
        where = f"{f'[{host}]' if ':' in host else host}:{item.host_port}"
        print(where if args.port else f"{item.container_port}/{item.protocol} -> {where}")
        shown += 1
    if args.port and not shown:
        raise NotFound(f"no public port '{args.port}' published for {name_of(container)}")


def _stats_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-a", "--all", action="store_true", help="also those that don't run")
    parser.add_argument("--no-stream", action="store_true", help="once, instead of every second")
    parser.add_argument("--no-trunc", action="store_true", help="whole ids")
    format_option(parser)
    parser.add_argument("containers", nargs="*", metavar="CONTAINER", help="all that run, when left out")


def _top_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("container", metavar="CONTAINER")
    parser.add_argument("options", nargs=argparse.REMAINDER, metavar="PS-OPTION...", help="of ps(1) (-ef)")


def _port_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("container", metavar="CONTAINER")
    parser.add_argument("port", nargs="?", default="", metavar="PORT[/PROTOCOL]", help="only this port")


COMMANDS = [
    Command(("stats",), "show what containers use, live", stats, _stats_options, "wherry stats --no-stream"),
    Command(("top",), "list the processes of a container", top, _top_options, "wherry top web -o pid,user,args"),
    Command(("port",), "list the ports that a container publishes", port, _port_options, "wherry port web 80/tcp"),
]
