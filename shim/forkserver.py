"""The fork server: `python -I -m wherry.shim.forkserver --control-fd N`, started by the daemon, parent of no shim.

It has everything loaded that a shim and the bundled runtime ever need, so that a shim begins as a fork: in 2 ms, with
its memory shared until written. It has one thread for life, keeps nothing about shims and ends with its control socket.

    daemon                     fork server                 shim
      │  {"op":"spawn",…}          │                         │
      ├───────────────────────────>│ fork, fork again        │
      │                            ├────────────────────────>│ session, bind, listen
      │  {"seq":…,"pid":…,"socket":…}                        │ (a child of init: its parent has exited)
      │<─────────────────────────────────────────────────────┤
      │            connect, Create, …                        │ serves

The control socket is SOCK_SEQPACKET: a message is one JSON object, whoever sends it, so the shim answers by itself.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import socket
import struct
import sys
from collections.abc import Callable
from typing import Any, Final, NoReturn

from wherry.core.errors import AlreadyExists, Code, WherryError
from wherry.linux.process import reserve_process_title, set_child_subreaper, set_process_title
from wherry.proto.ttrpc import sockets
from wherry.runtime import container as bundled
from wherry.runtime.sealed import ensure_sealed
from wherry.shim.cleanup import clean_up
from wherry.shim.log import log, log_exception, take_over
from wherry.shim.serving import NAME, Life, Parameters, become_shim, install_signals
from wherry.shim.warming import walk

TASK_API_VERSION: Final = 3
# what a title may hold: the longest id and namespace (76 each), and the address
TITLE_ROOM: Final = 1024
_MESSAGE_MAX: Final = 256 * 1024


def main() -> None:
    """The command: load, freeze, serve the control socket until its end."""
    if len(sys.argv) != 3 or sys.argv[1] != "--control-fd" or not sys.argv[2].isdigit():
        sys.exit("usage: python -I -m wherry.shim.forkserver --control-fd N\n\nStarted by wherryd, not by hand.")
    number = int(sys.argv[2])
    ensure_sealed()
    control = socket.socket(fileno=number)
    os.set_inheritable(number, False)
    reserve_process_title(TITLE_ROOM)
    set_process_title(["wherry-forkserver"], "wherry-fork")
    # its life ends with the control socket; Ctrl-C in the daemon's terminal is the daemon's
    install_signals()
    run(control, preload())


def preload() -> Life:
    """Load what is loaded late elsewhere, walk the shim's ways, then hand all objects to the permanent generation."""
    bundled.preload()
    walk()
    life = Life()
    gc.collect()
    # nothing collected later looks at them, so their pages stay shared
    gc.freeze()
    return life


def run(control: socket.socket, life: Life) -> None:
    """Answer until the daemon closes its end.

    As little as can be happens between two forks: what this process writes to is no longer shared with the shims that
    were forked before, and every one of them is left with a copy of its own.
    """
    receive, fork, wait = control.recv, os.fork, os.waitpid
    while True:
        try:
            data = receive(_MESSAGE_MAX)
        except OSError:
            return
        if not data:
            return
        middle = fork()
        if not middle:
            _orphan(_answer, control, life, data)
        wait(middle, 0)


def detach(function: Callable[..., object], *args: object) -> None:
    """Run a function in a process that is a child of init and leads its own session; it ends with the function."""
    middle = os.fork()
    if not middle:
        _orphan(function, *args)
    os.waitpid(middle, 0)


def _orphan(function: Callable[..., object], *args: object) -> NoReturn:
    status = 1
    try:
        if os.fork():
            status = 0
        else:
            os.setsid()
            function(*args)
            status = 0
    except BaseException as error:  # noqa: BLE001  # nothing may return into the caller's code
        log_exception(error)
    finally:
        os._exit(status)


def _answer(control: socket.socket, life: Life, data: bytes) -> None:
    request = json.loads(data)
    operation = request.pop("op", "")
    sequence = int(request.pop("seq", 0))
    try:
        if operation == "spawn":
            _shim(control, sequence, request, life)
        elif operation == "delete":
            _delete(control, sequence, request)
        elif operation == "ping":
            _reply(control, sequence, {})
        else:
            raise WherryError(f"the fork server knows no {operation!r}")
    except (WherryError, OSError, KeyError, TypeError) as error:
        _refuse(control, sequence, error)


# -- in the shim -----------------------------------------------------------------------------------------------------


def _shim(control: socket.socket, sequence: int, request: dict[str, Any], life: Life) -> None:
    parameters = _parameters(request)
    _own_streams(parameters.bundle, str(request.get("log_level", "info")))
    listener = _listen(control, sequence, parameters)
    if listener is None:
        return
    become_shim(parameters)
    _reply(control, sequence, {"pid": os.getpid(), "socket": parameters.socket, "version": TASK_API_VERSION})
    control.close()
    life.serve(listener, parameters)


def _parameters(request: dict[str, Any]) -> Parameters:
    return Parameters(
        namespace=request["namespace"],
        id=request["id"],
        bundle=request["bundle"],
        socket=request["socket"],
        ttrpc_address=request["ttrpc_address"],
        grpc_address=request.get("grpc_address", ""),
        runtime_root=request.get("state", ""),
        shim_cgroup=request.get("shim_cgroup", ""),
        oom_score_adj=request.get("oom_score_adj"),
    )


def _own_streams(bundle: str, level: str) -> None:
    """Nothing of the daemon's terminal or journal stays open in a shim; its log is a file beside the container."""
    os.chdir(bundle)
    fd = os.open("shim.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    os.dup2(fd, 2)
    os.close(fd)
    take_over(level)


def _listen(control: socket.socket, sequence: int, parameters: Parameters) -> socket.socket | None:
    """The shim's socket; None where a shim listens there already, which is then the answer."""
    try:
        return sockets.bind(parameters.socket, replace=True)
    except AlreadyExists:
        with sockets.connect(parameters.socket, timeout=1) as peer:
            pid = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
        _reply(control, sequence, {"pid": pid, "socket": parameters.socket, "version": TASK_API_VERSION})
        return None


def _delete(control: socket.socket, sequence: int, request: dict[str, Any]) -> None:
    parameters = _parameters(request)
    set_process_title([NAME, "-namespace", parameters.namespace, "-id", parameters.id, "delete"], NAME)
    set_child_subreaper()
    remains = clean_up(parameters.namespace, parameters.id, parameters.bundle, parameters.runtime_root)
    _reply(
        control,
        sequence,
        {
            "pid": remains.pid,
            "exit_status": remains.exit_status,
            "exited_at_ns": remains.exited_at_ns,
            "reason": remains.reason,
        },
    )


# -- answers ---------------------------------------------------------------------------------------------------------


def _reply(control: socket.socket, sequence: int, fields: dict[str, Any]) -> None:
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the daemon is gone; its successor finds the shim
        control.send(json.dumps({"seq": sequence, **fields}).encode())


def _refuse(control: socket.socket, sequence: int, error: Exception) -> None:
    code = error.code if isinstance(error, WherryError) else Code.UNKNOWN
    text = error.message if isinstance(error, WherryError) else f"{type(error).__name__}: {error}"
    log("error", text)
    _reply(control, sequence, {"error": text, "code": int(code)})


if __name__ == "__main__":
    main()
