"""Bad input to the task service: a clear error with the right code, nothing left behind, and the daemon serves on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from google.protobuf import any_pb2

from tests.wherryd import BUSYBOX, Wherryd
from wherry.proto import containers_pb2, tasks_pb2

SPEC = "types.containerd.io/opencontainers/runtime-spec/1/Spec"
NAMESPACE = (("containerd-namespace", "default"),)


@pytest.fixture(scope="module")
def daemon() -> Iterator[Wherryd]:
    daemon = Wherryd()
    try:
        daemon.start()
        daemon.import_busybox()
        yield daemon
    finally:
        daemon.close()


@pytest.fixture
def channel(daemon: Wherryd) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(f"unix:{daemon.address}") as channel:
        yield channel
    assert daemon.settle() == []
    assert "call failed" not in daemon.log_text()
    assert daemon.ctr("run", "--rm", BUSYBOX, "after", "echo", "fine").stdout == "fine\n"


def call(channel: grpc.Channel, service: str, name: str, request: Any, answer: Any, metadata: Any = NAMESPACE) -> Any:
    method = channel.unary_unary(
        f"/containerd.services.{service}/{name}", type(request).SerializeToString, answer.FromString
    )
    return method(request, metadata=metadata, timeout=30)


def create_container(channel: grpc.Channel, identity: str, spec: bytes, runtime: str = "io.containerd.runc.v2") -> None:
    container = containers_pb2.Container(id=identity, spec=any_pb2.Any(type_url=SPEC, value=spec))
    container.runtime.name = runtime
    request = containers_pb2.CreateContainerRequest(container=container)
    call(channel, "containers.v1.Containers", "Create", request, containers_pb2.CreateContainerResponse)


def delete_container(channel: grpc.Channel, identity: str) -> None:
    request = containers_pb2.DeleteContainerRequest(id=identity)
    call(channel, "containers.v1.Containers", "Delete", request, any_pb2.Any)


def create_task(channel: grpc.Channel, identity: str, **more: Any) -> grpc.RpcError:
    """The error that creating a task ends with."""
    request = tasks_pb2.CreateTaskRequest(container_id=identity, **more)
    with pytest.raises(grpc.RpcError) as caught:
        call(channel, "tasks.v1.Tasks", "Create", request, tasks_pb2.CreateTaskResponse)
    return caught.value


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        (b"this is no JSON", "is not JSON"),
        (b"[1, 2]", "is no JSON object"),
        (b"", "is not JSON"),
        (b"\xff\xfe{}", "is not JSON"),
    ],
)
def test_a_spec_that_is_none(channel: grpc.Channel, spec: bytes, says: str) -> None:
    create_container(channel, "nospec", spec)
    error = create_task(channel, "nospec")
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert 'spec of container "nospec"' in (error.details() or "")
    assert says in (error.details() or "")
    delete_container(channel, "nospec")


@pytest.mark.parametrize(
    "spec",
    [{}, {"ociVersion": "1.0.2", "root": {"path": "rootfs"}}, {"ociVersion": "1.0.2", "process": {"args": 5}}],
)
def test_a_spec_without_what_it_needs(channel: grpc.Channel, spec: dict[str, Any]) -> None:
    create_container(channel, "thin", json.dumps(spec).encode())
    error = create_task(channel, "thin")
    assert (error.details() or "").startswith("failed to create shim task: ")
    assert error.code() != grpc.StatusCode.OK
    delete_container(channel, "thin")


def test_a_container_without_an_image(channel: grpc.Channel) -> None:
    spec = {
        "ociVersion": "1.0.2",
        "process": {"args": ["/bin/true"], "cwd": "/", "user": {"uid": 0, "gid": 0}},
        "root": {"path": "rootfs"},
        "linux": {"namespaces": [{"type": "mount"}, {"type": "pid"}]},
    }
    create_container(channel, "empty", json.dumps(spec).encode())
    error = create_task(channel, "empty")
    assert "/bin/true" in (error.details() or "")
    assert "no such file or directory" in (error.details() or "")
    delete_container(channel, "empty")


@pytest.mark.parametrize("identity", ["..", "a/b", "x" * 300, "", "a b", "-a", "a\nb"])
def test_ids_that_are_none(channel: grpc.Channel, identity: str) -> None:
    error = create_task(channel, identity)
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "identifier" in (error.details() or "")


@pytest.mark.parametrize(
    ("metadata", "code"),
    [
        ((), grpc.StatusCode.FAILED_PRECONDITION),
        ((("containerd-namespace", "../x"),), grpc.StatusCode.INVALID_ARGUMENT),
        ((("containerd-namespace", "nobody"),), grpc.StatusCode.NOT_FOUND),
    ],
)
@pytest.mark.parametrize("name", ["Create", "Start", "Delete", "Get", "Kill", "Wait", "Exec", "Pause", "ListPids"])
def test_namespaces_that_are_none(channel: grpc.Channel, name: str, metadata: Any, code: grpc.StatusCode) -> None:
    request = getattr(tasks_pb2, REQUESTS[name])(container_id="c")
    with pytest.raises(grpc.RpcError) as caught:
        call(channel, "tasks.v1.Tasks", name, request, any_pb2.Any, metadata)
    assert caught.value.code() == code


REQUESTS = {
    "Create": "CreateTaskRequest",
    "Start": "StartRequest",
    "Delete": "DeleteTaskRequest",
    "Get": "GetRequest",
    "Kill": "KillRequest",
    "Wait": "WaitRequest",
    "Exec": "ExecProcessRequest",
    "Pause": "PauseTaskRequest",
    "ListPids": "ListPidsRequest",
}


def test_a_root_that_cannot_be_mounted(channel: grpc.Channel) -> None:
    spec = {"ociVersion": "1.0.2", "process": {"args": ["/bin/true"], "cwd": "/"}, "root": {"path": "rootfs"}}
    create_container(channel, "nomount", json.dumps(spec).encode())
    mount = {"type": "overlay", "source": "overlay", "options": ["lowerdir=/no/such/folder"]}
    error = create_task(channel, "nomount", rootfs=[mount])
    assert "/no/such/folder" in (error.details() or "") or "mount" in (error.details() or "")
    delete_container(channel, "nomount")


def test_streams_that_cannot_be_opened(channel: grpc.Channel) -> None:
    spec = {"ociVersion": "1.0.2", "process": {"args": ["/bin/true"], "cwd": "/"}, "root": {"path": "rootfs"}}
    create_container(channel, "nofifo", json.dumps(spec).encode())
    error = create_task(channel, "nofifo", stdout="/no/such/fifo", stdin="/no/such/in")
    assert error.code() != grpc.StatusCode.OK
    delete_container(channel, "nofifo")


def test_options_of_a_wrong_type(channel: grpc.Channel) -> None:
    spec = {"ociVersion": "1.0.2", "process": {"args": ["/bin/true"], "cwd": "/"}, "root": {"path": "rootfs"}}
    create_container(channel, "badoptions", json.dumps(spec).encode())
    options = any_pb2.Any(type_url="containerd.runc.v1.Options", value=b"\xff\xff\xff")
    error = create_task(channel, "badoptions", options=options)
    assert error.code() != grpc.StatusCode.OK
    assert "option" in (error.details() or "").lower()
    delete_container(channel, "badoptions")


def test_a_checkpoint_that_is_not_there(channel: grpc.Channel) -> None:
    create_container(channel, "restored", b"{}")
    error = create_task(channel, "restored", checkpoint={"digest": f"sha256:{'0' * 64}", "media_type": "x"})
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert 'unsupported checkpoint type "x"' in (error.details() or "")
    delete_container(channel, "restored")
