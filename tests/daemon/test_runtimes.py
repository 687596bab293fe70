"""Runtime handlers of the configuration: which shim, which options, and what is said when it isn't there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.any_pb2 import Any as AnyMessage

from tests.daemon import strange_shims
from tests.peers import need
from tests.wherryd import BUSYBOX, Wherryd
from wherry.core.errors import InvalidArgument, NotFound
from wherry.core.typeurl import pack, unpack_as
from wherry.daemon import config as configuration
from wherry.daemon import runtimes
from wherry.daemon.bundle import Launch
from wherry.proto import runc_options_pb2, runtimeoptions_pb2

CONFIG = """
version = 3
[runtimes.runsc]
  shim = "{shim}"
  pod_annotations = ["dev.gvisor.*"]
  [runtimes.runsc.options]
    TypeUrl = "io.containerd.runsc.v1.options"
    ConfigPath = "/etc/containerd/runsc.toml"
[runtimes.kata]
  shim = "{shim}"
  config_path = "/opt/kata/configuration.toml"
  pod_annotations = ["io.katacontainers.*"]
[runtimes.named]
  runtime_type = "io.containerd.runc.v2"
  [runtimes.named.options]
    BinaryName = "{runc}"
    SystemdCgroup = false
    IoUid = 7
[runtimes.away]
  runtime_type = "io.containerd.away.v1"
[runtimes.noruntime]
  binary = "runtime-that-is-nowhere"
[runtimes.wrong]
  [runtimes.wrong.options]
    BinaryNaem = "runc"
[runtimes.wrongtype]
  [runtimes.wrongtype.options]
    IoUid = "many"
"""


@pytest.fixture(scope="module")
def daemon() -> Iterator[Wherryd]:
    daemon = Wherryd()
    try:
        shim = strange_shims.write(daemon.folder)["address"]
        daemon.config.write_text(CONFIG.format(shim=shim, runc=need("runc")))
        daemon.start()
        daemon.import_busybox()
        yield daemon
    finally:
        daemon.close()


@pytest.fixture(scope="module")
def handlers(daemon: Wherryd) -> Any:
    return configuration.load(str(daemon.config)).runtimes


def options_of(name: str, handlers: Any, given: AnyMessage | None = None) -> AnyMessage:
    return runtimes.options(given or AnyMessage(), Launch(name), handlers)


def test_options_for_shims_with_a_file(handlers: Any) -> None:
    options = unpack_as(options_of("runsc", handlers), runtimeoptions_pb2.Options)
    assert options.type_url == "io.containerd.runsc.v1.options"
    assert options.config_path == "/etc/containerd/runsc.toml"
    options = unpack_as(options_of("kata", handlers), runtimeoptions_pb2.Options)
    assert options.config_path == "/opt/kata/configuration.toml"


def test_options_of_runc_and_what_the_container_says(handlers: Any) -> None:
    options = unpack_as(options_of("named", handlers), runc_options_pb2.Options)
    assert (options.binary_name, options.io_uid) == (need("runc"), 7)
    given = pack(runc_options_pb2.Options(binary_name="/own/runc", root="/own"))
    options = unpack_as(options_of("named", handlers, given), runc_options_pb2.Options)
    assert (options.binary_name, options.io_uid, options.root) == ("/own/runc", 7, "/own")
    other = pack(runtimeoptions_pb2.Options(config_path="/x"))
    assert options_of("named", handlers, other) == other
    assert options_of("somebody else", handlers, given) == given


def test_options_that_are_none(handlers: Any) -> None:
    with pytest.raises(InvalidArgument, match=r'runtimes."wrong".options.BinaryNaem: no such option.*BinaryName'):
        options_of("wrong", handlers)
    with pytest.raises(InvalidArgument, match=r'runtimes."wrongtype".options.IoUid: '):
        options_of("wrongtype", handlers)


def test_annotations_are_passed_on_by_name(handlers: Any) -> None:
    annotations = {"io.katacontainers.config": "1", "dev.gvisor.x": "2", "other": "3"}
    assert runtimes.passed_annotations(annotations, handlers["kata"].pod_annotations) == {
        "io.katacontainers.config": "1"
    }
    assert runtimes.passed_annotations(annotations, handlers["runsc"].pod_annotations) == {"dev.gvisor.x": "2"}
    assert runtimes.passed_annotations(annotations, handlers["named"].pod_annotations) == {}


def test_which_shim(handlers: Any) -> None:
    assert runtimes.resolve("runsc", handlers).binary.endswith("/shim-address")
    assert runtimes.resolve("named", handlers) == Launch("named")
    with pytest.raises(NotFound, match=r'runtime "io.containerd.away.v1": binary "containerd-shim-away-v1" is in none'):
        runtimes.resolve("away", handlers)


def test_containers_run_with_them(daemon: Wherryd) -> None:
    assert daemon.ctr("run", "--rm", "--runtime", "named", BUSYBOX, "c", "echo", "named").stdout == "named\n"
    daemon.ctr("run", "-d", "--runtime", "named", BUSYBOX, "rt-stays", "sleep", "1000")
    assert need("runc") in (daemon.state / "tasks" / "default" / "rt-stays" / "runtime.json").read_text()
    daemon.ctr("task", "delete", "--force", "rt-stays", check=False)
    daemon.ctr("containers", "delete", "rt-stays")
    # the options reach the shim, and what ours doesn't know of them it takes for none
    assert daemon.ctr("run", "--rm", "--runtime", "kata", BUSYBOX, "k", "echo", "kata").stdout == "kata\n"
    packed = AnyMessage.FromString((daemon.state / "stdin-k").read_bytes())
    assert unpack_as(packed, runtimeoptions_pb2.Options).config_path == "/opt/kata/configuration.toml"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("away", 'binary "containerd-shim-away-v1" is in none of '),
        ("noruntime", 'exec: "runtime-that-is-nowhere": executable file not found in $PATH (/'),
        ("wrong", 'runtimes."wrong".options.BinaryNaem: no such option'),
    ],
)
def test_what_is_not_there_is_named_with_the_place(daemon: Wherryd, name: str, says: str) -> None:
    done = daemon.ctr("run", "--runtime", name, BUSYBOX, "none", "true", check=False)
    assert says in done.stderr
    daemon.ctr("containers", "delete", "none")
    assert daemon.settle() == []


def test_a_runtime_of_the_containers_own_options(daemon: Wherryd, tmp_path: Path) -> None:
    absent = tmp_path / "runc"
    done = daemon.ctr("run", "--runc-binary", str(absent), BUSYBOX, "own", "true", check=False)
    assert f'exec: "{absent}": no such executable file' in done.stderr
    daemon.ctr("containers", "delete", "own")
