"""SELinux's labels, as far as a host without a policy shows them: what is made of options, and files that get one."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from wherry.core.errors import FailedPrecondition, InvalidArgument, ResourceExhausted
from wherry.cri import selinux
from wherry.cri.selinux import container_labels, pod_label, relabel
from wherry.cri.settings import Settings
from wherry.proto import cri_pb2 as cri

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="sets attributes of the kind security: run as root")
LABEL = "system_u:object_r:container_file_t:s0:c1,c2"


def test_of_pods() -> None:
    """What a pod says counts, the rest is the default; categories are drawn until they are nobody else's."""
    taken: list[str] = []
    for _ in range(45):  # of 10 categories there are 45 pairs
        taken.append(pod_label(cri.SELinuxOption(), taken, 10))
    assert len(set(taken)) == 45
    assert all(re.fullmatch(r"system_u:system_r:container_t:s0:c\d,c\d", each) for each in taken)
    with pytest.raises(ResourceExhausted):
        pod_label(cri.SELinuxOption(), taken, 10)
    said = cri.SELinuxOption(user="u", type="spc_t", level="s0:c9,c10")
    assert pod_label(said, taken, 10) == "u:system_r:spc_t:s0:c9,c10"


def test_of_containers(monkeypatch: pytest.MonkeyPatch) -> None:
    on = Settings(enable_selinux=True)
    monkeypatch.setattr(selinux, "has_selinux", lambda: True)
    level = cri.SELinuxOption(level="s0:c1,c2")
    assert container_labels(level, "", on) == ("system_u:system_r:container_t:s0:c1,c2", LABEL)
    pod = "system_u:system_r:container_t:s0:c3,c4"
    assert container_labels(None, pod, on) == (pod, "system_u:object_r:container_file_t:s0:c3,c4")
    assert container_labels(level, pod, Settings()) == ("", "")
    with pytest.raises(InvalidArgument, match="the format of 'level'"):
        container_labels(cri.SELinuxOption(level="high"), "", Settings())


def of(path: Path) -> str:
    try:
        return os.getxattr(path, "security.selinux", follow_symlinks=False).decode().rstrip("\0")
    except OSError:
        return ""


@needs_root
def test_a_tree_gets_a_label_and_what_its_links_point_to_does_not(tmp_path: Path) -> None:
    tree, other = tmp_path / "tree", tmp_path / "other"
    (tree / "sub" / "deep").mkdir(parents=True)
    (tree / "sub" / "deep" / "file").touch()
    other.mkdir()
    (other / "file").touch()
    (tree / "link").symlink_to(other)
    (tree / "sub" / "dangling").symlink_to("nowhere")
    relabel(str(tree), LABEL)
    below = [tree, *tree.rglob("*")]
    assert len(below) == 6
    assert {of(path) for path in below} == {LABEL}
    assert [of(path) for path in (other, other / "file")] == ["", ""]


@needs_root
def test_a_file_gets_a_label(tmp_path: Path) -> None:
    (tmp_path / "config").touch()
    (tmp_path / "beside").touch()
    relabel(str(tmp_path / "config"), LABEL)
    assert of(tmp_path / "config") == LABEL
    assert of(tmp_path / "beside") == ""


@pytest.mark.parametrize("path", ["/", "/etc", "/usr/", "/var/lib", "/var/log/../lib", "/home", "/etc/passwd"])
def test_the_hosts_own_folders_are_refused(path: str) -> None:
    with pytest.raises(FailedPrecondition, match="is not allowed"):
        relabel(path, LABEL)


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition, match="relabel"):
        relabel(str(tmp_path / "none"), LABEL)


@pytest.fixture
def unlabelled(tmp_path: Path) -> Iterator[Path]:
    """A file system that has no attributes at all."""
    place = tmp_path / "proc"
    place.mkdir()
    subprocess.run(["mount", "-t", "proc", "proc", place], check=True)
    yield place
    subprocess.run(["umount", place], check=True)


@needs_root
def test_a_file_system_without_labels_is_left_as_it_is(unlabelled: Path) -> None:
    relabel(str(unlabelled / "version"), LABEL)
    assert of(unlabelled / "version") == ""
