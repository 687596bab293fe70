"""One VM for all tests of this folder. They run where they are asked for (`make test-v2`), not with `make test`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.peers import need
from tests.vm.image import build
from tests.vm.machine import Machine

_FOLDER = Path(__file__).parent
_IMAGE = """
cd /opt/src && python - <<'END'
from pathlib import Path
from tests.busybox import write_archive
write_archive(Path("/root/busybox.tar"))
END
"""


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave this folder out unless the command line names it."""
    named = (Path(argument.partition("::")[0]).resolve() for argument in config.args)
    return None if any(path.is_relative_to(_FOLDER) for path in named) else True


@pytest.fixture(scope="session")
def machine() -> Iterator[Machine]:
    """The VM, without a daemon. Building its image needs root, booting it doesn't."""
    need("qemu-system-x86_64")
    need("mke2fs")
    if os.geteuid() != 0 or os.uname().machine != "x86_64":
        pytest.skip("needs root to build the image, and an x86-64 host for its packages")
    with Machine(build()) as machine:
        machine.check(_IMAGE)
        yield machine


@pytest.fixture(scope="session")
def daemon(machine: Machine) -> Machine:
    """The VM with wherryd installed as a unit, started by systemd, and the image busybox:test imported."""
    installed = machine.run("wherryd systemd install --now -- --log-level debug", timeout=90)
    if installed.code:
        pytest.fail(f"{installed.out}\n{machine.run('journalctl -u wherryd -n 40 --no-pager').out}")
    machine.check("wherry images import /root/busybox.tar", timeout=90)
    return machine
