"""The shim on pure v2: checkpoints, which criu can make of this kernel, pods, options, every method in every state."""

from __future__ import annotations

import pytest

from tests.vm.machine import Machine, chosen

#: Two lanes that take about as long, for the VM's two processors: the tests of each file.
_LANES = (
    {
        "test_checkpoint": "lab or there",
        "test_options": "lab or shims or pipes",
        "test_task": "memory or kill_all or metrics or pause",
    },
    {"test_sandbox": "lab or pod or sandbox", "test_methods": "not bookworm and not sid"},
)


@pytest.mark.timeout(1000)
def test_those_of_the_host_hold_here(machine: Machine) -> None:
    machine.check("modprobe nf_conntrack_netlink")  # criu asks for it, and the module isn't loaded by asking
    # the fork server's interpreter has no compiled code here yet: it would take it longer than a shim may
    machine.check("python -I -OO -c 'import wherry.shim.nursery'", timeout=200)
    done = machine.lanes([
        "cd /opt/src && WHERRY_REQUIRE_PEERS=1 WHERRY_TESTS_START_SECONDS=120 "
        "python -B -m pytest -q -p no:cacheprovider -o timeout=300 -rs --durations=5 "
        f"-k '{chosen(lane)}' {' '.join(f'tests/shim/{name}.py' for name in lane)}"
        for lane in _LANES
    ], timeout=900)  # fmt: skip
    if done.code:
        raise AssertionError(done.out)
