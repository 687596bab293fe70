"""The process that looks into a container's files, started by exec for one job each.

    python -I -m wherry.client.files_worker '{"op": "pack", "pid": 4711, "path": "/etc"}'

The container is the one that runs with `pid`, or `mounts`: the mounts of its root, with `binds` (source and
destination) on top, mounted in a mount namespace of this process' own. Everything but `copy` happens after chroot(2)
into that root, so that no symbolic link leads out of it, whoever changes it meanwhile; nothing is imported and no name
of a user looked up from then on (what lies in the root must not become code here). Operations:

- `stat`: a line of JSON about `path` on stdout
- `pack`: a tar archive of `path`, under its last name, on stdout
- `unpack`: a tar archive on stdin, into the folder `path`
- `copy`: everything in the folder `path` into the folder `target` of the host; the root's own files can't change then

Exit codes: 0; 3 where `path` isn't there; 4 where it isn't a folder; 1 for errors, said on stderr.
"""

from __future__ import annotations

# bz2, gzip, lzma: tarfile loads them when it meets such an archive, which would be from the container's root
import bz2  # noqa: F401
import gzip  # noqa: F401
import json
import lzma  # noqa: F401
import os
import posixpath
import stat
import sys
import tarfile
import tempfile
from typing import Any, BinaryIO

from wherry.linux import syscalls as sc
from wherry.linux.copying import copy_tree
from wherry.linux.mounts import Mount, mount_all

MISSING, NO_FOLDER = 3, 4


def _root(job: dict[str, Any]) -> int:
    """The container's root as a descriptor."""
    if job.get("pid"):
        return os.open(f"/proc/{int(job['pid'])}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    sc.unshare(sc.CLONE_NEWNS)
    sc.mount("none", "/", "", sc.MS_REC | sc.MS_PRIVATE)
    folder = tempfile.mkdtemp(prefix="wherry-files-")
    # the mounts go with this process; the folder under them must be gone before, and can be when it is entered
    mount_all([Mount(item["type"], item["source"], "", item["options"]) for item in job["mounts"]], folder)
    root = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    for source, destination in job.get("binds") or ():
        try:
            place = sc.openat2(root, destination, os.O_PATH, resolve=sc.RESOLVE_IN_ROOT)
        except OSError:
            # made when the container starts
            continue
        sc.mount(source, f"/proc/self/fd/{place}", "", sc.MS_BIND | sc.MS_REC)
        os.close(place)
    return root


def _enter(root: int) -> None:
    """From here on paths are the container's."""
    os.fchdir(root)
    os.chroot(".")
    os.chdir("/")


def _forget_people() -> None:
    """Names of users come from the host's or the container's files, by code that glibc loads: numbers do."""
    for name in ("pwd", "grp"):
        setattr(tarfile, name, None)


def _describe(path: str, *, follow: bool) -> dict[str, Any]:
    info = os.stat(path) if follow else os.lstat(path)
    target = os.readlink(path) if stat.S_ISLNK(info.st_mode) else ""
    return {
        "name": posixpath.basename(path.rstrip("/")) or "/",
        "size": info.st_size,
        "mode": info.st_mode,
        "mtime": info.st_mtime,
        "uid": info.st_uid,
        "gid": info.st_gid,
        "link": target,
    }


def _pack(path: str, out: BinaryIO, *, one_filesystem: bool) -> None:
    name = posixpath.basename(posixpath.normpath(path)) or "."
    device = os.lstat(path).st_dev if one_filesystem else None
    with tarfile.open(fileobj=out, mode="w|", format=tarfile.PAX_FORMAT, bufsize=1 << 16) as archive:
        _add(archive, path, name, device)


def _add(archive: tarfile.TarFile, path: str, name: str, device: int | None) -> None:
    """One path with what is below it; what is mounted there too, unless a device is named that holds all."""
    try:
        member = archive.gettarinfo(path, name)
    except FileNotFoundError:
        # gone since its folder was read: somebody works there
        return
    if member is None:
        # a socket: nobody listens on a copy
        return
    member.uname = member.gname = ""
    if member.isreg():
        # one that goes in this moment is an error: its name and size are told by then
        with open(path, "rb") as file:
            archive.addfile(member, file)
        return
    archive.addfile(member)
    if member.isdir() and (device is None or os.lstat(path).st_dev == device):
        for entry in sorted(os.listdir(path)):
            _add(archive, posixpath.join(path, entry), posixpath.join(name, entry), device)


def _unpack(path: str, source: BinaryIO, job: dict[str, Any]) -> None:
    with tarfile.open(fileobj=source, mode="r|*", bufsize=1 << 16) as archive:
        for member in archive:
            if job.get("owner"):
                member.uid, member.gid = job["owner"]
            member.uname = member.gname = ""
            _extract(archive, member, path)
    # what follows the archive's end is read, or who sends it sees a broken pipe
    while source.read(1 << 16):
        pass


def _extract(archive: tarfile.TarFile, member: tarfile.TarInfo, path: str) -> None:
    place = posixpath.join(path, member.name.lstrip("/"))
    if member.isdir() and os.path.isdir(place):
        # a folder that is there keeps what is in it and how it is
        return
    if not member.isdir() and os.path.isdir(place) and not os.path.islink(place):
        raise OSError(f"cannot overwrite directory {place} with a file")
    if member.isdir() and os.path.lexists(place):
        raise OSError(f"cannot overwrite {place}, no directory, with a directory")
    if os.path.lexists(place) and not member.isdir():
        os.unlink(place)
    archive.extract(member, path, numeric_owner=True, filter="fully_trusted")


def _copy(root: int, path: str, target: str) -> int:
    try:
        found = sc.openat2(root, path, os.O_PATH | os.O_DIRECTORY, resolve=sc.RESOLVE_IN_ROOT)
    except (FileNotFoundError, NotADirectoryError):
        return MISSING
    copy_tree(f"/proc/self/fd/{found}/.", target)
    return 0


def main(argv: list[str] | None = None) -> int:
    """One job."""
    job: dict[str, Any] = json.loads((argv or sys.argv[1:])[0])
    try:
        return _work(job)
    except OSError as error:
        name = f": {error.filename}" if error.filename else ""
        sys.stderr.write(f"{error.strerror or error}{name}\n")
    except tarfile.TarError as error:
        sys.stderr.write(f"not a tar archive that can be read: {error}\n")
    return 1


def _work(job: dict[str, Any]) -> int:
    root, path = _root(job), str(job["path"])
    if job["op"] == "copy":
        return _copy(root, path, job["target"])
    _forget_people()
    _enter(root)
    try:
        info = _describe(path, follow=bool(job.get("follow")))
    except (FileNotFoundError, NotADirectoryError):
        return MISSING
    if job["op"] == "stat":
        sys.stdout.write(json.dumps(info) + "\n")
        sys.stdout.flush()
    elif job["op"] == "pack":
        place = os.path.realpath(path) if job.get("follow") else path
        _pack(place, sys.stdout.buffer, one_filesystem=bool(job.get("one_filesystem")))
        sys.stdout.buffer.flush()
    else:
        if not os.path.isdir(path):
            return NO_FOLDER
        _unpack(path, sys.stdin.buffer, job)
    return 0


if __name__ == "__main__":
    sys.exit(main())
