"""What a host allows: every check says what it found and what to do about it, for root and for an ordinary user.

Nothing is changed. What can be tried is tried (in a child that ends), because files under /proc tell less than the
kernel does: a namespace may exist and be forbidden all the same.
"""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

from wherry.core import places
from wherry.linux import syscalls as sc
from wherry.linux.cgroups.layout import Mode, host
from wherry.linux.rootless import granted, refusal

OK, WARNING, FAILURE = "ok", "warning", "failure"


class Finding(NamedTuple):
    """What a check found: `status` is OK, WARNING (something will be missing) or FAILURE (containers won't run)."""

    name: str
    status: str
    found: str
    advice: str = ""


def examine() -> list[Finding]:
    """All checks that make sense for who asks."""
    mine = USER if places.is_users() else ROOT
    return [finding for check in (*EVERYBODY, *mine) if (finding := check()) is not None]


def _kernel() -> Finding:
    release = os.uname().release
    numbers = tuple(int(part) for part in release.split("-")[0].split(".")[:2] if part.isdigit())
    if numbers < (5, 12):
        return Finding("kernel", WARNING, release, "5.12 or newer: mount_setattr, idmapped mounts, overlay for users")
    return Finding("kernel", OK, release)


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    return Finding("python", OK, f"{version} at {sys.executable}")


def _cgroups() -> Finding:
    layout = host()
    if layout.mode == Mode.V2:
        return Finding("cgroups", OK, "version 2")
    if layout.v1:
        names = ", ".join(sorted(name for name in layout.v1 if "=" not in name))
        advice = "" if places.is_users() is False else "version 2: only there can limits be delegated to users"
        return Finding("cgroups", WARNING if advice else OK, f"version 1 ({names})", advice)
    return Finding("cgroups", FAILURE, "not mounted", "mount -t cgroup2 none /sys/fs/cgroup")


def _overlay() -> Finding:
    with open("/proc/filesystems", encoding="ascii") as file:
        known = "overlay" in file.read().split()
    if known:
        return Finding("overlayfs", OK, "in the kernel")
    return Finding("overlayfs", WARNING, "not loaded", "modprobe overlay; without it, --snapshotter native (slow)")


def _seccomp() -> Finding:
    import ctypes

    try:
        ctypes.CDLL("libseccomp.so.2")
    except OSError:
        return Finding("libseccomp", WARNING, "missing", "install libseccomp2: without it no system call is filtered")
    return Finding("libseccomp", OK, "libseccomp.so.2")


def _namespaces() -> Finding:
    missing = [
        kind for kind in ("cgroup", "ipc", "mnt", "net", "pid", "uts") if not os.path.exists(f"/proc/self/ns/{kind}")
    ]
    if missing:
        return Finding(
            "namespaces", FAILURE, f"the kernel lacks {', '.join(missing)}", "a kernel with these namespaces"
        )
    return Finding("namespaces", OK, "all kinds")


def _tools(name: str, programs: Sequence[str], use: str, package: str) -> Finding:
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    found = [program for program in programs if shutil.which(program, path=path)]
    if found:
        return Finding(name, OK, ", ".join(found))
    return Finding(name, WARNING, f"no {' or '.join(programs)}", f"install {package}: {use}")


def _forwarding() -> Finding:
    with open("/proc/sys/net/ipv4/ip_forward", encoding="ascii") as file:
        if file.read().strip() == "1":
            return Finding("forwarding", OK, "net.ipv4.ip_forward is 1")
    return Finding("forwarding", OK, "net.ipv4.ip_forward is 0: wherryd sets it with the first bridge network")


def _root_rights() -> Finding | None:
    """Root in a container has less than root of a host."""
    _, permitted, _ = sc.capget()
    names = {"CAP_SYS_ADMIN": 21, "CAP_NET_ADMIN": 12, "CAP_SYS_CHROOT": 18, "CAP_SETUID": 6, "CAP_MKNOD": 27}
    missing = [name for name, bit in names.items() if not permitted >> bit & 1]
    if missing:
        return Finding("rights", FAILURE, f"no {', '.join(missing)}", "run as root of the host, or as an ordinary user")
    if not permitted >> 24 & 1:
        return Finding("rights", WARNING, "no CAP_SYS_RESOURCE", "containers can't raise limits or lower oom_score_adj")
    return Finding("rights", OK, "all that it takes")


def _user_namespace() -> Finding:
    """Tried out: a child makes one."""
    child = os.fork()
    if not child:
        try:
            sc.unshare(sc.CLONE_NEWUSER | sc.CLONE_NEWNS)
        except OSError as error:
            os._exit(error.errno or 1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if not code:
        return Finding("user namespaces", OK, "may be made")
    why, hints = refusal(OSError(code, os.strerror(code)))
    return Finding("user namespaces", FAILURE, why, "; ".join(hints))


def _granted_ids() -> Finding:
    uid = places.user_id()
    try:
        name = pwd.getpwuid(uid).pw_name
    except KeyError:
        name = str(uid)
    uids, gids = granted("/etc/subuid", name, uid), granted("/etc/subgid", name, uid)
    if uids and gids:
        total = min(sum(item.size for item in uids), sum(item.size for item in gids))
        if total < 65535:
            return Finding("ids", WARNING, f"{total} besides one's own", "images use ids up to 65535: grant 65536")
        missing = [tool for tool in ("newuidmap", "newgidmap") if not shutil.which(tool)]
        if missing:
            return Finding(
                "ids", FAILURE, f"granted, but {', '.join(missing)} missing", "install uidmap (shadow-utils)"
            )
        return Finding("ids", OK, f"{total} besides one's own")
    advice = f"as root: usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {name}"
    return Finding("ids", WARNING, "only one's own: images with several owners can't be kept exactly", advice)


def _delegated() -> Finding:
    """Which controllers systemd's user manager was given (v2)."""
    if host().mode != Mode.V2:
        return Finding(
            "limits", WARNING, "not on cgroup version 1", "without delegation --memory and others are refused"
        )
    place = f"/sys/fs/cgroup/user.slice/user-{places.user_id()}.slice/user@{places.user_id()}.service"
    try:
        with open(f"{place}/cgroup.controllers", encoding="ascii") as file:
            controllers = file.read().split()
    except OSError:
        advice = "loginctl enable-linger, or log in by a login manager: systemd's user manager delegates cgroups"
        return Finding("limits", WARNING, "no cgroup of one's own", advice)
    wanted = {"cpu", "memory", "pids"}
    if wanted - set(controllers):
        drop_in = "/etc/systemd/system/user@.service.d/delegate.conf: [Service] Delegate=cpu cpuset io memory pids"
        return Finding(
            "limits", WARNING, f"only {', '.join(controllers) or 'nothing'} delegated", f"as root, in {drop_in}"
        )
    return Finding("limits", OK, ", ".join(controllers))


def _runtime_folder() -> Finding:
    folder = os.environ.get("XDG_RUNTIME_DIR")
    if not folder:
        return Finding("XDG_RUNTIME_DIR", WARNING, f"not set: {places.runtime_folder()} is used", "log in, or set it")
    if not os.access(folder, os.W_OK):
        return Finding("XDG_RUNTIME_DIR", FAILURE, f"{folder} can't be written", "log in as this user (not with su)")
    return Finding("XDG_RUNTIME_DIR", OK, folder)


def _lingering() -> Finding | None:
    if not os.path.isdir("/run/systemd/system"):
        return None
    name = pwd.getpwuid(places.user_id()).pw_name
    if os.path.exists(f"/var/lib/systemd/linger/{name}"):
        return Finding("lingering", OK, "containers go on after the last logout")
    return Finding("lingering", WARNING, "containers end with the last logout", f"loginctl enable-linger {name}")


def _ping() -> Finding:
    with open("/proc/sys/net/ipv4/ping_group_range", encoding="ascii") as file:
        low, high = map(int, file.read().split())
    if low <= os.getgid() <= high:
        return Finding("ping", OK, "without rights")
    return Finding("ping", WARNING, "not from containers", "sysctl net.ipv4.ping_group_range='0 2147483647'")


def _systemd() -> Finding:
    if os.path.isdir("/run/systemd/system"):
        done = subprocess.run(["systemctl", "--version"], capture_output=True, text=True, check=False)
        return Finding("systemd", OK, done.stdout.partition("\n")[0] or "runs this machine")
    return Finding("systemd", OK, "doesn't run this machine")


Check = Callable[[], Finding | None]
EVERYBODY: tuple[Check, ...] = (_kernel, _python, _namespaces, _cgroups, _overlay, _seccomp, _systemd)
ROOT: tuple[Check, ...] = (
    _root_rights,
    _forwarding,
    lambda: _tools("packets", ("nft", "iptables"), "bridge networks and published ports", "nftables"),
)
USER: tuple[Check, ...] = (
    _user_namespace,
    _granted_ids,
    _runtime_folder,
    _delegated,
    _lingering,
    lambda: _tools("network", ("pasta", "slirp4netns"), "networks without root", "passt, or slirp4netns"),
    _ping,
)
