"""The process that changes the kernel's networks for a daemon: one thread, requests one after the other.

The daemon can't do it itself: it has threads, and who enters another network namespace does it for a thread; pyroute2
brings 33 MB and a tenth of a second of imports; what goes wrong in C (libnftables) stays here. Started by exec, it ends
with the socket that it was given, so with the daemon at the latest. Killed at any moment it leaves only what bears our
mark (links.py) and is swept away.

A request is a line of JSON, `{"id": …, "op": …}`, so is the answer: `{"id": …, "ok": …}` or `{"id": …, "error": [CODE,
TEXT]}`.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from typing import Any

from pyroute2.netlink.exceptions import NetlinkError

from wherry.core.errors import Code, InvalidArgument, NotFound, WherryError
from wherry.core.failpoints import reach
from wherry.network import hub, nft
from wherry.network.conntrack import forget
from wherry.network.links import Links, refused
from wherry.network.model import USERS

Request = dict[str, Any]


class Worker:
    """One daemon's worker."""

    def __init__(self, instance: str) -> None:
        self._links = Links(instance)
        self._nft: nft.Nft | None = None
        self.operations: dict[str, Callable[[Request], Any]] = {
            "attach": self.attach,
            "withdraw": self.withdraw,
            "detach": self.detach,
            "namespace": self.namespace,
            "hub": self.hub,
            "network": self.network,
            "remove_network": self.remove_network,
            "rules": self.rules,
            "sweep": self.sweep,
            "droppers": self.droppers,
        }

    def attach(self, request: Request) -> list[str]:
        """Connects a container: `netns` (made where `make`, for `users`), `plugs` of networks and endpoints, `rules`.

        The MACs.
        """
        path, owner = str(request["netns"]), str(request["owner"])
        plugged: list[str] = []
        macs = []
        if request["make"]:
            self._links.make_namespace(path, request.get("users"))
            reach("network.worker.made")
        try:
            for plug in request["plugs"]:
                endpoint = plug["endpoint"]
                macs.append(self._links.plug(plug["network"], endpoint, path, owner))
                plugged.append(endpoint["host_interface"])
            reach("network.worker.plugged")
            self._run(request["rules"])
            reach("network.worker.ruled")
        except BaseException:
            for name in plugged:
                self._links.unplug(name)
            if request["make"]:
                self._links.remove_namespace(path)
            raise
        return macs

    def withdraw(self, request: Request) -> None:
        """Takes `rules` away that may be gone already."""
        self._take_away(request["rules"])

    def detach(self, request: Request) -> None:
        """Takes a container off: `interfaces` (the outer ends), `netns` ("" for none).

        `forget`: addresses whose known flows end.
        """
        for name in request["interfaces"]:
            self._links.unplug(name)
        reach("network.worker.unplugged")
        if request["netns"]:
            self._links.remove_namespace(request["netns"])
            with contextlib.suppress(OSError):  # another container of the namespace is there
                os.rmdir(os.path.dirname(request["netns"]))
        if request["forget"]:
            forget(request["forget"])

    def namespace(self, request: Request) -> None:
        """A namespace alone, for CNI: its plugins do the rest."""
        self._links.make_namespace(request["netns"], request.get("users"))

    def hub(self, request: Request) -> int:
        """The number of the namespace that this process is in: an ordinary user's, which is there from now on."""
        return os.stat("/proc/self/ns/net").st_ino

    def network(self, request: Request) -> None:
        """A network's bridge, and `rules`."""
        self._links.ensure_bridge(request["network"])
        self._run(request["rules"])

    def remove_network(self, request: Request) -> None:
        """Without the bridge and the rules."""
        self._take_away(request["rules"])
        self._links.remove_bridge(request["bridge"])

    def rules(self, request: Request) -> None:
        """Rules as they are."""
        self._run(request["rules"])

    def sweep(self, request: Request) -> list[str]:
        """Removes what is ours and not in `keep` (interfaces) or `namespaces` (paths); then `rules` hold."""
        gone = self._links.sweep(request["keep"], request["bridges"])
        kept = {name for path in request["namespaces"] for name in (path, path + USERS)}
        for path in _files(request["folder"]):
            if path not in kept:
                self._links.remove_namespace(path.removesuffix(USERS))
                gone.append(path)
        for folder in _folders(request["folder"]):
            with contextlib.suppress(OSError):
                os.rmdir(folder)
        self._run(request["rules"])
        return gone

    def droppers(self, request: Request) -> list[str]:
        """Other people's base chains that drop what they don't know, of packets that are forwarded."""
        chains = self._nftables().tables()
        return [
            f"{chain['family']} {chain['table']} {chain['name']}"
            for chain in chains
            if chain.get("hook") == "forward" and chain.get("policy") == "drop" and chain["table"] != request["table"]
        ]

    def _nftables(self) -> nft.Nft:
        if self._nft is None:
            self._nft = nft.load()
        return self._nft

    def _run(self, text: str) -> None:
        if text:
            self._nftables().run(text)

    def _take_away(self, text: str) -> None:
        """Elements that go, each by itself where some of them are gone already."""
        if not text:
            return
        try:
            self._run(text)
        except NotFound:
            for line in text.splitlines():
                with contextlib.suppress(NotFound):
                    self._run(line)


def _files(top: str) -> list[str]:
    return [os.path.join(folder, name) for folder, _, names in os.walk(top) for name in names]


def _folders(top: str) -> list[str]:
    return [folder for folder, _, _ in os.walk(top, topdown=False) if folder != top]


def _answer(worker: Worker, request: Request) -> dict[str, Any]:
    try:
        operation = worker.operations.get(request["op"])
        if operation is None:
            raise InvalidArgument(f"unknown operation {request['op']!r}")
        return {"ok": operation(request)}
    except WherryError as error:
        return {"error": [int(error.code), error.message]}
    except NetlinkError as error:
        kind = refused(error, "network")
        return {"error": [int(kind.code), kind.message]}
    except OSError as error:
        code = Code.NOT_FOUND if error.errno == errno.ENOENT else Code.FAILED_PRECONDITION
        return {"error": [int(code), f"{error.filename or 'network'}: {error.strerror or error}"]}
    except Exception as error:  # noqa: BLE001 -- a request that nobody foresaw must not end the worker for all others
        return {"error": [int(Code.INTERNAL), f"network worker: {type(error).__name__}: {error}"]}


def serve(control: socket.socket, worker: Worker, instance: str) -> None:
    """Answers requests until the other side closes.

    The kernel takes some ten milliseconds to let an interface go (it waits for packets under way), and who removes one
    container must not hold up the start of the next: that is done by a child, which answers in its turn.
    """
    with control, control.makefile("rb") as reader:
        for line in reader:
            request = json.loads(line)
            if request["op"] == "detach" and os.fork():
                continue
            # netlink sockets aren't shared with a child
            actor = Worker(instance) if request["op"] == "detach" else worker
            answer = _answer(actor, request)
            control.sendall(json.dumps({"id": request["id"], **answer}).encode() + b"\n")
            if actor is not worker:
                os._exit(0)


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m wherry.network.worker INSTANCE FD [HUB]`; HUB: the file of an ordinary user's network namespace."""
    instance, descriptor, *hubs = sys.argv[1:] if arguments is None else list(arguments)
    # a terminal's signals are for the daemon, which ends this process by closing the socket
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children are nobody's business
    for path in hubs:
        hub.enter(path)
    with contextlib.suppress(ConnectionError):
        serve(socket.socket(fileno=int(descriptor)), Worker(instance), instance)
    return 0


if __name__ == "__main__":
    sys.exit(main())
