"""Volumes and binds: what is in them, who sees it, and when it goes."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli.conftest import Wherry
from tests.wherryd import BUSYBOX


def test_a_named_volume_outlives_containers(wherry: Wherry) -> None:
    assert wherry.run("volume", "create", "--label", "a=b", "data").stdout == "data\n"
    try:
        wherry.run("run", "--rm", "-v", "data:/data", BUSYBOX, "sh", "-c", "echo kept >/data/file")
        assert wherry.run("run", "--rm", "-v", "data:/d:ro", BUSYBOX, "cat", "/d/file").stdout == "kept\n"
        assert wherry.run("run", "--rm", "-v", "data:/d:ro", BUSYBOX, "touch", "/d/x", code=None).returncode != 0
        (found,) = json.loads(wherry.run("volume", "inspect", "data").stdout)
        assert (found["Labels"], found["Driver"]) == ({"a": "b"}, "local")
        wherry.run("create", "--name", "user", "-v", "data:/data", BUSYBOX, "true")
        assert "in use by container" in wherry.run("volume", "rm", "data", code=1).stderr
        assert wherry.run("ps", "-aq", "--filter", "volume=data").stdout
        wherry.run("rm", "user")
    finally:
        assert wherry.run("volume", "rm", "data").stdout == "data\n"
    assert "no such volume" in wherry.run("volume", "rm", "data", code=1).stderr


def test_a_fresh_volume_gets_what_the_image_has(wherry: Wherry) -> None:
    try:
        first = wherry.run("run", "--rm", "-v", "etc:/etc", BUSYBOX, "ls", "/etc").stdout
        assert "passwd" in first
        wherry.run("run", "--rm", "-v", "etc:/etc", BUSYBOX, "rm", "/etc/group")
        assert "group" not in wherry.run("run", "--rm", "-v", "etc:/etc", BUSYBOX, "ls", "/etc").stdout
        assert wherry.run("run", "--rm", "-v", "bare:/etc:nocopy", BUSYBOX, "ls", "/etc/passwd", code=1).stdout == ""
    finally:
        wherry.run("volume", "rm", "-f", "etc", "bare")


def test_nameless_ones_go_with_their_container(wherry: Wherry) -> None:
    wherry.run("run", "--rm", "-v", "/anon", BUSYBOX, "touch", "/anon/x")
    assert wherry.run("volume", "ls", "-q").stdout == ""
    wherry.run("run", "--name", "keeps", "-v", "/anon", BUSYBOX, "touch", "/anon/x")
    wherry.run("rm", "keeps")
    assert len(wherry.run("volume", "ls", "-q").stdout.split()) == 1
    assert "Deleted Volumes" in wherry.run("volume", "prune", "-f").stdout
    wherry.run("run", "--name", "gone", "-v", "/anon", BUSYBOX, "true")
    wherry.run("rm", "-v", "gone")
    assert wherry.run("volume", "ls", "-q").stdout == ""


def test_binds(wherry: Wherry, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("of the host\n")
    assert wherry.run("run", "--rm", "-v", f"{tmp_path}:/b", BUSYBOX, "cat", "/b/file").stdout == "of the host\n"
    assert wherry.run("run", "--rm", "-v", f"{tmp_path}:/b:ro", BUSYBOX, "touch", "/b/x", code=None).returncode != 0
    made = tmp_path / "made"
    wherry.run("run", "--rm", "-v", f"{made}:/b", BUSYBOX, "touch", "/b/x")
    assert (made / "x").exists()
    spec = f"type=bind,src={tmp_path},dst=/b,readonly"
    assert wherry.run("run", "--rm", "--mount", spec, BUSYBOX, "cat", "/b/file").stdout == "of the host\n"


def test_the_mounts_of_another_container(wherry: Wherry) -> None:
    wherry.run("run", "--name", "has", "-v", "shared:/s", BUSYBOX, "sh", "-c", "echo x >/s/f")
    try:
        assert wherry.run("run", "--rm", "--volumes-from", "has", BUSYBOX, "cat", "/s/f").stdout == "x\n"
    finally:
        wherry.run("rm", "has")
        wherry.run("volume", "rm", "shared")
