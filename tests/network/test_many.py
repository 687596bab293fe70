"""Many at once: starts that race for addresses, ports and the first rules."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from tests import networks
from tests.cli.conftest import Wherry
from tests.network.conftest import START, import_image, make_daemon
from tests.network.test_crash import elements, nothing
from tests.network.traffic import HTTP, http, until
from tests.wherryd import BUSYBOX

COUNT = 8


def test_first_containers_at_once() -> None:
    daemon = make_daemon()
    try:
        daemon.start(START)
        import_image(daemon)
        wherry = Wherry(daemon.address)

        def start(number: int) -> int:
            name = f"c{number}"
            script = HTTP.format(word=name, port=80)
            wherry.run("run", "-d", "--name", name, "-p", "80", BUSYBOX, "sh", "-c", script)
            return int(wherry.run("port", name, "80").stdout.rpartition(":")[2])

        with ThreadPoolExecutor(COUNT) as pool:
            ports = list(pool.map(start, range(COUNT)))
        assert len(set(ports)) == COUNT
        for number, port in enumerate(ports):
            assert until(lambda port=port: http("127.0.0.1", port)) == f"c{number}"  # type: ignore[misc]
        assert len(elements(daemon)) == COUNT
        shown = wherry.run("network", "inspect", "-f", "{{range .Containers}}{{.IPAddress}} {{end}}", "bridge").stdout
        assert len(set(shown.split())) == COUNT
        wherry.run("rm", "-f", *(f"c{number}" for number in range(COUNT)))
        assert until(lambda: nothing(daemon), lambda found: not found) == []
    finally:
        daemon.close()
    assert networks.left(daemon.state) == []
