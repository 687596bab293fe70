"""Files of containers by the worker that enters their roots (`wherry.client.files_worker`): archives in and out.

Volumes are filled by it, too. These calls block; they need root and a daemon on this host.
"""

from __future__ import annotations

import fcntl
import json
import os
import posixpath
import stat
import subprocess
import sys
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from wherry.core.errors import FailedPrecondition, InvalidArgument, NotFound, WherryError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from wherry.client.api import Client
    from wherry.client.containers import Container
    from wherry.client.values import Mount

_MISSING, _NO_FOLDER = 3, 4
# options of a snapshot's mounts that give its files other owners (linux/idmapped.py)
_MAPS = ("uidmap=", "gidmap=")


class Place(NamedTuple):
    """A root to work in: a running container's (`pid`), or its snapshot's mounts with binds of the host on top."""

    pid: int = 0
    mounts: Sequence[Mount] = ()
    binds: Sequence[tuple[str, str]] = ()

    def job(self, operation: str, path: str, **more: Any) -> dict[str, Any]:
        """What the worker is told."""
        mounts = [{"type": item.type, "source": item.source, "options": list(item.options)} for item in self.mounts]
        return {"op": operation, "path": path, "pid": self.pid, "mounts": mounts, "binds": list(self.binds), **more}


class Entry(NamedTuple):
    """A file in a container; `mode` is `st_mode`, `link` where a symbolic link points to."""

    name: str
    size: int
    mode: int
    mtime: float
    link: str

    @property
    def is_dir(self) -> bool:
        """Whether it is a folder (and no link to one)."""
        return stat.S_ISDIR(self.mode)


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


def stat_path(place: Place, path: str, *, follow: bool = False) -> Entry:
    """What is at a path; raises NotFound."""
    done = subprocess.run(_command(place.job("stat", path, follow=follow)), capture_output=True, check=False)
    _check(done.returncode, done.stderr, path)
    found = json.loads(done.stdout)
    return Entry(found["name"], found["size"], found["mode"], found["mtime"], found["link"])


@contextmanager
def packed(place: Place, path: str, *, follow: bool = False, one_filesystem: bool = False) -> Iterator[IO[bytes]]:
    """A tar archive of a path, to be read in the block. Raises NotFound (at its end).

    With `one_filesystem` nothing is in it of what is mounted below the path.
    """
    command = _command(place.job("pack", path, follow=follow, one_filesystem=one_filesystem))
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        if process.stdout is None or process.stderr is None:
            raise WherryError("the worker that reads files has no output")
        try:
            yield process.stdout
        except BaseException:
            process.kill()
            raise
        process.stdout.close()
        errors = process.stderr.read()
        _check(process.wait(), errors, path)


def unpack(place: Place, path: str, archive: IO[bytes], *, owner: tuple[int, int] | None = None) -> None:
    """Unpacks a tar archive into a folder of a container; raises NotFound, InvalidArgument, FailedPrecondition.

    `archive` must have a descriptor.
    """
    command = _command(place.job("unpack", path, owner=owner))
    done = subprocess.run(command, stdin=archive, stderr=subprocess.PIPE, check=False)
    _check(done.returncode, done.stderr, path)


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
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if not is_empty(folder):
            return False
        # with the image's own ids: what a user namespace makes of them is the volume's mount's business
        plain = [item._replace(options=tuple(o for o in item.options if not o.startswith(_MAPS))) for item in mounts]
        command = _command(Place(mounts=plain).job("copy", posixpath.normpath(path), target=folder))
        done = subprocess.run(command, capture_output=True, check=False)
        if done.returncode == _MISSING:
            return False
        _check(done.returncode, done.stderr, path)
        return True
    finally:
        os.close(descriptor)


def _command(job: dict[str, Any]) -> list[str]:
    return [sys.executable, "-I", "-m", "wherry.client.files_worker", json.dumps(job)]


def _check(code: int, errors: bytes, path: str) -> None:
    if code == _MISSING:
        raise NotFound(f"could not find the file {path} in the container")
    if code == _NO_FOLDER:
        raise InvalidArgument(f"{path} in the container is not a directory")
    if code:
        lines = errors.decode(errors="replace").strip().splitlines()
        raise FailedPrecondition(f"{path}: {lines[-1] if lines else f'the worker ended with code {code}'}")
