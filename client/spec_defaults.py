"""The OCI runtime specification of a container for which nothing is asked: the one that containerd's clients make.

The lists are the field's (containerd's `oci` package, Docker's defaults); programs in containers rely on them.
"""

from __future__ import annotations

import os
from typing import Any

from wherry.core import places

# nothing newer is used; older runtimes refuse a version that they do not know
OCI_VERSION = "1.0.2"
PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

CAPABILITIES = (
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FSETID",
    "CAP_FOWNER",
    "CAP_MKNOD",
    "CAP_NET_RAW",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETFCAP",
    "CAP_SETPCAP",
    "CAP_NET_BIND_SERVICE",
    "CAP_SYS_CHROOT",
    "CAP_KILL",
    "CAP_AUDIT_WRITE",
)

USERS_CAPABILITIES = tuple(name for name in CAPABILITIES if name not in {"CAP_MKNOD", "CAP_NET_RAW", "CAP_AUDIT_WRITE"})
"""An ordinary user's: as podman has it. In a user namespace devices and audit records can't be made anyway, and ping
goes without raw packets (links.py)."""

MASKED = (
    "/proc/acpi",
    "/proc/asound",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/sys/firmware",
    "/sys/devices/virtual/powercap",
    "/proc/scsi",
)

READ_ONLY = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")

_MOUNTS: tuple[tuple[str, str, str, tuple[str, ...]], ...] = (
    ("/proc", "proc", "proc", ("nosuid", "noexec", "nodev")),
    ("/dev", "tmpfs", "tmpfs", ("nosuid", "strictatime", "mode=755", "size=65536k")),
    (
        "/dev/pts",
        "devpts",
        "devpts",
        ("nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"),
    ),
    ("/dev/shm", "tmpfs", "shm", ("nosuid", "noexec", "nodev", "mode=1777", "size=65536k")),
    ("/dev/mqueue", "mqueue", "mqueue", ("nosuid", "noexec", "nodev")),
    ("/sys", "sysfs", "sysfs", ("nosuid", "noexec", "nodev", "ro")),
    ("/run", "tmpfs", "tmpfs", ("nosuid", "strictatime", "mode=755", "size=65536k")),
)

# null, random, full, tty, zero, urandom, console, any pty, ptmx
_DEVICES = ((1, 3), (1, 8), (1, 7), (5, 0), (1, 5), (1, 9), (5, 1), (136, None), (5, 2))


def device_rules() -> list[dict[str, Any]]:
    """The device cgroup's rules: nothing but the usual devices."""
    rules: list[dict[str, Any]] = [{"allow": False, "access": "rwm"}]
    for major, minor in _DEVICES:
        rule: dict[str, Any] = {"allow": True, "type": "c", "major": major}
        if minor is not None:
            rule["minor"] = minor
        rules.append({**rule, "access": "rwm"})
    return rules


def default_capabilities() -> list[str]:
    """Those of a container of who asks."""
    return list(USERS_CAPABILITIES if places.is_users() else CAPABILITIES)


def capabilities(names: list[str]) -> dict[str, list[str]]:
    """The three sets that a container's first process starts with; none is inheritable or ambient."""
    return {"bounding": list(names), "effective": list(names), "permitted": list(names)}


def namespaces() -> list[dict[str, str]]:
    """Those of every container; on pure cgroup v2 a cgroup namespace too, as Docker, podman and nerdctl have it."""
    kinds = ["pid", "ipc", "uts", "mount", "network"]
    if os.path.exists("/sys/fs/cgroup/cgroup.controllers"):
        kinds.append("cgroup")
    return [{"type": kind} for kind in kinds]


def default_spec(namespace: str, container: str) -> dict[str, Any]:
    """The specification of a container that runs nothing yet: `process.args` is for the caller."""
    return {
        "ociVersion": OCI_VERSION,
        "process": {
            "user": {"uid": 0, "gid": 0, "additionalGids": [0]},
            "args": [],
            "env": [],
            "cwd": "/",
            "capabilities": capabilities(default_capabilities()),
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
            "noNewPrivileges": True,
            # else it inherits the daemon's -999 and outlives everything else when memory runs out; only root may lower
            **({"oomScoreAdj": 0} if os.geteuid() == 0 else {}),
        },
        "root": {"path": "rootfs"},
        "mounts": [
            {"destination": place, "type": kind, "source": source, "options": list(options)}
            for place, kind, source, options in _MOUNTS
        ],
        "linux": {
            "resources": {"devices": device_rules(), "cpu": {"shares": 1024}},
            "cgroupsPath": f"/{namespace}/{container}",
            "namespaces": namespaces(),
            "maskedPaths": list(MASKED),
            "readonlyPaths": list(READ_ONLY),
        },
    }
