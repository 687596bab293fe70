"""The messages of DNS as far as a name server needs them that knows names of its own: RFC 1035, 3596, 6891.

Bytes in, values out; nothing here waits or sends. What comes from containers is not to be trusted: a message that isn't
as it should be raises ValueError.
"""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Sequence
from typing import NamedTuple

A, PTR, AAAA, ANY = 1, 12, 28, 255
IN = 1
NOERROR, FORMERR, SERVFAIL, NXDOMAIN, NOTIMP, REFUSED = 0, 1, 2, 3, 4, 5

_HEADER = struct.Struct("!HHHHHH")
_QR, _AA, _TC, _RD, _RA = 0x8000, 0x0400, 0x0200, 0x0100, 0x0080
# what a client takes over UDP that doesn't say more (RFC 1035, 4.2.1)
UDP_SIZE = 512


class Query(NamedTuple):
    """A question. `name` is in lower case without the last dot; `question` are its bytes, to be sent back."""

    id: int
    flags: int
    name: str
    kind: int
    kind_class: int
    question: bytes

    @property
    def opcode(self) -> int:
        return self.flags >> 11 & 0xF


def parse(data: bytes) -> Query:
    """The one question of a query. Raises ValueError."""
    if len(data) < _HEADER.size:
        raise ValueError("shorter than a header")
    identity, flags, questions, *_ = _HEADER.unpack_from(data)
    if flags & _QR:
        raise ValueError("no query")
    if questions != 1:
        raise ValueError(f"{questions} questions")
    labels, at = _name(data, _HEADER.size)
    if at + 4 > len(data):
        raise ValueError("the question is cut short")
    kind, kind_class = struct.unpack_from("!HH", data, at)
    name = ".".join(labels).lower()
    return Query(identity, flags, name, kind, kind_class, data[_HEADER.size : at + 4])


def _name(data: bytes, at: int) -> tuple[list[str], int]:
    """The labels of a name in a question, where nothing is compressed, and where it ends."""
    labels: list[str] = []
    total = 0
    while True:
        if at >= len(data):
            raise ValueError("the name is cut short")
        length = data[at]
        at += 1
        if length == 0:
            return labels, at
        total += length + 1
        if length > 63 or total > 254 or at + length > len(data):
            raise ValueError("the name is malformed")
        labels.append(data[at : at + length].decode("latin-1"))
        at += length


def answer(query: Query, records: Sequence[tuple[int, bytes]] = (), code: int = NOERROR, ttl: int = 0) -> bytes:
    """An answer with authority; `records` are types and data, all of the name that was asked for.

    A `ttl` of 0: containers come and go, and asking again costs a packet to the next interface.
    """
    flags = _QR | _AA | _RA | (query.flags & _RD) | (query.opcode << 11) | code
    header = _HEADER.pack(query.id, flags, 1, len(records), 0, 0)
    body = b"".join(
        # 0xC00C: the name is where the question's is
        struct.pack("!HHHIH", 0xC00C, kind, IN, ttl, len(data)) + data
        for kind, data in records
    )
    return header + query.question + body


def refuse(data: bytes, code: int) -> bytes | None:
    """An answer to a message that can't be read; None where it has not even an id."""
    if len(data) < _HEADER.size:
        return None
    identity, flags, *_ = _HEADER.unpack_from(data)
    return None if flags & _QR else _HEADER.pack(identity, _QR | _RA | (flags & (_RD | 0x7800)) | code, 0, 0, 0, 0)


def truncated(query: Query) -> bytes:
    """An empty answer that sends the client to TCP."""
    return _HEADER.pack(query.id, _QR | _TC | _RA | (query.flags & _RD), 1, 0, 0, 0) + query.question


def address(text: str) -> tuple[int, bytes]:
    """The record of an address: A or AAAA."""
    parsed = ipaddress.ip_address(text)
    return (A if parsed.version == 4 else AAAA), parsed.packed


def name(text: str) -> tuple[int, bytes]:
    """The record of a name: PTR. Raises ValueError for one that is too long."""
    labels = [label.encode("latin-1", "replace") for label in text.split(".")]
    if any(not 1 <= len(label) <= 63 for label in labels):
        raise ValueError(f"no name: {text}")
    return PTR, b"".join(bytes([len(label)]) + label for label in labels) + b"\0"


def reversed_address(text: str) -> str | None:
    """The address that a name below in-addr.arpa or ip6.arpa stands for, None where it is no such name."""
    labels = text.split(".")
    try:
        if labels[-2:] == ["in-addr", "arpa"] and len(labels) == 6:
            return str(ipaddress.IPv4Address(".".join(reversed(labels[:4]))))
        if labels[-2:] == ["ip6", "arpa"] and len(labels) == 34:
            digits = "".join(reversed(labels[:32]))
            return str(ipaddress.IPv6Address(int(digits, 16)))
    except ValueError:
        return None
    return None


def is_answer_to(data: bytes, identity: int, question: bytes) -> bool:
    """Whether a message from outside answers this question; whoever guesses at ids must also guess the port."""
    if len(data) < _HEADER.size:
        return False
    found, flags, *_ = _HEADER.unpack_from(data)
    # a server may spell the name in other letters, but not another name
    echoed = data[_HEADER.size : _HEADER.size + len(question)]
    return found == identity and bool(flags & _QR) and (not echoed or echoed.lower() == question.lower())


def with_id(data: bytes, identity: int) -> bytes:
    """The same message under another id."""
    return struct.pack("!H", identity) + data[2:]
