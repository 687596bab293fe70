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


def test_what_an_archive_may_hold_comes_out_as_it_went_in(wherry: Wherry, box: str, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, kind, link in (
            ("kinds", tarfile.DIRTYPE, ""),
            ("kinds/plain", tarfile.REGTYPE, ""),
            ("kinds/hard", tarfile.LNKTYPE, "kinds/plain"),
            ("kinds/soft", tarfile.SYMTYPE, "/nowhere"),
            ("kinds/fifo", tarfile.FIFOTYPE, ""),
            ("kinds/null", tarfile.CHRTYPE, ""),
            ("kinds/../../../outside", tarfile.REGTYPE, ""),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.mode, info.mtime = (
                kind,
                link,
                0o4751 if name == "kinds/plain" else 0o750,
                1e9,
            )
            info.uid, info.gid, info.devmajor, info.devminor = 7, 8, 1, 3
            data = b"text" if kind == tarfile.REGTYPE else b""
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    subprocess.run(wherry.command("cp", "-", f"{box}:/tree"), input=buffer.getvalue(), check=True)
    back = subprocess.run(wherry.command("cp", f"{box}:/tree/kinds", "-"), capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(back)) as tar:
        found = {member.name: member for member in tar}
        assert found["kinds/plain"].isreg() != found["kinds/hard"].isreg()
        assert {found["kinds/plain"].linkname, found["kinds/hard"].linkname} & {"kinds/plain", "kinds/hard"}
        assert found["kinds/soft"].linkname == "/nowhere"
        assert found["kinds/fifo"].isfifo()
        assert (found["kinds/null"].devmajor, found["kinds/null"].devminor) == (1, 3)
        assert {(member.uid, member.gid) for member in found.values()} == {(7, 8)}
        assert {found[name].mode for name in ("kinds/plain", "kinds/hard")} == {0o4751}
        assert found["kinds"].mtime == found["kinds/fifo"].mtime == 1e9
    # the way up ends at the container's root
    assert wherry.run("cp", f"{box}:/outside", str(tmp_path / "outside")).returncode == 0
    assert (
        "cannot overwrite directory"
        in subprocess.run(
            wherry.command("cp", "-", f"{box}:/"), input=_one("tree"), capture_output=True, check=False
        ).stderr.decode()
    )
    done = subprocess.run(wherry.command("cp", "-", f"{box}:/"), input=b"x" * 5000, capture_output=True, check=False)
    assert b"not a tar archive" in done.stderr


def _one(name: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        tar.addfile(tarfile.TarInfo(name), io.BytesIO())
    return buffer.getvalue()
