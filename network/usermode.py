"""Networks for who has no rights on the host: a program of the user's carries the packets of a namespace.

pasta (of passt) or slirp4netns opens a tap in the container's namespace and ordinary sockets on the host. It is started
by exec, lives as long as the namespace, and needs no daemon; its pid file says which process it is, so that a later
daemon can end it.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Sequence

from wherry.core.errors import FailedPrecondition, InvalidArgument
from wherry.linux.process import is_alive, start_time
from wherry.network.model import Endpoint, Port

PROGRAMS = ("pasta", "slirp4netns")
# where a container asks for names: answered by the host's own resolver, also where that is on the host's loopback
PASTA_DNS = "169.254.1.1"
SLIRP_DNS, SLIRP_ADDRESS, SLIRP_GATEWAY = "10.0.2.3", "10.0.2.100/24", "10.0.2.2"
MTU = "65520"
# of the link between a user's bridges and such a program: link-local, and of a ULA prefix of nobody's (RFC 3927, 4193)
_UPLINK, _UPLINK6 = "169.254.77", "fdc9:9d2b:5c1e:77::"
# seconds until such a program must have set the namespace up
START = 15.0


def find() -> str:
    """The program to use: WHERRY_USER_NETWORK, else the first that is there.

    Raises FailedPrecondition with the package to install.
    """
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    named = os.environ.get("WHERRY_USER_NETWORK", "")
    for name in [named] if named else PROGRAMS:
        if found := shutil.which(name, path=path):
            return found
    raise FailedPrecondition(
        "a network without root takes pasta or slirp4netns: install the package passt or slirp4netns, or use --net none"
    )


def check_ports(program: str, ports: Sequence[Port]) -> None:
    """Whether a program can publish these ports, whose numbers are known. Raises FailedPrecondition.

    The pasta of 2023 (Debian 12) loses datagrams to a port that has another number inside.
    """
    for port in ports:
        shown = f"can't publish port {port.host_ip or '*'}:{port.host_port}/{port.protocol}"
        if os.path.basename(program) != "pasta":
            if ":" in port.host_ip:
                raise FailedPrecondition(f"{shown}: slirp4netns has no IPv6 for that; use pasta or a named network")
        elif port.protocol == "udp" and port.host_port != port.container_port and not _renumbers(program):
            raise FailedPrecondition(
                f"{shown} as {port.container_port}: this pasta is too old for another number; use the same one, or a "
                "named network"
            )


@functools.cache
def _renumbers(program: str) -> bool:
    """By its version, which is a date; Debian 12's has none."""
    done = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=START, check=False)
    found = re.search(r"\b(20\d\d)_\d\d_\d\d", done.stdout)
    return found is not None and int(found[1]) >= 2024


def choose_ports(ports: Sequence[Port]) -> None:
    """Give ports that may be any a number that is free now. Raises FailedPrecondition."""
    with contextlib.ExitStack() as held:  # until all are found: one that was found isn't free for the next
        for port in ports:
            if port.protocol not in {"tcp", "udp"}:
                raise InvalidArgument(f"port {port.container_port}/{port.protocol} can't be published without root")
            port.host_port, port.host_port_end = _free(port, held), 0


def _free(port: Port, held: contextlib.ExitStack) -> int:
    if port.host_port and not port.host_port_end:
        return _try(port, port.host_port, held)
    if not port.host_port and port.protocol == "udp":
        with contextlib.suppress(FailedPrecondition):  # the same number where it is free (`check_ports`)
            return _try(port, port.container_port, held)
    last = port.host_port_end or port.host_port
    for number in range(port.host_port, last + 1):
        with contextlib.suppress(FailedPrecondition):
            return _try(port, number, held)
    raise FailedPrecondition(f"no port from {port.host_port} to {last} is free")


def _try(port: Port, number: int, held: contextlib.ExitStack) -> int:
    """The number, bound until `held` ends (0: one that is free)."""
    family = socket.AF_INET6 if ":" in port.host_ip else socket.AF_INET
    kind = socket.SOCK_STREAM if port.protocol == "tcp" else socket.SOCK_DGRAM
    probe = socket.socket(family, kind)
    try:
        if port.protocol == "tcp":
            # only against what is left of connections of before; a socket that listens is in the way as ever
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((port.host_ip, number))
        if port.protocol == "tcp":
            probe.listen(1)
    except OSError as error:
        probe.close()
        hint = ""
        if isinstance(error, PermissionError):
            hint = "; low ports are root's: sysctl net.ipv4.ip_unprivileged_port_start"
        raise FailedPrecondition(f"can't publish port {port.host_ip or '*'}:{number}: {error.strerror}{hint}") from None
    held.enter_context(probe)
    found: int = probe.getsockname()[1]
    return found


async def attach(program: str, netns: str, endpoint: Endpoint, ports: Sequence[Port], folder: str) -> None:
    """Start `program` for the namespace at the path `netns`; its files go to `folder`, which is made.

    Fills in the endpoint's addresses. Raises FailedPrecondition with what the program said.
    """
    os.makedirs(folder, mode=0o700, exist_ok=True)
    if os.path.basename(program) == "pasta":
        await _pasta(program, netns, endpoint, ports, folder)
    else:
        await _slirp(program, netns, endpoint, ports, folder)


async def uplink(program: str, netns: str, folder: str) -> None:
    """Start `program` for a namespace with bridges of ours.

    What is on them reaches the host by all of the host's addresses: the namespace has none of them, as a container has
    that has no neighbours. Raises FailedPrecondition with what the program said.
    """
    os.makedirs(folder, mode=0o700, exist_ok=True)
    endpoint = Endpoint("", "", "outside")
    if os.path.basename(program) != "pasta":
        await _slirp(program, netns, endpoint, (), folder, "--cidr", f"{_UPLINK}.0/24", "--enable-ipv6")
        return
    more = ["-a", f"{_UPLINK}.2", "-n", "255.255.255.0", "-g", f"{_UPLINK}.1"]
    if any(route.endswith("/0") for route in _routes6()):
        more += ["-a", f"{_UPLINK6}2", "-g", f"{_UPLINK6}1"]
    await _pasta(program, netns, endpoint, (), folder, *more)


def attached(folder: str) -> bool:
    """Whether the program whose files are in `folder` runs."""
    return _running(folder) != 0


async def _pasta(program: str, netns: str, endpoint: Endpoint, ports: Sequence[Port], folder: str, *more: str) -> None:
    words = [program, "--quiet", "--config-net", "--netns-only", "--no-map-gw", "--ns-ifname", endpoint.interface]
    words += ["--dns-forward", PASTA_DNS, "-P", os.path.join(folder, "pid"), "-T", "none", "-U", "none", *more]
    for protocol, flag in (("tcp", "-t"), ("udp", "-u")):
        specs = [
            f"{f'{port.host_ip}/' if port.host_ip else ''}{port.host_port}:{port.container_port}"
            for port in ports
            if port.protocol == protocol
        ]
        for spec in specs or ["none"]:
            words += [flag, spec]
    # it goes into the background when everything is set up
    process = await asyncio.create_subprocess_exec(
        *words, "--netns", netns,
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip
    try:
        async with asyncio.timeout(START):
            _, said = await process.communicate()
    except TimeoutError:
        process.kill()
        await process.wait()
        raise FailedPrecondition(f"pasta set nothing up within {START:.0f} s") from None
    if process.returncode:
        raise FailedPrecondition(f"pasta failed: {_last(said)}")
    _note(folder)


async def _slirp(program: str, netns: str, endpoint: Endpoint, ports: Sequence[Port], folder: str, *more: str) -> None:
    api = os.path.join(folder, "api")
    ready, theirs = os.pipe()
    words = [
        program,
        "--configure",
        "--mtu",
        MTU,
        "--disable-host-loopback",
        "--netns-type",
        "path",
        "--api-socket",
        api,
        *more,
    ]
    log = os.path.join(folder, "log")
    try:
        with open(log, "wb") as output:  # noqa: ASYNC230 - files in memory, here and below
            process = await asyncio.create_subprocess_exec(
                *words, "--ready-fd", str(theirs), netns, endpoint.interface,
                stdin=asyncio.subprocess.DEVNULL, stdout=output, stderr=output, pass_fds=[theirs],
                start_new_session=True,
            )  # fmt: skip
    finally:
        os.close(theirs)
    try:
        async with asyncio.timeout(START):
            answer = await asyncio.to_thread(os.read, ready, 1)
    except TimeoutError:
        answer = b""
    finally:
        os.close(ready)
    if answer != b"1":
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        with open(log, "rb") as file:  # noqa: ASYNC230
            raise FailedPrecondition(f"slirp4netns failed: {_last(file.read())}")
    with open(os.path.join(folder, "pid"), "w", encoding="ascii") as file:  # noqa: ASYNC230
        file.write(str(process.pid))
    _note(folder)
    endpoint.ipv4, endpoint.gateway4 = SLIRP_ADDRESS, SLIRP_GATEWAY
    try:
        for port in ports:
            await _forward(api, port)
    except BaseException:
        detach(folder)
        raise


async def _forward(api: str, port: Port) -> None:
    """One published port, by slirp4netns' own protocol: a JSON object each way."""
    reader, writer = await asyncio.open_unix_connection(api)
    try:
        arguments = {
            "proto": port.protocol,
            "host_addr": port.host_ip or "0.0.0.0",
            "host_port": port.host_port,
            "guest_addr": SLIRP_ADDRESS.partition("/")[0],
            "guest_port": port.container_port,
        }
        writer.write(json.dumps({"execute": "add_hostfwd", "arguments": arguments}).encode())
        writer.write_eof()
        answer = json.loads(await reader.read() or b"{}")
    finally:
        writer.close()
    if "error" in answer:
        raise FailedPrecondition(f"can't publish port {port.host_port}: {answer['error'].get('desc', 'refused')}")


def nameserver(program: str) -> str:
    """The address inside at which the host's resolver answers."""
    return PASTA_DNS if os.path.basename(program) == "pasta" else SLIRP_DNS


def _note(folder: str) -> None:
    """Which process it is, once and for all: a number alone may be another's by the time it is used."""
    path = os.path.join(folder, "pid")
    with open(path, encoding="ascii") as file:
        pid = int(file.read().split()[0])
    with open(path, "w", encoding="ascii") as file:
        file.write(f"{pid} {start_time(pid)}\n")


def detach(folder: str) -> None:
    """End the program of a namespace, and remove its files; one that is gone is fine."""
    if pid := _running(folder):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    shutil.rmtree(folder, ignore_errors=True)


def _running(folder: str) -> int:
    """The process that `_note` noted, 0 where it is none any more."""
    with contextlib.suppress(OSError, ValueError), open(os.path.join(folder, "pid"), encoding="ascii") as file:
        pid, started = map(int, file.read().split())
        return pid if is_alive(pid, started) else 0
    return 0


def _routes6() -> list[str]:
    """The destinations of the host's IPv6 routes by interfaces other than the loopback, as the kernel prints them."""
    try:
        with open("/proc/net/ipv6_route", encoding="ascii") as file:
            rows = [line.split() for line in file]
    except FileNotFoundError:
        return []
    return [f"{row[0]}/{int(row[1], 16)}" for row in rows if row[-1] != "lo"]


def _last(said: bytes) -> str:
    """What a program said last."""
    lines = [line for line in said.decode(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else "it said nothing"
