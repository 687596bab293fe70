"""The gRPC door of a whole daemon: grpcio's clients, Go's (ctr), and a peer that sends what nobody should."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import random
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf import empty_pb2

from tests.peers import need
from tests.wherryd import Wherryd
from wherry.proto import content_pb2, events_service_pb2, namespaces_pb2, version_pb2
from wherry.proto.grpc import hpack, http2

VERSION = "/containerd.services.version.v1.Version/Version"
CONTENT = "/containerd.services.content.v1.Content"
SUBSCRIBE = "/containerd.services.events.v1.Events/Subscribe"
NAMESPACE = (("containerd-namespace", "grpc"),)


@pytest.fixture(scope="module")
def daemon() -> Iterator[Wherryd]:
    daemon = Wherryd()
    try:
        daemon.start()
        yield daemon
    finally:
        daemon.close()


def channel(daemon: Wherryd, **options: int) -> grpc.Channel:
    sizes = {"grpc.max_receive_message_length": -1, "grpc.max_send_message_length": -1}
    more = {f"grpc.{name}": value for name, value in options.items()}
    return grpc.insecure_channel(f"unix:{daemon.address}", options=list({**sizes, **more}.items()))


def version(on: grpc.Channel, **more: Any) -> str:
    call = on.unary_unary(VERSION, empty_pb2.Empty.SerializeToString, version_pb2.VersionResponse.FromString)
    return str(call(empty_pb2.Empty(), timeout=10, **more).version)


def memory(daemon: Wherryd) -> int:
    """Resident bytes."""
    with open(f"/proc/{daemon.pid}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# -- grpcio


def test_many_threads_on_one_channel_and_many_channels(daemon: Wherryd) -> None:
    with channel(daemon) as one, ThreadPoolExecutor(16) as pool:
        assert set(pool.map(lambda _: version(one), range(400))) == {version(one)}

        def alone(number: int) -> str:
            with channel(daemon, use_local_subchannel_pool=1) as other:
                return version(other, metadata=(("x-number", str(number)), ("x-some-bin", b"\0\xff" * number)))

        assert set(pool.map(alone, range(40))) == {version(one)}


async def test_a_thousand_calls_at_once(daemon: Wherryd) -> None:
    async with grpc.aio.insecure_channel(f"unix:{daemon.address}") as on:
        call = on.unary_unary(VERSION, empty_pb2.Empty.SerializeToString, version_pb2.VersionResponse.FromString)
        answers = await asyncio.gather(*(call(empty_pb2.Empty(), timeout=20) for _ in range(1000)))
        assert len({answer.version for answer in answers}) == 1


def write(on: grpc.Channel, blob: bytes, piece: int, ref: str) -> None:
    def requests() -> Iterator[content_pb2.WriteContentRequest]:
        for at in range(0, len(blob), piece):
            yield content_pb2.WriteContentRequest(
                action=content_pb2.WRITE, ref=ref, total=len(blob), offset=at, data=blob[at : at + piece]
            )
        digest = f"sha256:{hashlib.sha256(blob).hexdigest()}"
        yield content_pb2.WriteContentRequest(
            action=content_pb2.COMMIT, ref=ref, total=len(blob), offset=len(blob), expected=digest
        )

    call = on.stream_stream(
        f"{CONTENT}/Write",
        content_pb2.WriteContentRequest.SerializeToString,
        content_pb2.WriteContentResponse.FromString,
    )
    *_, last = call(requests(), metadata=NAMESPACE, timeout=30)
    assert last.digest == f"sha256:{hashlib.sha256(blob).hexdigest()}"


def read(on: grpc.Channel, digest: str) -> bytes:
    call = on.unary_stream(
        f"{CONTENT}/Read",
        content_pb2.ReadContentRequest.SerializeToString,
        content_pb2.ReadContentResponse.FromString,
    )
    pieces = call(content_pb2.ReadContentRequest(digest=digest), metadata=NAMESPACE, timeout=30)
    return b"".join(piece.data for piece in pieces)


@pytest.mark.parametrize("piece", [15 << 20, 1 << 20, 4097])
def test_blobs_in_messages_of_any_size(daemon: Wherryd, piece: int) -> None:
    blob = random.Random(piece).randbytes(20 << 20 if piece > 4097 else 1 << 20)
    with channel(daemon) as on:
        write(on, blob, piece, f"ref-{piece}")
        assert read(on, f"sha256:{hashlib.sha256(blob).hexdigest()}") == blob


def test_a_message_beyond_16_mib_is_refused_and_the_channel_goes_on(daemon: Wherryd) -> None:
    with channel(daemon) as on:
        with pytest.raises(grpc.RpcError) as caught:
            write(on, bytes(17 << 20), 17 << 20, "too-large")
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "larger than max" in str(caught.value.details())
        assert version(on)


def test_metadata_that_is_too_large_ends_its_call_alone(daemon: Wherryd) -> None:
    with channel(daemon) as on:
        assert version(on, metadata=(("x-large", "x" * 50_000),))
        with pytest.raises(grpc.RpcError) as caught:
            version(on, metadata=(("x-large", "x" * 100_000),))
        assert caught.value.code() in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.INTERNAL)
        assert version(on)


def test_compression_is_refused_in_words(daemon: Wherryd) -> None:
    with channel(daemon) as on:
        call = on.unary_unary(
            f"{CONTENT}/Info", content_pb2.InfoRequest.SerializeToString, content_pb2.InfoResponse.FromString
        )
        with pytest.raises(grpc.RpcError) as caught:
            call(content_pb2.InfoRequest(digest="x" * 5000), metadata=NAMESPACE, compression=grpc.Compression.Gzip)
        assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED
        assert "gzip" in str(caught.value.details())


def test_keepalive_of_a_client_that_only_listens(daemon: Wherryd) -> None:
    options = {"keepalive_time_ms": 100, "keepalive_timeout_ms": 2000, "keepalive_permit_without_calls": 1}
    with channel(daemon, **options) as on:
        subscribe = on.unary_stream(
            SUBSCRIBE,
            events_service_pb2.SubscribeRequest.SerializeToString,
            version_pb2.VersionResponse.FromString,
        )
        with pytest.raises(grpc.RpcError) as caught:
            list(subscribe(events_service_pb2.SubscribeRequest(filters=['topic=="/no/such"']), timeout=3))
        assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED


def test_a_client_cancels_and_leaves_nothing(daemon: Wherryd) -> None:
    with channel(daemon) as on:
        subscribe = on.unary_stream(SUBSCRIBE, events_service_pb2.SubscribeRequest.SerializeToString, bytes)
        streams = [subscribe(events_service_pb2.SubscribeRequest()) for _ in range(200)]
        time.sleep(0.2)
        for stream in streams:
            stream.cancel()  # type: ignore[no-untyped-call]
        assert version(on)


# -- Go's


def test_ctr_stores_and_gets_a_large_blob(daemon: Wherryd) -> None:
    blob = random.Random(5).randbytes(48 << 20)
    digest = f"sha256:{hashlib.sha256(blob).hexdigest()}"
    command = [need("ctr"), "--address", daemon.address, "content"]
    stored = subprocess.run(
        [*command, "ingest", "--expected-digest", digest, "--expected-size", str(len(blob)), "big"],
        input=blob,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert stored.returncode == 0, stored.stderr
    got = subprocess.run([*command, "get", digest], capture_output=True, timeout=60, check=True)
    assert got.stdout == blob
    assert digest in daemon.ctr("content", "ls").stdout


def test_ctr_hears_errors_and_events(daemon: Wherryd) -> None:
    assert "not found" in daemon.ctr("content", "get", f"sha256:{'0' * 64}", check=False).stderr
    with subprocess.Popen(
        [need("ctr"), "--address", daemon.address, "events"], stdout=subprocess.PIPE, text=True
    ) as events:
        assert events.stdout is not None
        stop = threading.Timer(60, events.kill)
        stop.start()
        line = ""
        for number in range(50):
            daemon.ctr("namespaces", "create", f"n{number}")
            if (line := _line(events)) != "":
                break
        stop.cancel()
        events.kill()
    assert "/namespaces/create" in line


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    os.set_blocking(process.stdout.fileno(), False)
    time.sleep(0.1)
    return process.stdout.readline()


# -- what nobody should send


def block(*fields: tuple[str, str]) -> bytes:
    usual = [(":method", "POST"), (":scheme", "http"), (":path", VERSION), ("content-type", "application/grpc")]
    return hpack.encode([*usual, *fields])


def frames(chance: random.Random) -> list[bytes]:
    """A conversation as it could be: what is mutated then."""
    found = [http2.frame(http2.SETTINGS, 0, 0, struct.pack(">HL", 4, chance.choice([0, 100, 1 << 20])))]
    for stream in range(1, 2 * chance.randrange(2, 8), 2):
        found.append(http2.frame(http2.HEADERS, http2.END_HEADERS, stream, block(("grpc-timeout", "1S"))))
        found.append(http2.frame(http2.DATA, chance.choice([0, 1, 8]), stream, chance.choice([bytes(5), bytes(4)])))
        extra = [
            http2.frame(http2.PING, 0, 0, bytes(8)),
            http2.frame(http2.WINDOW_UPDATE, 0, chance.choice([0, stream]), struct.pack(">L", 1000)),
            http2.frame(http2.RST_STREAM, 0, stream, struct.pack(">L", 8)),
            http2.frame(http2.PRIORITY, 0, stream, bytes(5)),
            http2.frame(http2.GOAWAY, 0, 0, bytes(8)),
            http2.frame(chance.randrange(256), chance.randrange(256), stream, chance.randbytes(chance.randrange(30))),
        ]
        found += chance.sample(extra, chance.randrange(3))
    return found


def mutated(chance: random.Random) -> bytes:
    found = frames(chance)
    for _ in range(chance.randrange(4)):
        at = chance.randrange(len(found))
        kind = chance.randrange(4)
        if kind == 0:
            del found[at]
        elif kind == 1:
            found.insert(at, found[chance.randrange(len(found))])
        elif kind == 2:
            found[at] = found[at][: chance.randrange(len(found[at]) + 1)]
        if not found:
            break
    data = bytearray(http2.PREFACE + b"".join(found))
    for _ in range(chance.choice([0, 1, 1, 2, 10])):
        data[chance.randrange(len(data))] = chance.randrange(256)
    return bytes(data)


def test_mutated_conversations_harm_nobody_else(daemon: Wherryd) -> None:
    chance = random.Random(2026)
    with channel(daemon) as on:
        assert version(on)
        before, conversations, end = memory(daemon), 0, time.monotonic() + 8
        while conversations <= 200 or (time.monotonic() < end and conversations < 15_000):
            conversations += 1
            with socket.socket(socket.AF_UNIX) as peer:
                peer.settimeout(30)
                peer.connect(daemon.address)
                with contextlib.suppress(OSError):
                    peer.sendall(mutated(chance))
                if chance.random() < 0.2:
                    peer.shutdown(socket.SHUT_WR)
                    with contextlib.suppress(ConnectionError):
                        while peer.recv(1 << 16):
                            pass
            if conversations % 100 == 0:
                assert version(on)
        assert version(on)
        assert memory(daemon) - before < 32 << 20
    assert "Traceback" not in daemon.log_text()
    assert "call failed" not in daemon.log_text()


def test_a_flood_of_half_requests_is_bounded(daemon: Wherryd) -> None:
    before = memory(daemon)
    with socket.socket(socket.AF_UNIX) as peer:
        peer.settimeout(0.5)
        peer.connect(daemon.address)
        with contextlib.suppress(OSError):
            peer.sendall(http2.PREFACE + http2.frame(http2.SETTINGS, 0, 0, b""))
            for stream in range(1, 3001, 2):
                peer.sendall(
                    http2.frame(http2.HEADERS, http2.END_HEADERS, stream, block())
                    + http2.frame(http2.DATA, 0, stream, b"\0" + (16 << 20).to_bytes(4, "big") + bytes(1000))
                )
        with channel(daemon) as on:
            assert version(on)
        assert memory(daemon) - before < 64 << 20


def test_sigterm_lets_a_call_finish_and_a_client_finds_the_next_daemon() -> None:
    daemon = Wherryd()
    try:
        daemon.start()
        with channel(daemon, initial_reconnect_backoff_ms=50, max_reconnect_backoff_ms=100) as on:
            blob = random.Random(6).randbytes(8 << 20)
            begun = threading.Event()

            def slowly() -> Iterator[content_pb2.WriteContentRequest]:
                for at in range(0, len(blob), 1 << 20):
                    yield content_pb2.WriteContentRequest(
                        action=content_pb2.WRITE, ref="slow", offset=at, data=blob[at : at + (1 << 20)]
                    )
                    begun.set()
                    time.sleep(0.05)
                yield content_pb2.WriteContentRequest(
                    action=content_pb2.COMMIT, ref="slow", offset=len(blob), total=len(blob)
                )

            call = on.stream_stream(
                f"{CONTENT}/Write",
                content_pb2.WriteContentRequest.SerializeToString,
                content_pb2.WriteContentResponse.FromString,
            )
            on.unary_unary(
                "/containerd.services.namespaces.v1.Namespaces/Create",
                namespaces_pb2.CreateNamespaceRequest.SerializeToString,
                namespaces_pb2.CreateNamespaceResponse.FromString,
            )(namespaces_pb2.CreateNamespaceRequest(namespace=namespaces_pb2.Namespace(name="grpc")))
            with ThreadPoolExecutor(1) as pool:
                answers = pool.submit(lambda: list(call(slowly(), metadata=NAMESPACE, timeout=20)))
                assert begun.wait(30)
                assert daemon.stop() == 0
                assert answers.result(60)[-1].digest == f"sha256:{hashlib.sha256(blob).hexdigest()}"
            daemon.start()
            assert version(on, wait_for_ready=True)
    finally:
        daemon.close()
