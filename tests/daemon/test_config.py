"""The configuration: containerd's schema, warnings for what isn't known, errors that name file and key."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from tests.peers import need
from wherry.core import platforms
from wherry.core.errors import InvalidArgument, NotFound
from wherry.daemon import config
from wherry.daemon.durations import parse_duration
from wherry.daemon.plugins import Plugins
from wherry.daemon.toml import dumps


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_defaults_survive_being_written_and_read(tmp_path: Path) -> None:
    path = write(tmp_path / "c.toml", dumps(config.Config().as_tables()))
    read = config.load(path)
    assert read.warnings == ()
    assert read.as_tables() == config.Config().as_tables()


def test_containerds_own_default_is_accepted_with_warnings_only(tmp_path: Path) -> None:
    text = subprocess.run([need("containerd"), "config", "default"], capture_output=True, text=True, check=True).stdout
    read = config.load(write(tmp_path / "c.toml", text))
    assert read.version == 2
    assert read.grpc.address == "/run/containerd/containerd.sock"
    assert read.timeout("io.containerd.timeout.shim.cleanup", 0) == 5.0
    assert all(warning.startswith(f'{tmp_path}/c.toml: plugins."io.containerd.') for warning in read.warnings)
    assert not any("io.containerd.grpc.v1.cri" in warning for warning in read.warnings)
    assert read.cri_settings().pause_image.startswith("registry.k8s.io/pause:")


def test_what_dockerd_writes_is_accepted(tmp_path: Path) -> None:
    # the file of docker 20.10 for its child (/var/run/docker/containerd/containerd.toml)
    text = """
version = 0
root = "/var/lib/docker/containerd/daemon"
state = "/var/run/docker/containerd/daemon"
temp = ""
plugin_dir = ""
disabled_plugins = ["cri"]
oom_score = 0
[grpc]
address = "/var/run/docker/containerd/containerd.sock"
tcp_address = ""
tcp_tls_ca = ""
tcp_tls_cert = ""
tcp_tls_key = ""
uid = 0
gid = 0
max_recv_message_size = 16777216
max_send_message_size = 16777216
[ttrpc]
address = ""
uid = 0
gid = 0
[debug]
address = "/var/run/docker/containerd/containerd-debug.sock"
uid = 0
gid = 0
level = "info"
format = ""
[metrics]
address = ""
grpc_histogram = false
[cgroup]
path = ""
[plugins]
[plugins.linux]
shim = "containerd-shim"
runtime = "runc"
runtime_root = "/var/lib/docker/runc"
no_shim = false
shim_debug = false
"""
    read = config.load(write(tmp_path / "c.toml", text))
    assert read.warnings == (
        f'{tmp_path}/c.toml: plugins."linux": no such plugin here, its settings have no effect',
        f"{tmp_path}/c.toml: debug.address: it has no effect here",
    )
    assert read.disabled_plugins == ("cri",)
    assert read.grpc.address == "/var/run/docker/containerd/containerd.sock"
    assert read.ttrpc_address == "/var/run/docker/containerd/containerd.sock.ttrpc"


def test_plugins_runtimes_and_proxies_are_read(tmp_path: Path) -> None:
    text = """
version = 3
[plugins."io.containerd.gc.v1.scheduler"]
  pause_threshold = 1
  schedule_delay = "1m30s"
[plugins."io.containerd.cri.v1.runtime"]
  enable_selinux = true
[plugins."io.containerd.nri.v1.nri"]
  disable = true
[runtimes."io.containerd.runsc.v1"]
  shim = "/opt/containerd-shim-runsc-v1"
  config_path = "/etc/runsc.toml"
[proxy_plugins.stargz]
  type = "snapshot"
  address = "/run/stargz.sock"
  exports = { root = "/var/lib/stargz" }
"""
    read = config.load(write(tmp_path / "c.toml", text))
    assert read.gc.pause_threshold == 1.0
    assert read.runtimes["io.containerd.runsc.v1"].config_path == "/etc/runsc.toml"
    assert read.proxy_plugins["stargz"].exports == {"root": "/var/lib/stargz"}
    assert [warning.split(": ")[1] for warning in read.warnings] == [
        'plugins."io.containerd.nri.v1.nri"',
    ]
    assert read.cri_settings().enable_selinux


def test_unknown_keys_warn_with_their_path(tmp_path: Path) -> None:
    read = config.load(write(tmp_path / "c.toml", "version = 2\nfoo = 1\n[grpc]\nbar = 2\n"))
    assert sorted(read.warnings) == [
        f"{tmp_path}/c.toml: foo: unknown key, it has no effect",
        f"{tmp_path}/c.toml: grpc.bar: unknown key, it has no effect",
    ]


SHIM, BOLT, TRANSFER = (
    "io.containerd.runtime.v2.task",
    "io.containerd.metadata.v1.bolt",
    "io.containerd.transfer.v1.local",
)
OVERLAYFS, NATIVE = "io.containerd.snapshotter.v1.overlayfs", "io.containerd.snapshotter.v1.native"


@pytest.mark.parametrize(
    ("text", "at"),
    [
        ('[grpc]\ntcp_address = "127.0.0.1:1"', "grpc.tcp_address"),
        ('[debug]\naddress = "/x"', "debug.address"),
        ("[debug]\nuid = 5", "debug.uid"),
        ('[cgroup]\npath = "/x"', "cgroup.path"),
        ('[stream_processors."mine"]\npath = "x"', "stream_processors.mine.path"),
        ('[timeouts]\n"io.containerd.timeout.bolt.open" = "5s"', 'timeouts."io.containerd.timeout.bolt.open"'),
        ('[timeouts]\n"shim.lode" = "5s"', 'timeouts."shim.lode"'),
        ('[proxy_plugins.x]\ntype = "content"\naddress = "/x"', 'proxy_plugins."x"'),
        (f'[plugins."{SHIM}"]\nplatforms = ["plan9/mips"]', f'plugins."{SHIM}".platforms'),
        (f'[plugins."{SHIM}"]\nsched_core = true', f'plugins."{SHIM}".sched_core'),
        (f'[plugins."{TRANSFER}"]\nmax_concurrent_unpacks = 4', f'plugins."{TRANSFER}".max_concurrent_unpacks'),
        (f'[[plugins."{TRANSFER}".unpack_config]]\nplatform = "x"', f'plugins."{TRANSFER}".unpack_config'),
        (
            '[plugins."io.containerd.service.v1.diff-service"]\ndefault = ["a"]',
            'plugins."io.containerd.service.v1.diff-service".default',
        ),
    ],
)
def test_what_has_no_effect_warns_with_its_path(tmp_path: Path, text: str, at: str) -> None:
    path = write(tmp_path / "c.toml", text)
    assert config.load(path).warnings == (f"{path}: {at}: it has no effect here",)


def test_what_asks_for_nothing_does_not_warn(tmp_path: Path) -> None:
    text = f"""
oom_score = 0
[metrics]
address = ""
grpc_histogram = false
[stream_processors."io.containerd.ocicrypt.decoder.v1.tar"]
path = "ctd-decoder"
[timeouts]
"io.containerd.timeout.bolt.open" = "0s"
"io.containerd.timeout.shim.load" = "7s"
[plugins."{SHIM}"]
platforms = ["{platforms.host()}"]
[plugins."{OVERLAYFS}"]
sync_remove = false
"""
    assert config.load(write(tmp_path / "c.toml", text)).warnings == ()
    native = write(tmp_path / "n.toml", f'[plugins."{NATIVE}"]\nsync_remove = true')
    assert config.load(native).warnings == (f'{native}: plugins."{NATIVE}".sync_remove: unknown key, it has no effect',)


def test_disabling_what_stays_warns() -> None:
    plugins = Plugins(["io.containerd.gc.v1.scheduler", "io.containerd.grpc.v1.cri", "io.containerd.grpc.v1.tasks"])
    with plugins.load("io.containerd.gc.v1", "scheduler"):
        pass
    assert not plugins.enabled("io.containerd.grpc.v1", "tasks")
    with capture_logs() as said:
        plugins.check()
    assert [entry["uri"] for entry in said if entry["log_level"] == "warning"] == ["io.containerd.gc.v1.scheduler"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (f'[plugins."{BOLT}"]\ncontent_sharing_policy = "x"', 'policy: expected "shared" or "isolated"'),
        ('[grpc]\nuid = "abc"', "grpc.uid: expected an integer, got 'abc'"),
        ("[grpc]\naddress = 5", "grpc.address: expected a string, got 5"),
        ("[grpc]\nuid = true", "grpc.uid: expected an integer, got True"),
        ("grpc = 5", "grpc.: expected a table, got 5"),
        ("disabled_plugins = [1]", "disabled_plugins[0]: expected a string, got 1"),
        ("version = 9", "version: expected 2 or 3, got 9"),
        ("plugins = 1", "plugins: expected a table"),
        ('[plugins."io.containerd.gc.v1.scheduler"]\npause_threshold = "x"', "pause_threshold: expected a number"),
        ('[timeouts]\n"io.containerd.timeout.shim.load" = "5 parsecs"', "is no duration"),
        ('[debug]\nlevel = "loud"', "debug.level: expected one of trace, debug"),
        ("this is not toml", "not TOML"),
        ('imports = "x"', "imports: expected an array of strings"),
        ('[proxy_plugins.x]\ntype = "other"', 'proxy_plugins."x".type: expected "snapshot"'),
        ('[proxy_plugins.x]\ntype = "snapshot"', 'proxy_plugins."x".address: expected the absolute path'),
        ('[proxy_plugins.x]\ntype = "snapshot"\naddress = "/x"\nplatform = "a/b/c/d"', 'proxy_plugins."x".platform: '),
        ("[limits]\nlayer_bytes = -1", "limits.layer_bytes: expected a number from 0 on"),
    ],
)
def test_wrong_values_name_file_and_key(tmp_path: Path, text: str, says: str) -> None:
    path = write(tmp_path / "c.toml", text)
    with pytest.raises(InvalidArgument) as caught:
        config.load(path)
    assert f"config file {path}: " in caught.value.message
    assert says in caught.value.message


def test_imports_are_merged_over_the_file(tmp_path: Path) -> None:
    (tmp_path / "conf.d").mkdir()
    write(tmp_path / "conf.d" / "a.toml", 'disabled_plugins = ["a"]\n[grpc]\nuid = 7\n')
    write(tmp_path / "conf.d" / "b.toml", 'imports = ["../c.toml"]\n[grpc]\ngid = 8\n')
    text = 'version = 2\nimports = ["conf.d/*.toml"]\ndisabled_plugins = ["m"]\n[grpc]\nuid = 1\naddress = "/x"\n'
    read = config.load(write(tmp_path / "c.toml", text))
    assert (read.grpc.address, read.grpc.uid, read.grpc.gid) == ("/x", 7, 8)
    assert read.disabled_plugins == ("m", "a")
    assert len(read.files) == 3


def test_a_missing_file_is_an_error_and_the_missing_default_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(NotFound, match=r"nope\.toml: not found"):
        config.load(str(tmp_path / "nope.toml"))
    monkeypatch.setattr(config, "DEFAULT_PATH", str(tmp_path / "default.toml"))
    assert config.load(None) == config.Config()
    write(tmp_path / "default.toml", '[grpc]\naddress = "/y"')
    assert config.load(None).grpc.address == "/y"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("0", 0), ("1h30m", 5400), ("100ms", 0.1), ("1.5s", 1.5), ("-2s", -2), ("3us", 3e-6), (".5m", 30)],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "5", "s", "1 s", "1sx", "--1s", "1d"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(InvalidArgument):
        parse_duration(text)
