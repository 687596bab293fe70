"""The fork server: everything loaded that a shim and the bundled runtime ever need, and a fork for each shim.

A shim begins as a fork, in 2 ms, with its memory shared until written. The fork server has one thread for life, is the
parent of no shim, keeps nothing about them and ends with its control socket.

    daemon                     fork server                 shim
      │  "spawn" 7 …               │                         │
      ├───────────────────────────>│ fork, fork again        │
      │                            ├────────────────────────>│ session, bind, listen
      │  7 "" pid socket                                     │ (a child of init: its parent has exited)
      │<─────────────────────────────────────────────────────┤
      │            connect, Create, …                        │ serves

The control socket is SOCK_SEQPACKET, so the shim answers by itself. A message is a list of strings, see
`wherry.shim.words`: JSON would be nicer to look at, and 0.2 MB more in each shim.
"""

from __future__ import annotations

import contextlib
import gc
import os
import socket
import struct
from collections.abc import Callable
from typing import Final, NoReturn

from wherry.core.errors import AlreadyExists, Code, WherryError
from wherry.core.failpoints import reach
from wherry.linux import vfork
from wherry.linux.process import reserve_process_title, set_child_subreaper, set_process_title
from wherry.proto.ttrpc import sockets
from wherry.runtime import container as bundled
from wherry.shim import template
from wherry.shim.birth import NAME, Parameters, bind, own_streams, parameters_of
from wherry.shim.cleanup import clean_up
from wherry.shim.log import log, log_exception
from wherry.shim.pools import fill_heap, fill_holes, know_types
from wherry.shim.serving import Life, become_shim, install_signals, raise_oom_score
from wherry.shim.settled import settle
from wherry.shim.warming import walk
from wherry.shim.words import ShimWords, join, split

# what a title may hold: the longest id and namespace (76 each), and the address
TITLE_ROOM: Final = 1024
_MESSAGE_MAX: Final = 256 * 1024


def serve_control(number: int) -> None:
    """Load, freeze, serve the control socket, a descriptor, until its end."""
    os.set_inheritable(number, False)
    reserve_process_title(TITLE_ROOM)
    # its life ends with the control socket; Ctrl-C in the daemon's terminal is the daemon's
    install_signals()
    raise_oom_score()
    life = preload()
    set_process_title(["wherry-forkserver"], "wherry-fork")
    run(number, life)


def preload() -> Life:
    """Load what is loaded late elsewhere, walk the shim's ways, then hand all objects to the permanent generation."""
    bundled.preload()
    know_types()
    walk(own_streams)
    life = Life()
    settle()
    gc.collect()
    fill_holes()
    fill_heap()
    # nothing collected later looks at them, so their pages stay shared
    gc.freeze()
    life.template = template.take()
    return life


def run(control: int, life: Life) -> None:
    """Answer until the daemon closes its end.

    As little as can be happens between two forks: what this process writes to is no longer shared with the shims that
    were forked before, and every one of them is left with a copy of its own.
    """
    read, wait = os.read, os.waitpid
    machine = vfork.prepare()
    fork, child = (os.fork, _orphan) if machine is None else (machine.orphan, _alone)
    while True:
        try:
            data = read(control, _MESSAGE_MAX)
        except OSError:
            return
        if not data:
            return
        reach("forkserver.asked")
        middle = fork()
        if not middle:
            child(_answer, control, life, data)
        reach("forkserver.forked")
        wait(middle, 0)
        reach("forkserver.reaped")


def detach(function: Callable[..., object], *args: object) -> None:
    """Run a function in a process that is a child of init and leads its own session; it ends with the function."""
    middle = os.fork()
    if not middle:
        _orphan(function, *args)
    os.waitpid(middle, 0)


def _orphan(function: Callable[..., object], *args: object) -> NoReturn:
    """In a child: fork once more, and end; its child is init's."""
    try:
        if os.fork():
            os._exit(0)
    except BaseException as error:  # noqa: BLE001  # nothing may return into the caller's code
        log_exception(error)
        os._exit(1)
    _alone(function, *args)


def _alone(function: Callable[..., object], *args: object) -> NoReturn:
    """In a child of init: lead a session, do it, end."""
    status = 1
    try:
        os.setsid()
        function(*args)
        status = 0
    except BaseException as error:  # noqa: BLE001  # nothing may return into the caller's code
        log_exception(error)
    finally:
        os._exit(status)


def _answer(control: int, life: Life, data: bytes) -> None:
    operation, sequence, *words = split(data)
    try:
        if operation == "spawn":
            _shim(control, sequence, ShimWords(*words), life)
        elif operation == "delete":
            _delete(control, sequence, ShimWords(*words))
        elif operation == "ping":
            _reply(control, sequence)
        else:
            raise WherryError(f"the fork server knows no {operation!r}")
    except (WherryError, OSError, TypeError, ValueError) as error:
        _refuse(control, sequence, error)


# -- in the shim -----------------------------------------------------------------------------------------------------


def _shim(control: int, sequence: str, words: ShimWords, life: Life) -> None:
    parameters = parameters_of(words)
    own_streams(parameters.bundle, words.log_level)
    reach("shim.spawn.streams")
    listener = _listen(control, sequence, parameters)
    if listener is None:
        return
    reach("shim.spawn.bound")
    become_shim(parameters)
    if not _reply(control, sequence, str(os.getpid()), parameters.socket):
        _leave(listener, parameters.socket)
        return
    reach("shim.spawn.answered")
    os.close(control)
    life.serve(listener, parameters)


def _listen(control: int, sequence: str, parameters: Parameters) -> socket.SocketType | None:
    """The shim's socket; None where a shim listens there already, which is then the answer."""
    try:
        return bind(parameters.socket)
    except OSError:  # a file is there (whose?), or the path is too long for the short way
        try:
            return sockets.bind(parameters.socket, replace=True)
        except AlreadyExists:
            with sockets.connect(parameters.socket, timeout=1) as peer:
                pid = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
            _reply(control, sequence, str(pid), parameters.socket)
            return None


def _leave(listener: socket.SocketType, path: str) -> None:
    """End as a shim that nobody knows of: the daemon died before it was told, and the next one may have looked by then.

    A shim that has answered is there before that daemon's end, and so is found by the next one.
    """
    listener.close()
    with contextlib.suppress(OSError):
        os.unlink(path)


def _delete(control: int, sequence: str, words: ShimWords) -> None:
    set_process_title([NAME, "-namespace", words.namespace, "-id", words.id, "delete"], NAME)
    set_child_subreaper()
    remains = clean_up(words.namespace, words.id, words.bundle, words.state)
    _reply(control, sequence, str(remains.pid), str(remains.exit_status), str(remains.exited_at_ns), remains.reason)


# -- answers ---------------------------------------------------------------------------------------------------------


def _reply(control: int, sequence: str, *words: str) -> bool:
    """Answer the daemon; False where it is gone."""
    try:
        os.write(control, join(sequence, "", *words))
    except (BrokenPipeError, ConnectionResetError):
        return False
    return True


def _refuse(control: int, sequence: str, error: Exception) -> None:
    code = error.code if isinstance(error, WherryError) else Code.UNKNOWN
    text = error.message if isinstance(error, WherryError) else f"{type(error).__name__}: {error}"
    log("error", text)
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        os.write(control, join(sequence, str(int(code)), text))
