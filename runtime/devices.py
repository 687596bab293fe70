"""/dev of a container: the nodes that every container has, those of the configuration, and the usual links.

OCI runtime specification, config-linux.md ("Default Devices") and runtime-linux.md ("Dev symbolic links").
"""

from __future__ import annotations

import errno
import os
import stat

from wherry.linux.mounts import Options
from wherry.runtime.errors import ContainerError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from wherry.runtime.root import Root

DEFAULTS = (
    ("/dev/null", 1, 3),
    ("/dev/random", 1, 8),
    ("/dev/full", 1, 7),
    ("/dev/tty", 5, 0),
    ("/dev/zero", 1, 5),
    ("/dev/urandom", 1, 9),
)

LINKS = (
    ("/dev/fd", "/proc/self/fd"),
    ("/dev/stdin", "/proc/self/fd/0"),
    ("/dev/stdout", "/proc/self/fd/1"),
    ("/dev/stderr", "/proc/self/fd/2"),
)

_KINDS = {"c": stat.S_IFCHR, "u": stat.S_IFCHR, "b": stat.S_IFBLK, "p": stat.S_IFIFO}


def make(root: Root, linux: dict[str, Any], *, in_user_namespace: bool) -> None:
    """Make nodes and links. In a user namespace mknod(2) is forbidden: the host's nodes are bound instead."""
    before = os.umask(0)
    try:
        named = {item["path"]: item for item in linux.get("devices") or []}
        for path, major, minor in DEFAULTS:
            if path not in named:
                _node(root, path, stat.S_IFCHR | 0o666, os.makedev(major, minor), (0, 0), bind=in_user_namespace)
        for path, item in named.items():
            if path == "/dev/ptmx":
                continue  # devpts has its own; a node would open the host's terminals
            mode = item.get("fileMode")
            kind = _KINDS[item["type"]] | (0o666 if mode is None else mode & 0o7777)
            device = os.makedev(item.get("major") or 0, item.get("minor") or 0) if item["type"] != "p" else 0
            _node(root, path, kind, device, (item.get("uid") or 0, item.get("gid") or 0), bind=in_user_namespace)
    finally:
        os.umask(before)


def _node(root: Root, path: str, mode: int, device: int, owner: tuple[int, int], *, bind: bool) -> None:
    if bind:
        _bind(root, path)
        return
    folder, name = os.path.split(os.path.normpath(path))
    parent = root.make_directory(folder)
    try:
        os.mknod(name, mode, device, dir_fd=parent)
        os.chown(name, *owner, dir_fd=parent, follow_symlinks=False)
    except FileExistsError:
        return  # runc's rule: what the image or a mount put there stays
    except PermissionError:
        _bind(root, path)
    except OSError as error:
        raise ContainerError(f"error creating device node {path}: {error.strerror}") from None
    finally:
        os.close(parent)


def _bind(root: Root, path: str) -> None:
    target = root.make_file(path)
    try:
        root.bind(path, target, Options(()))
    except OSError as error:
        raise ContainerError(f"error binding device {path}: {error.strerror}") from None
    finally:
        os.close(target)


def make_links(root: Root) -> None:
    """The links that the specification asks for, and /dev/ptmx → pts/ptmx where devpts is mounted."""
    dev = root.make_directory("/dev")
    try:
        core = (("/dev/core", "/proc/kcore"),) if os.path.exists("/proc/kcore") else ()
        for path, target in LINKS + core:
            try:
                os.symlink(target, os.path.basename(path), dir_fd=dev)
            except FileExistsError:
                continue
        try:
            os.unlink("ptmx", dir_fd=dev)
        except OSError as error:
            if error.errno != errno.ENOENT:
                return  # a mount of somebody's: left alone
        os.symlink("pts/ptmx", "ptmx", dir_fd=dev)
    except PermissionError:
        return
    except OSError as error:
        if error.errno != errno.EROFS:
            raise ContainerError(f"error creating links in /dev: {error.strerror}") from None
    finally:
        os.close(dev)


def host_null() -> int:
    """The host's /dev/null as a descriptor (O_PATH); ContainerError if it is something else (CVE-2025-31133)."""
    fd = os.open("/dev/null", os.O_PATH | os.O_CLOEXEC | os.O_NOFOLLOW)
    info = os.fstat(fd)
    if not stat.S_ISCHR(info.st_mode) or info.st_rdev != os.makedev(1, 3):
        os.close(fd)
        raise ContainerError("/dev/null of the host is not the null device")
    return fd
