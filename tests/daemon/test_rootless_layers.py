"""What a layer holds and a user can't have: unpacked as podman unpacks it, by each way of laying layers over others."""

from __future__ import annotations

import io
import os
import struct
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import busybox, users
from tests.peers import need
from tests.users import User

ODD = "docker.io/library/odd:1"
# prints every file of a tree: kind and mode, owner, device, links, time, attributes
WALK = """
import os, stat, sys
top = sys.argv[1]
for folder, folders, files in os.walk(top + "/odd"):
    folders.sort()
    for name in sorted([*folders, *files]):
        path = os.path.join(folder, name)
        s = os.lstat(path)
        names = [key for key in os.listxattr(path, follow_symlinks=False) if "overlay" not in key]
        values = {key: os.getxattr(path, key, follow_symlinks=False).hex() for key in sorted(names)}
        links = 0 if stat.S_ISDIR(s.st_mode) else s.st_nlink
        print(path[len(top):], oct(s.st_mode), s.st_uid, s.st_gid, s.st_rdev, links, s.st_mtime, values)
"""
D, DEVICE, BLOCK, FIFO = tarfile.DIRTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE
# CAP_NET_RAW, permitted and effective (VFS_CAP_REVISION_2)
CAPABILITY = struct.pack("<IIIII", 0x02000001, 1 << 13, 0, 0, 0).decode("latin1")


class Tar:
    def __init__(self, time: int) -> None:
        self._buffer = io.BytesIO()
        self._tar = tarfile.open(fileobj=self._buffer, mode="w", format=tarfile.PAX_FORMAT)  # noqa: SIM115 - in data()
        self._time = time

    def add(
        self,
        name: str,
        kind: bytes = tarfile.REGTYPE,
        mode: int = 0o644,
        owner: tuple[int, int] = (0, 0),
        *,
        link: str = "",
        device: tuple[int, int] = (0, 0),
        xattrs: dict[str, str] | None = None,
    ) -> None:
        item = tarfile.TarInfo(name)
        item.type, item.mode, item.mtime, item.linkname = kind, mode, self._time, link
        item.uid, item.gid = owner
        item.devmajor, item.devminor = device
        item.pax_headers = {f"SCHILY.xattr.{key}": value for key, value in (xattrs or {}).items()}
        data = b"x" if kind == tarfile.REGTYPE else b""
        item.size = len(data)
        self._tar.addfile(item, io.BytesIO(data))

    def data(self) -> bytes:
        self._tar.close()
        return self._buffer.getvalue()


def layers(*, far: bool = False) -> list[bytes]:
    """Two layers over busybox; `far`: with an id that no user is granted."""
    one, two = Tar(1_700_000_000), Tar(1_700_000_001)
    one.add("odd", D, 0o755)
    one.add("odd/setuid", mode=0o4755)
    one.add("odd/setgid", mode=0o2755, owner=(0, 42))
    one.add("odd/sticky", D, 0o1777)
    one.add("odd/user", owner=(1000, 1000))
    one.add("odd/theirs", mode=0o4755, owner=(33, 33))
    one.add("odd/nobody", mode=0o600, owner=(65534, 65534))
    one.add("odd/ping", mode=0o755, xattrs={"security.capability": CAPABILITY})
    one.add("odd/note", xattrs={"user.note": "hello"})
    one.add("odd/trusted", xattrs={"trusted.note": "hello"})
    one.add("odd/null", DEVICE, 0o666, device=(1, 3))
    one.add("odd/disk", BLOCK, 0o660, device=(8, 0))
    one.add("odd/fifo", FIFO, 0o600, owner=(5, 0))
    one.add("odd/link", tarfile.SYMTYPE, owner=(1000, 1000), link="user")
    one.add("odd/hard", tarfile.LNKTYPE, owner=(1000, 1000), link="odd/user")
    one.add("odd/gone")
    one.add("odd/dir", D, 0o755)
    one.add("odd/dir/a")
    if far:
        one.add("odd/far", owner=(200_000, 200_000))
    two.add("odd/.wh.gone")
    two.add("odd/dir", D, 0o700, (7, 8))
    two.add("odd/dir/.wh..wh..opq")
    two.add("odd/dir/b")
    return [busybox.layer(), one.data(), two.data()]


@pytest.fixture
def barrow() -> Iterator[User]:
    user = users.of_host("barrow")
    try:
        with users.devices("fuse"):
            yield user
    finally:
        user.close()


def archive(user: User, *, far: bool = False) -> str:
    path = user.folder / "odd.tar"
    busybox.write_archive(path, name=ODD, layers=layers(far=far))
    return str(path)


def tree(user: User, shell: list[str], pid: str) -> list[str]:
    """A container's files, seen as its root sees them."""
    script = user.folder / "walk.py"
    script.write_text(WALK)
    return user.command(*shell, users.PYTHON, str(script), f"/proc/{pid.strip()}/root").stdout.splitlines()


def ours(user: User) -> list[str]:
    user("images", "import", archive(user))
    user("run", "-d", "--name", "odd", "--net", "none", ODD, "sleep", "1000")
    return tree(user, ["wherry", "unshare"], user("inspect", "-f", "{{.State.Pid}}", "odd").stdout)


def test_the_tree_is_podmans(barrow: User) -> None:
    for name in ("podman", "runc"):
        need(name)
    found = ours(barrow)
    podman = ["podman", "--root", f"{barrow.folder}/home/podman", "--runroot", f"{barrow.run}/podman"]
    podman += ["--runtime", "runc", "--cgroup-manager", "cgroupfs"]
    barrow.command(*podman, "load", "-q", "-i", archive(barrow))
    barrow.command(*podman, "run", "-d", "--name", "odd", "--net", "none", ODD, "sleep", "1000")
    try:
        pid = barrow.command(*podman, "inspect", "-f", "{{.State.Pid}}", "odd").stdout
        assert found == tree(barrow, ["podman", "unshare"], pid)
    finally:
        barrow.command(*podman, "rm", "-f", "-t", "0", "odd")
        barrow.command(*podman, "unshare", "rm", "-rf", f"{barrow.folder}/home/podman")
    assert len(found) == 14  # all but the devices and what was taken away


def test_every_way_keeps_the_same_files(barrow: User) -> None:
    """By the kernel, by fuse-overlayfs, and as copies; what a container changes is a layer in each of them."""
    need("fuse-overlayfs")
    found = {}
    for way, kind in (("kernel", "overlay "), ("fuse", "fuse.fuse-overlayfs "), ("copies", "")):
        barrow.more = {"WHERRY_OVERLAY": way, "XDG_DATA_HOME": f"{barrow.folder}/home/{way}"}
        barrow.more["XDG_RUNTIME_DIR"] = str(barrow.run / way)
        (barrow.run / way).mkdir()
        os.chown(barrow.run / way, barrow.uid, barrow.uid)
        found[way] = ours(barrow)
        mounted = barrow("exec", "odd", "cat", "/proc/mounts").stdout.splitlines()[0]
        assert kind in mounted, mounted
        barrow("exec", "odd", "sh", "-c", "rm -r /odd/dir /odd/user; mkdir /odd/dir; echo new >/odd/dir/new")
        assert {"D /odd/user", "A /odd/dir/new"} <= set(barrow("diff", "odd").stdout.splitlines())
        barrow("commit", "odd", "changed:1")
        done = barrow("run", "--rm", "--net", "none", "changed:1", "sh", "-c", "ls /odd/dir; cat /odd/dir/new")
        assert done.stdout == "new\nnew\n", way
        barrow("rm", "-f", "odd")
    assert found["kernel"] == found["fuse"] == found["copies"]


def test_an_id_that_was_not_granted_is_named(barrow: User) -> None:
    done = barrow("images", "import", archive(barrow, far=True), check=False)
    assert done.returncode == 1
    assert "odd/far' belongs to 200000:200000, an id that this user wasn't granted: see /etc/subuid" in done.stderr


def test_with_one_id_everything_belongs_to_it() -> None:
    lonely = User("nobody", 65534)
    try:
        lonely("images", "import", archive(lonely, far=True))
        run = ("run", "--rm", "--net", "none", ODD, "stat", "-c", "%u %g %n")
        assert lonely(*run, "/odd/user", "/odd/far").stdout == "0 0 /odd/user\n0 0 /odd/far\n"
    finally:
        lonely.close()


def test_ways_that_there_are_not(barrow: User) -> None:
    barrow.more["WHERRY_OVERLAY"] = "magic"
    assert "there are kernel, fuse and copies" in barrow("version", check=False).stderr + _log(barrow)


def _log(user: User) -> str:
    return "".join(path.read_text() for path in Path(user.run).glob("wherry/*.log"))
