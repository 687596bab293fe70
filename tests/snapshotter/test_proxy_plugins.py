"""Snapshotters over sockets, with the real others: ours under containerd of two generations, others' under wherryd."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests import busybox
from tests.containerd import Containerd
from tests.daemon.transfer_rig import make_image, publish, tar
from tests.peers import need
from tests.registry.conftest import registry
from tests.sid import need_sid
from tests.wherryd import Wherryd

__all__ = ["registry"]
PATIENCE = 30.0
# of a containerd that nobody asks for it
NO_COLLECTION = 'startup_delay = "1h"\n  deletion_threshold = 1000000\n  mutation_threshold = 1000000'


class Alone:
    """`wherry-snapshotter`, a process of its own."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.address = str(folder / "snapshotter.sock")
        self.root = folder / "snapshotter"
        self._command = [sys.executable, "-m", "wherry.snapshotter.command", kind, "--address", self.address]
        self._command += ["--root", str(self.root)]
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(self._command)
        wait_for(self._answers)

    def _answers(self) -> bool:
        with socket.socket(socket.AF_UNIX) as sock:
            return sock.connect_ex(self.address) == 0

    def stop(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)
        assert self.process.wait(PATIENCE) in (0, -number)

    @property
    def kept(self) -> int:
        """How many snapshots' directories there are."""
        return len(os.listdir(self.root / "snapshots"))


def wait_for(condition: object) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, "it didn't come"
        time.sleep(0.02)


@contextmanager
def alone(kind: str, folder: Path) -> Iterator[Alone]:
    made = Alone(kind, folder)
    try:
        yield made
    finally:
        if made.process.poll() is None:
            made.stop()


def image(registry: str) -> str:
    """Busybox with a layer above it that takes something away, in the registry."""
    ref = f"{registry}/proxied/busybox:test"
    top = tar({"etc/group": None, "etc/added": b"added\n"})
    asyncio.run(publish(make_image([busybox.layer(), top]), ref))
    return ref


def program(generation: str) -> str:
    return need("containerd") if generation == "bookworm" else need_sid("containerd")


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


LOOK = "cat /etc/added; test -e /etc/group || echo gone; echo new > /etc/new && cat /etc/new"
SEEN = "added\ngone\nnew\n"


@pytest.mark.parametrize(
    ("generation", "kind"), [("bookworm", "overlayfs"), ("bookworm", "native"), ("sid", "overlayfs"), ("sid", "native")]
)
def test_containerd_uses_ours(generation: str, kind: str, registry: str, tmp_path: Path) -> None:
    """Pull, run, killed and served again, remove: with nothing left."""
    binary, ref = program(generation), image(registry)
    with alone(kind, tmp_path) as ours:
        more = f'[proxy_plugins.wherry]\n  type = "snapshot"\n  address = "{ours.address}"\n'
        containerd = Containerd(binary, more)
        try:
            containerd.start()
            ctr = [containerd.ctr, "-a", containerd.address]
            local = ["--local"] if generation == "sid" else []
            run(*ctr, "images", "pull", *local, "--plain-http", "--snapshotter", "wherry", ref)
            assert ours.kept == 2
            command = ["run", "--rm", "--snapshotter", "wherry", ref]
            assert run(*ctr, *command, f"one-{os.getpid()}", "sh", "-c", LOOK) == SEEN
            ours.stop(signal.SIGKILL)
            ours.start()
            # Go's client tries again after a second or so
            listing = [*ctr, "snapshots", "--snapshotter", "wherry", "ls"]
            wait_for(lambda: subprocess.run(listing, capture_output=True).returncode == 0)
            assert run(*ctr, *command, f"two-{os.getpid()}", "sh", "-c", LOOK) == SEEN
            listed = run(*listing).splitlines()[1:]
            assert [line.split()[-1] for line in listed] == ["Committed", "Committed"]
            for line in listed:
                assert "B" in run(*ctr, "snapshots", "--snapshotter", "wherry", "usage", line.split()[0])
            run(*ctr, "images", "rm", "--sync", ref)
            wait_for(lambda: ours.kept == 0)
        finally:
            containerd.close()


@contextmanager
def daemon(address: str, name: str = "foreign") -> Iterator[Wherryd]:
    made = Wherryd(config=f'[proxy_plugins.{name}]\n  type = "snapshot"\n  address = "{address}"\n')
    try:
        made.start()
        yield made
    finally:
        made.close()


@pytest.mark.parametrize("kind", ["overlayfs", "native"])
def test_wherryd_uses_one_that_is_served_alone(kind: str, registry: str, tmp_path: Path) -> None:
    """The daemon comes first: a snapshotter that isn't there is told so, and used when it comes."""
    ref, address = image(registry), str(tmp_path / "snapshotter.sock")
    with daemon(address) as wherryd:
        missing = wherryd.ctr("snapshots", "--snapshotter", "foreign", "prepare", "k", "", check=False)
        assert missing.returncode != 0
        assert address in missing.stderr
        with alone(kind, tmp_path) as theirs:
            wherryd.ctr("images", "pull", "--plain-http", "--snapshotter", "foreign", ref)
            command = ["run", "--rm", "--snapshotter", "foreign", ref]
            assert wherryd.ctr(*command, f"one-{os.getpid()}", "sh", "-c", LOOK).stdout == SEEN
            theirs.stop(signal.SIGKILL)
            theirs.start()
            wherryd.kill()
            wherryd.start()
            assert wherryd.ctr(*command, f"two-{os.getpid()}", "sh", "-c", LOOK).stdout == SEEN
            wherryd.ctr("images", "rm", "--sync", ref)
            wait_for(lambda: theirs.kept == 0)


def test_wherryd_uses_containerds(registry: str) -> None:
    """containerd's own snapshots service as the foreign one. The name goes along with each call, so it is one that
    containerd has, and ours of that name is disabled."""
    ref = image(registry)
    # its collector knows of no one who uses the snapshots: soon after the first removal it would take them all
    containerd = Containerd(more=f'[plugins."io.containerd.gc.v1.scheduler"]\n  {NO_COLLECTION}\n')
    try:
        containerd.start()
        with daemon(containerd.address, name="blockfile") as wherryd:
            refused = wherryd.ctr("snapshots", "--snapshotter", "blockfile", "prepare", "k", "", check=False)
            assert "snapshotter not loaded: blockfile" in refused.stderr
        disabled = 'disabled_plugins = ["io.containerd.snapshotter.v1.overlayfs"]\n'
        with daemon_with(disabled, containerd.address) as wherryd:
            wherryd.ctr("images", "pull", "--plain-http", ref)
            assert wherryd.ctr("run", "--rm", ref, f"one-{os.getpid()}", "sh", "-c", LOOK).stdout == SEEN
            there = run(containerd.ctr, "-a", containerd.address, "snapshots", "ls")
            assert there.count("Committed") == 2
            wherryd.ctr("images", "rm", "--sync", ref)
            wait_for(lambda: "Committed" not in run(containerd.ctr, "-a", containerd.address, "snapshots", "ls"))
    finally:
        containerd.close()


@contextmanager
def daemon_with(config: str, address: str) -> Iterator[Wherryd]:
    made = Wherryd(config=f'{config}[proxy_plugins.overlayfs]\n  type = "snapshot"\n  address = "{address}"\n')
    try:
        made.start()
        yield made
    finally:
        made.close()


def test_two_cannot_serve_one_root_or_one_address(tmp_path: Path) -> None:
    with alone("overlayfs", tmp_path) as first:
        for address, root, what in (
            (first.address, tmp_path / "other", f"address {first.address} is in use"),
            (str(tmp_path / "other.sock"), first.root, "are served by another process"),
        ):
            command = [sys.executable, "-m", "wherry.snapshotter.command", "overlayfs"]
            command += ["--address", address, "--root", str(root)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
            assert done.returncode == 1
            assert what in done.stderr
        assert os.stat(first.address).st_mode & 0o777 == 0o600
    assert not os.path.exists(first.address)


def test_a_mute_one_delays_nobody(tmp_path: Path) -> None:
    """It takes connections and says nothing: the daemon starts, runs containers on its own, collects and stops."""
    address = str(tmp_path / "mute.sock")
    with socket.socket(socket.AF_UNIX) as mute:
        mute.bind(address)
        mute.listen()
        with daemon(address) as wherryd:
            assert wherryd.process is not None
            ref = wherryd.import_busybox()
            command = [need("ctr"), "-a", wherryd.address, "snapshots", "--snapshotter", "foreign", "ls"]
            with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as asking:
                assert wherryd.ctr("run", "--rm", ref, f"one-{os.getpid()}", "echo", "hi").stdout == "hi\n"
                wherryd.ctr("images", "rm", "--sync", ref)
                assert asking.poll() is None
                began = time.monotonic()
                wherryd.stop()
                assert time.monotonic() - began < 10
                asking.wait(PATIENCE)
