"""`spec`: a config.json to begin with, the same container as runc's."""

from __future__ import annotations

import json
import os

from wherry.runtime.errors import EXISTS, ContainerError
from wherry.runtime.spec import SPEC_VERSION

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_CAPABILITIES = ["CAP_AUDIT_WRITE", "CAP_KILL", "CAP_NET_BIND_SERVICE"]

_MOUNTS: tuple[tuple[str, str, str, tuple[str, ...]], ...] = (
    ("/proc", "proc", "proc", ()),
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
    ("/sys/fs/cgroup", "cgroup", "cgroup", ("nosuid", "noexec", "nodev", "relatime", "ro")),
)

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
    "/proc/scsi",
)
READONLY = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")


def make(*, rootless: bool = False) -> dict[str, Any]:
    """The specification as an object. rootless: for the user that calls, mapped to root, without what takes rights."""
    mounts = []
    for destination, fstype, source, options in _MOUNTS:
        mount = {"destination": destination, "type": fstype, "source": source}
        mounts.append({**mount, "options": list(options)} if options else mount)
    kinds = ["pid", "network", "ipc", "uts", "mount", "cgroup"]
    linux: dict[str, Any] = {
        "resources": {"devices": [{"allow": False, "access": "rwm"}]},
        "namespaces": [{"type": kind} for kind in kinds],
        "maskedPaths": list(MASKED),
        "readonlyPaths": list(READONLY),
    }
    spec: dict[str, Any] = {
        "ociVersion": SPEC_VERSION,
        "process": {
            "terminal": True,
            "user": {"uid": 0, "gid": 0},
            "args": ["sh"],
            "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "TERM=xterm"],
            "cwd": "/",
            "capabilities": {key: list(_CAPABILITIES) for key in ("bounding", "effective", "permitted")},
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
            "noNewPrivileges": True,
        },
        "root": {"path": "rootfs", "readonly": True},
        "hostname": "wherry",
        "mounts": mounts,
        "linux": linux,
    }
    if rootless:
        _make_rootless(spec, linux)
    return spec


def _make_rootless(spec: dict[str, Any], linux: dict[str, Any]) -> None:
    linux["namespaces"] = [{"type": k} for k in ("pid", "ipc", "uts", "mount", "cgroup", "user")]
    linux["uidMappings"] = [{"containerID": 0, "hostID": os.geteuid(), "size": 1}]
    linux["gidMappings"] = [{"containerID": 0, "hostID": os.getegid(), "size": 1}]
    linux.pop("resources")
    mounts = []
    for mount in spec["mounts"]:
        options = [o for o in mount.get("options", []) if not o.startswith(("gid=", "uid="))]
        if mount["destination"] == "/sys":
            # without a network namespace of our own sysfs can only be bound
            mount.update(type="none", source="/sys")
            options = ["rbind", "nosuid", "noexec", "nodev", "ro"]
        mounts.append({**mount, "options": options} if options else mount)
    spec["mounts"] = mounts


def write(folder: str, *, rootless: bool) -> None:
    """FOLDER/config.json, which must not be there yet."""
    path = os.path.join(folder, "config.json")
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    except FileExistsError:
        raise ContainerError("File config.json exists. Remove it first", EXISTS) from None
    with os.fdopen(fd, "w", encoding="utf-8") as file:
        json.dump(make(rootless=rootless), file, indent="\t")
