"""Flows that the kernel remembers and that lead to a container that is gone.

A UDP flow to a published port stays with the address that it got first for as long as packets come, also when that
container is gone and another one has the port. TCP needs no help: a new connection is a new flow.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterable

from pyroute2.conntrack import Conntrack
from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.netlink.nfnetlink.nfctsocket import NFCTAttrTuple


def forget(addresses: Iterable[str]) -> int:
    """Ends the UDP flows that lead to these addresses; how many. A kernel without conntrack has none."""
    ended = 0
    for address in addresses:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        leads_here = NFCTAttrTuple(family=family, saddr=address, proto=socket.IPPROTO_UDP)
        with contextlib.suppress(NetlinkError, OSError), Conntrack(nfgen_family=family) as table:
            for entry in list(table.dump_entries(tuple_reply=leads_here)):
                with contextlib.suppress(NetlinkError):  # it ended by itself meanwhile
                    table.delete(entry)
                    ended += 1
    return ended
