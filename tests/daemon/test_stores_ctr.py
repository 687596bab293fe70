"""The stores through a real wherryd, driven by Debian's ctr: what its users see of them."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.peers import need
from tests.wherryd import BUSYBOX, Wherryd


@pytest.fixture(scope="module")
def shared() -> Iterator[Wherryd]:
    """One daemon for the tests of this file that don't kill it; each uses namespaces of its own."""
    need("ctr")
    # what no lease holds would go in the collection after the start, as on containerd
    later = '[plugins."io.containerd.gc.v1.scheduler"]\n  startup_delay = "1h"\n'
    daemon = Wherryd(config=f"version = 2\n{later}")
    try:
        daemon.start()
        yield daemon
    finally:
        daemon.close()


def sha256(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def lines(wherryd: Wherryd, namespace: str, *args: str) -> list[str]:
    return wherryd.ctr(*args, namespace=namespace).stdout.split("\n")[:-1]


def test_content_comes_and_goes(shared: Wherryd) -> None:
    data = "hello content\n" * 1000
    digest = sha256(data.encode())
    shared.ctr(
        *("content", "ingest", "--expected-digest", digest, "--expected-size", str(len(data)), "ref"),
        namespace="content",
        stdin=data,
    )
    assert shared.ctr("content", "get", digest, namespace="content").stdout == data
    assert lines(shared, "content", "content", "ls", "-q") == [digest]
    assert "a=b" in shared.ctr("content", "label", digest, "a=b", namespace="content").stdout
    assert digest in shared.ctr("content", "ls", "labels.a==b", namespace="content").stdout
    assert digest not in shared.ctr("content", "ls", "labels.a==c", namespace="content").stdout
    shared.ctr("content", "rm", digest, namespace="content")
    gone = shared.ctr("content", "get", digest, namespace="content", check=False)
    assert gone.returncode != 0
    assert f"content digest {digest}: not found" in gone.stderr


def test_a_wrong_digest_is_refused(shared: Wherryd) -> None:
    wrong = sha256(b"other")
    done = shared.ctr(
        *("content", "ingest", "--expected-digest", wrong, "bad"), namespace="wrong", stdin="hello", check=False
    )
    assert done.returncode != 0
    assert f"unexpected commit digest {sha256(b'hello')}, expected {wrong}: failed precondition" in done.stderr
    assert lines(shared, "wrong", "content", "ls", "-q") == []
    assert len(lines(shared, "wrong", "content", "active")) == 1  # the heading


def test_an_image_is_imported_tagged_exported_and_takes_all_along_when_it_goes(shared: Wherryd) -> None:
    shared.import_busybox("images")
    shared.ctr("images", "tag", BUSYBOX, "copy:1", namespace="images")
    shared.ctr("images", "label", "copy:1", "my.label=x", namespace="images")
    assert sorted(lines(shared, "images", "images", "ls", "-q")) == ["copy:1", BUSYBOX]
    assert lines(shared, "images", "images", "ls", "-q", "labels.my.label==x") == ["copy:1"]
    archive = shared.folder / "export.tar"
    shared.ctr("images", "export", str(archive), "copy:1", namespace="images")
    shared.ctr("images", "rm", "--sync", BUSYBOX, namespace="images")
    blobs = lines(shared, "images", "content", "ls", "-q")
    assert len(blobs) >= 3
    shared.ctr("images", "rm", "--sync", "copy:1", namespace="images")
    assert lines(shared, "images", "content", "ls", "-q") == []
    assert len(lines(shared, "images", "snapshots", "ls")) == 1
    for blob in blobs:
        assert not (shared.root / "content" / "blobs" / "sha256" / blob.removeprefix("sha256:")).exists()
    shared.ctr("images", "import", str(archive), namespace="images")
    assert lines(shared, "images", "images", "ls", "-q") == ["copy:1"]


def test_snapshots(shared: Wherryd) -> None:
    shared.import_busybox("snapshots")
    [committed] = lines(shared, "snapshots", "snapshots", "ls")[1:]
    chain = committed.split()[0]
    assert "Committed" in committed
    shared.ctr("snapshots", "prepare", "work", chain, namespace="snapshots")
    mount = shared.ctr("snapshots", "mounts", "/mnt", "work", namespace="snapshots").stdout
    assert mount.startswith("mount -t overlay")
    info = json.loads(shared.ctr("snapshots", "info", "work", namespace="snapshots").stdout)
    assert (info["Kind"], info["Parent"]) == ("Active", chain)
    refused = shared.ctr("snapshots", "rm", chain, namespace="snapshots", check=False)
    assert "cannot remove snapshot with child: failed precondition" in refused.stderr
    shared.ctr("snapshots", "commit", "layer", "work", namespace="snapshots")
    usage = lines(shared, "snapshots", "snapshots", "usage", "-b", "layer")
    assert len(usage) == 2
    shared.ctr("snapshots", "rm", "layer", namespace="snapshots")
    missing = shared.ctr("snapshots", "info", "layer", namespace="snapshots", check=False)
    assert "snapshot layer does not exist: not found" in missing.stderr


def test_leases(shared: Wherryd) -> None:
    shared.ctr("leases", "create", "--id", "l1", "a=b", namespace="leases")
    assert "a=b" in shared.ctr("leases", "ls", namespace="leases").stdout
    again = shared.ctr("leases", "create", "--id", "l1", namespace="leases", check=False)
    assert 'lease "l1": already exists' in again.stderr
    shared.ctr("leases", "rm", "--sync", "l1", namespace="leases")
    assert len(lines(shared, "leases", "leases", "ls")) == 1


def test_namespaces(shared: Wherryd) -> None:
    shared.ctr("namespaces", "create", "tenant", "a=b")
    assert any(line.split() == ["tenant", "a=b"] for line in lines(shared, "", "namespaces", "ls"))
    shared.ctr("namespaces", "label", "tenant", "c=d")
    shared.ctr("containers", "create", "--config", str(_spec(shared.folder)), "c1", namespace="tenant")
    refused = shared.ctr("namespaces", "rm", "tenant", check=False)
    assert (
        'namespace "tenant" must be empty, but it still has containers: failed precondition'.replace('"', '\\"')
        in (refused.stderr)
        or 'namespace "tenant" must be empty, but it still has containers: failed precondition' in refused.stderr
    )
    shared.ctr("containers", "rm", "c1", namespace="tenant")
    shared.ctr("namespaces", "rm", "tenant")
    bad = shared.ctr("namespaces", "create", "../evil", check=False)
    assert 'identifier "../evil" must match' in bad.stderr.replace('\\"', '"')


def _spec(folder: Path) -> Path:
    path = folder / "spec.json"
    path.write_text(
        json.dumps({"ociVersion": "1.0.2", "process": {"args": ["true"], "cwd": "/"}, "root": {"path": "/"}})
    )
    return path


def test_a_container_id_that_is_none_is_refused(shared: Wherryd) -> None:
    for bad in ("..", "a/b", "x" * 300):
        done = shared.ctr(
            "containers", "create", "--config", str(_spec(shared.folder)), bad, namespace="ids", check=False
        )
        assert done.returncode != 0
        assert "container.ID: identifier" in done.stderr
    assert lines(shared, "ids", "containers", "ls", "-q") == []


def test_a_malformed_namespace_is_refused(shared: Wherryd) -> None:
    for bad in ("..", "a/b", "x" * 300):
        done = shared.ctr("images", "ls", namespace=bad, check=False)
        assert done.returncode != 0
        assert "namespace validation: identifier" in done.stderr


def test_an_upload_survives_the_daemon(wherryd: Wherryd) -> None:
    need("ctr")
    data = os.urandom(6 << 20)
    digest = sha256(data)
    time.sleep(0.5)  # the collection after the start
    command = ["ctr", "--address", wherryd.address, "content", "ingest", "--expected-digest", digest, "up"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL) as client:
        assert client.stdin is not None
        client.stdin.write(data[: 4 << 20])
        client.stdin.flush()
        ingests = wherryd.root / "content" / "ingest"
        end = time.monotonic() + 30
        while sum(path.stat().st_size for path in ingests.glob("*/data")) < 3 << 20 and time.monotonic() < end:
            time.sleep(0.02)
        wherryd.kill()
        client.kill()
        client.stdin.close()
    wherryd.start()
    time.sleep(0.5)
    active = wherryd.ctr("content", "active").stdout
    assert "up" in active
    [upload] = ingests.glob("*/data")
    assert upload.stat().st_size >= 3 << 20
    whole = wherryd.folder / "whole"
    whole.write_bytes(data)
    with whole.open("rb") as file:
        # ctr seeks to the offset that the daemon tells it
        subprocess.run(command, stdin=file, check=True, timeout=30)
    stored = wherryd.root / "content" / "blobs" / "sha256" / digest.removeprefix("sha256:")
    assert stored.read_bytes() == data
    assert list(ingests.iterdir()) == []


def test_what_was_answered_is_there_after_a_kill(wherryd: Wherryd) -> None:
    wherryd.import_busybox()
    before = [lines(wherryd, "", *args) for args in (("images", "ls"), ("snapshots", "ls"))]
    wherryd.ctr("containers", "create", "--config", str(_spec(wherryd.folder)), "c1")
    wherryd.ctr("leases", "create", "--id", "l1")
    wherryd.restart()
    after = [lines(wherryd, "", *args) for args in (("images", "ls"), ("snapshots", "ls"))]
    assert after == before
    assert lines(wherryd, "", "containers", "ls", "-q") == ["c1"]
    assert "l1" in wherryd.ctr("leases", "ls").stdout
    assert wherryd.ctr("run", "--rm", BUSYBOX, "one", "echo", "again").stdout == "again\n"


def test_a_kill_during_an_import_leaves_no_record_without_files(wherryd: Wherryd) -> None:
    wherryd.import_busybox()  # writes the archive
    archive = str(wherryd.folder / "busybox.tar")
    for number, delay in enumerate((0.02, 0.05, 0.1, 0.2)):
        namespace = f"n{number}"
        command = ["ctr", "--address", wherryd.address, "--namespace", namespace, "images", "import", archive]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as client:
            time.sleep(delay)
            wherryd.kill()
            client.kill()
        wherryd.start()
        assert wherryd.import_busybox(namespace) == BUSYBOX
        assert wherryd.ctr("run", "--rm", BUSYBOX, "one", "echo", "hi", namespace=namespace).stdout == "hi\n"
    assert "removed records without files" not in wherryd.log_text()


@pytest.fixture
def cramped() -> Iterator[Wherryd]:
    """A daemon whose root is a file system of 8 MiB."""
    need("ctr")
    daemon = Wherryd()
    daemon.root.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(daemon.root)], check=True)
    try:
        daemon.start()
        yield daemon
    finally:
        daemon.close()


def test_a_full_disk_is_said_and_the_daemon_serves_on(cramped: Wherryd) -> None:
    big = cramped.folder / "big"
    big.write_bytes(os.urandom(8 << 20))
    command = ["ctr", "--address", cramped.address, "content", "ingest", "big"]
    with big.open("rb") as file:
        done = subprocess.run(command, stdin=file, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert done.returncode != 0
    assert "no space left on device" in done.stderr
    assert list((cramped.root / "content" / "ingest").iterdir()) == []
    # an image whose blobs have room and whose layer has not
    cramped.ctr("content", "ingest", "filler", stdin=os.urandom(1 << 20).hex())
    with pytest.raises(AssertionError, match=r"[Nn]o space left on device"):
        cramped.import_busybox("full")
    assert "Committed" not in cramped.ctr("snapshots", "ls", namespace="full").stdout
    assert "Active" not in cramped.ctr("snapshots", "ls", namespace="full").stdout
    assert cramped.ctr("version").returncode == 0
    assert cramped.ctr("content", "ingest", "small", stdin="fits").returncode == 0
