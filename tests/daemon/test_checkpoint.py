"""Checkpoints as ctr makes them: into the content store and back.

criu itself works in the VM alone (Debian's can't read this kernel's vdso); here a runtime stands in for it that writes
and reads the folders, so that what the daemon and the shim do with them is the same.
"""

from __future__ import annotations

import json
import os
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.peers import need
from tests.wherryd import BUSYBOX, Wherryd

# checkpoint: leaves the number that /count holds; restore: makes the container anew, with that number in it
RUNTIME = """#!/bin/sh
for word; do
  case $before in --image-path) images=$word ;; --bundle) bundle=$word ;; --work-path) work=$word ;; esac
  case $word in checkpoint|restore) action=$word ;; --leave-running) leave=1 ;; esac
  before=$word; id=$word
done
case $action in
checkpoint)
  [ -d "$images" ] || { echo "no folder for the images" >&2; exit 1; }
  cp "$PWD/rootfs/count" "$images/pages-1.img" && echo "$*" >"$images/inventory.img"
  mkdir "$images/below" && ln -s ../pages-1.img "$images/below/link"
  [ -n "$leave" ] || RUNC --root "$2" kill "$id" KILL ;;
restore)
  [ -r "$images/inventory.img" ] || { echo "no images to restore from" >&2; exit 1; }
  cp "$images/pages-1.img" "$bundle/rootfs/count"
  RUNC --root "$2" create --bundle "$bundle" --pid-file "$bundle/init.pid" "$id" && RUNC --root "$2" start "$id" ;;
*) exec RUNC "$@" ;;
esac
"""
COUNT = "i=$(cat /count 2>/dev/null || echo 0); while :; do i=$((i+1)); echo $i >/count; sleep 0.05; done"


def kernel() -> tuple[int, ...]:
    return tuple(int(part) for part in os.uname().release.split(".")[:2])


@pytest.fixture(scope="module")
def daemon() -> Iterator[Wherryd]:
    daemon = Wherryd()
    try:
        daemon.start()
        daemon.import_busybox()
        yield daemon
    finally:
        daemon.close()


@pytest.fixture(params=["bundled", "runc", "stand-in"])
def flags(request: pytest.FixtureRequest, daemon: Wherryd) -> list[str]:
    """ctr's flags for a runtime that can checkpoint here."""
    if request.param == "stand-in":
        path = daemon.folder / "runtime"
        path.write_text(RUNTIME.replace("RUNC", need("runc")))
        path.chmod(0o755)
        return ["--runc-binary", str(path)]
    if kernel() >= (6, 2):
        pytest.skip("Debian's criu 3.17 fails on this kernel's vdso; `make test-v2` has one that it can read")
    need("criu")
    return [] if request.param == "bundled" else ["--runc-binary", need("runc")]


def count(daemon: Wherryd, identity: str) -> int:
    root = daemon.state / "tasks" / "default" / identity / "rootfs" / "count"
    try:
        return int(root.read_text() or 0)
    except (OSError, ValueError):
        return 0


def wait_for_count(daemon: Wherryd, identity: str, least: int) -> int:
    end = time.monotonic() + 30
    while (now := count(daemon, identity)) < least:
        assert time.monotonic() < end
        time.sleep(0.02)
    return now


def remove(daemon: Wherryd, *names: str) -> None:
    for name in names:
        daemon.ctr("task", "delete", "--force", name, check=False)
        daemon.ctr("containers", "delete", name, check=False)


def blobs(daemon: Wherryd, image: str) -> dict[str, Path]:
    """The blobs of a checkpoint image by media type."""
    line = next(line for line in daemon.ctr("images", "ls").stdout.splitlines() if line.startswith(image))
    folder = daemon.root / "content" / "blobs" / "sha256"
    index = json.loads((folder / line.split()[2].removeprefix("sha256:")).read_text())
    return {item["mediaType"]: folder / item["digest"].removeprefix("sha256:") for item in index["manifests"]}


def test_a_task_in_an_image_and_back(daemon: Wherryd, flags: list[str]) -> None:
    daemon.ctr("run", "-d", *flags, BUSYBOX, "counter", "sh", "-c", COUNT)
    before = wait_for_count(daemon, "counter", 3)
    daemon.ctr("containers", "checkpoint", "--task", "--rw", "--image", "counter", "saved/counter:1")
    # it runs on
    wait_for_count(daemon, "counter", count(daemon, "counter") + 2)
    assert "RUNNING" in daemon.ctr("task", "ls").stdout
    found = blobs(daemon, "saved/counter:1")
    assert {
        "application/vnd.containerd.container.criu.checkpoint.criu.tar",
        "application/vnd.containerd.container.checkpoint.config.v1+proto",
    } <= set(found)
    with tarfile.open(found["application/vnd.containerd.container.criu.checkpoint.criu.tar"]) as tar:
        assert {"inventory.img", "pages-1.img"} <= set(tar.getnames())
    spec = found["application/vnd.containerd.container.checkpoint.config.v1+proto"].read_bytes()
    assert b"types.containerd.io/opencontainers/runtime-spec/1/Spec" in spec
    remove(daemon, "counter")
    daemon.ctr("containers", "restore", "--rw", "--live", "again", "saved/counter:1")
    assert wait_for_count(daemon, "again", before + 2) < before + 1000
    # what it was restored from is kept as long as there is the task, also over a restart of the daemon
    kept = daemon.root / "checkpoints"
    (folder,) = kept.iterdir()
    daemon.restart()
    assert [path.name for path in kept.iterdir()] == [folder.name]
    remove(daemon, "again")
    assert daemon.settle(15) == []
    assert list(kept.iterdir()) == []
    daemon.ctr("images", "rm", "saved/counter:1")


def test_a_folder_and_the_end_of_the_task(daemon: Wherryd, flags: list[str], tmp_path: Path) -> None:
    daemon.ctr("run", "-d", *flags, BUSYBOX, "folder", "sh", "-c", COUNT)
    wait_for_count(daemon, "folder", 2)
    images = tmp_path / "images"
    images.mkdir()
    daemon.ctr("task", "checkpoint", "--exit", "--image-path", str(images), "folder")
    assert (images / "inventory.img").exists()
    end = time.monotonic() + 30
    while "RUNNING" in daemon.ctr("task", "ls").stdout:
        assert time.monotonic() < end
        time.sleep(0.05)
    remove(daemon, "folder")
    assert daemon.settle(15) == []


def test_what_criu_says_when_it_fails(daemon: Wherryd) -> None:
    need("criu")
    if kernel() < (6, 2):
        pytest.skip("criu works on this kernel")
    for flags in ([], ["--runc-binary", need("runc")]):
        daemon.ctr("run", "-d", *flags, BUSYBOX, "fails", "sleep", "1000")
        done = daemon.ctr("containers", "checkpoint", "--task", "fails", "saved/fails:1", check=False)
        assert "criu failed: type DUMP errno 0" in done.stderr
        bundle = daemon.state / "tasks" / "default" / "fails"
        assert f"path= {bundle}/criu-dump.log" in done.stderr
        assert "Error (criu/" in (bundle / "criu-dump.log").read_text()
        assert daemon.ctr("task", "exec", "--exec-id", "x", "fails", "echo", "runs").stdout == "runs\n"
        remove(daemon, "fails")
    assert list((daemon.root / "checkpoints").iterdir()) == []
    assert daemon.settle(15) == []


def test_what_is_no_checkpoint(daemon: Wherryd) -> None:
    """A task can't be made from any content."""
    daemon.ctr("containers", "create", BUSYBOX, "wrong", "true")
    done = daemon.ctr("containers", "restore", "--live", "wrongly", BUSYBOX, check=False)
    assert done.returncode != 0
    remove(daemon, "wrong", "wrongly")
    assert daemon.settle() == []
