"""Applying a layer: the members of an archive become files below the working directory, which is the process's root.

The caller has entered the root (`roots.enter`), so no name, link or whiteout of the archive leads out of it. The rules
are the OCI image specification's (layer.md: "Applying Changesets", "Whiteouts") and where it is silent containerd's:
parents are resolved through links, what stands in the way is replaced, entries for the root itself are ignored.

Files are made with the fewest calls: openat, write, utimensat, close for the usual file of root's. Owner and mode need
calls of their own only when they are not what creation gives.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress

from wherry.core.errors import FailedPrecondition, InvalidArgument
from wherry.snapshotter import tar
from wherry.snapshotter.below import ROOT, adopt, copy_up, is_below
from wherry.snapshotter.limits import too_many
from wherry.snapshotter.roots import Root
from wherry.snapshotter.tar import Member, TarReader

WHITEOUT = b".wh."
OPAQUE = b".wh..wh..opq"
AUFS = b".wh..wh."
"""Names by which the aufs storage driver kept its own records; they are no files of the image."""

_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
_SPECIAL_BITS = 0o7000
_OPEN_DIRECTORIES = 128
_LINK_DEPTH = 40
"""As many links as the kernel follows in one path (path_resolution(7))."""
_OVERLAYS_OWN = ("trusted.overlay.", "user.overlay.")
"""Attributes by which overlay keeps its records: from an archive they would redirect it."""
_LAST_TIME = (1 << 63) - 1


class LayerApplier:
    """Applies one archive. Needs umask 0 and, for anything but the caller's own files, root's capabilities.

    Errors: InvalidArgument for what an archive must not say; OSError from the file system, with the member's name.
    """

    def __init__(self, reader: TarReader, root: Root, *, limit: int = 0) -> None:
        """`limit`: how many members there may be; 0: as many as there are."""
        self._reader = reader
        self._limit = limit
        self._root = root
        self._directories: dict[bytes, int] = {}
        self._stale: list[int] = []
        self._last: bytes | None = None
        self._last_fd = -1
        self._times: dict[bytes, tuple[int, int]] = {}
        self._implied: dict[bytes, None] = {}
        self._whiteouts: set[bytes] = set()
        # what this archive made: needed where whiteouts may meet files that were there before
        self._made: set[bytes] | None = None if root.fresh else set()
        # creation alone doesn't give the right owner and mode where directories pass on theirs
        self._exact = not root.fresh or bool(os.stat(".").st_mode & stat.S_ISGID)
        self._uid, self._gid = os.geteuid(), os.getegid()

    @property
    def implied(self) -> list[bytes]:
        """Directories that were made because a member needed them, and that no member named."""
        return list(self._implied)

    def run(self) -> int:
        """Apply all members and return their count."""
        count = 0
        stop = self._limit + 1 if self._limit else -1
        reader = self._reader
        try:
            for member in reader:
                count += 1
                if count == stop:
                    raise too_many(f"the layer has {count} entries or more", self._limit, "layer_entries")
                name = member.name
                if self._root.one_id:
                    member.uid, member.gid = self._uid, self._gid
                try:
                    self._apply(member, name if is_clean(name) else clean(name))
                except OSError as error:
                    raise self._explained(error, member) from error
            self._finish()
        finally:
            self._forget_directories()
            self._close_stale()
        return count

    def _explained(self, error: OSError, member: Member) -> Exception:
        if error.errno == errno.EINVAL and self._root.user_namespace and (member.uid or member.gid):
            # chown(2): an id that the namespace doesn't know
            return FailedPrecondition(
                f"{_text(member.name)} belongs to {member.uid}:{member.gid}, an id that this user wasn't granted: see "
                "/etc/subuid and /etc/subgid (wherry doctor): failed precondition"
            )
        return _named(error, member)

    def _apply(self, member: Member, name: bytes) -> None:
        if self._stale:
            self._close_stale()
        if name.endswith(b"/"):
            name = name[:-1]
        if not name:
            return
        parent, _, base = name.rpartition(b"/")
        if base.startswith(WHITEOUT):
            self._whiteout(parent, base)
            return
        if parent.startswith(AUFS):
            return
        fd = self._last_fd if parent == self._last else self._directory(parent)
        if self._made is not None:
            self._made.add(name)
        kind = member.type
        if kind == tar.REGULAR:
            self._regular(member, name, fd, base)
        elif kind == tar.DIRECTORY:
            self._make_directory(member, name, fd, base)
        elif kind == tar.SYMLINK:
            self._symlink(member, name, fd, base)
        elif kind == tar.LINK:
            self._link(member, name, fd, base)
        elif kind in {tar.CHARACTER, tar.BLOCK_DEVICE, tar.FIFO}:
            self._node(member, name, fd, base)
        else:
            raise InvalidArgument(f"unhandled tar header type {kind[0]} for {_text(name)}: invalid argument")

    # one member

    def _regular(self, member: Member, name: bytes, fd: int, base: bytes) -> None:
        mode = member.mode & 0o7777
        try:
            out = os.open(base, _CREATE, mode & 0o777, dir_fd=fd)
        except FileExistsError:
            self._clear(name)
            out = os.open(base, _CREATE, mode & 0o777, dir_fd=fd)
        try:
            if member.extents is not None:
                self._sparse(member, out)
            elif member.size:
                self._reader.copy_to(out)
            if self._exact or member.uid != self._uid or member.gid != self._gid:
                os.fchown(out, member.uid, member.gid)
            if self._exact or mode & _SPECIAL_BITS:
                os.fchmod(out, mode)
            if member.xattrs:
                self._xattrs(out, member.xattrs)
            os.utime(out, ns=_times(member))
        finally:
            os.close(out)

    def _sparse(self, member: Member, out: int) -> None:
        for offset, length in member.extents or ():
            os.lseek(out, offset, os.SEEK_SET)
            left = length
            while left:
                data = self._reader.read(min(left, 1 << 20))
                if not data:
                    raise InvalidArgument(f"the archive is cut short in {_text(member.name)}: invalid argument")
                left -= len(data)
                while data:
                    data = data[os.write(out, data) :]
        os.ftruncate(out, member.size)

    def _make_directory(self, member: Member, name: bytes, fd: int, base: bytes) -> None:
        mode = member.mode & 0o7777
        existed = False
        try:
            os.mkdir(base, mode & 0o777, dir_fd=fd)
        except FileExistsError:
            existed = stat.S_ISDIR(os.stat(base, dir_fd=fd, follow_symlinks=False).st_mode)
            if not existed:
                self._clear(name)
                os.mkdir(base, mode & 0o777, dir_fd=fd)
        self._implied.pop(name, None)
        exact = self._exact or existed
        if exact or member.uid != self._uid or member.gid != self._gid:
            os.chown(base, member.uid, member.gid, dir_fd=fd, follow_symlinks=False)
        if exact or mode & _SPECIAL_BITS:
            os.chmod(base, mode, dir_fd=fd)
            self._exact = self._exact or bool(mode & stat.S_ISGID)
        if name in self._whiteouts:
            # what the layers below have here was taken away before this directory took its place
            os.setxattr(name, self._root.opaque, b"y")
        if member.xattrs:
            self._xattrs(name, member.xattrs)
        self._times[name] = _times(member)

    def _symlink(self, member: Member, name: bytes, fd: int, base: bytes) -> None:
        if not member.link:
            raise InvalidArgument(f"the symbolic link {_text(name)} has no target: invalid argument")
        try:
            os.symlink(member.link, base, dir_fd=fd)
        except FileExistsError:
            self._clear(name)
            os.symlink(member.link, base, dir_fd=fd)
        if self._exact or member.uid != self._uid or member.gid != self._gid:
            os.chown(base, member.uid, member.gid, dir_fd=fd, follow_symlinks=False)
        if member.xattrs:
            self._xattrs(name, member.xattrs)
        os.utime(base, ns=_times(member), dir_fd=fd, follow_symlinks=False)

    def _link(self, member: Member, name: bytes, fd: int, base: bytes) -> None:
        target = clean(member.link)
        parent, _, target_base = target.rpartition(b"/")
        if not target_base or target == name:
            raise InvalidArgument(f"the hard link {_text(name)} points to {_text(member.link)}: invalid argument")
        try:
            self._hard_link(parent, target_base, fd, base)
        except FileExistsError:
            self._clear(name)
            self._hard_link(parent, target_base, fd, base)
        except (FileNotFoundError, NotADirectoryError):
            if not is_below(self._root.layers, target):
                raise InvalidArgument(
                    f"the hard link {_text(name)} points to {_text(member.link)}, which isn't there: invalid argument"
                ) from None
            self._directory(parent)
            copy_up(self._root.layers, target)
            self._hard_link(parent, target_base, fd, base)
        # one inode: its owner and mode were set by the member that it was made for, and setting the owner again
        # would take its capabilities away
        status = os.stat(base, dir_fd=fd, follow_symlinks=False)
        if (status.st_uid, status.st_gid) != (member.uid, member.gid):
            os.chown(base, member.uid, member.gid, dir_fd=fd, follow_symlinks=False)
        if not stat.S_ISLNK(status.st_mode) and status.st_mode & 0o7777 != member.mode & 0o7777:
            os.chmod(base, member.mode & 0o7777, dir_fd=fd)
        os.utime(base, ns=_times(member), dir_fd=fd, follow_symlinks=False)

    def _hard_link(self, parent: bytes, target: bytes, fd: int, base: bytes) -> None:
        target_fd = self._directory(parent, create=False)
        os.link(target, base, src_dir_fd=target_fd, dst_dir_fd=fd, follow_symlinks=False)

    def _node(self, member: Member, name: bytes, fd: int, base: bytes) -> None:
        kinds = {tar.CHARACTER: stat.S_IFCHR, tar.BLOCK_DEVICE: stat.S_IFBLK, tar.FIFO: stat.S_IFIFO}
        mode = kinds[member.type] | member.mode & 0o777
        device = 0 if member.type == tar.FIFO else os.makedev(member.major, member.minor)
        try:
            try:
                os.mknod(base, mode, device, dir_fd=fd)
            except FileExistsError:
                self._clear(name)
                os.mknod(base, mode, device, dir_fd=fd)
        except PermissionError:
            if member.type == tar.FIFO or not self._root.user_namespace:
                raise
            return  # devices can't be made in a user namespace; containerd leaves them out there, too
        os.chown(base, member.uid, member.gid, dir_fd=fd, follow_symlinks=False)
        os.chmod(base, member.mode & 0o7777, dir_fd=fd)
        if member.xattrs:
            self._xattrs(name, member.xattrs)
        os.utime(base, ns=_times(member), dir_fd=fd, follow_symlinks=False)

    def _xattrs(self, target: int | bytes, xattrs: dict[str, bytes]) -> None:
        for key, value in xattrs.items():
            if key.startswith(_OVERLAYS_OWN):
                continue
            try:
                if isinstance(target, int):
                    os.setxattr(target, key, value)
                else:
                    os.setxattr(target, key, value, follow_symlinks=False)
            except OSError as error:
                # a file system without them: containerd goes on too; `trusted.` is for the host's root alone
                if error.errno != errno.ENOTSUP and not (error.errno == errno.EPERM and self._root.user_namespace):
                    raise
            if key == "system.posix_acl_default":
                self._exact = True

    # directories

    def _directory(self, path: bytes, *, create: bool = True) -> int:
        """A descriptor of a parent directory, links on the way followed; made where it isn't there."""
        fd = self._directories.get(path)
        if fd is None:
            try:
                fd = os.open(path or b".", _DIRECTORY)
            except (FileNotFoundError, NotADirectoryError):
                if not create:
                    raise
                self._make_parents(path, _LINK_DEPTH)
                fd = os.open(path, _DIRECTORY)
            if len(self._directories) >= _OPEN_DIRECTORIES:
                self._forget_directories()
            self._directories[path] = fd
        self._last, self._last_fd = path, fd
        return fd

    def _forget_directories(self) -> None:
        """Stop using the descriptors; they are closed when the current member, which may hold two, is done."""
        self._stale.extend(self._directories.values())
        self._directories.clear()
        self._last = None

    def _close_stale(self) -> None:
        for fd in self._stale:
            os.close(fd)
        self._stale.clear()

    def _make_parents(self, path: bytes, depth: int) -> None:
        if depth == 0:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
        made = b""
        for component in path.split(b"/"):
            made = made + b"/" + component if made else component
            try:
                os.mkdir(made, 0o755)
                self._implied[made] = None
                continue
            except FileExistsError:
                pass
            try:
                status = os.stat(made)
            except FileNotFoundError:
                # a link to what isn't there yet
                target = os.readlink(made)
                target = target if target.startswith(b"/") else made.rpartition(b"/")[0] + b"/" + target
                self._make_parents(clean(target), depth - 1)
                continue
            if stat.S_ISDIR(status.st_mode):
                continue
            if made not in self._whiteouts:
                raise InvalidArgument(f"{_text(made)} is needed as a directory but isn't one: invalid argument")
            os.unlink(made)
            os.mkdir(made, 0o755)
            os.setxattr(made, self._root.opaque, b"y")

    def _clear(self, name: bytes) -> None:
        """Take away what stands where a member is to be made."""
        remove_tree(name)
        self._forget_below(name)

    def _forget_below(self, name: bytes) -> None:
        """A directory (or a link to one) is gone: descriptors and times that were kept under its name are void."""
        self._forget_directories()
        below = name + b"/"
        for path in [path for path in self._times if path == name or path.startswith(below)]:
            del self._times[path]
        for path in [path for path in self._implied if path == name or path.startswith(below)]:
            del self._implied[path]

    # whiteouts

    def _whiteout(self, parent: bytes, base: bytes) -> None:
        if base == OPAQUE:
            self._make_opaque(parent)
            return
        if base.startswith(AUFS):
            return
        target = base[len(WHITEOUT) :]
        if target in {b"", b".", b".."}:
            raise InvalidArgument(f"invalid whiteout {_text(base)} in {_text(parent)}/: invalid argument")
        name = parent + b"/" + target if parent else target
        if self._root.overlay:
            self._overlay_whiteout(parent, target, name)
        elif self._made is not None:
            with suppress(FileNotFoundError, NotADirectoryError):
                self._take_away(name)

    def _overlay_whiteout(self, parent: bytes, target: bytes, name: bytes) -> None:
        if self._made is not None:
            with suppress(FileNotFoundError, NotADirectoryError):
                self._take_away(name)
        if self._root.layers and not is_below(self._root.layers, name):
            # overlay filters whiteouts only where it merges directories: one for nothing would be seen elsewhere
            return
        fd = self._directory(parent)
        try:
            os.mknod(target, stat.S_IFCHR, 0, dir_fd=fd)
        except FileExistsError:
            if stat.S_ISDIR(os.stat(target, dir_fd=fd, follow_symlinks=False).st_mode):
                # a whiteout speaks of the layers below, wherever it stands in the archive
                os.setxattr(name, self._root.opaque, b"y")
        self._whiteouts.add(name)

    def _make_opaque(self, parent: bytes) -> None:
        if self._root.overlay:
            if parent:
                self._directory(parent)
                os.setxattr(parent, self._root.opaque, b"y")
            else:
                self._implied[ROOT] = None
        if self._made is not None:
            try:
                names = os.listdir(parent or b".")
            except FileNotFoundError:
                return
            for name in names:
                self._take_away(parent + b"/" + name if parent else name)

    def _take_away(self, name: bytes) -> None:
        """Remove what was there before this layer; what this layer made stays."""
        status = os.lstat(name)
        if self._made is None or not stat.S_ISDIR(status.st_mode):
            if self._made is None or name not in self._made:
                remove_tree(name)
                self._forget_below(name)
            return
        below = name + b"/"
        if name not in self._made and not any(made.startswith(below) for made in self._made):
            remove_tree(name)
            self._forget_below(name)
            return
        for child in os.listdir(name):
            self._take_away(below + child)

    def _finish(self) -> None:
        self._forget_directories()
        self._close_stale()
        if self._implied and self._root.layers:
            root = os.open(".", _DIRECTORY)
            try:
                adopt(root, self._root.layers, self._implied, self._root.opaque)
            finally:
                os.close(root)
        for name, times in self._times.items():
            with suppress(FileNotFoundError, NotADirectoryError):  # a later member took the place of a parent
                os.utime(name, ns=times, follow_symlinks=False)


def _times(member: Member) -> tuple[int, int]:
    """(atime, mtime); what the clock can't show becomes the epoch, as containerd has it."""
    mtime, atime = member.mtime, member.atime
    if not 0 <= mtime <= _LAST_TIME:
        mtime = 0
    return (mtime if not mtime < atime <= _LAST_TIME else atime), mtime


def is_clean(name: bytes) -> bool:
    """Whether a name is relative and without `.`, `..` and empty parts (a directory's last slash is allowed)."""
    return bool(name) and name[0] != 47 and b"./" not in name and b"//" not in name and name[-1] != 46


def clean(name: bytes) -> bytes:
    """The name relative to the root, which `..` doesn't leave."""
    parts: list[bytes] = []
    for part in name.split(b"/"):
        if part == b"..":
            if parts:
                parts.pop()
        elif part not in {b"", b"."}:
            parts.append(part)
    return b"/".join(parts)


def remove_tree(path: bytes) -> None:
    """Delete a file, or a directory with all that is in it, without following links. OSError."""
    try:
        os.unlink(path)
        return
    except IsADirectoryError:
        pass
    directories = [path]
    for directory in directories:
        with os.scandir(directory) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    directories.append(entry.path)
                else:
                    os.unlink(entry.path)
    for directory in reversed(directories):
        os.rmdir(directory)


def _text(name: bytes) -> str:
    return repr(name.decode("utf-8", "backslashreplace"))


def _named(error: OSError, member: Member) -> OSError:
    """The same error, naming the archive's member."""
    return OSError(error.errno, error.strerror, member.name.decode("utf-8", "backslashreplace"))
