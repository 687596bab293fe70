"""System calls that matter for a container's start: their numbers, and what they are about in words.

The numbers are the kernel's, for x86-64 and AArch64 (arch/x86/entry/syscalls, include/uapi/asm-generic/unistd.h).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from typing import Protocol

# name: (x86-64, AArch64, kind); -1 where a machine has no such call
_TABLE: dict[str, tuple[int, int, str]] = {
    "read": (0, 63, "other"), "write": (1, 64, "write"), "close": (3, 57, "other"), "mmap": (9, 222, "other"),
    "munmap": (11, 215, "other"), "mprotect": (10, 226, "other"), "brk": (12, 214, "other"),
    "rt_sigaction": (13, 134, "other"), "rt_sigprocmask": (14, 135, "other"), "ioctl": (16, 29, "other"),
    "socket": (41, 198, "other"), "connect": (42, 203, "other"), "sendmsg": (46, 211, "other"),
    "recvmsg": (47, 212, "other"), "socketpair": (53, 199, "other"), "clone": (56, 220, "process"),
    "fork": (57, -1, "process"), "vfork": (58, -1, "process"), "execve": (59, 221, "process"),
    "wait4": (61, 260, "other"), "kill": (62, 129, "process"), "fcntl": (72, 25, "other"), "chdir": (80, 49, "file"),
    "fchdir": (81, 50, "other"), "rename": (82, -1, "file"), "mkdir": (83, -1, "mkdir"), "rmdir": (84, -1, "mkdir"),
    "unlink": (87, -1, "file"), "symlink": (88, -1, "file"), "chmod": (90, -1, "file"), "umask": (95, 166, "other"),
    "setuid": (105, 146, "rights"), "setgid": (106, 144, "rights"), "setsid": (112, 157, "process"),
    "setgroups": (116, 159, "rights"), "setresuid": (117, 147, "rights"), "setresgid": (119, 149, "rights"),
    "capset": (126, 91, "rights"), "mknod": (133, -1, "file"), "pivot_root": (155, 41, "mount"),
    "prctl": (157, 167, "prctl"), "chroot": (161, 51, "mount"), "mount": (165, 40, "mount"),
    "umount2": (166, 39, "mount"), "sethostname": (170, 161, "namespace"), "setdomainname": (171, 162, "namespace"),
    "keyctl": (250, 219, "rights"), "openat": (257, 56, "other"), "mkdirat": (258, 34, "mkdir"),
    "mknodat": (259, 33, "file"), "unlinkat": (263, 35, "file"), "symlinkat": (266, 36, "file"),
    "unshare": (272, 97, "namespace"), "splice": (275, 76, "other"), "prlimit64": (302, 261, "prlimit"),
    "setns": (308, 268, "namespace"), "seccomp": (317, 277, "rights"), "execveat": (322, 281, "process"),
    "pidfd_open": (434, 434, "other"), "clone3": (435, 435, "process"), "close_range": (436, 436, "other"),
    "openat2": (437, 437, "other"), "open_tree": (428, 428, "mount"), "move_mount": (429, 429, "mount"),
    "fsopen": (430, 430, "mount"), "fsconfig": (431, 431, "mount"), "fsmount": (432, 432, "mount"),
    "mount_setattr": (442, 442, "mount"), "exit_group": (231, 94, "other"),
}  # fmt: skip
_SECOND = os.uname().machine == "aarch64"
NUMBERS = {(row[1] if _SECOND else row[0]): (name, row[2]) for name, row in _TABLE.items()}
# where the arguments of a call are texts
_TEXTS: dict[str, tuple[int, ...]] = {
    "execve": (0,), "execveat": (1,), "chdir": (0,), "rename": (0, 1), "mkdir": (0,), "rmdir": (0,), "unlink": (0,),
    "symlink": (0, 1), "symlinkat": (0, 2), "chmod": (0,), "mknod": (0,), "pivot_root": (0, 1), "chroot": (0,),
    "mount": (0, 1, 2), "umount2": (0,), "sethostname": (0,), "setdomainname": (0,), "openat": (1,), "mkdirat": (1,),
    "mknodat": (1,), "unlinkat": (1,), "open_tree": (1,), "move_mount": (1, 3), "fsopen": (0,), "fsconfig": (2, 3),
    "openat2": (1,), "mount_setattr": (1,),
}  # fmt: skip
# those whose first argument is a folder or a file that is open
_DESCRIPTORS = frozenset({"setns", "fsconfig", "fsmount", "fchdir", "mkdirat", "mknodat", "unlinkat", "open_tree"})
_CLONE = {
    0x00020000: "NEWNS", 0x02000000: "NEWCGROUP", 0x04000000: "NEWUTS", 0x08000000: "NEWIPC", 0x10000000: "NEWUSER",
    0x20000000: "NEWPID", 0x40000000: "NEWNET", 0x00000100: "VM", 0x00004000: "VFORK", 0x00010000: "THREAD",
}  # fmt: skip
_MOUNT = {
    1: "RDONLY", 2: "NOSUID", 4: "NODEV", 8: "NOEXEC", 32: "REMOUNT", 4096: "BIND", 8192: "MOVE", 16384: "REC",
    1 << 17: "UNBINDABLE", 1 << 18: "PRIVATE", 1 << 19: "SLAVE", 1 << 20: "SHARED", 1 << 21: "RELATIME",
    1 << 24: "STRICTATIME",
}  # fmt: skip
# prctl(2)'s options that say something of a container
_PRCTL = {
    1: "SET_PDEATHSIG", 4: "SET_DUMPABLE", 8: "SET_KEEPCAPS", 15: "SET_NAME", 22: "SET_SECCOMP", 24: "CAPBSET_DROP",
    36: "SET_CHILD_SUBREAPER", 38: "SET_NO_NEW_PRIVS", 47: "CAP_AMBIENT",
}  # fmt: skip
_RLIMITS = [
    "CPU", "FSIZE", "DATA", "STACK", "CORE", "RSS", "NPROC", "NOFILE", "MEMLOCK", "AS", "LOCKS", "SIGPENDING",
    "MSGQUEUE", "NICE", "RTPRIO", "RTTIME",
]  # fmt: skip
_AT_FDCWD = 0xFFFFFFFFFFFFFF9C
# files of /proc that change what a process may
_TELLING = re.compile(r"/proc/[^/]+/(?:oom_score_adj|uid_map|gid_map|setgroups|loginuid|attr/|timens)|/proc/sys/")


class Memory(Protocol):
    """What reads the memory of the process that calls."""

    def read(self, address: int, length: int) -> bytes:
        """Bytes at an address."""

    def text(self, address: int) -> str:
        """The C string at an address."""


def describe(pid: int, number: int, args: Sequence[int], memory: Memory) -> tuple[str, str]:
    """The kind of a call, and the call in words. `other` is what says little of a container."""
    name, kind = NUMBERS.get(number, (f"syscall {number}", "other"))
    special = _SPECIAL.get(name)
    if special is not None:
        return special(pid, name, kind, args, memory)
    return kind, f"{name}({', '.join(_arguments(pid, name, args, memory))})"


def _arguments(pid: int, name: str, args: Sequence[int], memory: Memory) -> list[str]:
    shown = []
    first = 0
    if name in _DESCRIPTORS:
        first = 1
        if not (name.endswith("at") or name == "open_tree") or args[0] not in {_AT_FDCWD, _AT_FDCWD & 0xFFFFFFFF}:
            shown.append(_file(pid, args[0]))
    texts = [at for at in _TEXTS.get(name, ()) if at >= first or name not in _DESCRIPTORS]
    shown += [f'"{memory.text(args[at])}"' for at in texts if args[at]]
    return shown


def _file(pid: int, descriptor: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/fd/{descriptor & 0xFFFFFFFF}")
    except OSError:
        return str(descriptor & 0xFFFFFFFF)


def _flags(value: int, names: dict[int, str]) -> str:
    return "|".join(name for bit, name in names.items() if value & bit)


Special = Callable[[int, str, str, Sequence[int], Memory], "tuple[str, str]"]


def _mount(pid: int, name: str, kind: str, args: Sequence[int], memory: Memory) -> tuple[str, str]:
    source, target, filesystem = (memory.text(args[at]) for at in range(3))
    place = _through(pid, target)
    data = memory.text(args[4]) if args[4] else ""
    parts = [f'"{source}"', f'"{place}"', filesystem, _flags(args[3], _MOUNT), data]
    return kind, f"{name}({', '.join(part for part in parts if part)})"


def _through(pid: int, path: str) -> str:
    """A path through a descriptor as the path that it stands for."""
    match = re.fullmatch(r"/proc/(?:self|thread-self|\d+)/fd/(\d+)(/.*)?", path)
    return path if match is None else _file(pid, int(match[1])) + (match[2] or "")


def _write(pid: int, name: str, kind: str, args: Sequence[int], memory: Memory) -> tuple[str, str]:
    path = _file(pid, args[0])
    if path.startswith("/sys/fs/cgroup"):
        kind = "cgroup"
    elif _TELLING.match(path):
        kind = "rights"
    else:
        return "other", f"{name}({path}, {args[2]} bytes)"
    data = memory.read(args[1], min(args[2], 200)).decode(errors="replace").strip()
    return kind, f'{path} <- "{data}"'


def _mkdir(pid: int, name: str, kind: str, args: Sequence[int], memory: Memory) -> tuple[str, str]:
    shown = ", ".join(_arguments(pid, name, args, memory))
    return "cgroup" if "/sys/fs/cgroup" in shown else "file", f"{name}({shown})"


def _clone(pid: int, name: str, kind: str, args: Sequence[int], memory: Memory) -> tuple[str, str]:
    flags = args[0]
    if name == "clone3":
        flags = int.from_bytes(memory.read(args[0], 8), "little")
    return kind, f"{name}({_flags(flags, _CLONE)})"


def _unshare(pid: int, name: str, kind: str, args: Sequence[int], memory: Memory) -> tuple[str, str]:
    return kind, f"{name}({_flags(args[0], _CLONE)})"


def _execve(pid: int, name: str, kind: str, args: Sequence[int], memory: Memory) -> tuple[str, str]:
    at = 2 if name == "execveat" else 1
    words = []
    for index in range(12):
        address = int.from_bytes(memory.read(args[at] + index * 8, 8), "little")
        if not address:
            break
        words.append(memory.text(address))
    path = memory.text(args[at - 1]) or _file(pid, args[0])
    return kind, f'{name}("{path}", [{" ".join(words)}])'


def _prctl(pid: int, name: str, kind: str, args: Sequence[int], memory: Memory) -> tuple[str, str]:
    option = _PRCTL.get(args[0])
    if option is None:
        return "other", f"{name}({args[0]})"
    value = f'"{memory.text(args[1])}"' if args[0] == 15 else str(args[1])
    return "rights", f"{name}({option}, {value})"


def _prlimit(pid: int, name: str, kind: str, args: Sequence[int], memory: Memory) -> tuple[str, str]:
    if not args[2]:
        return "other", f"{name}()"
    data = memory.read(args[2], 16)
    soft, hard = int.from_bytes(data[:8], "little"), int.from_bytes(data[8:], "little")
    limit = _RLIMITS[args[1]] if args[1] < len(_RLIMITS) else str(args[1])
    return "rights", f"{name}({limit}, {soft}, {hard})"


def _numbers(pid: int, name: str, kind: str, args: Sequence[int], memory: Memory) -> tuple[str, str]:
    count = {"setresuid": 3, "setresgid": 3, "kill": 2, "setsid": 0, "capset": 0, "keyctl": 2}.get(name, 1)
    shown = (value - (1 << 64) if value >> 63 else value for value in args[:count])
    return kind, f"{name}({', '.join(map(str, shown))})"


_ATTRIBUTES = {1: "RDONLY", 2: "NOSUID", 4: "NODEV", 8: "NOEXEC", 0x20: "STRICTATIME", 0x00200000: "NOSYMFOLLOW"}


def _move_mount(pid: int, name: str, kind: str, args: Sequence[int], memory: Memory) -> tuple[str, str]:
    source, target = (_place(pid, args[at], memory.text(args[at + 1])) for at in (0, 2))
    return kind, f"{name}({source}, {target})"


def _mount_setattr(pid: int, name: str, kind: str, args: Sequence[int], memory: Memory) -> tuple[str, str]:
    data = memory.read(args[3], 24)
    flags = _flags(int.from_bytes(data[:8], "little"), _ATTRIBUTES)
    propagation = _flags(int.from_bytes(data[16:24], "little"), _MOUNT)
    shown = [_place(pid, args[0], memory.text(args[1])), flags, propagation]
    return kind, f"{name}({', '.join(part for part in shown if part)})"


def _place(pid: int, descriptor: int, path: str) -> str:
    """A path that begins at a descriptor."""
    if path.startswith("/") or descriptor & 0xFFFFFFFF == _AT_FDCWD & 0xFFFFFFFF:
        return _through(pid, path)
    return f"{_file(pid, descriptor)}{'/' if path else ''}{path}"


_SPECIAL: dict[str, Special] = {
    "mount": _mount,
    "move_mount": _move_mount,
    "mount_setattr": _mount_setattr,
    "write": _write,
    **dict.fromkeys(("mkdir", "mkdirat", "rmdir"), _mkdir),
    **dict.fromkeys(("clone", "clone3"), _clone),
    "unshare": _unshare,
    **dict.fromkeys(("execve", "execveat"), _execve),
    "prctl": _prctl,
    "prlimit64": _prlimit,
    **dict.fromkeys(
        ("setuid", "setgid", "setgroups", "setresuid", "setresgid", "kill", "setsid", "capset", "keyctl", "seccomp"),
        _numbers,
    ),
}
