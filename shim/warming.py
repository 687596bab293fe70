"""Walks the ways of a shim in the fork server, before its memory is shared.

CPython rewrites the code that it runs: after eight calls a function's instructions are exchanged for specialised ones,
with caches beside them. Done here, once, those pages stay shared; done in each shim they cost each one half as much
again as all else that it writes to. So a few lives of a container are lived through, in this process and with the
shim's own code, from the start of a shim to its end; only what makes the container is replaced by a plain fork.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

from google.protobuf.message import Message

from wherry.core import typeurl
from wherry.linux.process import set_child_subreaper, start_time
from wherry.proto import task_v2_pb2 as task
from wherry.proto.ttrpc import sockets
from wherry.proto.ttrpc.frames import Answer, Call, ClientConnection, ServerConnection
from wherry.runtime import container as bundled
from wherry.runtime import state
from wherry.runtime.container import CreateRequest, ExecRequest
from wherry.shim.birth import Parameters
from wherry.shim.serving import Life, become_shim
from wherry.shim.warming_runtime import walk_runtime

# a function is specialised after 8 calls, its instructions one by one in the calls after that
ROUNDS: Final = 10
# seconds of a processor for each half of the walk, which takes 0.15; a machine that needs more (an emulated one) goes
# some of the rounds only
_ENOUGH: Final = 2.0
# a life takes 10 ms; if one gets stuck, the fork server goes on without the rest
_LIMIT: Final = 2.0
_ID: Final = "warm"
_FOLDER: Final = "/tmp/wherry-warm-"
# seconds; younger ones may be about to be locked
_STRAY: Final = 60.0
# so many at most, lest the first container waits for them
_STRAYS: Final = 5


def walk(own_streams: Callable[[str, str], None]) -> None:
    """Live a few lives. Nothing is left of them; what goes wrong is no error, only a loss of speed.

    `own_streams` is how a shim takes its streams and its working directory; both are put back.
    """
    folder = f"{_FOLDER}{os.urandom(8).hex()}"
    try:
        _remove_strays()
        os.mkdir(folder, 0o700)
        held = _hold(folder)
    except OSError:
        return
    set_child_subreaper()
    try:
        with _kept():
            with _plain_forks():
                for number in rounds():
                    _live(f"{folder}/{number}", own_streams)
            walk_runtime(f"{folder}/{ROUNDS}", rounds())
    except (Exception, _Stuck) as error:  # noqa: BLE001  # whatever this host lacks: shims start without it
        print(f"level=warning msg={f'warming up: {type(error).__name__}: {error}'!r}", file=sys.stderr)
    finally:
        set_child_subreaper(False)
        _remove(folder)
        os.close(held)


def rounds() -> Iterator[int]:
    """The numbers of the rounds, the first one at least."""
    end = time.process_time() + _ENOUGH
    for number in range(ROUNDS):
        if number and time.process_time() > end:
            return
        yield number


def _hold(folder: str) -> int:
    """A lock on it, for as long as this process lives. Raises BlockingIOError where another one has it."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        raise
    return fd


def _remove_strays() -> None:
    """What a fork server left that was killed while it warmed up."""
    parent, name = os.path.split(_FOLDER)
    for stray in [item for item in os.listdir(parent) if item.startswith(name)][:_STRAYS]:
        with contextlib.suppress(OSError):
            held = _hold(f"{parent}/{stray}")
            if os.fstat(held).st_uid == os.geteuid() and os.fstat(held).st_mtime < time.time() - _STRAY:
                _remove(f"{parent}/{stray}")
            os.close(held)


def _remove(folder: str) -> None:
    """With all that is in it, as far as that goes; `shutil` would map six libraries into every shim."""
    for path, folders, files in os.walk(folder, topdown=False):
        for name in files:
            with contextlib.suppress(OSError):
                os.unlink(f"{path}/{name}")
        for name in folders:
            with contextlib.suppress(OSError):
                (os.unlink if os.path.islink(f"{path}/{name}") else os.rmdir)(f"{path}/{name}")
    with contextlib.suppress(OSError):
        os.rmdir(folder)


@contextlib.contextmanager
def _kept() -> Iterator[None]:
    """Put back what a shim changes of its process."""
    streams = [os.dup(fd) for fd in (0, 1, 2)]
    stderr, folder = sys.stderr, os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield
    finally:
        for fd, saved in enumerate(streams):
            os.dup2(saved, fd)
            os.close(saved)
        os.fchdir(folder)
        os.close(folder)
        sys.stderr = stderr


@contextlib.contextmanager
def _plain_forks() -> Iterator[None]:
    create, exec_process = bundled.create, bundled.exec_process
    bundled.create, bundled.exec_process = _create, _exec
    try:
        yield
    finally:
        bundled.create, bundled.exec_process = create, exec_process


def _create(request: CreateRequest) -> int:
    """In the shim's child: an init without a container, which waits at its fifo and then for its end."""
    known = state.State(request.root, request.id)
    known.make()
    known.save_spec(request.spec or {})
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        _let_go((write, *(request.stdio or ())))
        fifo = os.open(known.fifo, os.O_RDONLY | os.O_NONBLOCK)
        os.set_blocking(fifo, True)
        os.write(write, b"x")
        while not os.read(fifo, 1):
            signal.sigtimedwait([], 0.001)
        os.close(fifo)
        if request.stdio is not None:
            os.write(request.stdio[1], b"output\n")
        while True:
            signal.pause()
    os.read(read, 1)
    known.pid, known.pid_started, known.bundle = pid, start_time(pid), request.bundle
    known.namespaces = {"pid": ""}
    known.save()
    return pid


def _let_go(kept: tuple[int, ...]) -> None:
    """So that a fork server that is killed here leaves nothing: its control socket closes with it, and what waits to be
    killed by it ends by itself."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(int(_LIMIT) * 2)
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2 and int(name) not in kept:
            with contextlib.suppress(OSError):
                os.close(int(name))


def _exec(request: ExecRequest) -> int:
    pid = os.fork()
    if not pid:
        if request.stdio is not None:
            os.write(request.stdio[1], b"output\n")
        os._exit(0)
    return pid


class _Stuck(BaseException):
    """Past the loop, which survives every Exception of its callbacks."""


class _Daemon:
    """Both of a daemon's connections with a shim, in the shim's own loop."""

    def __init__(self, life: Life) -> None:
        self._life = life
        self._calls = ClientConnection()
        self._events = ServerConnection()
        self._answers: dict[int, Answer] = {}
        self._caller, callee = socket.socketpair()
        self._listener, publisher = socket.socketpair()
        for sock in (self._caller, callee, self._listener, publisher):
            sock.setblocking(False)
        life.server.adopt(callee.detach())
        life.publisher.connected(publisher.detach())
        life.loop.on_read(self._caller.fileno(), self._answered)
        life.loop.on_read(self._listener.fileno(), self._published)

    def _answered(self) -> None:
        for answer in self._calls.receive(self._caller.recv(65536)):
            if isinstance(answer, Answer):
                self._answers[answer.stream_id] = answer

    def _published(self) -> None:
        for call in self._events.receive(self._listener.recv(65536)):
            if isinstance(call, Call):
                self._listener.send(self._events.answer(call.stream_id))

    def begin(self, method: str, request: Message) -> int:
        """Send a call; its number."""
        number, data = self._calls.call("containerd.task.v2.Task", method, request.SerializeToString())
        self._caller.send(data)
        return number

    def end(self, number: int) -> None:
        """Turn the loop until it is answered."""
        while number not in self._answers:
            self._life.loop.turn()

    def call(self, method: str, request: Message) -> None:
        """A call and its answer."""
        self.end(self.begin(method, request))

    def close(self) -> None:
        """The daemon goes away."""
        self._life.loop.forget(self._caller.fileno())
        self._life.loop.forget(self._listener.fileno())
        self._caller.close()
        self._listener.close()


def _live(bundle: str, own_streams: Callable[[str, str], None]) -> None:
    os.mkdir(bundle)
    names = {name: f"{bundle}/{name}" for name in ("stdin", "stdout", "stderr")}
    for path in names.values():
        os.mkfifo(path)
    with open(f"{bundle}/config.json", "w") as file:
        json.dump({"ociVersion": "1.0.2", "linux": {"namespaces": [{"type": "pid"}]}}, file)
    own_streams(bundle, "error")
    parameters = Parameters(_ID, _ID, bundle, f"{bundle}/s", f"{bundle}/d", "", "", f"{bundle}/r", "", None)
    listener = sockets.bind(parameters.socket)
    become_shim(parameters)
    life = Life()
    life.begin(parameters)
    life.server.listen(listener)
    overdue = life.loop.later(_LIMIT, _give_up)
    try:
        daemon = _Daemon(life)
        _drive(daemon, bundle, names)
        daemon.close()
    finally:
        overdue.cancel()
        life.server.close()
        life.publisher.close()
        life.children.close()
        life.loop.close()


def _give_up() -> None:
    raise _Stuck("a walk through a container's life got stuck")


def _drive(daemon: _Daemon, bundle: str, names: dict[str, str]) -> None:
    spec = typeurl.pack_json(typeurl.PROCESS, {"args": ["true"], "cwd": "/"})
    daemon.call("Connect", task.ConnectRequest(id=_ID))
    stdin, stdout, stderr = names["stdin"], names["stdout"], names["stderr"]
    daemon.call("Create", task.CreateTaskRequest(id=_ID, bundle=bundle, stdin=stdin, stdout=stdout, stderr=stderr))
    waiting = daemon.begin("Wait", task.WaitRequest(id=_ID))
    daemon.call("Start", task.StartRequest(id=_ID))
    daemon.call("State", task.StateRequest(id=_ID))
    exec_ = task.ExecProcessRequest(id=_ID, exec_id="x", spec=spec, stdin=stdin, stdout=stdout, stderr=stderr)
    daemon.call("Exec", exec_)
    daemon.call("Start", task.StartRequest(id=_ID, exec_id="x"))
    daemon.call("Wait", task.WaitRequest(id=_ID, exec_id="x"))
    daemon.call("Delete", task.DeleteRequest(id=_ID, exec_id="x"))
    for method, request in _questions():
        daemon.call(method, request)
    daemon.call("Kill", task.KillRequest(id=_ID, signal=signal.SIGKILL))
    daemon.end(waiting)
    daemon.call("Delete", task.DeleteRequest(id=_ID))
    daemon.call("State", task.StateRequest(id=_ID))


def _questions() -> list[tuple[str, Any]]:
    return [
        ("Stats", task.StatsRequest(id=_ID)),
        ("Pids", task.PidsRequest(id=_ID)),
        ("ResizePty", task.ResizePtyRequest(id=_ID, width=80, height=24)),
        ("CloseIO", task.CloseIORequest(id=_ID, stdin=True)),
        ("Connect", task.ConnectRequest(id=_ID)),
    ]
