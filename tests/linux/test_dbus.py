"""The D-Bus client against a real bus, and against busctl's idea of the same bytes."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.peers import need
from wherry.linux import dbus
from wherry.linux.cgroups import systemd

BUS = "org.freedesktop.DBus"
_CONFIG = """<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig><listen>unix:path={path}</listen><auth>EXTERNAL</auth>
<policy context="default"><allow send_destination="*" eavesdrop="true"/><allow own="*"/><allow receive_sender="*"/>
<allow eavesdrop="true"/></policy></busconfig>
"""


@pytest.fixture
def bus(tmp_path: Path) -> Iterator[str]:
    daemon = need("dbus-daemon")
    path = tmp_path / "bus"
    (tmp_path / "config").write_text(_CONFIG.format(path=path))
    process = subprocess.Popen(
        [daemon, f"--config-file={tmp_path}/config", "--nofork", "--print-address"], stdout=subprocess.PIPE
    )
    assert process.stdout
    process.stdout.readline()
    yield str(path)
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_call_and_its_answer(bus: str) -> None:
    connection = dbus.Connection(bus, timeout=5)
    try:
        names = connection.call(BUS, "/", BUS, "ListNames")[0]
        assert BUS in names
        assert connection.call(BUS, "/", BUS, "NameHasOwner", "s", BUS) == (True,)
        credentials = connection.call(BUS, "/", BUS, "GetConnectionCredentials", "s", BUS)[0]
        assert credentials["UnixUserID"] == ("u", 0)
    finally:
        connection.close()


def test_an_error_keeps_its_name(bus: str) -> None:
    connection = dbus.Connection(bus, timeout=5)
    try:
        with pytest.raises(dbus.DBusError) as caught:
            connection.call("org.nobody", "/", "org.nobody", "Method")
        assert caught.value.name == "org.freedesktop.DBus.Error.ServiceUnknown"
        assert connection.call(BUS, "/", BUS, "NameHasOwner", "s", BUS) == (True,)
    finally:
        connection.close()


def test_signals_wait_until_they_are_asked_for(bus: str) -> None:
    listening, other = dbus.Connection(bus, timeout=5), dbus.Connection(bus, timeout=5)
    try:
        listening.subscribe(f"type='signal',interface='{BUS}',member='NameOwnerChanged'")
        other.call(BUS, "/", BUS, "RequestName", "su", "org.wherry.test", 0)
        listening.call(BUS, "/", BUS, "GetId")  # the signal comes before the answer
        while (signal := listening.next_signal()).body[0] != "org.wherry.test":
            continue  # a bus also tells us our own name
        assert signal.member == "NameOwnerChanged"
        assert signal.body[0] == "org.wherry.test"
    finally:
        listening.close()
        other.close()


VALUES: list[tuple[str, tuple[Any, ...]]] = [
    ("y", (7,)),
    ("bnqiuxtd", (True, -1, 2, -3, 4, -5, 2**64 - 1, 0.5)),
    ("sog", ("text ü", "/a/b", "a(sv)")),
    ("ay", (b"\x00\xff",)),
    ("as", (["a", "bcd", ""],)),
    ("a{sv}", ({"k": ("t", 1), "other": ("as", ["x"])},)),
    ("ssa(sv)a(sa(sv))", ("u.scope", "replace", [("PIDs", ("au", [1])), ("B", ("b", False))], [])),
    ("ya(yt)y", (1, [(2, 3), (4, 5)], 6)),
]


@pytest.mark.parametrize(("signature", "values"), VALUES, ids=[signature for signature, _ in VALUES])
def test_values_come_back(signature: str, values: tuple[Any, ...]) -> None:
    assert dbus.Reader(dbus.marshal(signature, values)).values(signature) == values


def test_an_empty_array_is_still_aligned() -> None:
    """The padding before the first item is there even without one, and is not counted."""
    assert dbus.marshal("yat", (1, [])) == b"\1\0\0\0" + b"\0\0\0\0"
    assert dbus.marshal("at", ([1],)) == b"\x08\0\0\0" + b"\0\0\0\0" + b"\1" + b"\0" * 7


def test_where_a_unit_lies() -> None:
    assert systemd.split_path("", "c1") == ("system.slice", "wherry-c1.scope")
    assert systemd.split_path("machine.slice:libpod:abc", "x") == ("machine.slice", "libpod-abc.scope")
    assert systemd.split_path(":pod:own.slice", "x") == ("system.slice", "own.slice")
    assert systemd.slice_path("a-b-c.slice") == "/a.slice/a-b.slice/a-b-c.slice"
    assert systemd.slice_path("-.slice") == ""
    for bad in ("a", "a/b.slice", "-a.slice", "a--b.slice", ".slice"):
        with pytest.raises(ValueError, match="invalid slice name"):
            systemd.slice_path(bad)
    with pytest.raises(ValueError, match='to be of format "slice:prefix:name"'):
        systemd.split_path("/a/path", "x")


def test_limits_as_properties(monkeypatch: pytest.MonkeyPatch) -> None:
    class Unified:
        mode = "unified"

    monkeypatch.setattr(systemd, "host", Unified)
    found = systemd.limits(
        {
            "memory": {"limit": 1 << 20, "reservation": 4096, "swap": 3 << 20},
            "cpu": {"shares": 1024, "quota": 12345, "period": 50000, "cpus": "0-2,8"},
            "pids": {"limit": -1},
        }
    )
    assert dict(found) == {
        "MemoryMax": ("t", 1 << 20),
        "MemoryLow": ("t", 4096),
        "MemorySwapMax": ("t", 2 << 20),
        "CPUWeight": ("t", 100),
        "CPUQuotaPeriodUSec": ("t", 50000),
        "CPUQuotaPerSecUSec": ("t", 250000),  # 246 900 µs, in the hundredths of a CPU that systemd keeps
        "AllowedCPUs": ("ay", b"\x07\x01"),
        "TasksMax": ("t", 2**64 - 1),
    }


def test_properties_from_annotations() -> None:
    given = {
        "org.systemd.property.TimeoutStopUSec": "uint64 5000",
        "org.systemd.property.RuntimeMaxSec": "1.5",
        "org.systemd.property.CollectMode": "'inactive-or-failed'",
        "org.systemd.property.SendSIGHUP": "true",
        "org.systemd.property.Before": "['a.service', 'b.service']",
        "other": "x",
    }
    assert dict(systemd.from_annotations(given)) == {
        "TimeoutStopUSec": ("t", 5000),
        "RuntimeMaxUSec": ("t", 1_500_000),
        "CollectMode": ("s", "inactive-or-failed"),
        "SendSIGHUP": ("b", True),
        "Before": ("as", ["a.service", "b.service"]),
    }
    with pytest.raises(ValueError, match="value parse error"):
        systemd.from_annotations({"org.systemd.property.X": "no such form"})
