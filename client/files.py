"""Files of a container, by the file system as its processes see it: for `wherry cp` and for programs.

The way in is the root of a process: a running container's first one, or one that holds the snapshot of a container that
doesn't run (`Root.of_mounts`, wherry.client.mounts_holder). Every path is resolved below it by the kernel (openat2(2),
RESOLVE_IN_ROOT): a link in the container leads to where the container's own processes would get, never out of it, also
while somebody changes links under our feet. Owners are told and given as the container numbers them, also where it has
a user namespace. Needs a daemon on this host and the right to look into its containers. These are blocking calls:
programs with asyncio run them in a thread.
"""

from __future__ import annotations

import contextlib
import json
import os
import posixpath
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import IO, TYPE_CHECKING, Self

from wherry.core.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound, PermissionDenied
from wherry.core.tuples import NamedTuple
from wherry.linux import syscalls

if TYPE_CHECKING:
    from types import TracebackType

    from wherry.client.values import Mount

_STEP = 1 << 20
_RESOLVE = syscalls.RESOLVE_IN_ROOT | syscalls.RESOLVE_NO_MAGICLINKS
_FOLDER = os.O_RDONLY | os.O_DIRECTORY
_IDENTITY = ((0, 0, 0xFFFFFFFF),)
# options of a snapshot's mounts that give its files other owners (linux/idmapped.py)
MAPS = ("uidmap=", "gidmap=")


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


class Ids:
    """Which ids of the host a container's ids are: ranges of (inside, outside, how many)."""

    def __init__(self, uids: Sequence[Sequence[int]] = _IDENTITY, gids: Sequence[Sequence[int]] = _IDENTITY) -> None:
        self._uids, self._gids = uids, gids

    @classmethod
    def of_process(cls, pid: int) -> Ids:
        """Those of a process' user namespace, as we see them; our own where it is gone."""
        found = []
        for name in ("uid_map", "gid_map"):
            try:
                with open(f"/proc/{pid}/{name}", encoding="ascii") as file:
                    found.append([[int(word) for word in line.split()] for line in file])
            except OSError:
                return cls()
        return cls(*found)

    @classmethod
    def of_mounts(cls, mounts: Sequence[Mount]) -> Ids:
        """Those with which a snapshot's files are shown."""
        options = dict(option.partition("=")[::2] for mount in mounts for option in mount.options)
        found = [options.get(name.rstrip("=")) for name in MAPS]
        if not all(found):
            return cls()
        return cls(*([[int(word) for word in item.split(":")] for item in str(text).split(",")] for text in found))

    def to_host(self, uid: int, gid: int) -> tuple[int, int]:
        """Raises InvalidArgument for an id that the container hasn't got."""
        return _mapped(self._uids, uid, "user"), _mapped(self._gids, gid, "group")

    def to_container(self, uid: int, gid: int) -> tuple[int, int]:
        """The kernel's overflow id for one that the container hasn't got."""
        return _unmapped(self._uids, uid), _unmapped(self._gids, gid)


def _mapped(ranges: Sequence[Sequence[int]], number: int, kind: str) -> int:
    for inside, outside, count in ranges:
        if inside <= number < inside + count:
            return outside + number - inside
    raise InvalidArgument(f"{kind} {number} isn't there in the container's user namespace")


def _unmapped(ranges: Sequence[Sequence[int]], number: int) -> int:
    for inside, outside, count in ranges:
        if outside <= number < outside + count:
            return inside + number - outside
    return 65534


class Root:
    """The root of a container, held open: `with Root(pid) as root: root.read("/etc/hostname")`."""

    def __init__(self, pid: int, ids: Ids | None = None) -> None:
        """`pid` is the container's first process. Raises NotFound, PermissionDenied."""
        try:
            self._fd = os.open(f"/proc/{pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except PermissionError:
            raise PermissionDenied(f"no permission to look into the files of process {pid}") from None
        except OSError:
            raise NotFound(f"process {pid} is gone") from None
        self._ids = ids or Ids.of_process(pid)

    @classmethod
    @contextlib.contextmanager
    def of_mounts(cls, mounts: Sequence[Mount], binds: Sequence[tuple[str, str]] = ()) -> Iterator[Self]:
        """The files that a snapshot's mounts show, with folders of the host (source, place) on top.

        Raises FailedPrecondition where they can't be mounted.
        """
        plain = [{"type": item.type, "source": item.source, "options": list(item.options)} for item in mounts]
        command = [
            sys.executable,
            "-I",
            "-m",
            "wherry.client.mounts_holder",
            json.dumps({"mounts": plain, "binds": binds}),
        ]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe) as holder:
            if holder.stdout is None or holder.stderr is None or not holder.stdout.readline():
                said = holder.stderr.read().decode(errors="replace").strip() if holder.stderr is not None else ""
                raise FailedPrecondition(
                    f"the container's files can't be mounted: {said or 'the process that does it ended'}"
                )
            with cls(holder.pid, Ids.of_mounts(mounts)) as root:
                yield root

    def close(self) -> None:
        """Lets the root go. May be called twice."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def open(self, path: str, flags: int, mode: int = 0) -> int:
        """A descriptor for a path of the container; raises NotFound, InvalidArgument … for what open(2) says."""
        try:
            return syscalls.openat2(
                self._fd, path.lstrip("/") or ".", flags | os.O_CLOEXEC, mode=mode, resolve=_RESOLVE
            )
        except OSError as error:
            raise _explained(error, path) from error

    def read(self, path: str, limit: int = 0) -> bytes:
        """What is in a file; raises FailedPrecondition where it has more than `limit` bytes (0: no limit)."""
        # a FIFO or a device must not make us wait: only regular files are read
        with self._regular(path, os.O_RDONLY) as file:
            data: bytes = file.read(limit + 1 if limit else -1)
        if limit and len(data) > limit:
            raise FailedPrecondition(f"{path} has more than {limit} bytes")
        return data

    def write(self, path: str, data: bytes, *, mode: int = 0o644, uid: int = 0, gid: int = 0) -> None:
        """Writes a file, making its folders; `uid` and `gid` are the container's, its mode is set even if it exists."""
        parent, name = os.path.split(path.rstrip("/"))
        if not name:
            raise InvalidArgument(f"{path!r} names no file")
        self.make_folders(parent, uid=uid, gid=gid)
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        with self._regular(path, flags, mode) as file:
            file.write(data)
            os.fchown(file.fileno(), *self._ids.to_host(uid, gid))
            os.fchmod(file.fileno(), mode)

    def make_folders(self, path: str, *, uid: int = 0, gid: int = 0) -> None:
        """Makes a folder and those above it, where they aren't there."""
        done = ""
        for part in [part for part in path.split("/") if part]:
            above, done = done or "/", f"{done}/{part}"
            try:
                os.close(self.open(done, os.O_PATH | os.O_DIRECTORY))
            except NotFound:
                parent = self.open(above, _FOLDER)
                try:
                    os.mkdir(part, 0o755, dir_fd=parent)
                    os.chown(part, *self._ids.to_host(uid, gid), dir_fd=parent, follow_symlinks=False)
                except FileExistsError:
                    raise FailedPrecondition(f"{done} is a link that leads nowhere") from None
                finally:
                    os.close(parent)

    def exists(self, path: str) -> bool:
        """Whether a path leads to something."""
        try:
            os.close(self.open(path, os.O_PATH))
        except NotFound:
            return False
        return True

    def names(self, path: str) -> list[str]:
        """What is in a folder, sorted."""
        folder = self.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            return sorted(os.listdir(folder))
        finally:
            os.close(folder)

    def stat(self, path: str, *, follow: bool = False) -> Entry:
        """What is at a path; raises NotFound."""
        place = self.open(path, os.O_PATH | (0 if follow else os.O_NOFOLLOW))
        try:
            info = os.fstat(place)
            link = os.readlink("", dir_fd=place) if stat.S_ISLNK(info.st_mode) else ""
        finally:
            os.close(place)
        return Entry(posixpath.basename(path.rstrip("/")) or "/", info.st_size, info.st_mode, info.st_mtime, link)

    def pack(self, path: str, out: IO[bytes], *, follow: bool = False, one_filesystem: bool = False) -> None:
        """Writes a tar archive of a path, under its last name; raises NotFound.

        With `one_filesystem` nothing is in it of what is mounted below the path.
        """
        from wherry.client.files_tar import Packer

        place = self.open(path, os.O_PATH | (0 if follow else os.O_NOFOLLOW))
        Packer(out, self._ids).pack(place, posixpath.basename(posixpath.normpath(path)) or ".", one=one_filesystem)

    def unpack(self, path: str, archive: IO[bytes]) -> None:
        """Unpacks a tar archive into a folder; raises NotFound, InvalidArgument, FailedPrecondition."""
        from wherry.client.files_tar import Unpacker

        if not self.stat(path, follow=True).is_dir:
            raise InvalidArgument(f"{path} in the container is not a directory")
        Unpacker(self, self._ids, path).unpack(archive)

    def fetch(self, path: str, target: str) -> None:
        """Copies a file or a whole folder of the container to `target` on the host, which must not exist.

        Regular files, folders and links are copied, with modes and times; devices, FIFOs and sockets are left out.
        """
        if os.path.lexists(target):
            raise AlreadyExists(f"{target}: already exists")
        place = self.open(path, os.O_PATH)
        try:
            if stat.S_ISDIR(os.fstat(place).st_mode):
                self._fetch_folder(self.open(path, os.O_RDONLY | os.O_DIRECTORY), target)
            else:
                with self._regular(path, os.O_RDONLY) as source:
                    _copy_out(source, target)
        finally:
            os.close(place)

    def _fetch_folder(self, folder: int, target: str) -> None:
        """By descriptors all the way down; a link that appears instead of a folder ends in an error, not outside."""
        try:
            os.mkdir(target, 0o700)
            with os.scandir(folder) as entries:
                found = [(entry.name, entry.stat(follow_symlinks=False).st_mode) for entry in entries]
            for name, mode in found:
                there = os.path.join(target, name)
                if stat.S_ISDIR(mode):
                    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
                    self._fetch_folder(os.open(name, flags, dir_fd=folder), there)
                elif stat.S_ISLNK(mode):
                    os.symlink(os.readlink(name, dir_fd=folder), there)
                elif stat.S_ISREG(mode):
                    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
                    with os.fdopen(os.open(name, flags, dir_fd=folder), "rb") as source:
                        _copy_out(source, there)
            info = os.fstat(folder)
            os.chmod(target, stat.S_IMODE(info.st_mode))
            os.utime(target, ns=(info.st_atime_ns, info.st_mtime_ns))
        finally:
            os.close(folder)

    def store(self, source: str, path: str, *, uid: int = 0, gid: int = 0) -> None:
        """Copies a file or a whole folder of the host to `path` in the container, with modes; owners as said."""
        if not os.path.isdir(source):
            parent = os.path.dirname(path.rstrip("/"))
            self.make_folders(parent, uid=uid, gid=gid)
            self._store_file(source, path, uid, gid)
            return
        self.make_folders(path, uid=uid, gid=gid)
        for folder, folders, names in os.walk(source):
            inside = path if folder == source else os.path.join(path, os.path.relpath(folder, source))
            for name in folders:
                if not os.path.islink(os.path.join(folder, name)):
                    self.make_folders(os.path.join(inside, name), uid=uid, gid=gid)
                else:
                    names.append(name)
            for name in names:
                self._store_file(os.path.join(folder, name), os.path.join(inside, name), uid, gid)

    def _store_file(self, source: str, path: str, uid: int, gid: int) -> None:
        info = os.lstat(source)
        if stat.S_ISLNK(info.st_mode):
            parent = self.open(os.path.dirname(path) or "/", os.O_RDONLY | os.O_DIRECTORY)
            try:
                name = os.path.basename(path)
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=parent)
                os.symlink(os.readlink(source), name, dir_fd=parent)
                os.chown(name, *self._ids.to_host(uid, gid), dir_fd=parent, follow_symlinks=False)
            finally:
                os.close(parent)
        elif stat.S_ISREG(info.st_mode):
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
            with open(source, "rb") as old, self._regular(path, flags, 0o600) as new:
                shutil.copyfileobj(old, new, _STEP)
                os.fchown(new.fileno(), *self._ids.to_host(uid, gid))
                os.fchmod(new.fileno(), stat.S_IMODE(info.st_mode))

    def _regular(self, path: str, flags: int, mode: int = 0) -> IO[bytes]:
        """A regular file as a Python file."""
        descriptor = self.open(path, flags | os.O_NONBLOCK, mode)
        kind = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(kind):
            os.close(descriptor)
            raise InvalidArgument(f"{path} is {'a folder' if stat.S_ISDIR(kind) else 'no regular file'}")
        return os.fdopen(descriptor, "wb" if flags & os.O_WRONLY else "rb")


def _copy_out(source: IO[bytes], target: str) -> None:
    """An open file to a new one on the host, with mode and times."""
    info = os.fstat(source.fileno())
    with open(target, "xb") as new:
        shutil.copyfileobj(source, new, _STEP)
        os.fchmod(new.fileno(), stat.S_IMODE(info.st_mode) & 0o777)
    os.utime(target, ns=(info.st_atime_ns, info.st_mtime_ns))


def _explained(error: OSError, path: str) -> Exception:
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return NotFound(f"could not find the file {path} in the container")
    if isinstance(error, PermissionError):
        return PermissionDenied(f"{path}: {error.strerror}")
    return InvalidArgument(f"{path}: {error.strerror}")
