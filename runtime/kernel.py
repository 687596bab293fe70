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

    from wherry.runtime.channel import Channel
    from wherry.runtime.plan import Plan

_PER_LINUX, _PER_LINUX32 = 0x0000, 0x0008
_IFF_UP = 1
_SIOCGIFFLAGS, _SIOCSIFFLAGS = 0x8913, 0x8914
_AF_INET, _SOCK_DGRAM_CLOEXEC = 2, 2 | os.O_CLOEXEC
_KEY_SEARCH_FOR_POSSESSOR = 0x080000


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
    domain = (linux.get("personality") or {}).get("domain")
    if domain:
        sc.personality(_PER_LINUX if domain == "LINUX" else _PER_LINUX32)


def set_rare(plan: Plan) -> None:
    """Scheduler, I/O priority, memory policy, the CPUs of exec: whatever of it is configured."""
    process, linux = plan.process, plan.linux
    if process.get("scheduler") or process.get("ioPriority") or process.get("execCPUAffinity"):
        from wherry.runtime import settings

        settings.set_scheduling(process)
        if plan.is_exec:
            settings.set_affinity(process, "final")
    if linux.get("memoryPolicy"):
        from wherry.runtime import settings

        settings.set_memory_policy(linux)


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


def label_path(process: dict[str, Any]) -> str:
    """The file that the label for the next exec is written to, on the host's /proc; "" without a label or a file."""
    if process.get("apparmorProfile"):
        for path in ("/proc/self/attr/apparmor/exec", "/proc/self/attr/exec"):
            if os.path.exists(path):
                return path
    return "/proc/self/attr/exec" if process.get("selinuxLabel") else ""


def label_text(process: dict[str, Any]) -> bytes:
    """What is written there."""
    profile = process.get("apparmorProfile")
    return (f"exec {profile}" if profile else str(process["selinuxLabel"])).encode()


def open_label(process: dict[str, Any]) -> int:
    """Where the label for the next exec is written, opened on the host's /proc: the container's could be a fake."""
    path = label_path(process)
    return os.open(path, os.O_WRONLY | os.O_CLOEXEC) if path else -1


def write_label(fd: int, process: dict[str, Any]) -> None:
    if fd < 0:
        return
    profile = process.get("apparmorProfile")
    try:
        os.write(fd, label_text(process))
    except OSError as error:
        what = f"apply apparmor profile {profile}" if profile else f"set selinux label {process['selinuxLabel']}"
        raise ContainerError(f"unable to {what}: {(error.strerror or '').lower()}") from None
    finally:
        os.close(fd)


def load_seccomp(plan: Plan, channel: Channel) -> None:
    """Load the filter; the listener of SCMP_ACT_NOTIFY goes to the runtime, which gives it to the agent."""
    from wherry.runtime import seccomp

    if plan.seccomp is None:
        return
    listener = seccomp.uses_notify(plan.linux.get("seccomp") or {})
    fd = seccomp.load_filter(plan.seccomp, plan.seccomp_flags, listener=listener)
    if fd >= 0:
        channel.send("seccomp", fd)
        channel.expect("go")
        os.close(fd)
