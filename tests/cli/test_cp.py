"""`cp`, `diff` and `export`: by docker's rules for what lands where, running or not, and never out of the container."""

from __future__ import annotations

import io
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.conftest import Wherry
from tests.wherryd import BUSYBOX


@pytest.fixture(params=["running", "stopped"])
def box(wherry: Wherry, request: pytest.FixtureRequest) -> Iterator[str]:
    script = "mkdir -p /tree/sub; echo one >/tree/one; echo two >/tree/sub/two; ln -s /etc/shadow /link"
    script += "; rm /etc/group; echo >>/etc/passwd"
    wherry.run("run", "--name", "box", BUSYBOX, "sh", "-c", script)
    if request.param == "running":
        wherry.run("start", "box")
        wherry.run("rm", "box", "-f")
        wherry.run("run", "-d", "--name", "box", BUSYBOX, "sh", "-c", f"{script}; touch /ready; sleep 1000")
        for _ in range(100):
            if wherry.run("exec", "box", "test", "-e", "/ready", code=None).returncode == 0:
                break
    yield "box"
    wherry.run("rm", "-f", "box")


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_out(wherry: Wherry, box: str, tmp_path: Path) -> None:
    wherry.run("cp", f"{box}:/tree", str(tmp_path / "new"))
    assert names(tmp_path / "new") == ["one", "sub", "sub/two"]
    wherry.run("cp", f"{box}:/tree", str(tmp_path))
    wherry.run("cp", f"{box}:/tree/.", str(tmp_path / "new"))
    assert names(tmp_path / "new") == ["one", "sub", "sub/two"]
    assert (tmp_path / "tree" / "sub" / "two").read_text() == "two\n"
    wherry.run("cp", f"{box}:/tree/one", str(tmp_path / "renamed"))
    assert (tmp_path / "renamed").read_text() == "one\n"
    wherry.run("cp", f"{box}:/link", str(tmp_path / "link"))
    assert (tmp_path / "link").is_symlink()
    archive = subprocess.run(wherry.command("cp", f"{box}:/tree", "-"), capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        assert sorted(tar.getnames()) == ["tree", "tree/one", "tree/sub", "tree/sub/two"]
    assert "could not find the file /nope" in wherry.run("cp", f"{box}:/nope", str(tmp_path), code=1).stderr


def test_in(wherry: Wherry, box: str, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "file").write_text("in\n")
    wherry.run("cp", str(folder), f"{box}:/tree")
    wherry.run("cp", f"{folder}/.", f"{box}:/tree")
    wherry.run("cp", str(folder / "deep" / "file"), f"{box}:/tree/named")
    wherry.run("cp", str(tmp_path), f"{box}:/fresh")
    for place in ("folder/deep/file", "deep/file", "named"):
        wherry.run("cp", f"{box}:/tree/{place}", str(tmp_path / "back"))
        assert (tmp_path / "back").read_text() == "in\n"
    wherry.run("cp", f"{box}:/fresh/folder/deep/file", str(tmp_path / "back2"))
    assert "no directory" in wherry.run("cp", str(folder), f"{box}:/tree/one", code=1).stderr
    assert "no such" in wherry.run("cp", str(tmp_path / "nope"), f"{box}:/", code=1).stderr


def test_diff_and_export(wherry: Wherry, box: str) -> None:
    lines = wherry.run("diff", box).stdout.splitlines()
    assert {"A /tree", "A /tree/sub/two", "C /etc", "C /etc/passwd", "D /etc/group"} <= set(lines)
    archive = subprocess.run(wherry.command("export", box), capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        assert "tree/one" in {name.removeprefix("./") for name in tar.getnames()}


def test_a_link_leads_nowhere_else(wherry: Wherry, box: str, tmp_path: Path) -> None:
    if "Up" not in wherry.run("ps", "--filter", "name=box").stdout:
        pytest.skip("the link is made in a container that runs")
    wherry.run("exec", box, "ln", "-s", "/../../../../../../etc", "/out")
    wherry.run("exec", box, "ln", "-s", "/proc/1/root", "/root2")
    (tmp_path / "evil").write_text("x")
    wherry.run("cp", str(tmp_path / "evil"), f"{box}:/out/evil-of-wherry", code=None)
    assert not Path("/etc/evil-of-wherry").exists()
