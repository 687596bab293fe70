"""Terminals: a pty made inside the container, whose master goes to whoever asked for it.

The console socket's protocol is runc's: one message with the slave's name and the master as SCM_RIGHTS.
"""

from __future__ import annotations

import _socket
import array
import ctypes
import os
import stat

from wherry.linux import syscalls as sc
from wherry.runtime.errors import ContainerError
from wherry.runtime.root import attach, clone_tree

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from wherry.runtime.root import Root

_DEVPTS_SUPER_MAGIC = 0x1CD1
_TIOCSCTTY = 0x540E
_TIOCSWINSZ = 0x5414
_TIOCGPTN = 0x80045430
_TIOCSPTLCK = 0x40045431
_TIOCGPTPEER = 0x5441
_SUN_PATH_LIMIT = 107


def connect(path: str) -> int:
    """Connect to the console socket; the descriptor is the caller's."""
    sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
    try:
        if len(os.fsencode(path)) > _SUN_PATH_LIMIT:
            folder = os.open(os.path.dirname(path), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                sock.connect(f"/proc/self/fd/{folder}/{os.path.basename(path)}")
            finally:
                os.close(folder)
        else:
            sock.connect(path)
    except OSError as error:
        sock.close()
        raise ContainerError(f"dial unix {path}: connect: {(error.strerror or '').lower()}") from None
    return sock.detach()


def open_pty(root: Root) -> tuple[int, int, str]:
    """(master, slave, slave's name) from the devpts that is mounted at /dev/pts in `root`; a fake one is refused."""
    try:
        master = root.open_within("/dev/pts/ptmx", os.O_RDWR | os.O_NOCTTY)
    except OSError as error:
        raise ContainerError(f"open /dev/ptmx: {(error.strerror or '').lower()}") from None
    try:
        info = os.fstat(master)
        if (
            not stat.S_ISCHR(info.st_mode)
            or info.st_rdev != os.makedev(5, 2)
            or _filesystem(master) != _DEVPTS_SUPER_MAGIC
        ):
            raise ContainerError("/dev/pts/ptmx in the container is not the one of a devpts")
        sc.ioctl(master, _TIOCSPTLCK, ctypes.c_int(0))
        number = ctypes.c_uint(0)
        sc.ioctl(master, _TIOCGPTN, number)
        slave = sc.ioctl(master, _TIOCGPTPEER, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    except BaseException:
        os.close(master)
        raise
    return master, slave, f"/dev/pts/{number.value}"


def _filesystem(fd: int) -> int:
    buffer = ctypes.create_string_buffer(256)
    if sc.libc.fstatfs(fd, buffer) != 0:
        return 0
    return int.from_bytes(buffer.raw[:4], "little")


def mount_console(root: Root, slave: int) -> None:
    """/dev/console is the slave, bound on a file of ours (never through a symlink)."""
    target = root.make_file("/dev/console")
    try:
        tree = clone_tree(slave, "", recursive=False)
        try:
            attach(tree, target)
        finally:
            os.close(tree)
    finally:
        os.close(target)


def send_master(socket_fd: int, master: int, name: str) -> None:
    sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM, 0, socket_fd)
    try:
        sock.sendmsg([name.encode()], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, array.array("i", [master]))])
    finally:
        sock.detach()


def set_size(fd: int, size: dict[str, Any] | None) -> None:
    """`process.consoleSize`: height and width in characters."""
    if size and (size.get("height") or size.get("width")):
        rows, columns = size.get("height") or 0, size.get("width") or 0
        buffer = (ctypes.c_ushort * 4)(rows, columns, 0, 0)
        sc.ioctl(fd, _TIOCSWINSZ, buffer)


def set_up(root: Root, process: dict[str, Any], socket_fd: int, *, with_console: bool) -> None:
    """Make the pty, hand its master over, and make the slave 0, 1, 2 and the controlling terminal of this session."""
    master, slave, name = open_pty(root)
    try:
        set_size(master, process.get("consoleSize"))
        if with_console:
            mount_console(root, slave)
        send_master(socket_fd, master, name)
    finally:
        os.close(master)
    sc.ioctl(slave, _TIOCSCTTY, 0)
    for fd in (0, 1, 2):
        os.dup2(slave, fd)
    if slave > 2:
        os.close(slave)
