"""What tasks say of themselves: processes, metrics, checkpoints."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from wherry.cli.output import Column, listing, listing_options, print_json, table, when
from wherry.cli.table import Command
from wherry.client.samples import decode, flatten
from wherry.core.errors import NotFound
from wherry.core.tuples import NamedTuple

if TYPE_CHECKING:
    from wherry.cli.session import Session


class Pid(NamedTuple):
    """A row of `ps`."""

    pid: int
    info: str


PIDS = [
    Column[Pid]("PID", "PID", lambda row: row.pid),
    Column[Pid]("INFO", "Info", lambda row: row.info or None, lambda value: value or "-"),
]


async def ps(session: Session, args: argparse.Namespace) -> None:
    """Prints the processes of a container, as the host numbers them."""
    found = await session.client.tasks.pids(args.id)
    listing(args, PIDS, [Pid(pid, _exec_of(packed)) for pid, packed in found])


def _exec_of(packed: Any) -> str:
    """The exec that a process belongs to; "" for others."""
    if not packed.type_url:
        return ""
    from wherry.client.samples import process_details

    return process_details(packed)


async def metrics(session: Session, args: argparse.Namespace) -> None:
    """Prints one sample of a task's cgroup."""
    found = await session.client.tasks.metrics([args.id])
    if not found:
        raise NotFound(f"no metrics for task {args.id}: not found")
    sample = found[0]
    values = decode(sample.data)
    if args.format == "json":
        print_json(values)
        return
    table(("ID", "TIMESTAMP"), [(sample.id, when(sample.at))])
    print()
    table(("METRIC", "VALUE"), [(name, str(value)) for name, value in flatten(values)])


async def checkpoint(session: Session, args: argparse.Namespace) -> None:
    """Writes a checkpoint, and prints where it is."""
    from wherry.client.runtimes import checkpoint_options

    options = checkpoint_options(leave=not args.exit, images=args.image_path, work=args.work_path)
    for descriptor in await session.client.tasks.checkpoint(args.id, options):
        print(f"{descriptor.digest} {descriptor.media_type}")


def _ps_options(parser: argparse.ArgumentParser) -> None:
    listing_options(parser, quiet="process ids")
    parser.add_argument("id", metavar="CONTAINER")


def _metrics_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--format", choices=("table", "json"), default="table")
    parser.add_argument("id", metavar="CONTAINER")


def _checkpoint_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--exit", action="store_true", help="stop the container afterwards")
    parser.add_argument("--image-path", default="", metavar="DIR", help="for criu's images")
    parser.add_argument("--work-path", default="", metavar="DIR", help="for criu's logs")
    parser.add_argument("id", metavar="CONTAINER")


COMMANDS = [
    Command(("ps",), "list the processes in a container", ps, _ps_options, example="wherry tasks ps cache"),
    Command(
        ("metrics", "metric"),
        "show what a container uses",
        metrics,
        _metrics_options,
        example="wherry tasks metrics --format json cache",
    ),
    Command(
        ("checkpoint",),
        "write a container's state to the content store",
        checkpoint,
        _checkpoint_options,
        example="wherry tasks checkpoint --exit cache",
    ),
]
