"""NOTIFY_SOCKET: a container that is a service of systemd's says that it is ready (sd_notify(3)).

The host's socket can't be shown to the container. `create` binds a folder of the state's on /run/notify there;
`start` listens in it, passes READY=1 on, and says which process is the service's main one, as runc does.
"""

from __future__ import annotations

import _socket
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from wherry.runtime.state import State

INSIDE = "/run/notify"
_NAME = "notify.sock"
_FOLDER = "notify"
_LOOK = 0.1  # seconds between two looks at whether the container still lives
_MESSAGE_LIMIT = 4096


def prepare(config: dict[str, Any], folder: str) -> dict[str, Any]:
    """The configuration with the mount and the variable; `folder`: the state's. What was given is left as it was."""
    process = dict(config["process"])
    process["env"] = [item for item in process.get("env") or () if not item.startswith("NOTIFY_SOCKET=")]
    process["env"].append(f"NOTIFY_SOCKET={INSIDE}/{_NAME}")
    mount = {
        "destination": INSIDE,
        "type": "bind",
        "source": os.path.join(folder, _FOLDER),
        "options": ["bind", "nosuid", "noexec", "nodev", "ro"],
    }
    return {**config, "process": process, "mounts": [*(config.get("mounts") or ()), mount]}


def make_folder(folder: str) -> None:
    os.mkdir(os.path.join(folder, _FOLDER), 0o755)


def remove(folder: str) -> None:
    """What `make_folder` and `Proxy` have made."""
    path = os.path.join(folder, _FOLDER)
    for name in os.listdir(path):
        os.unlink(os.path.join(path, name))
    os.rmdir(path)


class Proxy:
    """Listens from before the program runs; `relay` waits until it is ready or gone."""

    def __init__(self, state: State, host: str) -> None:
        self._state = state
        self._host = "\0" + host[1:] if host.startswith("@") else host
        self._sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_DGRAM | _socket.SOCK_CLOEXEC)
        folder = os.open(os.path.join(state.folder, _FOLDER), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self._sock.bind(f"/proc/self/fd/{folder}/{_NAME}")
            os.chmod(_NAME, 0o777, dir_fd=folder)
        finally:
            os.close(folder)

    def relay(self) -> None:
        """Pass the container's READY=1 on, and say MAINPID."""
        self._sock.settimeout(_LOOK)
        out = _socket.socket(_socket.AF_UNIX, _socket.SOCK_DGRAM | _socket.SOCK_CLOEXEC)
        try:
            out.connect(self._host)
            while self._state.alive():
                try:
                    said = self._sock.recv(_MESSAGE_LIMIT)
                except TimeoutError:
                    continue
                ready = [line for line in said.split(b"\n") if line.startswith(b"READY=")]
                if ready:
                    out.send(ready[0] + b"\n")
                    out.send(f"MAINPID={self._state.pid}\n".encode())
                    return
        finally:
            out.close()

    def close(self) -> None:
        self._sock.close()


def wanted(state: State) -> str:
    """The host's socket, if `create` has prepared the container for it and there is one."""
    host = os.environ.get("NOTIFY_SOCKET", "")
    return host if host and os.path.isdir(os.path.join(state.folder, _FOLDER)) else ""
