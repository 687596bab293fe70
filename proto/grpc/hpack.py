"""HPACK, the compression of HTTP/2's header fields (RFC 7541): what a server that speaks gRPC needs of it.

Decoding is complete. Encoding uses neither table nor Huffman code: what a gRPC server says is a handful of short
fields, most of them constant.
"""

from __future__ import annotations

import re
from collections import deque
from typing import Final

# appendix A; names without a value have "" there
_STATIC: Final[tuple[tuple[str, str], ...]] = (
    (":authority", ""),
    (":method", "GET"),
    (":method", "POST"),
    (":path", "/"),
    (":path", "/index.html"),
    (":scheme", "http"),
    (":scheme", "https"),
    *((":status", code) for code in ("200", "204", "206", "304", "400", "404", "500")),
    ("accept-charset", ""),
    ("accept-encoding", "gzip, deflate"),
    *(
        (name, "")
        for name in [
            "accept-language",
            "accept-ranges",
            "accept",
            "access-control-allow-origin",
            "age",
            "allow",
            "authorization",
            "cache-control",
            "content-disposition",
            "content-encoding",
            "content-language",
            "content-length",
            "content-location",
            "content-range",
            "content-type",
            "cookie",
            "date",
            "etag",
            "expect",
            "expires",
            "from",
            "host",
            "if-match",
            "if-modified-since",
            "if-none-match",
            "if-range",
            "if-unmodified-since",
            "last-modified",
            "link",
            "location",
            "max-forwards",
            "proxy-authenticate",
            "proxy-authorization",
            "range",
            "referer",
            "refresh",
            "retry-after",
            "server",
            "set-cookie",
            "strict-transport-security",
            "transfer-encoding",
            "user-agent",
            "vary",
            "via",
            "www-authenticate",
        ]
    ),
)

# appendix B: the length of each byte's code in bits, and that of EOS. The codes follow from them, as the code is
# canonical: shorter ones first, those of one length in the order of their bytes.
_CODE_LENGTHS: Final = bytes.fromhex(
    "0d171c1c1c1c1c1c1c181e1c1c1e1c1c1c1c1c1c1c1c1e1c1c1c1c1c1c1c1c1c060a0a0c0d06080b0a0a080b08060606"
    "0505050606060606060607080f060c0a0d06070707070707070707070707070707070707070707070807080d130d0e06"
    "0f05060506050606060507070606060506070605050607070707070f0b0e0d1c14161414161616171617171717171817"
    "181816171817171717151617161717181615141616171715171616181516171715151615171617171416161617161617"
    "1a1a1413161716191a1a1a1b1b1a181913151a1b1b1a1b1815151a1a1c1b1b1b14181415161515171616191918181a17"
    "1a1b1a1a1b1b1b1b1b1c1b1b1b1b1b1a1e"
)

_EOS: Final = 256
_TABLE_SIZE: Final = 4096  # bytes; SETTINGS_HEADER_TABLE_SIZE, whose default is not changed here
_ENTRY_OVERHEAD: Final = 32  # section 4.1
# bytes of all fields of one header block after decoding (SETTINGS_MAX_HEADER_LIST_SIZE): four times what gRPC's C core
# takes
MAX_LIST_SIZE: Final = 1 << 16
# decoded strings that are kept, and the longest of them: clients repeat themselves
_CACHE_LIMIT: Final = 512
_CACHED_STRING: Final = 128


_NAME: Final = re.compile(r":?[!#$%&'*+\-.^_`|~0-9a-z]+")
_NO_VALUE: Final = re.compile(r"[\0\r\n]")


class HpackError(ValueError):
    """A header block that is none; the connection can't go on (COMPRESSION_ERROR)."""


class Malformed(HpackError):
    """A field that HTTP/2 forbids (RFC 9113, 8.2.1): upper case or other characters in its name, NUL, CR or LF in its
    value. It could be told by a stream error; a client that sends it is broken or hostile."""


class ListTooLarge(HpackError):
    """A header block with more than MAX_LIST_SIZE in it. It was decoded to its end: the connection can go on."""


class Decoder:
    """The state of one connection's receiving side."""

    def __init__(self) -> None:
        self._dynamic: deque[tuple[str, str]] = deque()  # newest first
        self._size = 0
        self._limit = _TABLE_SIZE
        self._strings: dict[bytes, str] = {}

    def decode(self, block: bytes) -> list[tuple[str, str]]:
        """The fields of a header block in order; bytes are taken as latin-1. Raises HpackError."""
        try:
            return self._decode(block)
        except IndexError:
            raise HpackError("header block ends too early, or names an entry that isn't there") from None

    def _decode(self, block: bytes) -> list[tuple[str, str]]:
        fields: list[tuple[str, str]] = []
        at, total, end = 0, 0, len(block)
        while at < end:
            first = block[at]
            if first & 0x80:  # indexed (6.1)
                index, at = _integer(block, at, 0x7F)
                field = self._entry(index)
            elif first & 0x40:  # literal, to be added to the table (6.2.1)
                field, at = self._literal(block, at, 0x3F)
                self._add(field)
            elif first & 0x20:  # a change of the table's size (6.3)
                size, at = _integer(block, at, 0x1F)
                if size > _TABLE_SIZE or total:
                    raise HpackError("dynamic table size update out of bounds or out of place")
                self._limit = size
                self._evict()
                continue
            else:  # literal, without or never indexed (6.2.2, 6.2.3)
                field, at = self._literal(block, at, 0x0F)
            total += len(field[0]) + len(field[1]) + _ENTRY_OVERHEAD
            if total <= MAX_LIST_SIZE:
                fields.append(field)
        if total > MAX_LIST_SIZE:
            raise ListTooLarge(f"header list is larger than {MAX_LIST_SIZE} bytes")
        return fields

    def _entry(self, index: int) -> tuple[str, str]:
        if index == 0:
            raise HpackError("index 0")
        return _STATIC[index - 1] if index <= len(_STATIC) else self._dynamic[index - len(_STATIC) - 1]

    def _literal(self, block: bytes, at: int, mask: int) -> tuple[tuple[str, str], int]:
        index, at = _integer(block, at, mask)
        if index:
            name = self._entry(index)[0]
        else:
            name, at = self._string(block, at)
            if _NAME.fullmatch(name) is None:
                raise Malformed(f"field name {name[:100]!r}")
        value, at = self._string(block, at)
        if _NO_VALUE.search(value) is not None:
            raise Malformed(f"value of the field {name}")
        return (name, value), at

    def _string(self, block: bytes, at: int) -> tuple[str, int]:
        huffman = block[at] & 0x80
        length, at = _integer(block, at, 0x7F)
        end = at + length
        if end > len(block):
            raise HpackError("string ends behind its block")
        data = block[at:end]
        if not huffman:
            return data.decode("latin-1"), end
        text = self._strings.get(data)
        if text is None:
            text = huffman_decode(data).decode("latin-1")
            if length <= _CACHED_STRING:
                if len(self._strings) >= _CACHE_LIMIT:
                    self._strings.clear()
                self._strings[data] = text
        return text, end

    def _add(self, field: tuple[str, str]) -> None:
        self._dynamic.appendleft(field)
        self._size += len(field[0]) + len(field[1]) + _ENTRY_OVERHEAD
        self._evict()

    def _evict(self) -> None:
        while self._size > self._limit:
            name, value = self._dynamic.pop()
            self._size -= len(name) + len(value) + _ENTRY_OVERHEAD


def encode(fields: list[tuple[str, str]]) -> bytes:
    """A header block of literals that nobody adds to a table (6.2.2)."""
    block = bytearray()
    for name, value in fields:
        block.append(0)
        for text in (name, value):
            data = text.encode("latin-1")
            block += _length(len(data))
            block += data
    return bytes(block)


def huffman_decode(data: bytes) -> bytes:
    """Undo the Huffman code (5.2). Raises HpackError for a code that is none, for EOS, and for a wrong padding."""
    out = bytearray()
    code, bits = 0, 0
    for byte in data:
        code = code << 8 | byte
        bits += 8
        while (found := _next_symbol(code, bits)) is not None:
            symbol, length = found
            out.append(symbol)
            bits -= length
            code &= (1 << bits) - 1
    if bits > 7 or code != (1 << bits) - 1:
        raise HpackError("padding of a string is not the start of EOS")
    return bytes(out)


def _next_symbol(code: int, bits: int) -> tuple[int, int] | None:
    """The symbol at the head of so many bits, and its length; None where more bits are needed."""
    for length, first, symbols in _CODES:
        if length > bits:
            return None
        offset = (code >> (bits - length)) - first
        if offset < len(symbols):
            if symbols[offset] == _EOS:
                raise HpackError("EOS in a string")
            return symbols[offset], length
    raise HpackError("no such Huffman code")


def _codes() -> tuple[tuple[int, int, tuple[int, ...]], ...]:
    """The canonical code: for each length its first code and its symbols in order."""
    table, code, before = [], 0, 0
    for length in sorted(set(_CODE_LENGTHS)):
        symbols = tuple(symbol for symbol, bits in enumerate(_CODE_LENGTHS) if bits == length)
        code <<= length - before
        table.append((length, code, symbols))
        code += len(symbols)
        before = length
    return tuple(table)


_CODES: Final = _codes()


def _integer(block: bytes, at: int, mask: int) -> tuple[int, int]:
    """An integer behind a prefix of as many bits as the mask has (5.1), and where it ends."""
    value = block[at] & mask
    at += 1
    if value < mask:
        return value, at
    shift = 0
    while True:
        byte = block[at]
        at += 1
        value += (byte & 0x7F) << shift
        shift += 7
        if not byte & 0x80:
            return value, at
        if shift > 28:
            raise HpackError("integer is too large")


def _length(value: int) -> bytes:
    if value < 0x7F:
        return bytes((value,))
    out = bytearray((0x7F,))
    value -= 0x7F
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
