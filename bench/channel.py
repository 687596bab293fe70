"""A gRPC client that costs next to nothing: one connection, calls of one message each way, as many at once as you like.

The client runs on the processors that it measures, and what it takes of them is the same for either daemon: with grpcio
3.8 ms of CPU for each container, beside 25 of Wherry's and 70 of containerd's, which makes two daemons more alike than
they are.
"""

from __future__ import annotations

import asyncio
import struct
from typing import Any, Self
from urllib.parse import unquote

from google.protobuf.message import Message

from wherry.proto.grpc import hpack
from wherry.proto.grpc.http2 import (
    ACK,
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    PING,
    PREFACE,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    frame,
)
from wherry.proto.service import Method

_HEAD = struct.Struct(">HBBBL")
_LARGEST_WINDOW, _DEFAULT_WINDOW = (1 << 31) - 1, 65_535
_NO_PUSH, _INITIAL_WINDOW = 2, 4


class CallFailed(RuntimeError):
    """What the daemon answered instead: the code of gRPC and its text."""


class _Call:
    __slots__ = ("answer", "body", "path", "response")

    def __init__(self, method: Method, answer: asyncio.Future[Any]) -> None:
        self.path = method.path
        self.response = method.response
        self.answer = answer
        self.body = b""


class Channel(asyncio.Protocol):
    """A connection to a daemon's unix socket. Requests have to fit into a frame of 16 KiB."""

    @classmethod
    async def open(cls, address: str, namespace: str) -> Self:
        """Connect."""
        loop = asyncio.get_running_loop()
        _, channel = await loop.create_unix_connection(lambda: cls(loop, namespace), address)
        return channel

    def __init__(self, loop: asyncio.AbstractEventLoop, namespace: str) -> None:
        self._loop = loop
        self._namespace = namespace
        self._blocks: dict[str, bytes] = {}
        self._calls: dict[int, _Call] = {}
        self._decoder = hpack.Decoder()
        self._buffer = b""
        self._stream = 1
        self._room = _DEFAULT_WINDOW
        self._waiting: list[tuple[int, bytes, bytes]] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: asyncio.Transport = transport  # type: ignore[assignment]
        settings = struct.pack(">HLHL", _NO_PUSH, 0, _INITIAL_WINDOW, _LARGEST_WINDOW)
        room = struct.pack(">L", _LARGEST_WINDOW - _DEFAULT_WINDOW)
        self._transport.write(PREFACE + frame(SETTINGS, 0, 0, settings) + frame(WINDOW_UPDATE, 0, 0, room))

    def connection_lost(self, exc: Exception | None) -> None:
        for call in self._calls.values():
            if not call.answer.done():
                call.answer.set_exception(CallFailed(f"{call.path}: the connection was lost"))

    def close(self) -> None:
        """End the connection."""
        self._transport.close()

    def call(self, method: Method, request: Message) -> asyncio.Future[Any]:
        """Send a request now; its answer, or CallFailed."""
        call = _Call(method, self._loop.create_future())
        stream, self._stream = self._stream, self._stream + 2
        self._calls[stream] = call
        block = self._blocks.get(method.path)
        if block is None:
            block = self._blocks[method.path] = hpack.encode(
                [
                    (":method", "POST"),
                    (":scheme", "http"),
                    (":path", method.path),
                    (":authority", "localhost"),
                    ("te", "trailers"),
                    ("content-type", "application/grpc"),
                    ("containerd-namespace", self._namespace),
                ]
            )
        payload = request.SerializeToString()
        self._waiting.append((stream, block, struct.pack(">BL", 0, len(payload)) + payload))
        self._flush()
        return call.answer

    def _flush(self) -> None:
        """Send what the connection's window has room for."""
        while self._waiting and len(self._waiting[0][2]) <= self._room:
            stream, block, data = self._waiting.pop(0)
            self._room -= len(data)
            self._transport.write(frame(HEADERS, END_HEADERS, stream, block) + frame(DATA, END_STREAM, stream, data))

    def data_received(self, data: bytes) -> None:
        data = self._buffer + data
        at, end = 0, len(data)
        while end - at >= 9:
            high, low, kind, flags, stream = _HEAD.unpack_from(data, at)
            after = at + 9 + (high << 8 | low)
            if after > end:
                break
            self._frame(kind, flags, stream, data[at + 9 : after])
            at = after
        self._buffer = data[at:]

    def _frame(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == HEADERS:
            fields = self._decoder.decode(payload)
            if flags & END_STREAM:
                self._end(stream, dict(fields))
        elif kind == DATA:
            if stream in self._calls:
                self._calls[stream].body += payload
        elif kind == WINDOW_UPDATE:
            if stream == 0:
                self._room += int.from_bytes(payload, "big")
                self._flush()
        elif kind in (SETTINGS, PING):
            if not flags & ACK:
                self._transport.write(frame(kind, ACK, 0, payload if kind == PING else b""))
        elif kind in (RST_STREAM, GOAWAY):
            self._transport.abort()

    def _end(self, stream: int, fields: dict[str, str]) -> None:
        call = self._calls.pop(stream, None)
        if call is None or call.answer.done():
            return
        status = fields.get("grpc-status", "")
        if status == "0":
            call.answer.set_result(call.response.FromString(call.body[5:]))
        else:
            call.answer.set_exception(CallFailed(f"{call.path}: {status}: {unquote(fields.get('grpc-message', ''))}"))
