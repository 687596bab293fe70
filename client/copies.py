"""Where a container's files are, running or not, and what is done with whole folders of them.

These calls block; they need a daemon on this host, and root where the container doesn't run.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import posixpath
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import IO, TYPE_CHECKING, NamedTuple

from wherry.client.files import MAPS, Root
from wherry.core.errors import FailedPrecondition, NotFound
from wherry.linux.copying import copy_tree

if TYPE_CHECKING:
    from wherry.client.api import Client
    from wherry.client.containers import Container
    from wherry.client.values import Mount


class Place(NamedTuple):
    """A running container's first process, or its snapshot's mounts with binds of the host on top."""

    pid: int = 0
    mounts: Sequence[Mount] = ()
    binds: Sequence[tuple[str, str]] = ()

    @contextlib.contextmanager
    def root(self) -> Iterator[Root]:
        """The files, for the time of the block. Raises NotFound, PermissionDenied, FailedPrecondition."""
        with Root(self.pid) if self.pid else Root.of_mounts(self.mounts, self.binds) as root:
            yield root


async def place_of(client: Client, container: Container) -> Place:
    """Where a container's files are now."""
    try:
        task = await client.tasks.get(container.id)
        if task.status in {"RUNNING", "PAUSED", "PAUSING", "CREATED"} and task.pid:
            return Place(pid=task.pid)
    except NotFound:
        pass
    if not container.snapshot_key:
        raise FailedPrecondition(f"container {container.id} has no snapshot: its files are where its root folder is")
    mounts = await client.snapshots(container.snapshotter).mounts(container.snapshot_key)
    return Place(mounts=mounts, binds=_binds(container))


def _binds(container: Container) -> list[tuple[str, str]]:
    return [
        (str(mount["source"]), str(mount["destination"]))
        for mount in (container.spec or {}).get("mounts") or ()
        if mount.get("type") == "bind" and os.path.exists(str(mount.get("source")))
    ]


@contextlib.contextmanager
def packed(root: Root, path: str, *, follow: bool = False, one_filesystem: bool = False) -> Iterator[IO[bytes]]:
    """A tar archive of a path, to be read in the block while it is made. Raises NotFound (at its end)."""
    reader, writer = os.pipe2(os.O_CLOEXEC)
    failed: list[BaseException] = []

    def pack() -> None:
        try:
            with open(writer, "wb") as out:
                root.pack(path, out, follow=follow, one_filesystem=one_filesystem)
        except BaseException as error:  # noqa: BLE001 - it is raised where somebody listens
            failed.append(error)

    thread = threading.Thread(target=pack, daemon=True)
    thread.start()
    try:
        with open(reader, "rb") as source:
            yield source
    finally:
        thread.join()
    if failed:
        raise failed[0]


def is_empty(folder: str) -> bool:
    """Whether nothing is in a folder of this host; False where it can't be looked at."""
    try:
        with os.scandir(folder) as entries:
            return next(entries, None) is None
    except OSError:
        return False


def fill(folder: str, mounts: Iterable[Mount], path: str) -> bool:
    """Fills a folder with what a snapshot has at `path`, where the folder is empty; False where nothing was done.

    Two containers that want to fill one volume at once don't meet: the second finds it filled.
    """
    if os.geteuid() != 0:
        if not is_empty(folder):
            return False
        from wherry.client import filler

        return filler.run(folder, mounts, path)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if not is_empty(folder):
            return False
        # with the image's own ids: what a user namespace makes of them is the business of the volume's mount
        plain = [item._replace(options=tuple(o for o in item.options if not o.startswith(MAPS))) for item in mounts]
        with Root.of_mounts(plain) as root:
            try:
                place = root.open(posixpath.normpath(path), os.O_PATH | os.O_DIRECTORY)
            except NotFound:
                return False
            try:
                copy_tree(f"/proc/self/fd/{place}/.", folder)
            except OSError as error:
                raise FailedPrecondition(f"{path}: {error.strerror or error}") from error
            finally:
                os.close(place)
        return True
    finally:
        os.close(descriptor)
