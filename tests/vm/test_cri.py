"""The CRI on pure cgroup v2 with systemd: slices of pods, scopes of containers, their limits and figures; checkpoints,
which criu can make of this kernel."""

from __future__ import annotations

import pytest

from tests.vm.machine import Machine


@pytest.mark.timeout(700)  # a fifth of it on an idle machine
def test_a_node_with_systemd(machine: Machine) -> None:
    machine.check("modprobe nf_conntrack_netlink")  # criu asks for it, and asking doesn't load it
    tests = "tests/cri/test_systemd.py tests/cri/test_checkpoint.py"
    machine.check(
        "cd /opt/src && WHERRY_REQUIRE_PEERS=1 WHERRY_TESTS_START_SECONDS=120 "
        f"python -B -m pytest -q -p no:cacheprovider -o timeout=200 {tests}",
        timeout=600,
    )
