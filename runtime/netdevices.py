"""`linux.netDevices`: devices of the host's network namespace that move into the container's (specification 1.3).

A device loses its addresses on the way; those of global scope that were set for good are set again, as the
specification wants it, and the device is up afterwards. rtnetlink(7), spoken plainly.
"""

from __future__ import annotations

import _socket
import errno
import os
import struct

from wherry.linux import syscalls as sc
from wherry.linux.namespaces import open_namespace, path_of
from wherry.runtime.errors import ContainerError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_ERROR, _DONE = 2, 3
_NEWLINK, _GETLINK, _NEWADDR, _GETADDR = 16, 18, 20, 22
_REQUEST, _ACK, _EXCL, _CREATE, _DUMP = 1, 4, 0x200, 0x400, 0x300
_IFLA_IFNAME, _IFLA_NET_NS_FD = 3, 28
_IFA_FLAGS = 8
_UP = 1
_PERMANENT = 0x80
_UNIVERSE = 0
_HEADER, _LINK, _ADDRESS = struct.Struct("=IHHII"), struct.Struct("=BxHiII"), struct.Struct("=BBBBI")
_ATTRIBUTE = struct.Struct("=HH")


class _Netlink:
    """A route socket in the namespace that its maker is in."""

    def __init__(self) -> None:
        self._sock = _socket.socket(_socket.AF_NETLINK, _socket.SOCK_RAW | _socket.SOCK_CLOEXEC, 0)
        self._sequence = 0

    def close(self) -> None:
        self._sock.close()

    def ask(self, kind: int, flags: int, body: bytes) -> list[tuple[int, bytes]]:
        """Send a request; (type, payload) of the answers. OSError with what the kernel answers."""
        self._sequence += 1
        length = _HEADER.size + len(body)
        self._sock.sendall(_HEADER.pack(length, kind, flags | _REQUEST, self._sequence, 0) + body)
        found: list[tuple[int, bytes]] = []
        while True:
            data = self._sock.recv(1 << 18)
            while data:
                size, answer, _, _, _ = _HEADER.unpack_from(data)
                payload, data = data[_HEADER.size : size], data[(size + 3) & ~3 :]
                if answer == _ERROR:
                    (code,) = struct.unpack_from("=i", payload)
                    if code:
                        raise OSError(-code, os.strerror(-code))
                    return found
                if answer == _DONE:
                    return found
                found.append((answer, payload))


def _attribute(kind: int, value: bytes) -> bytes:
    return _ATTRIBUTE.pack(4 + len(value), kind) + value + bytes(-len(value) % 4)


def _attributes(data: bytes) -> list[tuple[int, bytes]]:
    found = []
    while len(data) >= 4:
        size, kind = _ATTRIBUTE.unpack_from(data)
        found.append((kind, data[4:size]))
        data = data[max(4, (size + 3) & ~3) :]
    return found


def move(devices: dict[str, Any], pid: int) -> None:
    """Move them into the network namespace of the process. ContainerError names the device."""
    home = open_namespace(path_of("network"))
    away = open_namespace(path_of("network", pid))
    here = _Netlink()
    try:
        sc.setns(away, sc.CLONE_NEWNET)
        try:
            there = _Netlink()
        finally:
            sc.setns(home, sc.CLONE_NEWNET)
        try:
            for name, item in devices.items():
                try:
                    _move(here, there, name, (item or {}).get("name") or name, away)
                except OSError as error:
                    text = "no such device" if error.errno == errno.ENODEV else (error.strerror or str(error)).lower()
                    raise ContainerError(f'linux.netDevices["{name}"]: can\'t be moved: {text}') from None
        finally:
            there.close()
    finally:
        here.close()
        os.close(away)
        os.close(home)


def _move(here: _Netlink, there: _Netlink, name: str, new: str, namespace: int) -> None:
    index = _index(here, name)
    addresses = _addresses(here, index)
    here.ask(_NEWLINK, _ACK, _LINK.pack(0, 0, index, 0, _UP))  # a device that is up can't be renamed
    moved = _attribute(_IFLA_NET_NS_FD, struct.pack("=i", namespace)) + _attribute(_IFLA_IFNAME, new.encode() + b"\0")
    here.ask(_NEWLINK, _ACK, _LINK.pack(0, 0, index, 0, 0) + moved)
    index = _index(there, new)
    for head, rest in addresses:
        family, prefix, _, scope, _ = _ADDRESS.unpack(head)
        body = _ADDRESS.pack(family, prefix, 0, scope, index) + b"".join(_attribute(*item) for item in rest)
        there.ask(_NEWADDR, _ACK | _CREATE | _EXCL, body)
    there.ask(_NEWLINK, _ACK, _LINK.pack(0, 0, index, _UP, _UP))


def _index(socket: _Netlink, name: str) -> int:
    wanted = _attribute(_IFLA_IFNAME, name.encode() + b"\0")
    answers = socket.ask(_GETLINK, _ACK, _LINK.pack(0, 0, 0, 0, 0) + wanted)
    return int(_LINK.unpack_from(answers[0][1])[2])


def _addresses(socket: _Netlink, index: int) -> list[tuple[bytes, list[tuple[int, bytes]]]]:
    """Permanent addresses of global scope, as (head, attributes)."""
    found = []
    for _, payload in socket.ask(_GETADDR, _DUMP, _ADDRESS.pack(0, 0, 0, 0, 0)):
        head, rest = payload[: _ADDRESS.size], _attributes(payload[_ADDRESS.size :])
        _, _, flags, scope, at = _ADDRESS.unpack(head)
        wide = dict(rest).get(_IFA_FLAGS)
        flags = struct.unpack("=I", wide)[0] if wide else flags
        if at == index and scope == _UNIVERSE and flags & _PERMANENT:
            # IFA_ADDRESS, IFA_LOCAL, IFA_BROADCAST; the label is the old name, the cache info the kernel's own
            found.append((head, [item for item in rest if item[0] in (1, 2, 4)]))
    return found
