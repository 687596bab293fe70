"""The process that handles layers: started by exec, told over a socket, it forks one child for each layer.

    applier (in the daemon)                      worker                        child, one a layer
      {"id", "op", …} + descriptors   ──►   fork ─────────────────────►   enters the tree (chroot)
      {"cancel": id}                  ──►   kill the child                reads the archive, makes the files
                                                                          {"progress": n}\\n … {"ok": {…}}\\n or
      ◄──────────────────────────── result pipe ─────────────────────────{"error": [code, message]}\\n
      end of the socket               ──►   kill all children, exit

The worker itself has one thread and touches no layer, so that its children start with everything loaded and nothing of
another layer in memory. A child that ends without a word was killed: the worker, which holds a copy of the pipe,
writes the error for it.

Run as `python -I -m wherry.snapshotter.worker --control-fd N`; N is a SOCK_SEQPACKET socket.
"""

from __future__ import annotations

import array
import ctypes
import errno
import gc
import hashlib
import json
import os
import resource
import select
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn

from wherry.core.errors import (
    Code,
    FailedPrecondition,
    InvalidArgument,
    ResourceExhausted,
    Unavailable,
    WherryError,
)
from wherry.linux import syscalls as sc
from wherry.linux.mounts import Mount
from wherry.snapshotter.apply import LayerApplier
from wherry.snapshotter.diff import write_diff
from wherry.snapshotter.limits import MEMORY
from wherry.snapshotter.roots import enter
from wherry.snapshotter.stream import Stream
from wherry.snapshotter.tar import TarReader

_LIBC = ctypes.CDLL(None, use_errno=True)
MAX_MESSAGE = 1 << 20
PROGRESS_BYTES = 4 << 20
"""Progress is told each time that many more bytes are done."""
PR_SET_PDEATHSIG = 1

_NO_MEMORY = f"the layer needs more memory than its process gets ({MEMORY >> 20} MiB): resource exhausted"
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM})
_ARCHIVES = frozenset({errno.ENAMETOOLONG, errno.EINVAL, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.ENOTEMPTY})


class Worker:
    """The loop; `serve` returns when the control socket ends."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._children: dict[int, tuple[int, int]] = {}  # pid → (job id, result pipe)

    def serve(self) -> None:
        woken, waker = os.pipe()
        os.set_blocking(waker, False)
        signal.set_wakeup_fd(waker)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        poll = select.poll()
        poll.register(self._control, select.POLLIN)
        poll.register(woken, select.POLLIN)
        while True:
            ready = {fd for fd, _ in poll.poll()}
            if woken in ready:
                os.read(woken, 4096)
                self._reap()
            if self._control.fileno() in ready and not self._message():
                break
        for pid in self._children:
            os.kill(pid, signal.SIGKILL)
        for pid in self._children:
            os.waitpid(pid, 0)

    def _message(self) -> bool:
        data, ancillary, _, _ = self._control.recvmsg(MAX_MESSAGE, socket.CMSG_SPACE(3 * 4))
        if not data:
            return False
        fds = array.array("i")
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
        message = json.loads(data)
        if "cancel" in message:
            for pid, (job, _) in self._children.items():
                if job == message["cancel"]:
                    os.kill(pid, signal.SIGKILL)
            return True
        self._start(message, *fds)
        return True

    def _start(self, message: dict[str, Any], file: int, result: int, follow: int = -1) -> None:
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            self._control.close()
            message["follow"] = follow
            _run_child(message, file, result, parent)
        os.close(file)
        if follow >= 0:
            os.close(follow)
        self._children[pid] = (message["id"], result)

    def _reap(self) -> None:
        while self._children:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            _, result = self._children.pop(pid)
            if status:
                signaled = os.WIFSIGNALED(status)
                what = f"killed by signal {os.WTERMSIG(status)}" if signaled else f"ended with {status >> 8}"
                _tell(result, {"error": [int(Code.UNAVAILABLE), f"the process that handled the layer was {what}"]})
            os.close(result)


def _run_child(message: dict[str, Any], file: int, result: int, parent: int) -> NoReturn:
    """Do one job and exit. Every outcome is told through the pipe; the exit code is 0 when it was."""
    code = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        sc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)  # it died before that was set
        gc.disable()  # the work makes no cycles, and looking for them costs time
        os.umask(0)
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
        seal()
        answer = _outcome(message, file, result)
        _tell(result, answer)
        code = 0
    finally:
        os._exit(code)


def seal() -> None:
    """Load nothing any more: where this process goes, the files that an import would find are the image's."""
    for found in (sys.path, sys.meta_path, sys.path_hooks):
        found.clear()
    sys.path_importer_cache.clear()


def preload() -> None:
    """What is loaded at its first use, used: OpenSSL with its configuration, what ends threads, syncfs."""
    hashlib.sha256(b"").hexdigest()
    with suppress(OSError):
        ctypes.CDLL("libgcc_s.so.1")


def _outcome(message: dict[str, Any], file: int, result: int) -> dict[str, Any]:
    try:
        job = {"apply": _apply, "diff": _diff}[message["op"]]
        return {"ok": job(message, file, lambda done: _tell(result, {"progress": done}))}
    except WherryError as error:
        return {"error": [int(error.code), error.message]}
    except OSError as error:
        explained = explain(error)
        return {"error": [int(explained.code), explained.message]}
    except MemoryError:
        return {"error": [int(Code.RESOURCE_EXHAUSTED), _NO_MEMORY]}
    except Exception as error:  # noqa: BLE001 - the caller must hear of a bug too, in words
        return {"error": [int(Code.INTERNAL), f"{type(error).__name__}: {error}"]}


def explain(error: OSError) -> WherryError:
    """The kind of an error that the file system gave while a layer was handled."""
    text = f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror or error)
    if error.errno in _FULL:
        return ResourceExhausted(f"{text}: resource exhausted")
    if error.errno in _ARCHIVES:
        return InvalidArgument(f"{text}: invalid argument")
    return FailedPrecondition(f"{text}: failed precondition")


def _tell(result: int, answer: dict[str, Any]) -> None:
    data = memoryview(json.dumps(answer).encode() + b"\n")
    with suppress(BrokenPipeError):  # nobody waits any more
        while data:
            data = data[os.write(result, data) :]


def mounts_of(listed: list[list[Any]]) -> list[Mount]:
    """Mounts as they come in messages: [type, source, target, [options]]."""
    return [Mount(kind, source, target, tuple(options)) for kind, source, target, options in listed]


def _apply(message: dict[str, Any], file: int, tell: Callable[[int], None]) -> dict[str, Any]:
    root = enter(mounts_of(message["mounts"]), overlay=message["overlay"])
    stream = Stream(file, compressed=message["compressed"], limit=message["layer_bytes"], follow=message["follow"])
    reader = TarReader(_counted(stream, tell) if message["progress"] else stream.get)
    applier = LayerApplier(reader, root, limit=message["layer_entries"])
    entries = applier.run()
    reader.drain()
    expected = message["expected"]
    if expected and stream.digest != expected:
        raise InvalidArgument(f"wrong diff id calculated on extraction {stream.digest}, expected {expected}")
    if message["sync"]:
        _sync()
    implied = [] if root.layers else [os.fsdecode(path) for path in applier.implied]
    return {
        "digest": stream.digest,
        "size": stream.size,
        "entries": entries,
        "implied": implied if message["overlay"] else [],
    }


def _counted(stream: Stream, tell: Callable[[int], None]) -> Callable[[], bytes]:
    done = told = 0

    def get() -> bytes:
        nonlocal done, told
        chunk = stream.get()
        done += len(chunk)
        if done - told >= PROGRESS_BYTES or not chunk:
            told = done
            tell(done)
        return chunk

    return get


def _sync() -> None:
    """syncfs(2) of the file system that was written to."""
    fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if _LIBC.syncfs(fd) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), "syncfs")
    finally:
        os.close(fd)


def _diff(message: dict[str, Any], file: int, tell: Callable[[int], None]) -> dict[str, Any]:
    return write_diff(
        mounts_of(message["lower"]),
        mounts_of(message["upper"]),
        file,
        compression=message["compression"],
        epoch=message["epoch"],
        progress=tell if message["progress"] else None,
    )


def main() -> int:
    """The command: `--control-fd N`."""
    if len(sys.argv) != 3 or sys.argv[1] != "--control-fd" or not sys.argv[2].isdecimal():
        print("usage: python -m wherry.snapshotter.worker --control-fd N", file=sys.stderr)
        return 2
    control = socket.socket(fileno=int(sys.argv[2]))
    sc.set_process_name("wherry-layers")
    preload()
    gc.collect()
    gc.freeze()
    try:
        Worker(control).serve()
    except (ConnectionError, KeyboardInterrupt):
        pass
    except Unavailable as error:
        print(error.message, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
