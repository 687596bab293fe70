"""Namespaces that belong to a user namespace that is there already."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator

from wherry.linux import syscalls as sc


@contextlib.contextmanager
def made_in(users: int, flags: int) -> Iterator[int]:
    """New namespaces (CLONE_ flags) that belong to a user namespace (a descriptor): the pid of a process in them.

    The process is there for the time of the block; for callers with one thread. OSError.
    """
    reader, writer = os.pipe()
    ready, done = os.pipe()
    pid = os.fork()
    if not pid:
        code = errno.EIO
        try:
            os.close(writer)
            sc.setns(users, sc.CLONE_NEWUSER)
            sc.unshare(flags)
            os.write(done, b"\0")
            os.read(reader, 1)  # ends when the parent closes its end, or dies
            code = 0
        except OSError as error:
            os.write(done, bytes([min(error.errno or code, 255)]))
        finally:
            os._exit(code)
    os.close(reader)
    os.close(done)
    try:
        code = (os.read(ready, 1) or bytes([errno.EIO]))[0]
        if code:
            raise OSError(code, f"no namespace can be made there: {os.strerror(code)}")
        yield pid
    finally:
        os.close(ready)
        os.close(writer)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)
