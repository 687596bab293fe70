"""The two doors: errors, deadlines, metadata, garbage, health, the sockets that systemd hands over."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time

import grpc
import pytest
from google.protobuf import empty_pb2
from grpc_health.v1 import health_pb2

from tests.wherryd import Wherryd
from wherry.core.errors import DeadlineExceeded, FailedPrecondition, InvalidArgument, NotFound
from wherry.proto import containers_pb2, events_service_pb2, version_pb2
from wherry.proto.ttrpc.client import TtrpcClient
from wherry.proto.types_pb2 import Envelope

CONTAINERS = "containerd.services.containers.v1.Containers"
VERSION = "containerd.services.version.v1.Version"


def raw(data: bytes) -> bytes:
    """A message as it is."""
    return data


def version(channel: grpc.Channel, timeout: float = 5) -> str:
    call = channel.unary_unary(
        f"/{VERSION}/Version", empty_pb2.Empty.SerializeToString, version_pb2.VersionResponse.FromString
    )
    return str(call(empty_pb2.Empty(), timeout=timeout).version)


@pytest.mark.parametrize(
    ("metadata", "code", "says"),
    [
        ((), grpc.StatusCode.FAILED_PRECONDITION, "namespace is required"),
        ((("containerd-namespace", "a/b"),), grpc.StatusCode.INVALID_ARGUMENT, "a/b"),
        ((("containerd-namespace", "x" * 300),), grpc.StatusCode.INVALID_ARGUMENT, "greater than maximum length"),
        (
            (("containerd-namespace", "default"),),
            grpc.StatusCode.NOT_FOUND,
            'container "c" in namespace "default": not',
        ),
    ],
)
def test_errors_of_grpc(
    wherryd: Wherryd, metadata: tuple[tuple[str, str], ...], code: grpc.StatusCode, says: str
) -> None:
    with grpc.insecure_channel(f"unix:{wherryd.address}") as channel:
        call = channel.unary_unary(
            f"/{CONTAINERS}/Get",
            containers_pb2.GetContainerRequest.SerializeToString,
            containers_pb2.GetContainerResponse.FromString,
        )
        with pytest.raises(grpc.RpcError) as caught:
            call(containers_pb2.GetContainerRequest(id="c"), metadata=metadata)
        assert caught.value.code() == code
        assert says in (caught.value.details() or "")


async def test_errors_of_ttrpc(wherryd: Wherryd) -> None:
    client = await TtrpcClient.connect(f"{wherryd.address}.ttrpc")
    request = containers_pb2.GetContainerRequest(id="c")
    namespace = "containerd-namespace-ttrpc"
    with pytest.raises(FailedPrecondition, match="namespace is required"):
        await client.call(CONTAINERS, "Get", request)
    with pytest.raises(InvalidArgument):
        await client.call(CONTAINERS, "Get", request, metadata={namespace: "a/b"})
    with pytest.raises(NotFound, match='container "c" in namespace "n": not found'):
        await client.call(CONTAINERS, "Get", request, metadata={namespace: "n"})
    answer = await client.call(VERSION, "Version", empty_pb2.Empty())
    assert isinstance(answer, version_pb2.VersionResponse)
    await client.close()


def test_unknown_methods_and_messages_that_are_none(wherryd: Wherryd) -> None:
    with grpc.insecure_channel(f"unix:{wherryd.address}") as channel:
        for path, says in (("/no.Such/Thing", "unknown service no.Such"), (f"/{VERSION}/Nothing", "unknown method")):
            with pytest.raises(grpc.RpcError) as caught:
                channel.unary_unary(path, raw, raw)(b"")
            assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED
            assert says in (caught.value.details() or "")
        with pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary(f"/{CONTAINERS}/Get", raw, raw)(b"\xff\xff\xff")
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert "GetContainerRequest" in (caught.value.details() or "")
        with pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary(f"/{VERSION}/Version", raw, raw)(b"\0" * (17 << 20))
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert version(channel)


def test_garbage_on_both_sockets_harms_nobody(wherryd: Wherryd) -> None:
    with grpc.insecure_channel(f"unix:{wherryd.address}") as channel:
        assert version(channel)
        for path in (wherryd.address, f"{wherryd.address}.ttrpc"):
            for garbage in (
                b"GET / HTTP/1.1\r\n\r\n",
                os.urandom(4096),
                b"\xff" * 100,
                b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            ):
                with socket.socket(socket.AF_UNIX) as peer:
                    peer.settimeout(2)
                    peer.connect(path)
                    peer.sendall(garbage)
                    peer.shutdown(socket.SHUT_WR)
                    try:
                        while peer.recv(4096):
                            pass
                    except (TimeoutError, ConnectionResetError):
                        pass
        assert version(channel)
    assert "Server:" in wherryd.ctr("version").stdout


def test_a_client_that_leaves_ends_its_stream(wherryd: Wherryd) -> None:
    with grpc.insecure_channel(f"unix:{wherryd.address}") as channel:
        subscribe = channel.unary_stream(
            "/containerd.services.events.v1.Events/Subscribe",
            events_service_pb2.SubscribeRequest.SerializeToString,
            Envelope.FromString,
        )
        stream = subscribe(events_service_pb2.SubscribeRequest())
        heard = threading.Thread(target=lambda: next(iter(stream)))
        heard.start()
        while heard.is_alive():
            wherryd.ctr("namespaces", "create", f"mark-{time.monotonic_ns()}")
            heard.join(0.1)
        stream.cancel()  # type: ignore[no-untyped-call] # the stubs leave its type out
        late = subscribe(events_service_pb2.SubscribeRequest(), timeout=1)
        with pytest.raises(grpc.RpcError) as caught:
            next(iter(late))
        assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        end = time.monotonic() + 30
        while wherryd.log_text().count("Events/Subscribe") < 2 and time.monotonic() < end:
            time.sleep(0.05)
    assert wherryd.log_text().count("Events/Subscribe") == 2


async def test_a_deadline_of_ttrpc(wherryd: Wherryd) -> None:
    client = await TtrpcClient.connect(f"{wherryd.address}.ttrpc")
    stream = await client.stream(
        "containerd.services.events.v1.Events", "Subscribe", events_service_pb2.SubscribeRequest(), timeout=0.2
    )
    with pytest.raises(DeadlineExceeded):
        await anext(stream)
    await client.close()


def test_health(wherryd: Wherryd) -> None:
    with grpc.insecure_channel(f"unix:{wherryd.address}") as channel:
        check = channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            health_pb2.HealthCheckRequest.SerializeToString,
            health_pb2.HealthCheckResponse.FromString,
        )
        assert check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError) as caught:
            check(health_pb2.HealthCheckRequest(service="x"))
        assert caught.value.code() == grpc.StatusCode.NOT_FOUND


ACTIVATE = """
import os, socket, sys
paths, command = sys.argv[1:3], sys.argv[3:]
for path in paths:
    sock = socket.socket(socket.AF_UNIX); sock.bind(path); sock.listen()
    os.set_inheritable(sock.detach(), True)
os.environ.update(LISTEN_FDS="2", LISTEN_PID=str(os.getpid()), LISTEN_FDNAMES="grpc:ttrpc")
os.execv(command[0], command)
"""


def test_sockets_handed_over_by_the_service_manager() -> None:
    daemon = Wherryd()
    command = daemon.command()
    try:
        paths = [daemon.address, f"{daemon.address}.ttrpc"]
        # descriptors 3 and 4 are the first that a fresh interpreter opens and keeps
        daemon.command = lambda: [sys.executable, "-S", "-c", ACTIVATE, *paths, *command]  # type: ignore[method-assign]
        daemon.start()
        assert "Server:" in daemon.ctr("version").stdout
        assert daemon.ctr("namespaces", "create", "n").returncode == 0
        with socket.socket(socket.AF_UNIX) as peer:
            peer.connect(paths[1])
        assert daemon.stop() == 0
        # they are the service manager's: they stay
        assert os.path.exists(paths[0])
        assert os.path.exists(paths[1])
    finally:
        daemon.close()


def test_sigusr1_prints_stacks_and_sighup_the_level() -> None:
    daemon = Wherryd(config="version = 2\n")
    try:
        daemon.start()
        assert daemon.process is not None
        subprocess.run(["kill", "-USR1", str(daemon.pid)], check=True)
        daemon.config.write_text('version = 2\n[debug]\nlevel = "error"\n')
        subprocess.run(["kill", "-HUP", str(daemon.pid)], check=True)
        end = time.monotonic() + 30
        while "Current thread" not in daemon.log_text() and time.monotonic() < end:
            time.sleep(0.05)
        assert "Server:" in daemon.ctr("version").stdout
        assert "Current thread" in daemon.log_text()
        assert "task " in daemon.log_text()
        assert daemon.log_text().count("Version/Version") == 0
    finally:
        daemon.close()
