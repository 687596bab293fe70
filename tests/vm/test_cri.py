"""The CRI on pure cgroup v2 with systemd: slices of pods, scopes of containers, their limits and figures."""

from __future__ import annotations

import pytest

from tests.vm.machine import Machine


@pytest.mark.timeout(450)  # a third of it on an idle machine
def test_a_node_with_systemd(machine: Machine) -> None:
    machine.check(
        "cd /opt/src && WHERRY_TESTS_START_SECONDS=120 "
        "python -B -m pytest -q -p no:cacheprovider -o timeout=200 tests/cri/test_systemd.py",
        timeout=400,
    )
