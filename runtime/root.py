"""A container's root filesystem before anybody lives in it: paths in it are opened, made and mounted on by descriptor.

The root is untrusted: an image may hold any symlink, and another container may swap one while we look (a shared
volume). So a path is resolved once, by the kernel, with the root as its world (openat2(2), RESOLVE_IN_ROOT), and what
is done is done to the descriptor. Nothing here ever joins the root's path with one from the configuration.
"""

from __future__ import annotations

import errno
import os
import stat

from wherry.linux import syscalls as sc

TYPE_CHECKING = False
if TYPE_CHECKING:
    from wherry.linux.mounts import Options

_LINKS_LIMIT = 40  # the kernel's own limit for one path

_ATTRIBUTES = (
    (sc.MS_RDONLY, sc.MOUNT_ATTR_RDONLY),
    (sc.MS_NOSUID, sc.MOUNT_ATTR_NOSUID),
    (sc.MS_NODEV, sc.MOUNT_ATTR_NODEV),
    (sc.MS_NOEXEC, sc.MOUNT_ATTR_NOEXEC),
    (sc.MS_NODIRATIME, sc.MOUNT_ATTR_NODIRATIME),
    (sc.MS_NOSYMFOLLOW, sc.MOUNT_ATTR_NOSYMFOLLOW),
)
_ATIMES = (
    (sc.MS_NOATIME, sc.MOUNT_ATTR_NOATIME),
    (sc.MS_STRICTATIME, sc.MOUNT_ATTR_STRICTATIME),
    (sc.MS_RELATIME, sc.MOUNT_ATTR_RELATIME),
)


def attributes(flags: int, cleared: int) -> tuple[int, int]:
    """(attributes to set, to clear) of mount_setattr(2) for MS_ flags."""
    set_ = sum(attr for ms, attr in _ATTRIBUTES if flags & ms)
    clear = sum(attr for ms, attr in _ATTRIBUTES if cleared & ms)
    for ms, attr in _ATIMES:
        if flags & ms:
            set_, clear = set_ | attr, clear | sc.MOUNT_ATTR_ATIME
            break
    return set_, clear


class Root:
    """The root, held open. Descriptors that methods return are the caller's to close."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)

    def open(self, path: str, flags: int = os.O_PATH) -> int:
        return sc.openat2(self.fd, path.lstrip("/") or ".", flags, resolve=sc.RESOLVE_IN_ROOT)

    def open_within(self, path: str, flags: int) -> int:
        """As `open`, but no symlink on the way is followed at all: what we made ourselves, or nothing."""
        return sc.openat2(self.fd, path.lstrip("/") or ".", flags, resolve=sc.RESOLVE_IN_ROOT | sc.RESOLVE_NO_SYMLINKS)

    def make_directory(self, path: str, mode: int = 0o755, *, links: int = 0) -> int:
        """Open the directory, with those above it made where they are missing (behind dangling symlinks, too)."""
        path = os.path.normpath("/" + path.lstrip("/"))
        try:
            return self.open(path, os.O_PATH | os.O_DIRECTORY)
        except FileNotFoundError:
            pass
        head, name = os.path.split(path)
        parent = self.make_directory(head, mode, links=links)
        try:
            try:
                os.mkdir(name, mode, dir_fd=parent)
            except FileExistsError:
                target = self._link_target(parent, name)
                if target is None or links >= _LINKS_LIMIT:
                    raise
                return self.make_directory(target, mode, links=links + 1)
            return sc.openat2(parent, name, os.O_PATH | os.O_DIRECTORY, resolve=sc.RESOLVE_NO_SYMLINKS)
        finally:
            os.close(parent)

    def _link_target(self, parent: int, name: str) -> str | None:
        """Where the symlink `name` in `parent` points, as a path of this root; None if it is no symlink."""
        try:
            target = os.readlink(name, dir_fd=parent)
        except OSError:
            return None
        if target.startswith("/"):
            return target
        above = os.readlink(f"/proc/self/fd/{parent}")
        base = os.readlink(f"/proc/self/fd/{self.fd}")
        inside = above[len(base) :] if above.startswith(base) else ""
        return os.path.normpath(f"/{inside}/{target}")

    def make_file(self, path: str) -> int:
        """Open the file (O_PATH), made empty where it is missing: something to bind a file on."""
        try:
            return self.open(path)
        except FileNotFoundError:
            pass
        head, name = os.path.split(os.path.normpath("/" + path.lstrip("/")))
        parent = self.make_directory(head)
        try:
            try:
                flags = os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_WRONLY | os.O_CLOEXEC
                os.close(os.open(name, flags, 0o755, dir_fd=parent))
            except FileExistsError:
                target = self._link_target(parent, name)
                if target is not None:
                    return self.make_file(target)
            return sc.openat2(parent, name, os.O_PATH, resolve=sc.RESOLVE_NO_SYMLINKS)
        finally:
            os.close(parent)

    # -- mounting ---------------------------------------------------------------------------------------------------

    def mount(self, fstype: str, source: str, target: int, flags: int, data: str) -> None:
        """mount(2) on an open target."""
        sc.mount(source, f"/proc/self/fd/{target}", fstype, flags, data)

    def bind(self, source: str, target: int, options: Options) -> None:
        """Bind `source`, a path of the host, on an open target, with all its attributes set before it is visible."""
        tree = clone_tree(sc.AT_FDCWD, source, recursive=bool(options.flags & sc.MS_REC))
        try:
            set_attributes(tree, options)
            attach(tree, target)
        finally:
            os.close(tree)

    def adjust(self, path: str, options: Options) -> None:
        """Propagation and recursive attributes for what is now mounted at `path`."""
        if options.propagation or options.set_rec or options.clear_rec:
            fd = self.open(path)
            try:
                _set_rest(fd, options)
            finally:
                os.close(fd)


def clone_tree(dirfd: int, path: str, *, recursive: bool) -> int:
    """A detached copy of the mount at `path` (open_tree(2), Linux 5.2)."""
    flags = sc.OPEN_TREE_CLONE | sc.OPEN_TREE_CLOEXEC | (sc.AT_RECURSIVE if recursive else 0)
    return sc.open_tree(dirfd, path, flags | (0 if path else sc.AT_EMPTY_PATH))


def attach(tree: int, target: int) -> None:
    """Mount a detached tree on an open target (a directory on a directory, a file on a file)."""
    sc.move_mount(tree, "", target, "", sc.MOVE_MOUNT_F_EMPTY_PATH | sc.MOVE_MOUNT_T_EMPTY_PATH)


def set_attributes(tree: int, options: Options) -> None:
    """A bind mount's flags. Those that no option speaks of stay as the source has them."""
    set_, clear = attributes(options.flags, options.cleared)
    if set_ or clear:
        sc.mount_setattr(tree, "", sc.AT_EMPTY_PATH, set_=set_, clear=clear & ~set_ | clear & sc.MOUNT_ATTR_ATIME)
    _set_rest(tree, options)


def _set_rest(fd: int, options: Options) -> None:
    for propagation in options.propagation:
        recursive = sc.AT_RECURSIVE if propagation & sc.MS_REC else 0
        sc.mount_setattr(fd, "", sc.AT_EMPTY_PATH | recursive, propagation=propagation & ~sc.MS_REC)
    if options.set_rec or options.clear_rec:
        flags = sc.AT_EMPTY_PATH | sc.AT_RECURSIVE
        sc.mount_setattr(fd, "", flags, set_=options.set_rec, clear=options.clear_rec)


def is_character_device(fd: int, major: int, minor: int) -> bool:
    info = os.fstat(fd)
    return stat.S_ISCHR(info.st_mode) and info.st_rdev == os.makedev(major, minor)


def is_missing(error: OSError) -> bool:
    return error.errno in (errno.ENOENT, errno.ENOTDIR)
