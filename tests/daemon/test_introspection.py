"""What the daemon says of itself, as ctr and containerd's client ask it."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path

import grpc
import pytest
from google.protobuf import empty_pb2

from tests.wherryd import Wherryd
from wherry.daemon import version
from wherry.proto import introspection_pb2 as pb
from wherry.proto.types_pb2 import RuntimeInfo, RuntimeRequest

SERVICE = "/containerd.services.introspection.v1.Introspection"


def plugins(daemon: Wherryd, *filters: str) -> list[pb.Plugin]:
    with grpc.insecure_channel(f"unix:{daemon.address}") as channel:
        call = channel.unary_unary(
            f"{SERVICE}/Plugins", pb.PluginsRequest.SerializeToString, pb.PluginsResponse.FromString
        )
        return list(call(pb.PluginsRequest(filters=filters)).plugins)


def test_the_version_is_the_packages() -> None:
    with (Path(__file__).parents[2] / "pyproject.toml").open("rb") as file:
        assert tomllib.load(file)["project"]["version"] == version.VERSION


def test_ctr_lists_plugins_and_the_server_keeps_its_uuid(wherryd: Wherryd) -> None:
    listed = {
        tuple(line.split()[:2]): line.split()[2:] for line in wherryd.ctr("plugins", "ls").stdout.splitlines()[1:]
    }
    for kind, name in (
        ("io.containerd.content.v1", "content"),
        ("io.containerd.metadata.v1", "bolt"),
        ("io.containerd.gc.v1", "scheduler"),
        ("io.containerd.grpc.v1", "tasks"),
        ("io.containerd.grpc.v1", "healthcheck"),
    ):
        assert listed[kind, name] == ["-", "ok"], (kind, name)
    assert listed["io.containerd.snapshotter.v1", "overlayfs"][1] == "ok"
    assert listed["io.containerd.runtime.v2", "task"][0].startswith("linux/")
    before = wherryd.ctr("version").stdout
    wherryd.restart()
    assert wherryd.ctr("version").stdout == before
    assert f"Version:  {version.VERSION}" in before


def test_a_client_finds_a_snapshotters_platforms(wherryd: Wherryd) -> None:
    (found,) = plugins(wherryd, "type==io.containerd.snapshotter.v1, id==overlayfs")
    assert found.platforms[0].os == "linux"
    assert found.exports["root"] == str(wherryd.root / "snapshotter" / "overlayfs")
    (found,) = plugins(wherryd, "type==io.containerd.transfer.v1")
    assert found.platforms[0].architecture
    with pytest.raises(grpc.RpcError) as caught:
        plugins(wherryd, "type==")
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_the_server_and_a_runtime(wherryd: Wherryd) -> None:
    with grpc.insecure_channel(f"unix:{wherryd.address}") as channel:
        server = channel.unary_unary(
            f"{SERVICE}/Server", empty_pb2.Empty.SerializeToString, pb.ServerResponse.FromString
        )(empty_pb2.Empty())
        assert server.pid == wherryd.pid
        assert server.pidns == os.stat("/proc/self/ns/pid").st_ino
        request = pb.PluginInfoRequest(type="io.containerd.runtime.v2", id="task")
        request.options.type_url = RuntimeRequest.DESCRIPTOR.full_name
        request.options.value = RuntimeRequest(runtime_path="io.containerd.runc.v2").SerializeToString()
        info = channel.unary_unary(
            f"{SERVICE}/PluginInfo", pb.PluginInfoRequest.SerializeToString, pb.PluginInfoResponse.FromString
        )
        answer = info(request)
        assert answer.plugin.id == "task"
        assert RuntimeInfo.FromString(answer.extra.value).name == "io.containerd.runc.v2"
        request.id = "nothing"
        with pytest.raises(grpc.RpcError) as caught:
            info(request)
        assert caught.value.code() == grpc.StatusCode.NOT_FOUND


def test_disabled_and_required_plugins() -> None:
    daemon = Wherryd(config='version = 2\ndisabled_plugins = ["io.containerd.grpc.v1.diff"]\n')
    try:
        daemon.start()
        assert "diff" not in {line.split()[1] for line in daemon.ctr("plugins", "ls").stdout.splitlines()}
        daemon.stop()
        daemon.config.write_text('version = 2\nrequired_plugins = ["io.containerd.nri.v1.nri"]\n')
        with pytest.raises(RuntimeError, match=r"required plugins are not loaded: io.containerd.nri.v1.nri"):
            daemon.start()
    finally:
        daemon.close()
