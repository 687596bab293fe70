"""Namespaces, bridges and veth pairs, by pyroute2: for the worker's one thread, which may enter other namespaces.

The outer end of a veth pair begins with `wh` and the daemon's instance, a bridge says in its alias whose it is: whoever
cleans up removes what bears the mark and is in no record. rtnetlink(7), veth(4), network_namespaces(7).
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from wherry.core import places
from wherry.core.errors import AlreadyExists, FailedPrecondition, NotFound, WherryError
from wherry.core.failpoints import reach
from wherry.linux import namespaces, owned_namespaces
from wherry.linux import syscalls as sc
from wherry.network.model import USERS

_IFF_UP = 1
_IFA_F_NODAD = 2
_SYS = "/proc/sys/net"


def veth_prefix(instance: str) -> str:
    """What the outer ends of an instance's veth pairs begin with; seven more characters are free (IFNAMSIZ)."""
    return f"wh{instance}"


def refused(error: NetlinkError, what: str) -> WherryError:
    """The kernel's refusal as one of our kinds, with what was asked for."""
    text = f"{what}: {os.strerror(error.code)}"
    if error.code == errno.EEXIST:
        return AlreadyExists(text)
    if error.code in (errno.ENODEV, errno.ENOENT, errno.ESRCH):
        return NotFound(text)
    return FailedPrecondition(text)


class Links:
    """The kernel's interfaces as one daemon (`mark`) uses them."""

    def __init__(self, instance: str) -> None:
        """`instance`: six letters or digits that tell this daemon's interfaces from another one's."""
        self._mark = f"wherry {instance}"
        self._prefix = veth_prefix(instance)
        self._host = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        self._ip = IPRoute()
        self._bridges: dict[str, int] = {}

    # -- namespaces

    def make_namespace(self, path: str, users: Mapping[str, str] | None = None) -> None:
        """A new network namespace with its loopback up, held by a mount on the file `path`, which is made.

        `users`: it belongs to a user namespace, that of the file `path` in there, or a new one with the mappings
        `uids` and `gids` (lines of uid_map), which `path` + USERS holds. Raises AlreadyExists where there is such a
        file.
        """
        os.makedirs(os.path.dirname(path), mode=0o711, exist_ok=True)
        try:
            os.close(os.open(path, os.O_RDONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o444))
        except FileExistsError:
            raise AlreadyExists(f"network namespace {path}: already exists") from None
        try:
            if users:
                self._make_owned(path, users)
            else:
                try:
                    _new_namespace(path)
                finally:
                    sc.setns(self._host, sc.CLONE_NEWNET)
        except BaseException:
            self.remove_namespace(path)
            raise

    def _make_owned(self, path: str, users: Mapping[str, str]) -> None:
        """user_namespaces(7): who makes a network namespace decides by its own user namespace whose it is."""
        if users.get("path"):
            owner = namespaces.open_namespace(users["path"])
        else:
            owner = namespaces.make_user_namespace(users["uids"], users["gids"])
        try:
            if not users.get("path"):
                os.close(os.open(path + USERS, os.O_RDONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o444))
                sc.mount(f"/proc/self/fd/{owner}", path + USERS, "none", sc.MS_BIND)
            with owned_namespaces.made_in(owner, sc.CLONE_NEWNET) as pid:
                sc.mount(namespaces.path_of("network", pid), path, "none", sc.MS_BIND)
        finally:
            os.close(owner)
        with self.inside(path) as links:
            links.link("set", index=1, state="up")

    def remove_namespace(self, path: str) -> None:
        """Lets go of a namespace; it ends, with its interfaces, when no process is in it. None there is fine."""
        for name in (path, path + USERS):
            with contextlib.suppress(OSError):
                sc.umount2(name, sc.MNT_DETACH)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)

    @contextlib.contextmanager
    def inside(self, path: str) -> Iterator[IPRoute]:
        """The interfaces of a namespace. Raises NotFound where the file is none."""
        try:
            namespace = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise NotFound(f"network namespace {path}: {error.strerror}") from error
        try:
            sc.setns(namespace, sc.CLONE_NEWNET)
        except OSError as error:
            os.close(namespace)
            raise NotFound(f"{path} is no network namespace") from error
        try:
            # the socket belongs to the namespace in which it was made, and /proc/sys/net is that of the thread
            with IPRoute() as links:
                yield links
        finally:
            sc.setns(self._host, sc.CLONE_NEWNET)
            os.close(namespace)

    # -- bridges

    def ensure_bridge(self, network: Mapping[str, Any]) -> int:
        """The index of a network's bridge, which is made where it isn't there."""
        name = str(network["bridge"])
        if name in self._bridges:
            return self._bridges[name]
        found = self._ip.link_lookup(ifname=name)
        if found:
            index = int(found[0])
            # a name that we made up is ours also where somebody was killed before it was marked
            if not network.get("generated") and not self._is_ours(index):
                raise AlreadyExists(f"interface {name} is there already and isn't Wherry's")
        else:
            index = self._make_bridge(name, network)
        self._settle_bridge(name, index, network)
        self._bridges[name] = index
        return index

    def _make_bridge(self, name: str, network: Mapping[str, Any]) -> int:
        mtu = int(network["mtu"]) or self.host_mtu()
        try:
            self._ip.link("add", ifname=name, kind="bridge", mtu=mtu, br_forward_delay=0)
        except NetlinkError as error:
            raise refused(error, f"bridge {name}") from error
        reach("network.worker.bridged")
        return int(self._ip.link_lookup(ifname=name)[0])

    def _settle_bridge(self, name: str, index: int, network: Mapping[str, Any]) -> None:
        """Addresses, and what the kernel shall do and not do with packets from containers."""
        subnets = list(network["subnets"])
        # a container's router advertisements are none of the host's business
        _write(f"{_SYS}/ipv6/conf/{name}/accept_ra", "0")
        if not any(":" in item["subnet"] for item in subnets):
            _write(f"{_SYS}/ipv6/conf/{name}/disable_ipv6", "1")
        # published on 127.0.0.1: such packets may leave by this bridge; rules.py keeps containers from using it
        _write(f"{_SYS}/ipv4/conf/{name}/route_localnet", "1")
        self._ip.link("set", index=index, state="up", ifalias=f"{self._mark} network {network['name']}")
        for item in subnets:
            prefix = int(item["subnet"].rpartition("/")[2])
            try:
                self._ip.addr(
                    "add", index=index, address=item["gateway"], prefixlen=prefix, **_address_options(item["gateway"])
                )
            except NetlinkError as error:
                if error.code != errno.EEXIST:
                    raise refused(error, f"address {item['gateway']} of bridge {name}") from error
        if not network["internal"]:
            _forwarding(six=any(":" in item["subnet"] for item in subnets))

    def remove_bridge(self, name: str) -> None:
        """None there is fine; one that isn't ours stays."""
        self._bridges.pop(name, None)
        for index in self._ip.link_lookup(ifname=name):
            if self._is_ours(int(index)):
                self._delete(int(index))

    def host_mtu(self) -> int:
        """That of the interface of the default route, 1500 without one."""
        with contextlib.suppress(NetlinkError, IndexError):
            for route in self._ip.get_default_routes(family=2):
                index = route.get("oif")
                if index:
                    return int(self._ip.get_links(index)[0].get("mtu") or 1500)
        return 1500

    # -- containers

    def plug(self, network: Mapping[str, Any], endpoint: Mapping[str, Any], path: str, owner: str) -> str:
        """Connects a namespace to a network's bridge by a veth pair; the MAC that the inner end got.

        Raises NotFound where the bridge or the namespace went away meanwhile.
        """
        bridge = self.ensure_bridge(network)
        mtu = int(network["mtu"]) or self._mtu_of(bridge)
        host, inner = str(endpoint["host_interface"]), str(endpoint["interface"])
        peer: dict[str, Any] = {"ifname": inner, "mtu": mtu}
        if endpoint["mac"]:
            peer["address"] = endpoint["mac"]
        with self.inside(path) as links:
            namespace = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                peer["net_ns_fd"] = namespace
                try:
                    self._ip.link("add", ifname=host, kind="veth", peer=peer, master=bridge, mtu=mtu)
                except NetlinkError as error:
                    self._bridges.pop(str(network["bridge"]), None)
                    raise refused(error, f"interface {inner} on {network['bridge']}") from error
                reach("network.worker.paired")
            finally:
                os.close(namespace)
            try:
                return self._settle(links, endpoint, host, owner, isolated=bool(network["isolated"]))
            except BaseException:
                self.unplug(host)
                raise

    def _settle(self, links: IPRoute, endpoint: Mapping[str, Any], host: str, owner: str, *, isolated: bool) -> str:
        outer = int(self._ip.link_lookup(ifname=host)[0])
        self._ip.link("set", index=outer, ifalias=f"{self._mark} container {owner}", state="up")
        # a container that calls its own published port is answered through the port that it came by (br_netfilter);
        # bridge(8): isolated ports don't see each other, the bridge sees all. Not by /sys, which shows the namespace in
        # which it was mounted
        self._ip.brport("set", index=outer, mode=1, isolated=int(isolated))
        index = int(links.link_lookup(ifname=endpoint["interface"])[0])
        if not endpoint["ipv6"]:
            _write(f"{_SYS}/ipv6/conf/{endpoint['interface']}/disable_ipv6", "1")
        links.link("set", index=index, state="up")
        for address in (endpoint["ipv4"], endpoint["ipv6"]):
            if address:
                bare, _, prefix = address.partition("/")
                links.addr("add", index=index, address=bare, prefixlen=int(prefix), **_address_options(bare))
        for gateway in (endpoint["gateway4"], endpoint["gateway6"]):
            if gateway and endpoint.get("default_route"):
                with contextlib.suppress(NetlinkError):  # there is one already: the first network's
                    links.route("add", dst="::/0" if ":" in gateway else "0.0.0.0/0", gateway=gateway, oif=index)
        return str(links.get_links(index)[0].get("address") or "")

    def unplug(self, host_interface: str) -> None:
        """Removes a veth pair by its outer end; none there is fine."""
        for index in self._ip.link_lookup(ifname=host_interface):
            if host_interface.startswith(self._prefix):
                self._delete(int(index))

    def _mtu_of(self, index: int) -> int:
        return int(self._ip.get_links(index)[0].get("mtu") or 1500)

    # -- cleaning up

    def sweep(self, keep: Collection[str], bridges: Collection[str] = ()) -> list[str]:
        """Removes every interface that is ours and isn't named in `keep`; the names of what went.

        Ours are those with our mark, and `bridges`: names that we made up.
        """
        gone = []
        self._bridges.clear()
        for link in list(self._ip.get_links()):
            name = str(link.get("ifname"))
            ours = name.startswith(self._prefix) or name in bridges or self._marked(str(link.get("ifalias") or ""))
            if ours and name not in keep:
                self._delete(int(link["index"]))
                gone.append(name)
        return gone

    def _marked(self, alias: str) -> bool:
        return alias.startswith(f"{self._mark} ")

    def _is_ours(self, index: int) -> bool:
        try:
            return self._marked(str(self._ip.get_links(index)[0].get("ifalias") or ""))
        except NetlinkError:
            return False

    def _delete(self, index: int) -> None:
        try:
            self._ip.link("del", index=index)
        except NetlinkError as error:
            if error.code not in (errno.ENODEV, errno.ENOENT):
                raise refused(error, f"interface {index}") from error


def _address_options(address: str) -> dict[str, Any]:
    # an address that is looked for on the link first (RFC 4862) is of no use for a second; the pool gives it out once
    return {"flags": _IFA_F_NODAD} if ":" in address else {}


def _forwarding(*, six: bool) -> None:
    """Packets between containers and the outside need it; it stays on, as with every other engine."""
    if _read(f"{_SYS}/ipv4/ip_forward") == "0":
        _write(f"{_SYS}/ipv4/ip_forward", "1")
    if not six or _read(f"{_SYS}/ipv6/conf/all/forwarding") != "0":
        return
    # a host that forwards stops taking its own addresses and routes from router advertisements (accept_ra 1): those
    # interfaces shall go on doing so (2). Documentation/networking/ip-sysctl.rst
    for name in os.listdir(f"{_SYS}/ipv6/conf"):
        if name not in ("all", "default") and _read(f"{_SYS}/ipv6/conf/{name}/accept_ra") == "1":
            _write(f"{_SYS}/ipv6/conf/{name}/accept_ra", "2")
    _write(f"{_SYS}/ipv6/conf/all/forwarding", "1")


def _read(path: str) -> str:
    try:
        with open(path, encoding="ascii") as file:
            return file.read().strip()
    except FileNotFoundError:
        return ""


def _write(path: str, value: str) -> None:
    """A setting of the kernel; one that this kernel hasn't got (no IPv6) is left out."""
    with contextlib.suppress(FileNotFoundError), open(path, "w", encoding="ascii") as file:
        file.write(value)


def _new_namespace(path: str) -> None:
    """This process goes into a new network namespace, which the file `path` holds from then on."""
    sc.unshare(sc.CLONE_NEWNET)
    sc.mount("/proc/self/ns/net", path, "none", sc.MS_BIND)
    if places.is_users():
        # icmp(7): ping for the container's root, which has no CAP_NET_RAW then
        _write(f"{_SYS}/ipv4/ping_group_range", "0 0")
    with IPRoute() as inside:
        inside.link("set", index=1, state="up")
