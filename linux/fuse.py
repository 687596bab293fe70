"""fuse-overlayfs, which does for a user what the kernel's overlayfs does where that refuses user namespaces.

Its mounts are of the type that containerd's fuse-overlayfs snapshotter gives them, so that either's are mounted by the
other: a helper program of mount(8), here the program itself. It becomes a process in the background that lives as long
as its mount.
"""

from __future__ import annotations

import errno
import os

OVERLAY = "fuse3.fuse-overlayfs"
PROGRAM = "fuse-overlayfs"
OVERLAYS = frozenset(("overlay", OVERLAY))
"""The types of mounts that lay directories over each other, by the same options."""
# what the kernel's overlay is told and this one doesn't know
_KERNELS = ("index=", "userxattr", "redirect_dir=", "metacopy=")
_PLACES = ("/usr/local/bin", "/usr/bin", "/bin")


def program() -> str:
    """The path of fuse-overlayfs, "" where it isn't installed."""
    for folder in (*os.environ.get("PATH", "").split(":"), *_PLACES):
        path = os.path.join(folder or ".", PROGRAM)
        if os.access(path, os.X_OK):
            return os.path.abspath(path)
    return ""


def mount(target: str, flags: tuple[str, ...], data: str) -> None:
    """Lay directories over each other at `target`; `data` as overlayfs has it, `flags` such as `ro`.

    Raises OSError with what the program says.
    """
    path = program()
    if not path:
        raise OSError(errno.ENOENT, f"{PROGRAM} is missing: install the package of that name", target)
    options = [option for option in data.split(",") if not option.startswith(_KERNELS)]
    reader, writer = os.pipe()
    try:
        actions = [(os.POSIX_SPAWN_DUP2, writer, 2)]
        words = [PROGRAM, "-o", ",".join([*flags, *options]), target]
        pid = os.posix_spawn(path, words, dict(os.environ), file_actions=actions, setsid=False)
    finally:
        os.close(writer)
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    try:
        os.set_blocking(reader, False)  # the process that stays has the other end, too
        said = os.read(reader, 1000).decode(errors="replace").strip() if code else ""
    except BlockingIOError:
        said = ""
    finally:
        os.close(reader)
    if code:
        raise OSError(errno.EIO, f"{PROGRAM}: {said or f'ended with {code}'}", target)
