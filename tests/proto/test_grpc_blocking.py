"""The gRPC client without asyncio: against our server, grpcio's, and servers that break the rules."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
import time
from collections.abc import AsyncIterator, Coroutine, Iterator
from concurrent import futures
from pathlib import Path

import grpc
import pytest

from wherry.core.errors import DeadlineExceeded, Internal, NotFound, ResourceExhausted, Unavailable, Unimplemented
from wherry.proto import content_pb2 as pb
from wherry.proto.grpc import hpack, http2
from wherry.proto.grpc.blocking import GrpcClient
from wherry.proto.grpc.http2 import frame
from wherry.proto.grpc.server import GrpcServer
from wherry.proto.service import Context

SERVICE = "containerd.services.content.v1.Content"


class Content:
    SERVICE = SERVICE

    async def info(self, request: pb.InfoRequest, context: Context) -> pb.InfoResponse:
        if request.digest == "missing":
            raise NotFound("content missing: größe 100 %: not found")
        if request.digest == "slow":
            await asyncio.sleep(30)
        labels = {"namespace": context.namespace or "", "size": str(len(request.digest))}
        return pb.InfoResponse(info=pb.Info(digest=request.digest[:10], labels=labels))

    async def list(self, request: pb.ListContentRequest, context: Context) -> AsyncIterator[pb.ListContentResponse]:
        for number in range(int(request.filters[0])):
            yield pb.ListContentResponse(info=[pb.Info(digest=f"{number}" * 1000)])
        if len(request.filters) > 1:
            raise NotFound("in the middle: not found")


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    path = str(tmp_path / "s.sock")
    loop = asyncio.new_event_loop()
    server = GrpcServer([Content()])
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def run(work: Coroutine[object, object, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, loop).result(10)

    run(server.serve_unix(path))
    yield path
    run(server.stop(0))
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


@pytest.fixture
def client(address: str) -> Iterator[GrpcClient]:
    made = GrpcClient(f"unix://{address}")
    yield made
    made.close()


def info(client: GrpcClient, digest: str, **options: object) -> pb.Info:
    answer = client.call(SERVICE, "Info", pb.InfoRequest(digest=digest), **options)  # type: ignore[arg-type]
    assert isinstance(answer, pb.InfoResponse)
    return answer.info


def test_calls_and_errors(client: GrpcClient) -> None:
    for _ in range(3):
        found = info(client, "a", metadata={"containerd-namespace": "ns"})
        assert (found.digest, found.labels["namespace"]) == ("a", "ns")
        with pytest.raises(NotFound, match="content missing: größe 100 %: not found"):
            info(client, "missing")
    with pytest.raises(Unimplemented, match="unknown method Status"):
        client.call(SERVICE, "Status", pb.StatusRequest())
    with pytest.raises(Internal, match="no imported module"):
        client.call("no.Such", "Method", pb.StatusRequest())
    assert len(client._idle) == 1


def test_more_than_the_windows_hold(client: GrpcClient) -> None:
    """A request of 3 MB goes out as the server makes room; answers of 8 MB come in likewise."""
    assert info(client, "x" * 3_000_000).labels["size"] == "3000000"
    answers = list(client.stream(SERVICE, "List", pb.ListContentRequest(filters=["8000"])))
    assert len(answers) == 8000
    with pytest.raises(NotFound, match="in the middle"):
        list(client.stream(SERVICE, "List", pb.ListContentRequest(filters=["3", "fail"])))


def test_a_stream_that_is_left_disturbs_nobody(client: GrpcClient) -> None:
    for answer in client.stream(SERVICE, "List", pb.ListContentRequest(filters=["8000"])):
        assert isinstance(answer, pb.ListContentResponse)
        break
    assert info(client, "a").digest == "a"


def test_deadlines(client: GrpcClient) -> None:
    began = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        info(client, "slow", timeout=0.3)
    assert time.monotonic() - began < 10
    assert info(client, "a", timeout=20).digest == "a"


def test_calls_at_once_have_connections_of_their_own(client: GrpcClient) -> None:
    with futures.ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda number: info(client, f"{number}").digest, range(100)))
    assert found == [f"{number}" for number in range(100)]
    assert 1 <= len(client._idle) <= 4


def test_closing_ends_what_waits(client: GrpcClient) -> None:
    with futures.ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(info, client, "slow")
        while not client._busy:
            time.sleep(0.01)
        client.close()
        with pytest.raises(Unavailable):
            waiting.result(10)


def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="no such file"):
        info(GrpcClient(str(tmp_path / "none")), "a")


def test_grpcios_server(tmp_path: Path) -> None:
    """Its headers are compressed with a table and Huffman's code."""

    def answer(request: bytes, context: grpc.ServicerContext) -> bytes:
        if pb.InfoRequest.FromString(request).digest == "missing":
            context.abort(grpc.StatusCode.NOT_FOUND, "not here: not found")
        return pb.InfoResponse(info=pb.Info(digest="theirs" * 50_000)).SerializeToString()

    handler = grpc.method_handlers_generic_handler(SERVICE, {"Info": grpc.unary_unary_rpc_method_handler(answer)})
    server = grpc.server(futures.ThreadPoolExecutor(2))
    server.add_generic_rpc_handlers((handler,))
    server.add_insecure_port(f"unix://{tmp_path}/g.sock")
    server.start()
    client = GrpcClient(f"{tmp_path}/g.sock")
    try:
        for _ in range(3):
            assert info(client, "a").digest == "theirs" * 50_000
            with pytest.raises(NotFound, match="not here: not found"):
                info(client, "missing")
    finally:
        client.close()
        server.stop(None).wait()


# servers that break the rules

HELLO = frame(http2.SETTINGS, 0, 0, b"")
OK = hpack.encode([(":status", "200"), ("content-type", "application/grpc")])


def headers(fields: list[tuple[str, str]], *, end: bool) -> bytes:
    return frame(http2.HEADERS, http2.END_HEADERS | (http2.END_STREAM if end else 0), 1, hpack.encode(fields))


@contextlib.contextmanager
def rude(path: Path, says: bytes) -> Iterator[None]:
    """Answers the first request with these bytes and hangs up."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()

        def serve() -> None:
            peer, _ = listening.accept()
            with peer:
                peer.sendall(HELLO)
                seen = b""
                while b"\x00\x01\x00\x00\x00\x01" not in seen and (data := peer.recv(65536)):
                    seen += data
                peer.sendall(says)
                peer.settimeout(2)
                with contextlib.suppress(OSError):
                    while peer.recv(65536) and says:
                        peer.shutdown(socket.SHUT_WR)

        thread = threading.Thread(target=serve)
        thread.start()
        yield
        thread.join()


@pytest.mark.parametrize(
    ("says", "kind", "text"),
    [
        (b"", Unavailable, "closed the connection|broke"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n" + bytes(100), Unavailable, "no gRPC server"),
        (headers([(":status", "200"), ("grpc-status", "5"), ("grpc-message", "x")], end=True), NotFound, "x"),
        (headers([(":status", "503")], end=True), Unavailable, "HTTP status code 503"),
        (headers([(":status", "200"), ("grpc-status", "a")], end=True), Internal, "status is 'a'"),
        (headers([(":status", "200")], end=True), Internal, "without a status"),
        (frame(http2.RST_STREAM, 0, 1, struct.pack(">L", 7)), Unavailable, "refused"),
        (frame(http2.GOAWAY, 0, 0, struct.pack(">LL", 0, 0)), Unavailable, "stops"),
        (frame(http2.HEADERS, http2.END_HEADERS, 1, b"\xff\xff\xff"), Unavailable, "broke the rules"),
        (
            frame(http2.HEADERS, http2.END_HEADERS, 1, OK)
            + frame(http2.DATA, 0, 1, struct.pack(">BL", 0, 1 << 30) + b"x"),
            ResourceExhausted,
            "larger than max",
        ),
        (
            frame(http2.HEADERS, http2.END_HEADERS, 1, OK)
            + frame(http2.DATA, 1, 1, struct.pack(">BL", 0, 3) + b"\xff\xff\xff"),
            Internal,
            "can't be decoded",
        ),
    ],
)
def test_servers_that_break_the_rules(tmp_path: Path, says: bytes, kind: type[Exception], text: str) -> None:
    client = GrpcClient(str(tmp_path / "r.sock"))
    with rude(tmp_path / "r.sock", says):
        with pytest.raises(kind, match=text):
            info(client, "a", timeout=10)
        client.close()
