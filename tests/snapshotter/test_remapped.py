"""Containers in user namespaces, as `ctr` of two generations asks for them: by labels, or by changing owners itself."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator

import pytest

from tests.peers import need
from tests.sid import need_sid
from tests.wherryd import Wherryd

MAPPED = ["--uidmap", "0:100000:65536", "--gidmap", "0:100000:65536"]
SCRIPT = "cat /proc/self/uid_map; stat -c %u:%g /etc/passwd / /bin/busybox; touch /new; stat -c %u:%g /new"
SEEN = ["0", "100000", "65536", "0:0", "0:0", "0:0", "0:0"]


@pytest.fixture
def reachable() -> Iterator[Wherryd]:
    """A daemon whose folders another user may go through, as those of a host."""
    made = Wherryd()
    try:
        made.folder.chmod(0o711)
        made.start()
        yield made
    finally:
        made.close()


@pytest.mark.parametrize(
    ("generation", "snapshotter", "way"),
    [
        ("bookworm", "overlayfs", []),
        ("bookworm", "native", []),
        # 1.6 mounts the snapshot itself before, and knows nothing of idmapped overlays
        ("bookworm", "native", ["--remap-labels"]),
        ("sid", "overlayfs", ["--remap-labels"]),
        ("sid", "native", ["--remap-labels"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "".join(value) or "changes-owners",
)
def test_a_container_of_a_user_namespace_owns_its_files(
    reachable: Wherryd, generation: str, snapshotter: str, way: list[str]
) -> None:
    ctr = need("ctr") if generation == "bookworm" else need_sid("ctr")
    image = reachable.import_busybox()
    command = [ctr, "-a", reachable.address, "run", "--rm", *MAPPED, *way, "--snapshotter", snapshotter]
    command += [image, f"mapped-{os.getpid()}", "sh", "-c", SCRIPT]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == SEEN
    if way:
        # nothing was copied, no owner was changed: there is the image's layer and no other
        listed = reachable.ctr("snapshots", "--snapshotter", snapshotter, "ls").stdout.splitlines()[1:]
        assert [line.split()[-1] for line in listed] == ["Committed"]
