"""`wherry system`, `info`, and the prunes: what there is, what it takes, and what can go."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from wherry.cli.formats import Headings, decimal_size, document, filters, format_option, labels_fit, show
from wherry.cli.output import table
from wherry.cli.table import Command
from wherry.cli.version import VERSION
from wherry.client import lifecycle
from wherry.client.finding import name_of, short_id, short_image
from wherry.client.pictures import Found, all_images
from wherry.client.states import State, state_of
from wherry.core import places
from wherry.core.errors import NotFound, WherryError

if TYPE_CHECKING:
    from wherry.cli.session import Session
    from wherry.client.api import Client
    from wherry.client.containers import Container

DF: Headings = {
    "Type": "TYPE",
    "TotalCount": "TOTAL",
    "Active": "ACTIVE",
    "Size": "SIZE",
    "Reclaimable": "RECLAIMABLE",
}


def agreed(args: argparse.Namespace, what: str) -> bool:
    """Asks, unless -f says that it is fine."""
    if args.force:
        return True
    sys.stderr.write(f"WARNING! This will remove {what}.\nAre you sure you want to continue? [y/N] ")
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in {"y", "yes"}


async def _states(client: Client) -> list[tuple[Container, State]]:
    tasks = {task.container_id: task for task in await client.tasks.list()}
    return [(item, state_of(item, tasks.get(item.id))) for item in await client.containers.list()]


async def info(session: Session, args: argparse.Namespace) -> None:
    """Prints what the daemon is, what it has, and the host that it is on."""
    client = session.client
    version, server = await client.version(), await client.introspection.server()
    states = [state for _, state in await _states(client)]
    plugins = await client.introspection.plugins()
    snapshotters = [item.id for item in plugins if item.type == "io.containerd.snapshotter.v1" and item.status == "ok"]
    host = os.uname()
    found: dict[str, Any] = {
        "ID": server.uuid,
        "ServerVersion": version.version,
        "ClientVersion": VERSION,
        "Address": session.address,
        "Namespace": client.namespace,
        "Containers": len(states),
        "ContainersRunning": sum(state.status == "running" for state in states),
        "ContainersPaused": sum(state.status == "paused" for state in states),
        "ContainersStopped": sum(not state.running for state in states),
        "Images": len({item.target.digest for item in await client.images.list()}),
        "Snapshotters": snapshotters,
        "Driver": await client.namespaces.default_snapshotter(),
        "CgroupVersion": _cgroups(),
        "CDISpecDirs": _cdi_folders(),
        "KernelVersion": host.release,
        "OperatingSystem": _os_name(),
        "OSType": "linux",
        "Architecture": host.machine,
        "NCPU": os.cpu_count(),
        "MemTotal": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "Name": host.nodename,
        "ServerPid": server.pid,
        **_security(),
        "Warnings": [f"{item.type}.{item.id}: {item.error}" for item in plugins if item.status == "error"],
    }
    if args.format:
        document(args, found)
        return
    for key, value in {**found, "MemTotal": decimal_size(found["MemTotal"])}.items():
        if isinstance(value, dict):
            print(f"{key}:")
            for name, text in value.items():
                print(f"  {name + ':':<18} {text}".rstrip())
            continue
        text = " ".join(value) if isinstance(value, list) else str(value)
        print(f"{key + ':':<20} {text}".rstrip())


def _security() -> dict[str, Any]:
    """What confines containers; of an ordinary user what the host allows, and what it won't."""
    if not places.is_users():
        from wherry.client.security import default_profile

        profile = default_profile()
        return {"SecurityOptions": ["seccomp", *([f"apparmor={profile}"] if profile else [])], "Rootless": False}
    from wherry.client.doctor import allowed

    return {"SecurityOptions": ["seccomp", "rootless"], "Rootless": True, "Allowed": allowed()}


def _cgroups() -> str:
    if os.path.exists("/sys/fs/cgroup/cgroup.controllers"):
        return "2"
    return "1 (hybrid)" if os.path.exists("/sys/fs/cgroup/unified/cgroup.procs") else "1"


def _cdi_folders() -> list[str]:
    from wherry.client.cdi import folders

    return list(folders())


def _os_name() -> str:
    with contextlib.suppress(OSError), open("/etc/os-release", encoding="utf-8") as file:
        for line in file:
            if line.startswith("PRETTY_NAME="):
                return line.partition("=")[2].strip().strip('"')
    return "Linux"


class _Sizes:
    """What there is, and what of it nobody uses."""

    def __init__(self) -> None:
        self.total = self.active = 0
        self.size = self.reclaimable = 0
        self.items: list[tuple[str, int, bool]] = []

    def add(self, name: str, size: int, *, used: bool) -> None:
        self.items.append((name, size, used))
        self.total += 1
        self.active += used
        self.size += size
        self.reclaimable += 0 if used else size

    def row(self, kind: str) -> dict[str, Any]:
        share = f" ({self.reclaimable * 100 // self.size}%)" if self.size else ""
        return {
            "Type": kind,
            "TotalCount": self.total,
            "Active": self.active,
            "Size": decimal_size(self.size),
            "Reclaimable": f"{decimal_size(self.reclaimable)}{share}",
        }


async def df(session: Session, args: argparse.Namespace) -> None:
    """Prints what images, containers and volumes take on disk."""
    client = session.client
    states = await _states(client)
    used = {item.image for item, _ in states}
    images, containers, volumes = _Sizes(), _Sizes(), _Sizes()
    seen: set[str] = set()
    for found in await all_images(client):
        if found.id in seen:
            continue
        seen.add(found.id)
        images.add(short_image(found.image.name), await _image_size(client, found), used=bool(used & set(found.names)))
    for item, state in states:
        size = 0
        if item.snapshot_key:
            with contextlib.suppress(NotFound):
                size = (await client.snapshots(item.snapshotter).usage(item.snapshot_key)).size
        containers.add(name_of(item), size, used=state.running)
    with contextlib.suppress(WherryError):
        for volume in await client.volumes.list():
            volumes.add(volume.name, await client.volumes.usage(volume.name), used=bool(volume.containers))
    rows = [images.row("Images"), containers.row("Containers"), volumes.row("Local Volumes")]
    if args.verbose:
        _itemized((images, containers, volumes))
        return
    show(args, rows, DF, quiet="Type")


_ITEMS: tuple[tuple[str, Headings], ...] = (
    ("Images", {"Name": "IMAGE", "Size": "SIZE", "Used": "CONTAINERS"}),
    ("Containers", {"Name": "CONTAINER", "Size": "SIZE", "Used": "RUNNING"}),
    ("Local volumes", {"Name": "VOLUME NAME", "Size": "SIZE", "Used": "USED"}),
)


def _itemized(kinds: Sequence[_Sizes]) -> None:
    """Each thing by itself, the largest first."""
    for (title, headings), sizes in zip(_ITEMS, kinds, strict=True):
        print(f"{title} space usage:\n")
        items = sorted(sizes.items, key=lambda item: -item[1])
        rows = [[name, decimal_size(size), "yes" if used else "no"] for name, size, used in items]
        table(list(headings.values()), rows)
        print()


async def _image_size(client: Client, found: Found) -> int:
    """The bytes of its blobs, and of its layers unpacked."""
    if found.look is None:
        return found.image.target.size
    size = sum(layer.size for layer in found.look.layers) + found.look.config.size
    snapshots = client.snapshots(await client.namespaces.default_snapshotter())
    key = found.look.chain_id
    while key:
        try:
            size += (await snapshots.usage(key)).size
            key = (await snapshots.stat(key)).parent
        except NotFound:
            break
    return size


async def prune_containers(client: Client, wanted: dict[str, list[str]]) -> tuple[list[str], int]:
    """Removes containers that have ended: their ids, and the bytes that their files took."""
    from wherry.cli.docker_images import moment

    gone, freed = [], 0
    for item, state in await _states(client):
        if state.running or state.status == "restarting" or not labels_fit(wanted.get("label", ()), item.labels):
            continue
        if "until" in wanted and item.created_at >= moment(wanted["until"][0]):
            continue
        if item.snapshot_key:
            with contextlib.suppress(NotFound):
                freed += (await client.snapshots(item.snapshotter).usage(item.snapshot_key)).size
        with contextlib.suppress(NotFound):
            await lifecycle.remove(client, item)
            gone.append(item.id)
    return gone, freed


async def prune_images(client: Client, wanted: dict[str, list[str]], *, every: bool) -> tuple[list[str], int]:
    """Removes images that no container is made from: without `every` those without a tag alone."""
    from wherry.cli.docker_images import created, dangling, moment

    used = {item.image for item in await client.containers.list()}
    names: list[str] = []
    freed = 0
    for found in await all_images(client):
        if not used.isdisjoint(found.names) or not (every or dangling(found)):
            continue
        if "until" in wanted and created(found) >= moment(wanted["until"][0]):
            continue
        if set(found.names) <= {*names, found.image.name}:
            # its last name
            freed += await _image_size(client, found)
        await client.images.delete(found.image.name)
        names.append(found.image.name)
    if names:
        with contextlib.suppress(WherryError):
            await client.gc.collect()
    return names, freed


async def container_prune(session: Session, args: argparse.Namespace) -> int:
    """Removes all containers that have ended."""
    if not agreed(args, "all containers that have ended"):
        return 1
    gone, freed = await prune_containers(session.client, filters(args.filter, ("label", "until")))
    _told("Deleted Containers", gone)
    print(f"Total reclaimed space: {decimal_size(freed)}")
    return 0


async def image_prune(session: Session, args: argparse.Namespace) -> int:
    """Removes images that nobody uses."""
    if not agreed(args, "all images that no container is made from" if args.all else "all images without a name"):
        return 1
    names, freed = await prune_images(session.client, filters(args.filter, ("until",)), every=args.all)
    _told("Deleted Images", [short_image(name) for name in names])
    print(f"Total reclaimed space: {decimal_size(freed)}")
    return 0


async def prune(session: Session, args: argparse.Namespace) -> int:
    """Removes what nobody uses: containers, networks, images, with --volumes volumes too."""
    what = "all containers that have ended, all networks and all " + ("" if args.all else "nameless ") + "images that"
    if not agreed(args, f"{what} nobody uses{', and all nameless volumes' if args.volumes else ''}"):
        return 1
    client, wanted = session.client, filters(args.filter, ("label", "until"))
    gone, freed = await prune_containers(client, wanted)
    _told("Deleted Containers", gone)
    with contextlib.suppress(WherryError):
        _told("Deleted Networks", await client.networks.prune())
    if args.volumes:
        volumes, more = await client.volumes.prune(labels=wanted.get("label", ()))
        _told("Deleted Volumes", volumes)
        freed += more
    names, more = await prune_images(client, wanted, every=args.all)
    _told("Deleted Images", [short_image(name) for name in names])
    print(f"Total reclaimed space: {decimal_size(freed + more)}")
    return 0


def _told(title: str, names: list[str]) -> None:
    if names:
        print(f"{title}:\n" + "\n".join(map(short_id, names)) + "\n")


def _info_options(parser: argparse.ArgumentParser) -> None:
    format_option(parser, "lines (default), json, or a template")


def _df_options(parser: argparse.ArgumentParser) -> None:
    format_option(parser)
    parser.add_argument("-v", "--verbose", action="store_true", help="each image, container and volume by itself")


def prune_options(parser: argparse.ArgumentParser) -> None:
    """`-f` and `--filter`."""
    parser.add_argument("-f", "--force", action="store_true", help="don't ask")
    parser.add_argument(
        "--filter", action="append", default=[], metavar="KEY=VALUE", help="only those that fit (until=24h)"
    )


def _image_prune_options(parser: argparse.ArgumentParser) -> None:
    prune_options(parser)
    parser.add_argument("-a", "--all", action="store_true", help="also those with names")


def _prune_options(parser: argparse.ArgumentParser) -> None:
    _image_prune_options(parser)
    parser.add_argument("--volumes", action="store_true", help="nameless volumes too")


CONTAINER_PRUNE = Command(
    ("prune",), "remove all containers that have ended", container_prune, prune_options, "wherry container prune -f"
)
IMAGE_PRUNE = Command(
    ("prune",), "remove images that nobody uses", image_prune, _image_prune_options, "wherry image prune -a -f"
)
INFO = Command(
    ("info",), "show what the daemon is and has", info, _info_options, "wherry info -f '{{.ContainersRunning}}'"
)
COMMANDS = [
    Command(("df",), "show what takes how much on disk", df, _df_options, "wherry system df"),
    INFO,
    Command(("prune",), "remove what nobody uses", prune, _prune_options, "wherry system prune -f --volumes"),
]
