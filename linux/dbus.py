"""A D-Bus client as small as one question to systemd: connect, call, wait for a signal. Blocking, without threads.

After the D-Bus specification 0.41 ("Marshaling", "Message Protocol", "Authentication Protocol"). A library would bring
asyncio (dbus-next, jeepney's integrations) or a C dependency, and cost more than the container; what is needed is here.
Values are Python's own: numbers, strings, bool, lists for arrays, dicts for a{..}, tuples for structs, bytes for `ay`,
and `(signature, value)` for variants.
"""

from __future__ import annotations

import _socket
import ctypes
import struct
import time

from wherry.core import places
from wherry.linux import syscalls as sc

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_NUMBERS = {"y": "B", "n": "h", "q": "H", "i": "i", "u": "I", "x": "q", "t": "Q", "d": "d"}
_ALIGNMENT = {"y": 1, "n": 2, "q": 2, "v": 1, "g": 1, "x": 8, "t": 8, "d": 8, "(": 8, "{": 8}  # all others: 4

CALL, RETURN, ERROR, SIGNAL = 1, 2, 3, 4
_PATH, _INTERFACE, _MEMBER, _ERROR_NAME, _REPLY_SERIAL, _DESTINATION, _SIGNATURE = 1, 2, 3, 4, 5, 6, 8
_FIELD_KINDS = {_PATH: "o", _INTERFACE: "s", _MEMBER: "s", _DESTINATION: "s", _SIGNATURE: "g"}
_MESSAGE_LIMIT = 1 << 27  # the specification's: 128 MiB
_BUS = "org.freedesktop.DBus"


class DBusError(Exception):
    """An error that the other side answered with: `name` is the D-Bus name of the kind."""

    def __init__(self, name: str, text: str) -> None:
        super().__init__(f"{name}: {text}" if text else name)
        self.name = name


def split(signature: str) -> list[str]:
    """The complete types in a signature: `sa(sv)u` → `s`, `a(sv)`, `u`."""
    types: list[str] = []
    start = position = 0
    while position < len(signature):
        while signature[position] == "a":
            position += 1
        if signature[position] in "({":
            depth = 0
            while True:
                depth += (signature[position] in "({") - (signature[position] in ")}")
                if not depth:
                    break
                position += 1
        position += 1
        types.append(signature[start:position])
        start = position
    return types


def marshal(signature: str, values: tuple[Any, ...]) -> bytes:
    """The body for the values, little-endian."""
    out = bytearray()
    for kind, value in zip(split(signature), values, strict=True):
        _put(out, kind, value)
    return bytes(out)


def _pad(out: bytearray, alignment: int) -> None:
    out += bytes(-len(out) % alignment)


def _put(out: bytearray, kind: str, value: Any) -> None:
    first = kind[0]
    _pad(out, _ALIGNMENT.get(first, 4))
    if first in _NUMBERS:
        out += struct.pack("<" + _NUMBERS[first], value)
    elif first == "b":
        out += struct.pack("<I", bool(value))
    elif first in "sog":
        raw = str(value).encode()
        out += (bytes([len(raw)]) if first == "g" else struct.pack("<I", len(raw))) + raw + b"\0"
    elif first == "v":
        signature, inner = value
        _put(out, "g", signature)
        _put(out, signature, inner)
    elif first == "a":
        _put_array(out, kind[1:], value)
    else:  # a struct, or an entry of a dict
        for part, item in zip(split(kind[1:-1]), value, strict=True):
            _put(out, part, item)


def _put_array(out: bytearray, kind: str, values: Any) -> None:
    at = len(out)
    out += b"\0\0\0\0"
    _pad(out, _ALIGNMENT.get(kind[0], 4))  # not part of the length
    start = len(out)
    if kind == "y":
        out += bytes(values)
    else:
        for item in values.items() if isinstance(values, dict) else values:
            _put(out, kind, item)
    struct.pack_into("<I", out, at, len(out) - start)


class Reader:
    """Takes values from a message; `start` is where alignment counts from."""

    def __init__(self, data: bytes, little: bool = True) -> None:
        self.data = data
        self.at = 0
        self._order = "<" if little else ">"

    def values(self, signature: str) -> tuple[Any, ...]:
        return tuple(self.value(kind) for kind in split(signature))

    def value(self, kind: str) -> Any:
        first = kind[0]
        self.at += -self.at % _ALIGNMENT.get(first, 4)
        if first in _NUMBERS:
            return self._number(_NUMBERS[first])
        if first == "b":
            return bool(self._number("I"))
        if first in "sog":
            length = self._number("B" if first == "g" else "I")
            text = self.data[self.at : self.at + length].decode("utf-8", "replace")
            self.at += length + 1
            return text
        if first == "v":
            signature = self.value("g")
            return signature, self.value(signature)
        if first == "a":
            return self._array(kind[1:])
        return self.values(kind[1:-1])

    def _number(self, code: str) -> Any:
        found = struct.unpack_from(self._order + code, self.data, self.at)[0]
        self.at += struct.calcsize("<" + code)
        return found

    def _array(self, kind: str) -> Any:
        length = self._number("I")
        self.at += -self.at % _ALIGNMENT.get(kind[0], 4)
        end = self.at + length
        if end > len(self.data):
            raise DBusError("org.freedesktop.DBus.Error.InvalidSignature", "an array is longer than its message")
        if kind == "y":
            raw, self.at = self.data[self.at : end], end
            return raw
        items = []
        while self.at < end:
            items.append(self.value(kind))
        return dict(items) if kind[0] == "{" else items


class Message:
    """One message that came in."""

    __slots__ = ("body", "fields", "kind", "serial")

    def __init__(self, kind: int, serial: int, fields: dict[int, Any], body: tuple[Any, ...]) -> None:
        self.kind = kind
        self.serial = serial
        self.fields = fields
        self.body = body

    @property
    def member(self) -> str:
        return str(self.fields.get(_MEMBER, ""))


_SIOCOUTQ = 0x5411
_READ_LOOKS, _READ_PAUSE = 2000, 0.001  # seconds


class Connection:
    """One connection. bus: whether a message bus is at the other end (it wants to be greeted), or a peer itself."""

    def __init__(self, path: str, *, bus: bool = True, timeout: float = 30.0) -> None:
        self._sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
        self._serial = 0
        self._buffer = b""
        self._bus = bus
        self._signals: list[Message] = []
        try:
            self._sock.settimeout(timeout)
            self._sock.connect(path)
            self._authenticate()
            if bus:
                self.call(_BUS, "/org/freedesktop/DBus", _BUS, "Hello")
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._sock.close()

    def _authenticate(self) -> None:
        """EXTERNAL: the kernel says who we are, as the host numbers users."""
        identity = str(places.user_id()).encode().hex()
        self._sock.sendall(f"\0AUTH EXTERNAL {identity}\r\n".encode())
        line = b""
        while not line.endswith(b"\r\n"):
            line += self._more()
        if not line.startswith(b"OK"):
            raise DBusError("org.freedesktop.DBus.Error.AuthFailed", line.decode("ascii", "replace").strip())
        self._sock.sendall(b"BEGIN\r\n")
        if not self._bus:
            self._wait_until_read()

    def _wait_until_read(self) -> None:
        """systemd's private socket loses a wake-up for what it reads together with BEGIN, and then answers nobody: so
        the first message goes when BEGIN has been read (tcp(7)'s SIOCOUTQ: what the other side hasn't taken yet)."""
        left = ctypes.c_int(1)
        for _ in range(_READ_LOOKS):
            sc.ioctl(self._sock.fileno(), _SIOCOUTQ, left)
            if left.value == 0:
                return
            time.sleep(_READ_PAUSE)

    def _more(self) -> bytes:
        chunk = self._sock.recv(65536)
        if not chunk:
            raise DBusError("org.freedesktop.DBus.Error.Disconnected", "the bus closed the connection")
        return chunk

    def _take(self, count: int) -> bytes:
        while len(self._buffer) < count:
            self._buffer += self._more()
        taken, self._buffer = self._buffer[:count], self._buffer[count:]
        return taken

    def call(
        self, destination: str, path: str, interface: str, member: str, signature: str = "", *values: Any
    ) -> tuple[Any, ...]:
        """Call a method and wait for its answer. DBusError for an error of the other side, TimeoutError."""
        self._serial += 1
        body = marshal(signature, values)
        named = [(_PATH, path), (_INTERFACE, interface), (_MEMBER, member)]
        named += [(_DESTINATION, destination)] if self._bus else []
        named += [(_SIGNATURE, signature)] if signature else []
        fields = [(code, (_FIELD_KINDS[code], value)) for code, value in named]
        head = bytearray(marshal("yyyyuua(yv)", (ord("l"), CALL, 0, 1, len(body), self._serial, fields)))
        _pad(head, 8)
        self._sock.sendall(bytes(head) + body)
        while True:
            message = self._receive()
            if message.kind == SIGNAL:
                self._signals.append(message)
            elif message.fields.get(_REPLY_SERIAL) == self._serial:
                if message.kind == ERROR:
                    text = message.body[0] if message.body and isinstance(message.body[0], str) else ""
                    raise DBusError(str(message.fields.get(_ERROR_NAME, "error")), text)
                return message.body

    def subscribe(self, rule: str) -> None:
        """Ask a bus for the signals of this match rule; a peer sends what it has anyway."""
        if self._bus:
            self.call(_BUS, "/org/freedesktop/DBus", _BUS, "AddMatch", "s", rule)

    def next_signal(self) -> Message:
        """The next signal, from those that came meanwhile first; TimeoutError."""
        while not self._signals:
            message = self._receive()
            if message.kind == SIGNAL:
                return message
        return self._signals.pop(0)

    def _receive(self) -> Message:
        head = self._take(16)
        little = head[:1] == b"l"
        order = "<" if little else ">"
        size, serial, length = struct.unpack(order + "III", head[4:])
        if size > _MESSAGE_LIMIT or length > _MESSAGE_LIMIT:
            raise DBusError("org.freedesktop.DBus.Error.LimitsExceeded", "a message is too long")
        reader = Reader(head + self._take(length + -length % 8), little)
        reader.at = 12
        fields = {code: value for code, (_, value) in reader.value("a(yv)")}
        body = Reader(self._take(size), little).values(str(fields.get(_SIGNATURE, "")))
        return Message(head[1], serial, fields, body)
