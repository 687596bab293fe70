"""The shim on pure v2: checkpoints, which criu can make of this kernel, pods, options, every method in every state."""

from __future__ import annotations

import pytest

from tests.vm.machine import Machine

pytestmark = pytest.mark.timeout(400)


@pytest.mark.parametrize(
    ("name", "chosen"),
    [
        ("test_checkpoint", "lab or there"),
        ("test_sandbox", "lab or pod or sandbox"),
        ("test_options", "lab or shims or pipes"),
        ("test_methods", "not bookworm and not sid"),
        ("test_task", "memory or kill_all or metrics or pause"),
    ],
)
def test_those_of_the_host_hold_here(machine: Machine, name: str, chosen: str) -> None:
    machine.check("modprobe nf_conntrack_netlink")  # criu asks for it, and the module isn't loaded by asking
    # the fork server's interpreter has no compiled code here yet: it would take it longer than a shim may
    machine.check("python -I -OO -c 'import wherry.shim.nursery'", timeout=200)
    words = f"python -B -m pytest -q -p no:cacheprovider -rs -k '{chosen}' tests/shim/{name}.py"
    done = machine.run(f"cd /opt/src && WHERRY_REQUIRE_PEERS=1 {words}", timeout=360)
    if done.code:
        raise AssertionError(done.out)
