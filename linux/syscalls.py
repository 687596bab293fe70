"""The kernel's calls that Python's `os` lacks, each under the kernel's own name.

Every wrapper raises `OSError` with the errno and, where there is one, the path or argument in `filename`. Signatures
are bound once, when the module is loaded. Nothing here searches for libraries or imports more than `ctypes` and `os`:
the runtime's command line pays for each import (`python -X importtime`). For the same reason flags are plain numbers:
`enum` alone would cost what a fork costs.
"""

from __future__ import annotations

import ctypes
import errno
import os

# mount(2), from <linux/mount.h>
MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_SYNCHRONOUS = 16
MS_REMOUNT = 32
MS_MANDLOCK = 64
MS_DIRSYNC = 128
MS_NOSYMFOLLOW = 256
MS_NOATIME = 1024
MS_NODIRATIME = 2048
MS_BIND = 4096
MS_MOVE = 8192
MS_REC = 16384
MS_SILENT = 32768
MS_UNBINDABLE = 1 << 17
MS_PRIVATE = 1 << 18
MS_SLAVE = 1 << 19
MS_SHARED = 1 << 20
MS_RELATIME = 1 << 21
MS_I_VERSION = 1 << 23
MS_STRICTATIME = 1 << 24
MS_LAZYTIME = 1 << 25

MNT_FORCE = 1
MNT_DETACH = 2
MNT_EXPIRE = 4
UMOUNT_NOFOLLOW = 8

OPEN_TREE_CLONE = 1
OPEN_TREE_CLOEXEC = os.O_CLOEXEC
MOVE_MOUNT_F_EMPTY_PATH = 0x4
MOVE_MOUNT_T_EMPTY_PATH = 0x40
FSOPEN_CLOEXEC = 1
FSMOUNT_CLOEXEC = 1
FSCONFIG_SET_FLAG = 0
FSCONFIG_SET_STRING = 1
FSCONFIG_SET_FD = 5
FSCONFIG_CMD_CREATE = 6
MOUNT_ATTR_RDONLY = 0x1
MOUNT_ATTR_NOSUID = 0x2
MOUNT_ATTR_NODEV = 0x4
MOUNT_ATTR_NOEXEC = 0x8
MOUNT_ATTR_ATIME = 0x70
MOUNT_ATTR_RELATIME = 0x0
MOUNT_ATTR_NOATIME = 0x10
MOUNT_ATTR_STRICTATIME = 0x20
MOUNT_ATTR_NODIRATIME = 0x80
MOUNT_ATTR_IDMAP = 0x100000
MOUNT_ATTR_NOSYMFOLLOW = 0x200000

AT_FDCWD = -100
AT_EMPTY_PATH = 0x1000
AT_RECURSIVE = 0x8000
AT_SYMLINK_NOFOLLOW = 0x100

# openat2(2)
RESOLVE_NO_XDEV = 0x01
RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_NO_SYMLINKS = 0x04
RESOLVE_BENEATH = 0x08
RESOLVE_IN_ROOT = 0x10

# clone(2), unshare(2), setns(2)
CLONE_NEWTIME = 0x00000080
CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

# prctl(2)
PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_KEEPCAPS = 8
PR_SET_NAME = 15
PR_CAPBSET_READ = 23
PR_CAPBSET_DROP = 24
PR_SET_MM = 35
PR_SET_MM_MAP = 14
PR_SET_CHILD_SUBREAPER = 36
PR_GET_CHILD_SUBREAPER = 37
PR_SET_NO_NEW_PRIVS = 38
PR_GET_NO_NEW_PRIVS = 39
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_RAISE = 2
PR_CAP_AMBIENT_CLEAR_ALL = 4

CLOSE_RANGE_CLOEXEC = 4

# keyctl(2)
KEYCTL_JOIN_SESSION_KEYRING = 1
KEYCTL_SETPERM = 5
KEYCTL_DESCRIBE = 6

_X86 = os.uname().machine == "x86_64"  # the other machines with Linux that matter share asm-generic's numbers
_NR_PIVOT_ROOT = 155 if _X86 else 41
_NR_KEYCTL = 250 if _X86 else 219
_NR_CAPGET = 125 if _X86 else 90
_NR_CAPSET = 126 if _X86 else 91
_NR_EXECVEAT = 322 if _X86 else 281
_NR_IOPRIO_SET = 251 if _X86 else 30
_NR_SCHED_SETATTR = 314 if _X86 else 274
_NR_SET_MEMPOLICY = 238 if _X86 else 237
# From 424 on the numbers are the same on every machine.
_NR_OPEN_TREE = 428
_NR_MOVE_MOUNT = 429
_NR_FSOPEN = 430
_NR_FSCONFIG = 431
_NR_FSMOUNT = 432
_NR_CLOSE_RANGE = 436
_NR_OPENAT2 = 437
_NR_PIDFD_GETFD = 438
_NR_MOUNT_SETATTR = 442

libc = ctypes.CDLL(None, use_errno=True)

_int = ctypes.c_int
_long = ctypes.c_long
_ulong = ctypes.c_ulong
_str = ctypes.c_char_p
_ptr = ctypes.c_void_p

_mount = libc.mount
_mount.argtypes = (_str, _str, _str, _ulong, _ptr)
_umount2 = libc.umount2
_umount2.argtypes = (_str, _int)
_unshare = libc.unshare
_unshare.argtypes = (_int,)
_setns = libc.setns
_setns.argtypes = (_int, _int)
_prctl = libc.prctl
_prctl.argtypes = (_int, _ulong, _ulong, _ulong, _ulong)
_sethostname = libc.sethostname
_sethostname.argtypes = (_str, ctypes.c_size_t)
_setdomainname = libc.setdomainname
_setdomainname.argtypes = (_str, ctypes.c_size_t)
_personality = libc.personality
_personality.argtypes = (_ulong,)
_syscall = libc.syscall
_syscall.restype = _long


def _path(path: str | bytes) -> bytes:
    raw = os.fsencode(path)
    if b"\0" in raw:  # C would cut it there and act on another path
        raise ValueError(f"embedded null byte in {path!r}")
    return raw


def _raise(name: object = None) -> None:
    number = ctypes.get_errno()
    raise OSError(number, os.strerror(number), name)


def _call(number: int, *args: object, name: object = None) -> int:
    result: int = _syscall(_long(number), *args)
    if result < 0:
        _raise(name)
    return result


def mount(source: str, target: str, fstype: str, flags: int = 0, data: str | None = None) -> None:
    """mount(2); `OSError.filename` is the target."""
    raw = None if not data else os.fsencode(data)
    if _mount(_path(source), _path(target), _path(fstype), flags, raw) != 0:
        _raise(target)


def umount2(target: str, flags: int = 0) -> None:
    if _umount2(_path(target), flags) != 0:
        _raise(target)


def pivot_root(new_root: str, put_old: str) -> None:
    _call(_NR_PIVOT_ROOT, _str(_path(new_root)), _str(_path(put_old)), name=new_root)


def unshare(flags: int) -> None:
    if _unshare(flags) != 0:
        _raise(f"unshare({flags:#x})")


def setns(fd: int, nstype: int = 0) -> None:
    if _setns(fd, nstype) != 0:
        _raise(f"setns({nstype:#x})")


def prctl(option: int, arg2: int = 0, arg3: int = 0, arg4: int = 0, arg5: int = 0) -> int:
    result: int = _prctl(option, arg2, arg3, arg4, arg5)
    if result < 0:
        _raise(f"prctl({option})")
    return result


def prctl_buffer(option: int, arg2: int, buffer: bytes) -> None:
    """prctl(2) with a buffer as its third argument and the buffer's size as the fourth (`PR_SET_MM_MAP`)."""
    kept = ctypes.create_string_buffer(buffer, len(buffer))
    prctl(option, arg2, ctypes.addressof(kept), len(buffer), 0)


def set_process_name(name: str) -> None:
    """The thread's `comm`: the kernel keeps 15 bytes."""
    kept = ctypes.create_string_buffer(os.fsencode(name)[:15])
    prctl(PR_SET_NAME, ctypes.addressof(kept))


def sethostname(name: str) -> None:
    raw = name.encode()
    if _sethostname(raw, len(raw)) != 0:
        _raise(name)


def setdomainname(name: str) -> None:
    raw = name.encode()
    if _setdomainname(raw, len(raw)) != 0:
        _raise(name)


def personality(persona: int) -> int:
    result: int = _personality(persona)
    if result < 0:
        _raise(f"personality({persona:#x})")
    return result


def open_tree(dirfd: int, path: str, flags: int) -> int:
    return _call(_NR_OPEN_TREE, _int(dirfd), _str(_path(path)), ctypes.c_uint(flags), name=path)


def move_mount(from_fd: int, from_path: str, to_fd: int, to_path: str, flags: int) -> None:
    source, target = _str(_path(from_path)), _str(_path(to_path))
    _call(_NR_MOVE_MOUNT, _int(from_fd), source, _int(to_fd), target, ctypes.c_uint(flags), name=to_path or from_path)


def fsopen(fstype: str, flags: int = FSOPEN_CLOEXEC) -> int:
    return _call(_NR_FSOPEN, _str(_path(fstype)), ctypes.c_uint(flags), name=fstype)


def fsconfig_string(fd: int, key: str, value: str) -> None:
    args = (_int(fd), ctypes.c_uint(FSCONFIG_SET_STRING), _str(_path(key)), _str(_path(value)), _int(0))
    _call(_NR_FSCONFIG, *args, name=f"{key}={value}")


def fsconfig_flag(fd: int, key: str) -> None:
    args = (_int(fd), ctypes.c_uint(FSCONFIG_SET_FLAG), _str(_path(key)), _ptr(None), _int(0))
    _call(_NR_FSCONFIG, *args, name=key)


def fsconfig_create(fd: int) -> None:
    args = (_int(fd), ctypes.c_uint(FSCONFIG_CMD_CREATE), _ptr(None), _ptr(None), _int(0))
    _call(_NR_FSCONFIG, *args, name="FSCONFIG_CMD_CREATE")


def fsmount(fd: int, attributes: int = 0, flags: int = FSMOUNT_CLOEXEC) -> int:
    return _call(_NR_FSMOUNT, _int(fd), ctypes.c_uint(flags), ctypes.c_uint(attributes), name="fsmount")


class _MountAttr(ctypes.Structure):
    _fields_ = (
        ("attr_set", ctypes.c_uint64),
        ("attr_clr", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("userns_fd", ctypes.c_uint64),
    )


def mount_setattr(
    dirfd: int, path: str, flags: int, *, set_: int = 0, clear: int = 0, propagation: int = 0, userns_fd: int = 0
) -> None:
    """mount_setattr(2), Linux 5.12; `flags` are `AT_RECURSIVE` and `AT_EMPTY_PATH`."""
    attr = _MountAttr(set_, clear, propagation, userns_fd)
    size = ctypes.c_size_t(ctypes.sizeof(attr))
    args = (_int(dirfd), _str(_path(path)), ctypes.c_uint(flags), ctypes.byref(attr), size)
    _call(_NR_MOUNT_SETATTR, *args, name=path)


class _OpenHow(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


def openat2(dirfd: int, path: str, flags: int, *, mode: int = 0, resolve: int = 0) -> int:
    """openat2(2), Linux 5.6. `O_CLOEXEC` is always added. EAGAIN (a rename raced with a `..`) is tried again."""
    how = _OpenHow(flags | os.O_CLOEXEC, mode, resolve)
    args = (_int(dirfd), _str(_path(path)), ctypes.byref(how), ctypes.c_size_t(ctypes.sizeof(how)))
    for _ in range(127):
        try:
            return _call(_NR_OPENAT2, *args, name=path)
        except BlockingIOError:
            continue
    return _call(_NR_OPENAT2, *args, name=path)


def close_range(first: int, last: int = 0xFFFFFFFF, flags: int = 0) -> None:
    """close_range(2), Linux 5.9 (`CLOSE_RANGE_CLOEXEC`: 5.11)."""
    _call(_NR_CLOSE_RANGE, ctypes.c_uint(first), ctypes.c_uint(last), ctypes.c_uint(flags), name="close_range")


def execveat(fd: int, path: str, argv: list[str], env: list[str], flags: int = AT_EMPTY_PATH) -> None:
    """execveat(2); `env` are `NAME=value` strings. Returns only by raising."""
    c_argv = (_str * (len(argv) + 1))(*map(os.fsencode, argv), None)
    c_env = (_str * (len(env) + 1))(*map(os.fsencode, env), None)
    _call(_NR_EXECVEAT, _int(fd), _str(_path(path)), c_argv, c_env, _int(flags), name=path or argv[0])


def execve(path: str, argv: list[str], env: list[str]) -> None:
    """execve(2) with the environment exactly as given (`os.execve` takes a dict, which loses order and repeats)."""
    c_argv = (_str * (len(argv) + 1))(*map(os.fsencode, argv), None)
    c_env = (_str * (len(env) + 1))(*map(os.fsencode, env), None)
    libc.execve(_str(_path(path)), c_argv, c_env)
    _raise(path)


def keyctl(operation: int, arg2: object = 0, arg3: int = 0, arg4: int = 0) -> int:
    """keyctl(2); `arg2` is a number, or a string for `KEYCTL_JOIN_SESSION_KEYRING`."""
    second = _str(arg2.encode()) if isinstance(arg2, str) else _long(int(str(arg2)))
    return _call(_NR_KEYCTL, _int(operation), second, _long(arg3), _long(arg4), name=f"keyctl({operation})")


def keyctl_describe(key: int) -> str:
    """A key's `type;uid;gid;permissions;description`, the permissions in hexadecimal."""
    buffer = ctypes.create_string_buffer(512)
    _call(_NR_KEYCTL, _int(KEYCTL_DESCRIBE), _long(key), buffer, _long(512), name="keyctl(KEYCTL_DESCRIBE)")
    return buffer.value.decode("utf-8", "replace")


class _CapHeader(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _CapData(ctypes.Structure):
    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


_CAPABILITY_VERSION_3 = 0x20080522


def capget() -> tuple[int, int, int]:
    """The calling thread's (effective, permitted, inheritable) sets, bit N for capability N."""
    header = _CapHeader(_CAPABILITY_VERSION_3, 0)
    data = (_CapData * 2)()
    _call(_NR_CAPGET, ctypes.byref(header), data, name="capget")
    low, high = data[0], data[1]
    return (
        low.effective | high.effective << 32,
        low.permitted | high.permitted << 32,
        low.inheritable | high.inheritable << 32,
    )


def capset(effective: int, permitted: int, inheritable: int) -> None:
    header = _CapHeader(_CAPABILITY_VERSION_3, 0)
    word = 0xFFFFFFFF
    data = (_CapData * 2)(
        _CapData(effective & word, permitted & word, inheritable & word),
        _CapData(effective >> 32, permitted >> 32, inheritable >> 32),
    )
    _call(_NR_CAPSET, ctypes.byref(header), data, name="capset")


def ioprio_set(which: int, who: int, ioprio: int) -> None:
    _call(_NR_IOPRIO_SET, _int(which), _int(who), _int(ioprio), name="ioprio_set")


def sched_setattr(pid: int, attr: bytes) -> None:
    """sched_setattr(2) with a packed `struct sched_attr`."""
    kept = ctypes.create_string_buffer(attr, len(attr))
    _call(_NR_SCHED_SETATTR, _int(pid), kept, ctypes.c_uint(0), name="sched_setattr")


def set_mempolicy(mode: int, nodes: int) -> None:
    mask = _ulong(nodes)
    _call(_NR_SET_MEMPOLICY, _int(mode), ctypes.byref(mask), _ulong(64), name="set_mempolicy")


class _Rlimit(ctypes.Structure):
    _fields_ = (("soft", ctypes.c_uint64), ("hard", ctypes.c_uint64))


def prlimit(pid: int, resource: int, soft: int, hard: int) -> None:
    """prlimit(2), setting both limits; 2**64 - 1 is RLIM_INFINITY."""
    limit = _Rlimit(soft, hard)
    if libc.prlimit64(_int(pid), _int(resource), ctypes.byref(limit), _ptr(None)) != 0:
        _raise(f"rlimit {resource}")


def get_rlimit(pid: int, resource: int) -> tuple[int, int]:
    """The soft and the hard limit, by prlimit(2)."""
    limit = _Rlimit(0, 0)
    if libc.prlimit64(_int(pid), _int(resource), _ptr(None), ctypes.byref(limit)) != 0:
        _raise(f"rlimit {resource}")
    return limit.soft, limit.hard


def ioctl(fd: int, request: int, argument: object = 0) -> int:
    """ioctl(2); the argument is a number or a ctypes buffer."""
    last = _long(argument) if isinstance(argument, int) else ctypes.byref(argument)  # type: ignore[arg-type]
    result: int = libc.ioctl(_int(fd), _ulong(request), last)
    if result < 0:
        _raise(f"ioctl({request:#x})")
    return result


class CloneArgs(ctypes.Structure):
    """struct clone_args of clone3(2)."""

    _fields_ = tuple(
        (name, ctypes.c_uint64)
        for name in (
            "flags",
            "pidfd",
            "child_tid",
            "parent_tid",
            "exit_signal",
            "stack",
            "stack_size",
            "tls",
            "set_tid",
            "set_tid_size",
            "cgroup",
        )
    )


_NR_CLONE3 = 435
CLONE_INTO_CGROUP = 0x200000000
_SIGCHLD = 17

# The interpreter's lock stays held over the call: the child must come back holding it.
_holding = ctypes.PyDLL(None, use_errno=True)
_holding.syscall.restype = _long


def fork(flags: int = 0, cgroup: int = -1) -> int:
    """fork(2) with clone3's (Linux 5.7): namespaces (`CLONE_NEW…`) for the child, and a v2 cgroup to be born in.

    For processes with one thread only. Does what `os.fork` does around the call, so that Python works in the child.
    """
    if not flags and cgroup < 0:
        return os.fork()
    args = CloneArgs(flags=flags, exit_signal=_SIGCHLD)
    if cgroup >= 0:
        args.flags |= CLONE_INTO_CGROUP
        args.cgroup = cgroup
    api = ctypes.pythonapi
    api.PyOS_BeforeFork()
    pid: int = _holding.syscall(_long(_NR_CLONE3), ctypes.byref(args), ctypes.c_size_t(ctypes.sizeof(args)))
    if pid == 0:
        api.PyOS_AfterFork_Child()
        return 0
    number = ctypes.get_errno()
    api.PyOS_AfterFork_Parent()
    if pid < 0:
        raise OSError(number, os.strerror(number), f"clone3({flags:#x})")
    return pid


_NR_PIDFD_SEND_SIGNAL = 424
_LAST_SIGNAL = 64
_SIG_SETMASK = 2
_LOCK_EX, _LOCK_NB = 2, 4


def pidfd_send_signal(fd: int, number: int) -> None:
    """pidfd_send_signal(2); `signal.pidfd_send_signal` without the import of `signal`."""
    _call(_NR_PIDFD_SEND_SIGNAL, _int(fd), _int(number), _ptr(None), ctypes.c_uint(0), name=f"signal {number}")


def pidfd_getfd(pidfd: int, number: int) -> int:
    """pidfd_getfd(2), Linux 5.6: a copy of another process's descriptor, close-on-exec."""
    return _call(_NR_PIDFD_GETFD, _int(pidfd), _int(number), ctypes.c_uint(0), name=f"descriptor {number}")


def reset_signals() -> None:
    """Default handlers for all signals, and none blocked: what a program expects at its start. (Python ignores SIGPIPE,
    and its caller may have ignored more.) The kernel's dispositions change, not what `signal.getsignal` remembers.
    """
    for number in range(1, _LAST_SIGNAL + 1):
        libc.signal(_int(number), _ptr(None))  # SIGKILL, SIGSTOP and libc's own two refuse
    empty = ctypes.create_string_buffer(128)  # sigset_t
    libc.sigprocmask(_int(_SIG_SETMASK), empty, _ptr(None))


def flock(fd: int) -> bool:
    """flock(2), exclusive, without waiting: whether the lock was free."""
    if libc.flock(_int(fd), _int(_LOCK_EX | _LOCK_NB)) == 0:
        return True
    if ctypes.get_errno() != errno.EWOULDBLOCK:
        _raise("flock")
    return False
