"""Capabilities by name (capabilities(7)), and the five sets that a process gets."""

from __future__ import annotations

import errno

from wherry.linux import syscalls as sc

NAMES = (
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETPCAP",
    "CAP_LINUX_IMMUTABLE",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_BROADCAST",
    "CAP_NET_ADMIN",
    "CAP_NET_RAW",
    "CAP_IPC_LOCK",
    "CAP_IPC_OWNER",
    "CAP_SYS_MODULE",
    "CAP_SYS_RAWIO",
    "CAP_SYS_CHROOT",
    "CAP_SYS_PTRACE",
    "CAP_SYS_PACCT",
    "CAP_SYS_ADMIN",
    "CAP_SYS_BOOT",
    "CAP_SYS_NICE",
    "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG",
    "CAP_MKNOD",
    "CAP_LEASE",
    "CAP_AUDIT_WRITE",
    "CAP_AUDIT_CONTROL",
    "CAP_SETFCAP",
    "CAP_MAC_OVERRIDE",
    "CAP_MAC_ADMIN",
    "CAP_SYSLOG",
    "CAP_WAKE_ALARM",
    "CAP_BLOCK_SUSPEND",
    "CAP_AUDIT_READ",
    "CAP_PERFMON",
    "CAP_BPF",
    "CAP_CHECKPOINT_RESTORE",
)
NUMBERS: dict[str, int] = {name: number for number, name in enumerate(NAMES)}


def last_known() -> int:
    """The highest capability of this kernel."""
    with open("/proc/sys/kernel/cap_last_cap", encoding="utf-8") as file:
        return int(file.read())


def mask(names: list[str]) -> tuple[int, list[str]]:
    """The bit set of these names, and the names that are unknown here (runc warns of them and goes on)."""
    bits, unknown = 0, []
    for name in names:
        number = NUMBERS.get(name.upper())
        if number is None:
            unknown.append(name)
        else:
            bits |= 1 << number
    return bits, unknown


def drop_bounding(keep: int) -> None:
    """Take every capability out of the bounding set that is not in `keep`; stops at the first that the kernel lacks."""
    for number in range(64):
        if keep >> number & 1:
            continue
        try:
            sc.prctl(sc.PR_CAPBSET_DROP, number)
        except OSError as error:
            if error.errno == errno.EINVAL:
                return
            raise


def apply(effective: int, permitted: int, inheritable: int, ambient: int) -> None:
    """Set the thread's sets. What this process doesn't have (or the kernel lacks) is left out, as runc 1.1 does it:
    a host without CAP_SYS_RESOURCE still runs a container that asks for it. Ambient ones that can't be raised likewise.
    """
    _, have, _ = sc.capget()
    permitted &= have
    sc.capset(effective & permitted, permitted, inheritable & have)
    try:
        sc.prctl(sc.PR_CAP_AMBIENT, sc.PR_CAP_AMBIENT_CLEAR_ALL)
    except OSError as error:
        if error.errno != errno.EINVAL:  # EINVAL: older than 4.3, which has no ambient set
            raise
        return
    for number in range(64):
        if ambient >> number & 1:
            try:
                sc.prctl(sc.PR_CAP_AMBIENT, sc.PR_CAP_AMBIENT_RAISE, number)
            except OSError as error:
                if error.errno not in (errno.EPERM, errno.EINVAL):
                    raise
