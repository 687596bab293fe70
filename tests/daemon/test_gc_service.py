"""The collector on request, by the command line: what would go, what went, why a thing is kept; pulls that were cut."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from tests import busybox
from tests.daemon.transfer_rig import make_image, tar
from tests.wherryd import BUSYBOX, Wherryd

PATIENCE = 30.0
# names of containers are names of cgroups, which all daemons of a host share
OWN = f"gc-{os.getpid()}"


def wherry(wherryd: Wherryd, *arguments: str, fails: bool = False) -> str:
    command = [sys.executable, "-m", "wherry.cli", "--address", wherryd.address, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode != 0) == fails, done.stderr + done.stdout
    return done.stderr if fails else done.stdout


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it didn't come"
        time.sleep(0.02)


@pytest.fixture
def patient() -> Iterator[Wherryd]:
    """A daemon that collects when it is asked to, and not by itself."""
    config = '[plugins."io.containerd.gc.v1.scheduler"]\n  startup_delay = "1h"\n'
    made = Wherryd(config=config)
    try:
        made.start()
        yield made
    finally:
        made.close()


def test_what_would_go_and_what_goes(patient: Wherryd) -> None:
    patient.import_busybox()
    text = "garbage " * 1000
    digest = "sha256:" + hashlib.sha256(text.encode()).hexdigest()
    patient.ctr("content", "ingest", "ref", stdin=text, namespace="other")
    patient.ctr("snapshots", "prepare", "lost", "")
    patient.ctr("snapshots", "label", "lost", "containerd.io/gc.root=")  # which ctr gives it
    for _ in range(2):
        would = json.loads(wherry(patient, "gc", "--dry-run", "--format", "json"))
        found = {(item["Namespace"], item["Kind"], item["Key"]): item["Size"] for item in would}
        assert found["other", "content", digest] == len(text)
        assert ("default", "snapshot", "overlayfs/lost") in found
        assert ("default", "image", BUSYBOX) not in found
    summary = wherry(patient, "gc").splitlines()[-1]
    assert summary.startswith(f"{len(would)} removed, ")
    assert patient.ctr("content", "ls", "-q", namespace="other").stdout == ""
    assert "lost" not in patient.ctr("snapshots", "ls").stdout
    assert json.loads(wherry(patient, "gc", "--format", "json")) == []
    assert wherry(patient, "gc", "--dry-run").splitlines()[-1] == "0 would be removed, 0 B"
    patient.ctr("run", "--rm", BUSYBOX, OWN, "true")


def test_what_keeps_a_thing(wherryd: Wherryd) -> None:
    wherryd.import_busybox()
    wherryd.ctr("images", "tag", BUSYBOX, "example.com/other:v1")
    wherryd.ctr("run", "-d", BUSYBOX, OWN, "sleep", "1000")
    listed = wherryd.ctr("snapshots", "ls").stdout.splitlines()[1:]
    (chain,) = [line.split()[0] for line in listed if line.split()[0] != OWN]
    explained = json.loads(wherry(wherryd, "gc", "--explain", chain, "--format", "json"))
    assert [(each["Kind"], each["Key"]) for each in explained] == [("snapshot", f"overlayfs/{chain}")]
    assert explained[0]["Size"] > 500_000
    roots = {(each[0]["Kind"], each[0]["Key"]): each for each in explained[0]["Chains"]}
    assert set(roots) == {("container", OWN), ("image", BUSYBOX), ("image", "example.com/other:v1")}
    assert [link["How"] for link in roots["container", OWN]] == [
        "a container",
        "the container's root",
        "its parent",
    ]
    assert [link["Kind"] for link in roots["image", BUSYBOX]] == ["image", "content", "content", "snapshot"]
    config = roots["image", BUSYBOX][2]["Key"]
    text = wherry(wherryd, "gc", "--explain", config.removeprefix("sha256:")[:12])
    assert text.startswith(f"content {config} is kept by\n")
    assert f"\n  image {BUSYBOX} (an image)\n  └─ content sha256:" in text
    assert "\n     └─ content " + config + " (label containerd.io/gc.ref.content.config" in text
    # an image by its familiar name, a container by its id, and its snapshot has the same name
    assert "(an image)" in wherry(wherryd, "gc", "--explain", "busybox:test")
    both = wherry(wherryd, "gc", "--explain", OWN)
    assert f"container {OWN} is kept by\n  container {OWN} (a container)" in both
    assert f"snapshot overlayfs/{OWN} is kept by" in both
    assert '"nothing" in namespace "default": not found' in wherry(wherryd, "gc", "--explain", "nothing", fails=True)
    wherryd.ctr("tasks", "kill", "-s", "KILL", OWN)


class Registry(BaseHTTPRequestHandler):
    """Serves one image; its last layer comes to half and then not at all, until `go_on` is set."""

    protocol_version = "HTTP/1.1"
    blobs: dict[str, bytes]
    manifest: str
    slow: str
    go_on: threading.Event

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2].partition("?")[0]
        digest = self.manifest if "/manifests/" in self.path else name
        data = self.blobs.get(digest, b"")
        self.send_response(200 if data else 404)
        self.send_header("Content-Length", str(len(data)))
        if "/manifests/" in self.path:
            self.send_header("Content-Type", "application/vnd.oci.image.manifest.v1+json")
            self.send_header("Docker-Content-Digest", digest)
        self.end_headers()
        if self.command == "HEAD":
            return
        half = len(data) // 2 if digest == self.slow else len(data)
        self.wfile.write(data[:half])
        self.wfile.flush()
        if digest == self.slow and self.go_on.wait(PATIENCE):
            self.wfile.write(data[half:])

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base's name
        pass


@contextmanager
def slow_registry(second: bytes = b"") -> Iterator[str]:
    """An image of two layers, of which the second stays half-way; its reference."""
    image = make_image([busybox.layer(), second or tar({"etc/more": bytes(range(256)) * 4000})])
    Registry.blobs = {str(digest): data for digest, (_, data) in image.blobs.items()}
    Registry.manifest = str(image.target.digest)
    Registry.slow = json.loads(Registry.blobs[Registry.manifest])["layers"][1]["digest"]
    Registry.go_on = threading.Event()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Registry)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_port}/slow/image:v1"
    finally:
        Registry.go_on.set()
        server.shutdown()
        thread.join()
        server.server_close()


def kept(wherryd: Wherryd) -> list[str]:
    """Blobs, uploads, snapshots and leases."""
    found = wherryd.ctr("content", "ls", "-q").stdout.split()
    found += wherryd.ctr("content", "active").stdout.splitlines()[1:]
    found += wherryd.ctr("snapshots", "ls").stdout.splitlines()[1:]
    return found + wherryd.ctr("leases", "ls", "-q").stdout.split()


@contextmanager
def half_pulled(wherryd: Wherryd) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A pull of which one layer is unpacked and the other half there."""
    with slow_registry() as ref:
        command = [sys.executable, "-m", "wherry.cli", "--address", wherryd.address, "pull", "--plain-http", ref]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as client:
            try:
                wait_for(lambda: "Committed" in wherryd.ctr("snapshots", "ls").stdout)
                wait_for(lambda: Registry.slow[7:19] in wherryd.ctr("content", "active").stdout)
                yield ref, client
            finally:
                client.kill()


def _interrupt(wherryd: Wherryd, client: subprocess.Popen[bytes], how: str) -> None:
    if how == "daemon killed":
        wherryd.restart()
    else:
        client.send_signal(signal.SIGINT if how == "interrupted" else signal.SIGKILL)
    client.wait(PATIENCE)


@pytest.mark.parametrize("how", ["interrupted", "client killed", "daemon killed"])
def test_an_interrupted_pull_keeps_nothing_longer_than_its_lease(wherryd: Wherryd, how: str) -> None:
    with half_pulled(wherryd) as (ref, client):
        _interrupt(wherryd, client, how)
        # no snapshot that was being made; what had come waits for the next pull of the same
        wait_for(lambda: "extract-" not in "".join(kept(wherryd)) or how == "daemon killed")
        wherry(wherryd, "gc")
        (lease,) = wherryd.ctr("leases", "ls", "-q").stdout.split()
        assert "containerd.io/gc.expire" in wherryd.ctr("leases", "ls").stdout
        explained = wherry(wherryd, "gc", "--explain", Registry.manifest)
        assert f"lease {lease} (a lease that hasn't expired)" in explained
        # as the end of its time does it
        wherryd.ctr("leases", "rm", "--sync", lease)
        assert [line for line in kept(wherryd) if "layer" not in line] == []
        Registry.go_on.set()
        wherry(wherryd, "pull", "--plain-http", ref)
        wherryd.ctr("run", "--rm", ref, OWN, "true")
        assert wherryd.ctr("leases", "ls", "-q").stdout == ""
