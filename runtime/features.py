"""`features`: what this runtime can do, after the specification's schema (features.md)."""

from __future__ import annotations

from wherry.linux import capabilities, mounts, namespaces
from wherry.runtime import hooks, spec

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
_SECCOMP_ARCHITECTURES = (
    "SCMP_ARCH_AARCH64",
    "SCMP_ARCH_ARM",
    "SCMP_ARCH_PPC64LE",
    "SCMP_ARCH_RISCV64",
    "SCMP_ARCH_S390X",
    "SCMP_ARCH_X32",
    "SCMP_ARCH_X86",
    "SCMP_ARCH_X86_64",
)
_SECCOMP_FLAGS = ("SECCOMP_FILTER_FLAG_LOG", "SECCOMP_FILTER_FLAG_SPEC_ALLOW", "SECCOMP_FILTER_FLAG_TSYNC")


def describe() -> dict[str, Any]:
    """The object that the command prints."""
    last = capabilities.last_known()
    return {
        "ociVersionMin": "1.0.0",
        "ociVersionMax": spec.SPEC_VERSION,
        "hooks": list(hooks.KINDS),
        "mountOptions": sorted({*mounts.FLAGS, *mounts.PROPAGATION, *mounts.RECURSIVE, "tmpcopyup"}),
        "linux": {
            "namespaces": sorted(namespaces.supported()),
            "capabilities": [name for name, number in capabilities.NUMBERS.items() if number <= last],
            "cgroup": {"v1": True, "v2": True, "systemd": False, "systemdUser": False, "rdma": True},
            "seccomp": {
                "enabled": True,
                "actions": list(_SECCOMP_ACTIONS),
                "operators": list(_SECCOMP_OPERATORS),
                "archs": list(_SECCOMP_ARCHITECTURES),
                "knownFlags": list(_SECCOMP_FLAGS),
                "supportedFlags": list(_SECCOMP_FLAGS),
            },
            "apparmor": {"enabled": True},
            "selinux": {"enabled": True},
            "intelRdt": {"enabled": False},
            "mountExtensions": {"idmap": {"enabled": False}},
        },
        "annotations": {},
    }
