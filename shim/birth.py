"""What a process takes up to be the shim of one container: its words, its folder and log, its socket."""

from __future__ import annotations

import os
import socket
from typing import Final, NamedTuple

from wherry.linux.process import set_process_title
from wherry.proto.ttrpc import sockets
from wherry.shim.log import take_over
from wherry.shim.words import ShimWords

NAME: Final = "containerd-shim-wherry-v1"
_LISTENER: Final = int(socket.SOCK_STREAM) | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC


class Parameters(NamedTuple):
    """What a shim is told at its start. `bundle` is also its working directory; `socket` the path it listens on."""

    namespace: str
    id: str
    bundle: str
    socket: str
    ttrpc_address: str = ""
    grpc_address: str = ""
    publish_binary: str = ""
    runtime_root: str = ""
    shim_cgroup: str = ""
    oom_score_adj: int | None = None


def parameters_of(words: ShimWords) -> Parameters:
    """What the daemon's words say."""
    return Parameters(
        words.namespace,
        words.id,
        words.bundle,
        words.socket,
        words.ttrpc_address,
        words.grpc_address,
        "",
        words.state,
        words.shim_cgroup,
        int(words.oom_score_adj) if words.oom_score_adj else None,
    )


def own_streams(bundle: str, level: str) -> None:
    """Nothing of the daemon's terminal or journal stays open in a shim; its log is a file beside the container."""
    os.chdir(bundle)
    fd = os.open("shim.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    os.dup2(fd, 2)
    os.close(fd)
    take_over(level)


def bind(path: str) -> socket.SocketType:
    """`sockets.bind` for the common case, with the C type alone: the class around it costs a shim 40 kB."""
    listener = socket.SocketType(socket.AF_UNIX, _LISTENER)
    try:
        os.fchmod(listener.fileno(), 0o600)
        listener.bind(path)
        listener.listen(sockets.BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


def show(parameters: Parameters) -> None:
    """Tell `ps` whose shim this is."""
    title = [NAME, "-namespace", parameters.namespace, "-id", parameters.id, "-address", parameters.grpc_address]
    set_process_title(title, NAME)
