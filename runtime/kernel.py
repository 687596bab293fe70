"""The small settings of a container that are one system call or one file each."""

# ruff: noqa: PLC0415 - each command pays only for the modules that it needs; `container.preload` loads them all

from __future__ import annotations

import ctypes
import errno
import os

from wherry.linux import syscalls as sc
from wherry.runtime.errors import ContainerError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from wherry.runtime.plan import Plan

_PER_LINUX, _PER_LINUX32 = 0x0000, 0x0008
_IFF_UP = 1
_SIOCGIFFLAGS, _SIOCSIFFLAGS = 0x8913, 0x8914
_AF_INET, _SOCK_DGRAM_CLOEXEC = 2, 2 | os.O_CLOEXEC
_KEY_SEARCH_FOR_POSSESSOR = 0x080000
_IO_CLASSES = {"IOPRIO_CLASS_RT": 1, "IOPRIO_CLASS_BE": 2, "IOPRIO_CLASS_IDLE": 3}
_POLICIES = {
    "SCHED_OTHER": 0,
    "SCHED_FIFO": 1,
    "SCHED_RR": 2,
    "SCHED_BATCH": 3,
    "SCHED_ISO": 4,
    "SCHED_IDLE": 5,
    "SCHED_DEADLINE": 6,
}
_POLICY_FLAGS = {
    "SCHED_FLAG_RESET_ON_FORK": 1,
    "SCHED_FLAG_RECLAIM": 2,
    "SCHED_FLAG_DL_OVERRUN": 4,
    "SCHED_FLAG_KEEP_POLICY": 8,
    "SCHED_FLAG_KEEP_PARAMS": 16,
    "SCHED_FLAG_UTIL_CLAMP_MIN": 32,
    "SCHED_FLAG_UTIL_CLAMP_MAX": 64,
}


def join_keyring(container_id: str) -> None:
    """A session keyring of its own, so that the container can't see the caller's (keyrings(7))."""
    try:
        key = sc.keyctl(sc.KEYCTL_JOIN_SESSION_KEYRING, f"_ses.{container_id}")
        permissions = int(sc.keyctl_describe(key).split(";")[3], 16)
        sc.keyctl(sc.KEYCTL_SETPERM, key, permissions | _KEY_SEARCH_FOR_POSSESSOR)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EPERM, errno.EACCES, errno.EDQUOT):
            raise


def loopback_up() -> None:
    """A new network namespace has `lo`, down."""
    fd = sc.libc.socket(_AF_INET, _SOCK_DGRAM_CLOEXEC, 0)
    if fd < 0:
        return  # a kernel without IPv4
    try:
        request = ctypes.create_string_buffer(b"lo", 40)  # struct ifreq: a name of 16 bytes, then the flags
        sc.ioctl(fd, _SIOCGIFFLAGS, request)
        flags = int.from_bytes(request.raw[16:18], "little") | _IFF_UP
        request[16], request[17] = flags.to_bytes(2, "little")[:1], flags.to_bytes(2, "little")[1:]
        sc.ioctl(fd, _SIOCSIFFLAGS, request)
    finally:
        os.close(fd)


def set_names(spec: dict[str, Any]) -> None:
    if spec.get("hostname"):
        sc.sethostname(spec["hostname"])
    if spec.get("domainname"):
        sc.setdomainname(spec["domainname"])


def write_sysctls(values: dict[str, str]) -> None:
    """Through the host's /proc, which shows each process its own namespaces' values and can't be faked by an image."""
    for key, value in values.items():
        # a key with slashes may have dots in its parts (net/ipv4/conf/eth0.100/…)
        slash, dot = key.find("/"), key.find(".")
        path = key if slash >= 0 and (dot < 0 or slash < dot) else key.replace(".", "/")
        try:
            fd = os.open(f"/proc/sys/{path}", os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.write(fd, value.encode())
            finally:
                os.close(fd)
        except OSError as error:
            text = (error.strerror or "").lower()
            raise ContainerError(f"write sysctl key {key}: open /proc/sys/{path}: {text}") from None


def write_time_offsets(linux: dict[str, Any], new: list[str]) -> None:
    """Offsets of a new time namespace, before anybody is in it (time_namespaces(7))."""
    offsets = linux.get("timeOffsets") or {}
    if "time" not in new or not offsets:
        return
    lines = [f"{clock} {item.get('secs') or 0} {item.get('nanosecs') or 0}\n" for clock, item in offsets.items()]
    with open("/proc/self/timens_offsets", "w", encoding="utf-8") as file:
        file.write("".join(lines))


def set_personality(linux: dict[str, Any]) -> None:
    wanted = linux.get("personality") or {}
    domain = wanted.get("domain")
    if not domain:
        return
    if domain not in ("LINUX", "LINUX32"):
        raise ContainerError(f"linux.personality.domain: unknown domain {domain!r}")
    sc.personality(_PER_LINUX if domain == "LINUX" else _PER_LINUX32)


def set_scheduling(process: dict[str, Any]) -> None:
    """`process.scheduler` and `process.ioPriority`."""
    priority = process.get("ioPriority")
    if priority:
        class_ = _IO_CLASSES.get(priority.get("class", ""))
        if class_ is None:
            raise ContainerError(f"process.ioPriority.class: unknown class {priority.get('class')!r}")
        sc.ioprio_set(1, 0, class_ << 13 | (priority.get("priority") or 0))
    wanted = process.get("scheduler")
    if wanted:
        policy = _POLICIES.get(wanted.get("policy", ""))
        if policy is None:
            raise ContainerError(f"process.scheduler.policy: unknown policy {wanted.get('policy')!r}")
        flags = sum(_POLICY_FLAGS.get(name, 0) for name in wanted.get("flags") or ())
        import struct

        attr = struct.pack(
            "=IIQiIQQQ", 48, policy, flags, wanted.get("nice") or 0, wanted.get("priority") or 0,
            wanted.get("runtime") or 0, wanted.get("deadline") or 0, wanted.get("period") or 0,
        )  # fmt: skip
        sc.sched_setattr(0, attr)


# -- security modules -------------------------------------------------------------------------------------------------


def _apparmor_enabled() -> bool:
    try:
        with open("/sys/module/apparmor/parameters/enabled", encoding="utf-8") as file:
            return file.read(1) == "Y"
    except OSError:
        return False


def _selinux_enabled() -> bool:
    return os.path.exists("/sys/fs/selinux/enforce")


def check_labels(process: dict[str, Any], linux: dict[str, Any]) -> None:
    """The specified errors where the host has no such module."""
    if process.get("apparmorProfile") and not _apparmor_enabled():
        raise ContainerError("apparmor: config provided but apparmor not supported")
    if (process.get("selinuxLabel") or linux.get("mountLabel")) and not _selinux_enabled():
        raise ContainerError("selinux label is specified in config, but selinux is disabled or not supported")


def open_label(process: dict[str, Any]) -> int:
    """Where the label for the next exec is written, opened on the host's /proc: the container's could be a fake."""
    if process.get("apparmorProfile"):
        for path in ("/proc/self/attr/apparmor/exec", "/proc/self/attr/exec"):
            if os.path.exists(path):
                return os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    if process.get("selinuxLabel"):
        return os.open("/proc/self/attr/exec", os.O_WRONLY | os.O_CLOEXEC)
    return -1


def write_label(fd: int, process: dict[str, Any]) -> None:
    if fd < 0:
        return
    try:
        profile = process.get("apparmorProfile")
        os.write(fd, (f"exec {profile}" if profile else process["selinuxLabel"]).encode())
    except OSError as error:
        raise ContainerError(f"can't set the label for exec: {error.strerror}") from None
    finally:
        os.close(fd)


def load_seccomp(plan: Plan) -> None:
    from wherry.runtime import seccomp

    if plan.seccomp is None:
        return
    listener = seccomp.uses_notify(plan.linux.get("seccomp") or {})
    seccomp.load_filter(plan.seccomp, plan.seccomp_flags, listener=listener)
