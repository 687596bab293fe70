"""Namespaces: their names in the OCI specification, in /proc and in clone(2)."""

from __future__ import annotations

import errno
import os

from wherry.linux import syscalls as sc

FLAGS: dict[str, int] = {
    "user": sc.CLONE_NEWUSER,
    "pid": sc.CLONE_NEWPID,
    "time": sc.CLONE_NEWTIME,
    "ipc": sc.CLONE_NEWIPC,
    "uts": sc.CLONE_NEWUTS,
    "network": sc.CLONE_NEWNET,
    "cgroup": sc.CLONE_NEWCGROUP,
    "mount": sc.CLONE_NEWNS,
}
"""In the order in which a process enters them; the mount namespace last, because it takes the paths away."""

PROC_NAMES: dict[str, str] = {"mount": "mnt", "network": "net"}
"""Where /proc/PID/ns spells it differently."""

FOR_CHILDREN = ("pid", "time")
"""unshare(2) and setns(2) with these move only the caller's future children."""


def path_of(kind: str, pid: int | str = "self") -> str:
    return f"/proc/{pid}/ns/{PROC_NAMES.get(kind, kind)}"


def open_namespace(path: str) -> int:
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def same(path: str, other: str) -> bool:
    """Whether two namespace files name the same namespace; False if one can't be read."""
    try:
        one, two = os.stat(path), os.stat(other)
    except OSError:
        return False
    return (one.st_dev, one.st_ino) == (two.st_dev, two.st_ino)


def supported() -> list[str]:
    """The kinds that this kernel has."""
    return [kind for kind in FLAGS if os.path.exists(path_of(kind))]


def join(fds: dict[str, int]) -> None:
    """Enter the namespaces behind these descriptors (kind → fd), which are closed.

    All but the user namespace first: a process with the host's rights may enter those that other user namespaces own.
    Those that refuse are tried again from within the user namespace (a caller without rights on the host).
    """
    later: list[str] = []
    for kind, flag in FLAGS.items():
        if kind == "user" or kind not in fds:
            continue
        try:
            sc.setns(fds[kind], flag)
        except PermissionError:
            if "user" not in fds:
                raise
            later.append(kind)
    if "user" in fds:
        try:
            sc.setns(fds["user"], sc.CLONE_NEWUSER)
        except OSError as error:
            if error.errno != errno.EINVAL:  # EINVAL: it is the user namespace we are in
                raise
    for kind in later:
        sc.setns(fds[kind], FLAGS[kind])
    for fd in fds.values():
        os.close(fd)


def make_user_namespace(uids: str, gids: str) -> int:
    """A descriptor of a new user namespace with these mappings (lines of uid_map and gid_map), in which nobody lives.

    Takes the rights to write the mappings; for processes with one thread."""
    reader, writer = os.pipe()
    ready, done = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.close(writer)
            sc.unshare(sc.CLONE_NEWUSER)
            os.write(done, b"\0")
            os.read(reader, 1)  # ends when the parent closes its end, or dies
        finally:
            os._exit(0)
    os.close(reader)
    os.close(done)
    try:
        if not os.read(ready, 1):
            raise OSError(errno.EPERM, "no user namespace can be made here")
        for name, text in (("gid_map", gids), ("uid_map", uids)):
            fd = os.open(f"/proc/{pid}/{name}", os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.write(fd, text.encode())
            finally:
                os.close(fd)
        return open_namespace(path_of("user", pid))
    finally:
        os.close(ready)
        os.close(writer)
        try:  # noqa: SIM105 - importing contextlib would cost each command of the runtime 2 ms
            os.waitpid(pid, 0)
        except ChildProcessError:  # the caller ignores its children's end
            pass
