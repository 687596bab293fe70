"""`linux.seccomp` of the OCI runtime specification: compiled once, kept by the profile's digest, loaded into a process.

    program = compile_filter(profile)       # bytes, struct sock_filter[]; from the cache where it was compiled before
    flags = filter_flags(profile)           # SECCOMP_FILTER_FLAG_* of seccomp(2)
    load_filter(program, flags)             # in the container's process

Without `noNewPrivileges` the kernel wants CAP_SYS_ADMIN from whoever loads a filter: then it is loaded before the
capabilities are dropped (and the profile must allow what comes after: capset, setuid, execve), else as the last thing
before exec. The order is the caller's.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import struct
from _blake2 import blake2b  # hashlib would map OpenSSL into every shim

from wherry.core import places

TYPE_CHECKING = False  # without typing's import; type checkers know the name
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

#: Part of every cached program's name: raise it with each change of what `seccomp_compile` makes.
_FORMAT = b"1"
#: struct sock_fprog counts instructions in 16 bits, the kernel takes BPF_MAXINSNS.
_MAX_INSTRUCTIONS = 4096

_SET_MODE_FILTER = 1
_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 22, 2
_FLAG_NEW_LISTENER = 1 << 3
FLAGS = {
    "SECCOMP_FILTER_FLAG_TSYNC": 1 << 0,
    "SECCOMP_FILTER_FLAG_LOG": 1 << 1,
    "SECCOMP_FILTER_FLAG_SPEC_ALLOW": 1 << 2,
    "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV": 1 << 5,
}
_SYS_SECCOMP = {"x86_64": 317, "aarch64": 277, "riscv64": 277, "armv7l": 383, "ppc64le": 358, "s390x": 348}

_libc = ctypes.CDLL(None, use_errno=True)
_memory: dict[str, bytes] = {}


def compile_filter(profile: Mapping[str, Any], cache: str | None = None) -> bytes:
    """The program for a profile (`linux.seccomp`): struct sock_filter[], 8 bytes each.

    `cache`: a directory for programs, by default `default_cache()`; "" means none on disk. Raises ValueError for a
    profile that is wrong, and OSError where libseccomp is missing or refuses.
    """
    digest = _digest(profile)
    program = _memory.get(digest)
    if program is None:
        path = _cache_path(default_cache() if cache is None else cache, digest)
        program = _read(path)
        if program is None:
            from wherry.runtime import seccomp_compile  # noqa: PLC0415 - a cached program needs none of it

            program = seccomp_compile.compile_profile(profile)
            if len(program) > _MAX_INSTRUCTIONS * 8:
                msg = f"linux.seccomp: {len(program) // 8} instructions, the kernel takes {_MAX_INSTRUCTIONS}"
                raise ValueError(msg)
            _store(path, program)
        _memory[digest] = program
    return program


def kept_filter(profile: Mapping[str, Any]) -> bytes | None:
    """`compile_filter` for who may not compile: None where the program isn't kept yet."""
    digest = _digest(profile)
    program = _memory.get(digest) or _read(_cache_path(default_cache(), digest))
    if program:
        _memory[digest] = program
    return program


def filter_flags(profile: Mapping[str, Any]) -> int:
    """The flags for `load_filter`. Absent ones mean SPEC_ALLOW, as with runc: no slower branches for the process.

    Raises ValueError for a flag that isn't one.
    """
    names = profile.get("flags")
    if names is None:
        return FLAGS["SECCOMP_FILTER_FLAG_SPEC_ALLOW"]
    flags = 0
    for name in names:
        if name not in FLAGS:
            msg = f"linux.seccomp: unknown seccomp flag {name!r}"
            raise ValueError(msg)
        flags |= FLAGS[name]
    return flags


def uses_notify(profile: Mapping[str, Any]) -> bool:
    """True if a rule asks for SCMP_ACT_NOTIFY, so that `load_filter` must make a listener."""
    return any(rule.get("action") == "SCMP_ACT_NOTIFY" for rule in profile.get("syscalls") or ())


def load_filter(program: bytes, flags: int = 0, *, listener: bool = False) -> int:
    """Put the filter on the calling process, which keeps it over exec; it can't be taken off.

    Returns the descriptor of the listener (close-on-exec) if one was asked for, else -1. The caller has
    no_new_privs set or CAP_SYS_ADMIN (else OSError EACCES). Flags that an old kernel doesn't know are left out, except
    for the listener.
    """
    instructions = ctypes.create_string_buffer(program, len(program))
    fprog = struct.pack("@HP", len(program) // 8, ctypes.addressof(instructions))
    if listener:
        return _seccomp(flags | _FLAG_NEW_LISTENER, fprog)
    try:
        _seccomp(flags, fprog)
    except OSError as error:
        if error.errno not in {errno.ENOSYS, errno.EINVAL} or not _prctl(fprog):
            raise
    return -1


def _seccomp(flags: int, fprog: bytes) -> int:
    number = _SYS_SECCOMP.get(os.uname().machine)
    if number is None:
        raise OSError(errno.ENOSYS, "seccomp(2) has no known number on this machine")
    result = int(_libc.syscall(ctypes.c_long(number), ctypes.c_ulong(_SET_MODE_FILTER), ctypes.c_ulong(flags), fprog))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"seccomp(SECCOMP_SET_MODE_FILTER, {flags:#x}): {os.strerror(code)}")
    return result


def _prctl(fprog: bytes) -> bool:
    """The older call, without flags."""
    none = ctypes.c_ulong(0)
    return int(_libc.prctl(_PR_SET_SECCOMP, ctypes.c_ulong(_SECCOMP_MODE_FILTER), fprog, none, none)) == 0


def default_cache() -> str:
    """Where programs are kept: beside the other volatile state, where only this user writes; "" for nowhere."""
    if not places.is_users():
        return "/run/wherry/seccomp"
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    return f"{runtime}/wherry/seccomp" if runtime.startswith("/") else ""


def _digest(profile: Mapping[str, Any]) -> str:
    text = json.dumps(profile, sort_keys=True, separators=(",", ":"), default=dict).encode()
    return blake2b(b"\0".join((_FORMAT, os.uname().machine.encode(), text)), digest_size=32).hexdigest()


def _cache_path(cache: str, digest: str) -> str:
    return f"{cache}/{digest}.bpf" if cache else ""


def _read(path: str) -> bytes | None:
    """A kept program; None if there is none, or if it could be somebody else's."""
    if not path:
        return None
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        status = os.fstat(fd)
        trusted = status.st_uid == os.geteuid() and not status.st_mode & 0o022
        whole = 0 < status.st_size <= _MAX_INSTRUCTIONS * 8 and status.st_size % 8 == 0
        return os.read(fd, status.st_size) if trusted and whole else None
    finally:
        os.close(fd)


def _store(path: str, program: bytes) -> None:
    """Keep a program; a cache that can't be written is no reason to fail."""
    if not path:
        return
    temporary = f"{path}.{os.getpid()}"
    try:
        os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            os.write(fd, program)
        finally:
            os.close(fd)
        os.rename(temporary, path)
    except OSError:
        return
