"""Project quotas on Debian's kernel: a sandbox's disk with a limit that costs nothing."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.vm.machine import Machine

pytestmark = pytest.mark.timeout(400)
_PLACE = "/mnt/quota"
_MOUNTED = f"""
modprobe loop
modprobe quota_v2
mkdir -p {_PLACE}
truncate -s 256M /root/quota.img
mkfs.ext4 -q -O quota,project -E quotatype=prjquota /root/quota.img
mount -o loop,prjquota /root/quota.img {_PLACE}
"""
# limits don't hold for who has CAP_SYS_RESOURCE
_LIMITS = f"""
import contextlib, errno, os
from wherry.linux import quota

folder = "{_PLACE}/tree"
os.mkdir(folder)
assert quota.supported(folder) and not quota.supported("/root")
quota.assign(folder, 77)
quota.limit(folder, 77, 1 << 20, 5)
os.chown(folder, 1000, 1000)

@contextlib.contextmanager
def refused():
    os.seteuid(1000)
    try:
        yield
        raise SystemExit("there is no limit")
    except OSError as error:
        assert error.errno == errno.EDQUOT, error
    finally:
        os.seteuid(0)

with refused():
    os.mkdir(folder + "/below")
    with open(folder + "/below/file", "wb") as file:
        file.write(bytes(2 << 20))
size, inodes = quota.used(folder, 77)
assert 900_000 < size <= 1 << 20 and inodes == 3, (size, inodes)
os.unlink(folder + "/below/file")
assert quota.used(folder, 77)[1] == 2
with refused():
    for number in range(9):
        open(folder + "/" + str(number), "w").close()
assert quota.used(folder, 77)[1] == 5
quota.limit(folder, 77, 0)
os.seteuid(1000)
with open(folder + "/0", "wb") as file:
    file.write(bytes(2 << 20))
print("held")
"""
_SANDBOX = f"""
import asyncio
from wherry.client.wherry import Wherry

async def main():
    async with Wherry(embedded=True, root="{_PLACE}/root", state="/run/quota") as wherry:
        await wherry.load("/root/busybox.tar")
        async with wherry.sandbox("docker.io/library/busybox:test", disk=8 << 20) as box:
            assert box.disk.kind == "quota", box.disk
            full = await box.exec(["dd", "if=/dev/zero", "of=/big", "bs=1M", "count=20"])
            assert full.status and b"quota" in full.stderr.lower(), full
            await box.exec(["rm", "/big"], check=True)
            await box.exec(["sh", "-c", "echo fits >/small; mv /etc/group /etc/g; mkdir /d; mv /small /d"], check=True)
            forks = await box.fork(2)
            for fork in forks:
                assert fork.disk.kind == "quota" and fork.disk.project != box.disk.project
                assert (await fork.exec(["cat", "/d/small"])).text == "fits"
                assert (await fork.exec(["dd", "if=/dev/zero", "of=/big", "bs=1M", "count=20"])).status
                await fork.close()
    print("held")

asyncio.run(main())
"""


@pytest.fixture(scope="module")
def quotas(machine: Machine) -> Iterator[Machine]:
    """The machine with a file system that counts projects."""
    machine.check(_MOUNTED)
    yield machine
    machine.run(f"umount {_PLACE}; rm /root/quota.img")


def test_the_file_system_holds_a_project_to_its_limit(quotas: Machine) -> None:
    assert quotas.check(f"python - <<'END'\n{_LIMITS}END") == "held"


def test_a_sandbox_has_no_more_than_its_disk(quotas: Machine) -> None:
    assert quotas.check(f"python - <<'END'\n{_SANDBOX}END", timeout=240) == "held"
