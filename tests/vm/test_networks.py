"""Networks on Debian's kernel, whose parts are modules, and without anything of containerd's beside us."""

from __future__ import annotations

import pytest

from tests.vm.machine import Machine, chosen

# the machine has no card: an address of the host that isn't its loopback
_CARD = "modprobe dummy; ip link add card0 type dummy; ip addr add 192.0.2.9/24 dev card0; ip link set card0 up"


# by file, since an interpreter's start takes long here
_CHOSEN = {
    "test_ports": "published or outside or ipv6",
    "test_names": "resolve or see_each_other or isolated or survive",
    "test_crash": "recorded or plugged or ends_without",
}


@pytest.mark.timeout(1500)
def test_those_of_the_host_hold_here(machine: Machine) -> None:
    machine.run(_CARD)
    files = " ".join(f"tests/network/{name}.py" for name in _CHOSEN)
    words = f"python -B -m pytest -q -p no:cacheprovider --timeout 600 -rs -k '{chosen(_CHOSEN)}' {files}"
    done = machine.run(f"cd /opt/src && WHERRY_REQUIRE_PEERS=1 {words}", timeout=1400)
    if done.code:
        raise AssertionError(done.out)
