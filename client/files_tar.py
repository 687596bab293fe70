"""Archives of a container's files, made and unpacked by descriptors: for `wherry.client.files.Root`.

From a folder's descriptor on, names are single ones and no link is followed, so what somebody changes meanwhile leads
nowhere else. Owners are numbers, as the container has them.
"""

from __future__ import annotations

import os
import posixpath
import shutil
import stat
import tarfile
from typing import IO, TYPE_CHECKING

from wherry.core.errors import FailedPrecondition, InvalidArgument, NotFound

if TYPE_CHECKING:
    from wherry.client.files import Ids, Root

_PLACE = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_BUFFER = 1 << 16
_KINDS = (
    (stat.S_ISREG, tarfile.REGTYPE),
    (stat.S_ISDIR, tarfile.DIRTYPE),
    (stat.S_ISLNK, tarfile.SYMTYPE),
    (stat.S_ISFIFO, tarfile.FIFOTYPE),
    (stat.S_ISCHR, tarfile.CHRTYPE),
    (stat.S_ISBLK, tarfile.BLKTYPE),
)


class Packer:
    """Writes one archive."""

    def __init__(self, out: IO[bytes], ids: Ids) -> None:
        self._archive = tarfile.open(fileobj=out, mode="w|", format=tarfile.PAX_FORMAT, bufsize=_BUFFER)  # noqa: SIM115
        self._ids = ids
        self._links: dict[tuple[int, int], str] = {}
        self._device: int | None = None

    def pack(self, place: int, name: str, *, one: bool) -> None:
        """What is at an O_PATH descriptor, which is closed; `one`: nothing of other file systems below it."""
        self._device = os.fstat(place).st_dev if one else None
        with self._archive:
            self._add(place, name)

    def _add(self, place: int, name: str) -> None:
        try:
            info = os.fstat(place)
            member = self._member(place, info, name)
            if member is None:
                # a socket: nobody listens on a copy
                return
            if member.isreg():
                with open(f"/proc/self/fd/{place}", "rb") as file:
                    member.size = os.fstat(file.fileno()).st_size
                    self._archive.addfile(member, file)
                return
            self._archive.addfile(member)
            if member.isdir() and self._device in {None, info.st_dev}:
                self._add_folder(place, name)
        finally:
            os.close(place)

    def _add_folder(self, place: int, name: str) -> None:
        folder = os.open(f"/proc/self/fd/{place}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for entry in sorted(os.listdir(folder)):
                try:
                    below = os.open(entry, _PLACE, dir_fd=folder)
                except FileNotFoundError:
                    # gone since its folder was read: somebody works there
                    continue
                self._add(below, posixpath.join(name, entry))
        finally:
            os.close(folder)

    def _member(self, place: int, info: os.stat_result, name: str) -> tarfile.TarInfo | None:
        kind = next((kind for test, kind in _KINDS if test(info.st_mode)), None)
        if kind is None:
            return None
        member = tarfile.TarInfo(name)
        member.type, member.mode, member.mtime = kind, stat.S_IMODE(info.st_mode), info.st_mtime
        member.uid, member.gid = self._ids.to_container(info.st_uid, info.st_gid)
        if kind == tarfile.SYMTYPE:
            member.linkname = os.readlink("", dir_fd=place)
        elif kind in {tarfile.CHRTYPE, tarfile.BLKTYPE}:
            member.devmajor, member.devminor = os.major(info.st_rdev), os.minor(info.st_rdev)
        elif kind == tarfile.REGTYPE and info.st_nlink > 1:
            first = self._links.setdefault((info.st_dev, info.st_ino), name)
            if first != name:
                member.type, member.linkname = tarfile.LNKTYPE, first
        return member


class Unpacker:
    """Unpacks one archive into a folder of a container."""

    def __init__(self, root: Root, ids: Ids, folder: str) -> None:
        self._root, self._ids, self._folder = root, ids, folder
        # a folder's time changes with what is put into it
        self._times: list[tuple[str, float]] = []

    def unpack(self, source: IO[bytes]) -> None:
        """All of it; raises InvalidArgument for what is no archive, FailedPrecondition."""
        try:
            with tarfile.open(fileobj=source, mode="r|*", bufsize=_BUFFER) as archive:
                for member in archive:
                    self._extract(archive, member)
        except tarfile.TarError as error:
            raise InvalidArgument(f"not a tar archive that can be read: {error}") from None
        except OSError as error:
            raise FailedPrecondition(f"{error.filename or self._folder}: {error.strerror or error}") from error
        # what follows the archive's end is read, or who sends it sees a broken pipe
        while source.read(_BUFFER):
            pass
        for path, mtime in reversed(self._times):
            place = self._root.open(path, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.utime(place, (mtime, mtime))
            finally:
                os.close(place)

    def _extract(self, archive: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        path = posixpath.normpath(posixpath.join(self._folder, member.name.lstrip("/")))
        above, name = posixpath.split(path)
        if not name or path == posixpath.normpath(self._folder):
            return
        self._root.make_folders(above)
        parent = self._root.open(above, os.O_RDONLY | os.O_DIRECTORY)
        try:
            if self._keep(parent, name, path, member):
                return
            self._make(archive, member, parent, name)
            if not member.islnk():
                self._look(parent, name, member)
                if member.isdir():
                    self._times.append((path, member.mtime))
        finally:
            os.close(parent)

    def _keep(self, parent: int, name: str, path: str, member: tarfile.TarInfo) -> bool:
        """Whether a folder is there that keeps what is in it and how it is; another file is taken away."""
        try:
            there = os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode
        except FileNotFoundError:
            return False
        if member.isdir():
            if stat.S_ISDIR(there) or (stat.S_ISLNK(there) and self._leads_to_folder(path)):
                return True
            raise FailedPrecondition(f"cannot overwrite {path}, no directory, with a directory")
        if stat.S_ISDIR(there):
            raise FailedPrecondition(f"cannot overwrite directory {path} with a file")
        os.unlink(name, dir_fd=parent)
        return False

    def _leads_to_folder(self, path: str) -> bool:
        try:
            return self._root.stat(path, follow=True).is_dir
        except NotFound:
            return False

    def _make(self, archive: tarfile.TarFile, member: tarfile.TarInfo, parent: int, name: str) -> None:
        if member.isdir():
            os.mkdir(name, 0o700, dir_fd=parent)
        elif member.issym():
            os.symlink(member.linkname, name, dir_fd=parent)
        elif member.islnk():
            target = self._root.open(posixpath.join(self._folder, member.linkname.lstrip("/")), _PLACE)
            try:
                os.link(f"/proc/self/fd/{target}", name, dst_dir_fd=parent, follow_symlinks=True)
            finally:
                os.close(target)
        elif member.isreg():
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            data = archive.extractfile(member)
            with os.fdopen(os.open(name, flags, 0o600, dir_fd=parent), "wb") as file:
                if data is not None:
                    shutil.copyfileobj(data, file, 1 << 20)
        elif member.isfifo():
            os.mkfifo(name, 0o600, dir_fd=parent)
        elif member.isdev():
            kind = stat.S_IFCHR if member.ischr() else stat.S_IFBLK
            os.mknod(name, kind | 0o600, os.makedev(member.devmajor, member.devminor), dir_fd=parent)
        else:
            raise InvalidArgument(f"{member.name}: a kind of archive member that isn't known here")

    def _look(self, parent: int, name: str, member: tarfile.TarInfo) -> None:
        """Owner, mode and time; in this order, for a change of the owner takes set-user-ID away."""
        os.chown(name, *self._ids.to_host(member.uid, member.gid), dir_fd=parent, follow_symlinks=False)
        if not member.issym():
            place = os.open(name, _PLACE, dir_fd=parent)
            try:
                os.chmod(f"/proc/self/fd/{place}", stat.S_IMODE(member.mode))
            finally:
                os.close(place)
        os.utime(name, (member.mtime, member.mtime), dir_fd=parent, follow_symlinks=False)
