"""`wherry ps`: containers and what they are doing."""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING, Any

from wherry.cli.formats import Headings, Labelled, cut, decimal_size, filters, labels_fit, listing_flags, show
from wherry.cli.table import Command
from wherry.client.finding import choose, name_of, short_id, short_image
from wherry.client.states import State, ago, describe, label_json, state_of
from wherry.core.errors import InvalidArgument, NotFound, Unimplemented
from wherry.core.labels import MOUNTS, internal

if TYPE_CHECKING:
    from collections.abc import Callable

    from wherry.cli.session import Session
    from wherry.client.api import Client
    from wherry.client.containers import Container

# the extension in which a container's record says what it asks of networks (wherry.client.network)
_NETWORK = "wherry.network"
COLUMNS: Headings = {
    "ID": "CONTAINER ID",
    "Image": "IMAGE",
    "Command": "COMMAND",
    "RunningFor": "CREATED",
    "Status": "STATUS",
    "Ports": "PORTS",
    "Names": "NAMES",
}
FILTERS = (
    "id", "name", "label", "status", "exited", "ancestor", "before", "since", "volume", "network", "health", "publish",
    "is-task",
)  # fmt: skip
COMMAND_LENGTH = 20
STATUSES = ("created", "restarting", "running", "removing", "paused", "exited", "dead")


async def ps(session: Session, args: argparse.Namespace) -> None:
    """Prints the containers that run, or all of them."""
    client = session.client
    found = filters(args.filter, FILTERS)
    for status in found.get("status", ()):
        if status not in STATUSES:
            raise InvalidArgument(f"unknown status {status!r}: there are {', '.join(STATUSES)}")
    containers = await client.containers.list()
    tasks = {task.container_id: task for task in await client.tasks.list()}
    containers.sort(key=lambda item: item.created_at, reverse=True)
    items = [(item, state_of(item, tasks.get(item.id))) for item in containers]
    last = 1 if args.latest else args.last
    every = args.all or last > 0 or "status" in found or "exited" in found
    items = [item for item in items if every or item[1].running or item[1].status == "restarting"]
    items = [item for item in items if fits(found, *item, containers)]
    if last > 0:
        items = items[:last]
    columns = {**COLUMNS, "Size": "SIZE"} if args.size else COLUMNS
    rows = [row(item, state, whole=args.no_trunc) for item, state in items]
    if "Networks" in args.format or args.format == "json":
        for line, (item, _) in zip(rows, items, strict=True):
            line["Networks"] = ",".join(_network_names(item))
    await _networks(client, rows, items)
    if args.size or "Size" in args.format:
        for line, (item, _) in zip(rows, items, strict=True):
            line["Size"] = await _size(client, item)
    show(args, rows, columns)


async def _networks(client: Client, rows: list[dict[str, Any]], items: list[tuple[Container, State]]) -> None:
    """Fills in what those that run have of networks; nothing where the daemon has none (containerd)."""
    if not any(state.running and _NETWORK in item.extensions for item, state in items):
        return
    from wherry.client.network import show_ports

    try:
        has = {status.container: status for status in await client.networks.status()}
    except (Unimplemented, NotFound):
        return
    for line, (item, _) in zip(rows, items, strict=True):
        if (status := has.get(item.id)) is not None:
            line["Ports"] = show_ports(status.ports)
            line["Networks"] = ",".join(endpoint.network for endpoint in status.endpoints)


def row(container: Container, state: State, *, whole: bool = False) -> dict[str, Any]:
    """A line of the listing, with docker's names for the fields."""
    mounts = mounts_of(container)
    places = [str(mount.get("Name") or mount.get("Source") or "") for mount in mounts]
    found = Labelled(
        {
            "ID": container.id if whole else short_id(container.id),
            "Image": short_image(container.image) or "-",
            "Command": f'"{cut(command_of(container), COMMAND_LENGTH, whole=whole)}"',
            "CreatedAt": _local(container.created_at),
            "RunningFor": f"{ago(container.created_at)} ago",
            "Ports": "",
            "State": state.status,
            "Status": describe(state),
            "Size": "",
            "Names": name_of(container),
            "Labels": ",".join(
                f"{key}={value}" for key, value in sorted(container.labels.items()) if not internal(key)
            ),
            "Mounts": ",".join(places if whole else [cut(place, 15) for place in places]),
            "LocalVolumes": str(sum(mount.get("Type") == "volume" for mount in mounts)),
            "Networks": "",
        }
    )
    found.labels = container.labels
    return found


def mounts_of(container: Container) -> list[dict[str, Any]]:
    """The mounts that a person asked for."""
    found = label_json(container, MOUNTS).get("mounts")
    return [item for item in found if isinstance(item, dict)] if isinstance(found, list) else []


def command_of(container: Container) -> str:
    """What runs in it, in one line."""
    process = (container.spec or {}).get("process") or {}
    return " ".join(str(word) for word in process.get("args") or ())


def fits(found: dict[str, list[str]], container: Container, state: State, every: list[Container]) -> bool:
    """Whether a container passes docker's filters: one of the values of each key, for labels all of them."""
    name = name_of(container)
    tests: dict[str, Callable[[str], bool]] = {
        "id": container.id.startswith,
        "name": lambda value: _search(value, name),
        "status": lambda value: state.status == value,
        "exited": lambda value: state.status == "exited" and str(state.exit_code) == value,
        "ancestor": lambda value: (
            value in {container.image, short_image(container.image)}
            or short_image(container.image).partition(":")[0] == value
        ),
        "before": lambda value: container.created_at < _reference(value, every).created_at,
        "since": lambda value: container.created_at > _reference(value, every).created_at,
        "volume": lambda value: any(
            value in {mount.get("Name"), mount.get("Source"), mount.get("Destination")}
            for mount in mounts_of(container)
        ),
        "health": lambda value: (state.health or "none") == value,
        "network": lambda value: value in _network_names(container),
        "publish": lambda value: _publishes(container, value),
        "is-task": lambda value: value in {"0", "false"},
    }
    if not labels_fit(found.get("label", ()), container.labels):
        return False
    return all(any(tests[key](value) for value in values) for key, values in found.items() if key != "label")


def _network_names(container: Container) -> list[str]:
    from wherry.client.network import read_extensions

    asked = read_extensions(container.extensions)
    if asked is None:
        return []
    return [item.network for item in asked.networks] or [asked.mode]


def _publishes(container: Container, value: str) -> bool:
    """Whether a port (`80`, `53/udp`) is published, by its number on the host or inside."""
    from wherry.client.network import read_extensions

    number, _, protocol = value.partition("/")
    asked = read_extensions(container.extensions)
    return asked is not None and any(
        number in {str(port.host_port), str(port.container_port)} and port.protocol == (protocol or "tcp")
        for port in asked.ports
    )


def _search(pattern: str, text: str) -> bool:
    try:
        return re.search(pattern, text) is not None
    except re.error as error:
        raise InvalidArgument(f"filter name={pattern}: no regular expression: {error}") from error


def _reference(value: str, every: list[Container]) -> Container:
    try:
        return choose(value, every)
    except NotFound:
        raise NotFound(f"no such container: {value}") from None


async def _size(client: Client, container: Container) -> str:
    if not container.snapshot_key:
        return "0B"
    snapshots = client.snapshots(container.snapshotter)
    own, total = await snapshots.sizes(container.snapshot_key)
    return f"{decimal_size(own)} (virtual {decimal_size(total)})"


def _local(at: float) -> str:
    import time

    return time.strftime("%Y-%m-%d %H:%M:%S %z %Z", time.localtime(at)) if at else ""


def _configure(parser: argparse.ArgumentParser) -> None:
    listing_flags(parser)
    parser.add_argument("-a", "--all", action="store_true", help="also those that don't run")
    parser.add_argument("-n", "--last", type=int, default=-1, metavar="N", help="the N made last, in any state")
    parser.add_argument("-l", "--latest", action="store_true", help="the one made last, in any state")
    parser.add_argument("-s", "--size", action="store_true", help="what their files take")


COMMANDS = [
    Command(
        ("ps",), "list containers that run", ps, _configure,
        "wherry ps -a --filter status=exited --format '{{.Names}}: {{.Status}}'",
    ),
]  # fmt: skip
