"""What a host allows: every check says what it found and what to do about it, for root and for an ordinary user.

Nothing is changed. What can be tried is tried (in a child that ends), because files under /proc tell less than the
kernel does: a namespace may exist and be forbidden all the same.
"""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
import sys

from wherry.client.doctor_user import CHECKS, SHOWN
from wherry.client.finding_host import FAILURE, OK, WARNING, Check, Finding, read
from wherry.core import places
from wherry.linux import syscalls as sc
from wherry.linux.cgroups.layout import Mode, host

__all__ = ["FAILURE", "OK", "WARNING", "Finding", "allowed", "examine"]


def allowed() -> dict[str, str]:
    """What the host allows an ordinary user, by name: for `wherry info`. Empty for root."""
    return {found.name: found.found for check in SHOWN if (found := check())} if places.is_users() else {}


def examine() -> list[Finding]:
    """All checks that make sense for who asks."""
    mine = CHECKS if places.is_users() else ROOT
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
    with contextlib.suppress(OSError), open(f"/lib/modules/{os.uname().release}/modules.dep", encoding="utf-8") as file:
        if "/overlay.ko" in file.read():
            return Finding("overlayfs", OK, "a module, loaded when it is needed")
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


def _systemd() -> Finding:
    if os.path.isdir("/run/systemd/system"):
        done = subprocess.run(["systemctl", "--version"], capture_output=True, text=True, check=False)
        return Finding("systemd", OK, done.stdout.partition("\n")[0] or "runs this machine")
    return Finding("systemd", OK, "doesn't run this machine")


def _modules() -> Finding | None:
    """What a bridge network is made of: in the kernel, loaded, or there to be loaded."""
    known = read(f"/lib/modules/{os.uname().release}/modules.dep") + read(
        f"/lib/modules/{os.uname().release}/modules.builtin"
    )
    if not known:
        return None  # a kernel without modules: what it lacks is seen when it is used
    missing = [
        name for name in _NETWORK_MODULES if not os.path.isdir(f"/sys/module/{name}") and f"/{name}.ko" not in known
    ]
    if missing:
        return Finding("modules", WARNING, f"no {', '.join(missing)}", "bridge networks need them: another kernel")
    return Finding("modules", OK, ", ".join(_NETWORK_MODULES))


def _rules() -> Finding:
    import ctypes

    try:
        ctypes.CDLL("libnftables.so.1")
    except OSError:
        return Finding("packets", WARNING, "no libnftables", "install libnftables1: networks and published ports")
    return Finding("packets", OK, "libnftables.so.1")


def _controllers() -> Finding | None:
    """What limits need, as far as the host has it."""
    layout = host()
    known = set(read("/sys/fs/cgroup/cgroup.controllers").split()) if layout.mode == Mode.V2 else set(layout.v1)
    missing = sorted({"cpu", "cpuset", "memory", "pids"} - known)
    if missing:
        advice = "the kernel's command line may have cgroup_disable=; memory: cgroup_enable=memory (Raspberry Pi)"
        return Finding("limits", WARNING, f"without {', '.join(missing)}", advice)
    return Finding("limits", OK, ", ".join(sorted(name for name in known if "=" not in name)))


def _security() -> Finding:
    modules = read("/sys/kernel/security/lsm").split(",")
    found = [name for name in ("apparmor", "selinux") if name in modules]
    return Finding("security module", OK, found[0] if found else "none: capabilities and seccomp are what confines")


def _space() -> Finding:
    place = places.root()
    while not os.path.isdir(place):
        place = os.path.dirname(place)
    room = os.statvfs(place)
    free = room.f_bavail * room.f_frsize
    if free < _ROOM or (room.f_files and room.f_favail < _INODES):
        return Finding("space", WARNING, f"{free >> 20} MiB, {room.f_favail} files at {place}", "wherry system prune")
    return Finding("space", OK, f"{free >> 30} GiB at {place}")


def _limits() -> Finding:
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if soft != resource.RLIM_INFINITY and soft < _FILES:
        return Finding("open files", WARNING, f"at most {soft}", "LimitNOFILE= of the unit, or limits.conf(5)")
    return Finding("open files", OK, "unlimited" if soft == resource.RLIM_INFINITY else f"at most {soft}")


_NETWORK_MODULES = ("bridge", "veth", "nf_tables", "nf_nat")
# bytes and files below which an image of today doesn't fit; descriptors of a daemon with some hundred containers
_ROOM, _INODES, _FILES = 1 << 30, 50_000, 4096

EVERYBODY: tuple[Check, ...] = (
    _kernel, _python, _namespaces, _cgroups, _overlay, _seccomp, _security, _systemd, _space, _limits,
)  # fmt: skip
ROOT: tuple[Check, ...] = (_root_rights, _controllers, _modules, _forwarding, _rules)
