"""SPDY/3.1 without I/O: our two ends against each other, any bytes against one, and spdy-transport's own constants."""

from __future__ import annotations

import struct
import subprocess
import zlib
from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.npm import modules
from tests.peers import need
from wherry.cri.streaming import spdy
from wherry.cri.streaming.spdy import Data, GoneAway, Opened, ProtocolError, Reset, Session, Status
from wherry.cri.streaming.spdy_dictionary import DICTIONARY

NAMES = st.text("abcdefghijklmnopqrstuvwxyz:-", min_size=1, max_size=20)
VALUES = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=50)


def control(kind: int, payload: bytes, flags: int = 0, version: int = 3) -> bytes:
    return struct.pack(">II", 1 << 31 | version << 16 | kind, flags << 24 | len(payload)) + payload


def frames(data: bytes) -> list[tuple[int, int, bytes]]:
    """Kind (0 for data), flags, payload (for data with the stream's number in front)."""
    found = []
    while data:
        first, second = struct.unpack_from(">II", data)
        length = second & 0xFFFFFF
        body = data[8 : 8 + length]
        found.append((first & 0xFFFF if first >> 31 else 0, second >> 24, body if first >> 31 else data[:4] + body))
        data = data[8 + length :]
    return found


def refused(data: bytes, session: Session | None = None) -> str:
    """What a session says of these bytes; it must send GOAWAY and take nothing more."""
    session = session or Session()
    with pytest.raises(ProtocolError) as info:
        session.receive(data)
    assert frames(session.take())[-1][0] == spdy.GOAWAY
    assert session.receive(b"anything") == []
    return str(info.value)


def test_the_dictionary_is_that_of_spdy_transport() -> None:
    place = modules("spdy-transport")
    script = "process.stdout.write(require('spdy-transport/lib/spdy-transport/protocol/spdy/dictionary')[3])"
    theirs = subprocess.run([need("node"), "-e", script], capture_output=True, check=True, cwd=place, timeout=30).stdout
    assert theirs == DICTIONARY


@given(st.lists(st.dictionaries(NAMES, VALUES, max_size=6), min_size=1, max_size=5), st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_streams_open_however_the_bytes_are_cut(headers: list[dict[str, str]], step: int) -> None:
    client, server = Session(client=True), Session()
    numbers = [client.open(each) for each in headers]
    data, events = client.take(), []
    for start in range(0, len(data), step):
        events += server.receive(data[start : start + step])
    assert events == [Opened(number, each) for number, each in zip(numbers, headers, strict=True)]
    assert numbers == list(range(1, 2 * len(headers), 2))


@given(st.lists(st.tuples(st.integers(0, 2), st.binary(max_size=100_000)), max_size=8), st.integers(1000, 70_000))
@settings(max_examples=40, deadline=None)
def test_data_arrives_whole_and_in_order_within_the_windows(says: list[tuple[int, bytes]], step: int) -> None:
    """Both ends keep to windows; what is received is consumed, so everything arrives in the end."""
    client, server = Session(client=True), Session()
    client.windows = server.windows = True
    numbers = [client.open({"streamtype": str(index)}) for index in range(3)]
    todo = [(numbers[index], memoryview(data)) for index, data in says]
    heard: dict[int, bytes] = defaultdict(bytes)
    ended = set()
    flying: dict[int, int] = defaultdict(int)
    for _ in range(10_000):
        while todo:
            number, rest = todo[0]
            sent = client.send(number, rest)
            flying[number] += sent
            assert flying[number] <= spdy.WINDOW
            if sent < len(rest):
                todo[0] = number, rest[sent:]
                break
            todo.pop(0)
        if not todo:
            for number in numbers:
                client.finish(number)
        out = client.take()
        for start in range(0, len(out), step):
            for event in server.receive(out[start : start + step]):
                if isinstance(event, Data):
                    heard[event.stream] += event.data
                    flying[event.stream] -= len(event.data)
                    server.consumed(event.stream, len(event.data))
                    if event.fin:
                        ended.add(event.stream)
        client.receive(server.take())
        if len(ended) == 3:
            break
    expected: dict[int, bytes] = defaultdict(bytes)
    for index, data in says:
        expected[numbers[index]] += data
    assert {number: heard[number] for number in numbers} == {number: expected[number] for number in numbers}


@given(st.lists(st.binary(max_size=300), max_size=20))
@settings(max_examples=150, deadline=None)
def test_any_bytes_raise_nothing_but_a_protocol_error(parts: list[bytes]) -> None:
    session = Session()
    for part in parts:
        try:
            session.receive(part)
        except ProtocolError:
            assert session.dead
        session.take()


@given(st.integers(0, 12), st.integers(0, 255), st.binary(max_size=64), st.booleans())
@settings(max_examples=300, deadline=None)
def test_any_frame_after_a_stream_raises_nothing_but_a_protocol_error(
    kind: int, flags: int, payload: bytes, started: bool
) -> None:
    client, server = Session(client=True), Session()
    client.open({"streamtype": "data"})
    server.receive(client.take())
    frame = control(kind, payload, flags) if started else struct.pack(">II", 1, flags << 24 | len(payload)) + payload
    try:
        server.receive(frame)
        server.receive(frame)
    except ProtocolError:
        assert server.dead
    server.send(1, b"x" * 100)
    server.finish(1)
    server.take()


def test_flow_control_is_kept_to_only_for_those_who_know_it() -> None:
    client, server = Session(client=True), Session()
    client.open({})
    server.receive(client.take())
    assert server.send(1, b"x" * 300_000) == 300_000  # spdystream's client never says that there is room
    server.receive(control(spdy.WINDOW_UPDATE, struct.pack(">II", 1, 400_000)))
    assert server.windows
    assert server.send(1, b"x" * 300_000) == 0  # the session's window
    server.receive(control(spdy.WINDOW_UPDATE, struct.pack(">II", 0, 400_000)))
    assert server.send(1, b"x" * 300_000) == 400_000 - 300_000 + spdy.WINDOW


def test_settings_change_the_windows_of_streams_that_are_open() -> None:
    client, server = Session(client=True), Session()
    client.open({})
    server.receive(client.take())
    server.receive(control(spdy.SETTINGS, struct.pack(">III", 1, 7, 10)))
    assert server.send(1, b"x" * 100) == 10
    server.receive(control(spdy.SETTINGS, struct.pack(">III", 1, 7, 5)))
    assert server.send(1, b"x") == 0
    server.receive(control(spdy.SETTINGS, struct.pack(">III", 1, 7, 30)))
    assert server.send(1, b"x" * 100) == 20


def test_what_is_consumed_is_given_back() -> None:
    client, server = Session(client=True), Session()
    client.open({})
    client.send(1, b"x" * 60_000)
    server.receive(client.take())
    server.take()
    server.consumed(1, 60_000)
    updates = [struct.unpack(">II", payload) for kind, _, payload in frames(server.take()) if kind == 9]
    assert sorted(updates) == [(0, 60_000), (1, 60_000)]


def test_pings_of_the_peer_are_answered_and_ours_are_not_echoed() -> None:
    session = Session()
    session.receive(control(spdy.PING, struct.pack(">I", 7)))
    assert frames(session.take()) == [(spdy.PING, 0, struct.pack(">I", 7))]
    session.receive(control(spdy.PING, struct.pack(">I", 2)))
    assert session.take() == b""


def test_resets_and_farewells() -> None:
    client, server = Session(client=True), Session()
    one, two = client.open({"a": "b"}), client.open({}, fin=True)
    assert server.receive(client.take()) == [Opened(one, {"a": "b"}), Opened(two, {}, fin=True)]
    client.reset(one)
    client.go_away()
    assert server.receive(client.take()) == [Reset(one, Status.CANCEL), GoneAway(0)]
    assert server.send(one, b"nobody") == 6  # as if it had been
    assert server.take() == b""
    server.reply(two, {"Yes": "1"})
    server.finish(two)
    assert client.receive(server.take()) == [Opened(two, {"yes": "1"}, answer=True), Data(two, b"", fin=True)]
    assert not client.knows(two)
    assert not server.knows(two)


def test_data_behind_the_end_of_a_stream_resets_it() -> None:
    client, server = Session(client=True), Session()
    client.open({}, fin=True)
    server.receive(client.take())
    assert server.receive(struct.pack(">II", 1, 3) + b"abc") == []
    (reset,) = [payload for kind, _, payload in frames(server.take()) if kind == spdy.RST_STREAM]
    assert struct.unpack(">II", reset) == (1, Status.STREAM_ALREADY_CLOSED)
    assert server.receive(struct.pack(">II", 1, 3) + b"abc") == []  # a reset crossed it: no second one
    assert server.take() == b""


def test_more_streams_than_allowed_are_refused_one_by_one() -> None:
    client, server = Session(client=True), Session()
    for _ in range(spdy.MAX_STREAMS + 1):
        client.open({})
    events = server.receive(client.take())
    assert len(events) == spdy.MAX_STREAMS
    assert frames(server.take()) == [
        (spdy.RST_STREAM, 0, struct.pack(">II", 2 * spdy.MAX_STREAMS + 1, Status.REFUSED_STREAM))
    ]


def test_an_unknown_frame_is_ignored() -> None:
    session = Session()
    assert session.receive(control(0xF000, b"whatever")) == []
    assert session.take() == b""


class TestProtocolErrors:
    def test_another_version(self) -> None:
        assert "version 2" in refused(control(spdy.PING, b"\0\0\0\1", version=2))

    def test_text(self) -> None:
        assert "stream" in refused(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" + b" " * (8 << 20))

    def test_a_control_frame_without_end(self) -> None:
        assert "bytes" in refused(struct.pack(">II", 1 << 31 | 3 << 16 | 1, 0xFFFFFF))

    def test_a_short_frame(self) -> None:
        assert "too short" in refused(control(spdy.RST_STREAM, b"\0\0"))

    def test_headers_that_are_not_compressed(self) -> None:
        assert "header block" in refused(control(spdy.SYN_STREAM, struct.pack(">IIH", 1, 0, 0) + b"nonsense"))

    def test_headers_that_inflate_without_end(self) -> None:
        bomb = zlib.compressobj(zdict=DICTIONARY)
        block = bomb.compress(b"\0" * (8 << 20)) + bomb.flush(zlib.Z_SYNC_FLUSH)
        assert len(block) < spdy.MAX_CONTROL
        assert "more than" in refused(control(spdy.SYN_STREAM, struct.pack(">IIH", 1, 0, 0) + block))

    def test_headers_that_end_too_early(self) -> None:
        short = zlib.compressobj(zdict=DICTIONARY)
        block = short.compress(struct.pack(">II", 5, 400)) + short.flush(zlib.Z_SYNC_FLUSH)
        assert "within a text" in refused(control(spdy.SYN_STREAM, struct.pack(">IIH", 1, 0, 0) + block))

    def test_a_stream_of_the_wrong_side_or_twice(self) -> None:
        for numbers in ((2,), (0,), (5, 3), (1, 1)):
            client, server = Session(client=True), Session()
            data = b""
            for number in numbers:
                client._next = number
                client.open({})
                data += client.take()
            assert "can't be opened" in refused(data, server)

    def test_data_of_a_stream_that_nobody_opened(self) -> None:
        assert "nobody opened" in refused(struct.pack(">II", 1, 3) + b"abc")

    def test_windows_out_of_bounds(self) -> None:
        assert "nothing" in refused(control(spdy.WINDOW_UPDATE, struct.pack(">II", 0, 0)))
        assert "overflows" in refused(control(spdy.WINDOW_UPDATE, struct.pack(">II", 0, spdy.MAX_WINDOW)))
        assert "window" in refused(control(spdy.SETTINGS, struct.pack(">III", 1, 7, 0xFFFFFFFF)))
        assert "SETTINGS" in refused(control(spdy.SETTINGS, struct.pack(">I", 3)))

    def test_a_stream_whose_window_overflows_is_reset(self) -> None:
        client, server = Session(client=True), Session()
        client.open({})
        server.receive(client.take())
        server.receive(control(spdy.WINDOW_UPDATE, struct.pack(">II", 1, spdy.MAX_WINDOW)))
        assert frames(server.take()) == [(spdy.RST_STREAM, 0, struct.pack(">II", 1, Status.FLOW_CONTROL_ERROR))]
