"""A gRPC client by the `h2` package, for what no gRPC library would send."""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import unquote

import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.exceptions
import h2.settings

from wherry.proto import content_pb2 as pb

PATIENCE = 5  # seconds that a test waits for anything
CONTENT = "containerd.services.content.v1.Content"
INFO = f"/{CONTENT}/Info"
READ = f"/{CONTENT}/Read"
WRITE = f"/{CONTENT}/Write"


def message(payload: bytes, *, flag: int = 0) -> bytes:
    """A message with gRPC's prefix."""
    return struct.pack(">BL", flag, len(payload)) + payload


def info(digest: str) -> bytes:
    """A request of Info, as it goes over the wire."""
    return message(pb.InfoRequest(digest=digest).SerializeToString())


@dataclass
class Answer:
    """What came on one stream so far."""

    headers: list[dict[str, str]] = field(default_factory=list)  # response headers, trailers
    data: bytes = b""
    ended: bool = False
    reset: int | None = None

    @property
    def status(self) -> int:
        """grpc-status."""
        return int(self.headers[-1]["grpc-status"])

    @property
    def text(self) -> str:
        """grpc-message."""
        return unquote(self.headers[-1]["grpc-message"])

    @property
    def messages(self) -> list[bytes]:
        """The whole messages of the answer."""
        found, at = [], 0
        while at + 5 <= len(self.data):
            length = int.from_bytes(self.data[at + 1 : at + 5], "big")
            found.append(self.data[at + 5 : at + 5 + length])
            at += 5 + length
        return found


class Peer:
    """One connection. With `window` streams get so much room for answers, and no more of it by themselves."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, window: int | None) -> None:
        config = h2.config.H2Configuration(
            client_side=True,
            header_encoding="utf-8",
            validate_outbound_headers=False,
            normalize_outbound_headers=False,
        )
        self.h2 = h2.connection.H2Connection(config)
        self.reader, self.writer = reader, writer
        self.window = window
        self.answers: dict[int, Answer] = {}
        self.goaway: int | None = None
        self.closed = False
        self.broken: Exception | None = None  # a rule that the server broke, in h2's eyes
        self.pongs: list[bytes] = []
        self.changed = asyncio.Event()
        if window is not None:
            wanted = {h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: window}
            self.h2.local_settings = h2.settings.Settings(client=True, initial_values=wanted)
        self.h2.initiate_connection()
        self.flush()
        self._task = asyncio.create_task(self._read())

    @classmethod
    async def connect(cls, path: str, window: int | None = None) -> Peer:
        """Connect, and wait for the server's settings."""
        peer = cls(*await asyncio.open_unix_connection(path), window)
        await peer.until(lambda: peer.h2.remote_settings.max_concurrent_streams < 1 << 31)
        return peer

    def flush(self) -> None:
        """Send what h2 has."""
        self.writer.write(self.h2.data_to_send())

    def raw(self, data: bytes) -> None:
        """Send bytes past h2."""
        self.flush()
        self.writer.write(data)

    async def _read(self) -> None:
        with contextlib.suppress(ConnectionError):
            await self._receive()
        self.closed = True
        self.changed.set()

    async def _receive(self) -> None:
        while data := await self.reader.read(1 << 20):
            try:
                for event in self.h2.receive_data(data):
                    self._event(event)
            except h2.exceptions.ProtocolError as error:
                self.broken = error
                self.changed.set()
                return
            self.flush()
            self.changed.set()

    def _event(self, event: h2.events.Event) -> None:
        answer = self.answers.setdefault(getattr(event, "stream_id", None) or 0, Answer())
        if isinstance(event, h2.events.ResponseReceived | h2.events.TrailersReceived):
            answer.headers.append({str(name): str(value) for name, value in event.headers or ()})
        elif isinstance(event, h2.events.DataReceived):
            answer.data += event.data
            if self.window is None:
                self.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
        elif isinstance(event, h2.events.StreamEnded):
            answer.ended = True
        elif isinstance(event, h2.events.StreamReset):
            answer.reset = int(event.error_code)
        elif isinstance(event, h2.events.PingAckReceived):
            self.pongs.append(event.ping_data)
        elif isinstance(event, h2.events.ConnectionTerminated):
            self.goaway = int(event.error_code or 0)
            # h2 takes and sends nothing after GOAWAY, though calls under way go on (RFC 9113, 6.8)
            self.h2.state_machine.state = h2.connection.ConnectionState.CLIENT_OPEN

    async def until(self, done: Callable[[], object]) -> None:
        """Wait until a function gives something true. Raises TimeoutError, ConnectionError."""
        async with asyncio.timeout(PATIENCE):
            while not done():
                if self.broken is not None:
                    raise self.broken
                if self.closed:
                    raise ConnectionError("the server hung up")
                self.changed.clear()
                await self.changed.wait()

    def open(self, target: str, /, *extra: tuple[str, str], **fields: str) -> int:
        """Begin a call; its stream. `fields` replace the usual ones (`method`, `content_type`…), "-" omits one."""
        usual = {":method": "POST", ":scheme": "http", ":path": target, ":authority": "localhost"}
        usual |= {"content-type": "application/grpc", "te": "trailers"}
        for name, value in fields.items():
            key = name.replace("_", "-")
            usual[f":{key}" if f":{key}" in usual else key] = value
        stream = self.h2.get_next_available_stream_id()
        self.answers[stream] = Answer()
        self.h2.send_headers(stream, [*((n, v) for n, v in usual.items() if v != "-"), *extra])
        self.flush()
        return stream

    def send(self, stream: int, data: bytes, *, end: bool = False, pad: int | None = None) -> None:
        """Send bytes of a request, as far as the windows allow in one go."""
        size = self.h2.max_outbound_frame_size - 256
        pieces = [data[at : at + size] for at in range(0, len(data), size)] or [b""]
        for piece in pieces:
            self.h2.send_data(stream, piece, end_stream=end and piece is pieces[-1], pad_length=pad)
        self.flush()

    async def send_all(self, stream: int, data: bytes, *, end: bool = False) -> None:
        """Send bytes of a request, waiting for the windows."""
        at = 0
        while at < len(data):
            await self.until(lambda: self.h2.local_flow_control_window(stream) > 0)
            piece = data[at : at + min(self.h2.local_flow_control_window(stream), 16384)]
            at += len(piece)
            self.h2.send_data(stream, piece, end_stream=end and at == len(data))
            self.flush()

    async def end(self, stream: int) -> Answer:
        """Wait until a stream is over; what came on it."""
        answer = self.answers[stream]
        await self.until(lambda: answer.ended or answer.reset is not None)
        return answer

    async def call(self, target: str, data: bytes, /, *extra: tuple[str, str], **fields: str) -> Answer:
        """A call with the request as it is given."""
        stream = self.open(target, *extra, **fields)
        self.send(stream, data, end=True)
        return await self.end(stream)

    async def close(self) -> None:
        """Hang up."""
        self.writer.close()
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
