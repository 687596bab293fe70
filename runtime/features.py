"""`features`: what this runtime can do, after the specification's schema (features.md)."""

from __future__ import annotations

from wherry.linux import capabilities, mounts, namespaces
from wherry.linux.libseccomp import Arch
from wherry.runtime import hooks, seccomp, settings, spec

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_SECCOMP_ACTIONS = (
    "SCMP_ACT_ALLOW",
    "SCMP_ACT_ERRNO",
    "SCMP_ACT_KILL",
    "SCMP_ACT_KILL_PROCESS",
    "SCMP_ACT_KILL_THREAD",
    "SCMP_ACT_LOG",
    "SCMP_ACT_NOTIFY",
    "SCMP_ACT_TRACE",
    "SCMP_ACT_TRAP",
)
_SECCOMP_OPERATORS = (
    "SCMP_CMP_EQ",
    "SCMP_CMP_GE",
    "SCMP_CMP_GT",
    "SCMP_CMP_LE",
    "SCMP_CMP_LT",
    "SCMP_CMP_MASKED_EQ",
    "SCMP_CMP_NE",
)


def describe() -> dict[str, Any]:
    """The object that the command prints."""
    last = capabilities.last_known()
    return {
        "ociVersionMin": "1.0.0",
        "ociVersionMax": spec.SPEC_VERSION,
        "hooks": list(hooks.KINDS),
        "mountOptions": sorted({*mounts.FLAGS, *mounts.PROPAGATION, *mounts.RECURSIVE, *mounts.OURS}),
        "linux": {
            "namespaces": sorted(namespaces.supported()),
            "capabilities": [name for name, number in capabilities.NUMBERS.items() if number <= last],
            "cgroup": {"v1": True, "v2": True, "systemd": True, "systemdUser": True, "rdma": True},
            "seccomp": {
                "enabled": True,
                "actions": list(_SECCOMP_ACTIONS),
                "operators": list(_SECCOMP_OPERATORS),
                "archs": sorted(f"SCMP_ARCH_{name}" for name in Arch.__members__),
                "knownFlags": sorted(seccomp.FLAGS),
                "supportedFlags": sorted(seccomp.FLAGS),
            },
            "apparmor": {"enabled": True},
            "selinux": {"enabled": True},
            "intelRdt": {"enabled": True, "schemata": True, "monitoring": True},
            "memoryPolicy": {"modes": sorted(settings.MEMORY_MODES), "flags": sorted(settings.MEMORY_FLAGS)},
            "mountExtensions": {"idmap": {"enabled": True}},
            "netDevices": {"enabled": True},
        },
        "annotations": {"org.opencontainers.runc.checkpoint.enabled": "true"},  # by runc's name: callers look for it
        "potentiallyUnsafeConfigAnnotations": ["org.systemd.property."],
    }
