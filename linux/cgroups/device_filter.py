"""The device filter of cgroup v2: a BPF program of type BPF_PROG_TYPE_CGROUP_DEVICE, made and attached by bpf(2).

The kernel (kernel/bpf/cgroup.c) calls it with `struct bpf_cgroup_dev_ctx { u32 access_type; u32 major; u32 minor; }`,
where access_type is the access (1 mknod, 2 read, 4 write) shifted by 16, or'ed with the type (1 block, 2 char).
The program keeps in r3 the access that no rule decided yet, and walks the rules from the last to the first.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

from wherry.linux.cgroups.devices import ANY, Rule, allows_all
from wherry.linux.syscalls import get_rlimit, prlimit

_SYS_BPF = {"x86_64": 321, "aarch64": 280, "riscv64": 280, "ppc64le": 361, "s390x": 351, "armv7l": 386}
_PROG_LOAD, _PROG_ATTACH, _PROG_DETACH, _PROG_GET_FD_BY_ID, _PROG_QUERY = 5, 8, 9, 13, 16
_PROG_TYPE_CGROUP_DEVICE, _ATTACH_CGROUP_DEVICE = 15, 6
_F_ALLOW_MULTI = 2
_RLIMIT_MEMLOCK, _RLIM_INFINITY = 8, 2**64 - 1
_MAX_PROGRAMS = 64  # of one cgroup (BPF_CGROUP_MAX_PROGS)
_KINDS = {"b": 1, "c": 2}
_ACCESS = {"m": 1, "r": 2, "w": 4}

# opcodes (instruction set: Documentation/bpf/standardization/instruction-set.rst); K: with an immediate
_LDX_W, _MOV_K, _MOV_X, _AND_K, _RSH_K, _JNE_K, _JEQ_K, _EXIT = 0x61, 0xB7, 0xBF, 0x57, 0x77, 0x55, 0x15, 0x95
_R0, _CTX, _KIND, _WANTED, _MAJOR, _MINOR, _SCRATCH = range(7)

_libc = ctypes.CDLL(None, use_errno=True)


def _op(code: int, dst: int = 0, src: int = 0, offset: int = 0, immediate: int = 0) -> bytes:
    return struct.pack("<BBhI", code, dst | src << 4, offset, immediate & 0xFFFFFFFF)


def program(rules: list[Rule]) -> bytes:
    """The instructions for the rules (see `devices`), 8 bytes each."""
    parts = [
        _op(_LDX_W, _KIND, _CTX, 0),
        _op(_MOV_X, _WANTED, _KIND),
        _op(_AND_K, _KIND, immediate=0xFFFF),
        _op(_RSH_K, _WANTED, immediate=16),
        _op(_LDX_W, _MAJOR, _CTX, 4),
        _op(_LDX_W, _MINOR, _CTX, 8),
    ]
    parts += (_block(rule) for rule in reversed(rules))
    parts += (_op(_MOV_K, _R0, immediate=0), _op(_EXIT))
    return b"".join(parts)


def _block(rule: Rule) -> bytes:
    access = sum(_ACCESS[letter] for letter in rule.access)
    if rule.allow:
        # nothing left that this rule doesn't allow: return 1
        decide = [
            _op(_AND_K, _WANTED, immediate=~access),
            _op(_JNE_K, _WANTED, offset=2),
            _op(_MOV_K, _R0, immediate=1),
            _op(_EXIT),
        ]
    else:
        decide = [
            _op(_MOV_X, _SCRATCH, _WANTED),
            _op(_AND_K, _SCRATCH, immediate=access),
            _op(_JEQ_K, _SCRATCH, offset=2),
            _op(_MOV_K, _R0, immediate=0),
            _op(_EXIT),
        ]
    tests = [(_KIND, _KINDS[rule.kind])] if rule.kind != "a" else []
    tests += [(register, value) for register, value in ((_MAJOR, rule.major), (_MINOR, rule.minor)) if value != ANY]
    left = len(tests) + len(decide)
    jumps = [
        _op(_JNE_K, register, offset=left - index - 1, immediate=value) for index, (register, value) in enumerate(tests)
    ]
    return b"".join(jumps + decide)


def attach(directory: str, rules: list[Rule], fresh: bool) -> None:
    """Put the filter on a cgroup; the filters that are there (not `fresh`) go once the new one is on.

    Rules that allow all need no filter. Raises OSError with the directory and, where the verifier refused, its log.
    """
    cgroup = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        old = [] if fresh else _query(cgroup, directory)
        if not allows_all(rules):
            _attach(cgroup, directory, program(rules))
        for prog_id in old:
            fd = _bpf(_PROG_GET_FD_BY_ID, struct.pack("=III", prog_id, 0, 0), directory)
            try:
                _bpf(_PROG_DETACH, struct.pack("=IIII", cgroup, fd, _ATTACH_CGROUP_DEVICE, 0), directory)
            finally:
                os.close(fd)
    finally:
        os.close(cgroup)


def _attach(cgroup: int, directory: str, instructions: bytes) -> None:
    fd = _load(instructions, directory)
    try:
        attr = struct.pack("=IIIII", cgroup, fd, _ATTACH_CGROUP_DEVICE, _F_ALLOW_MULTI, 0)
        _bpf(_PROG_ATTACH, attr, directory)
    finally:
        os.close(fd)


def _load(instructions: bytes, directory: str) -> int:
    try:
        return _prog_load(instructions, None, directory)
    except OSError as error:
        if error.errno == errno.EPERM:
            # before 5.11 programs are charged to RLIMIT_MEMLOCK, which is 64 KiB or less by default
            before = get_rlimit(0, _RLIMIT_MEMLOCK)
            prlimit(0, _RLIMIT_MEMLOCK, _RLIM_INFINITY, _RLIM_INFINITY)
            try:
                return _prog_load(instructions, None, directory)
            finally:
                prlimit(0, _RLIMIT_MEMLOCK, *before)
        log = ctypes.create_string_buffer(65536)
        try:
            return _prog_load(instructions, log, directory)
        except OSError as again:
            again.add_note(log.value.decode(errors="replace"))
            raise


def _prog_load(instructions: bytes, log: ctypes.Array[ctypes.c_char] | None, directory: str) -> int:
    code = ctypes.create_string_buffer(instructions, len(instructions))
    licence = ctypes.create_string_buffer(b"Apache-2.0")
    attr = struct.pack(
        "=IIQQIIQII16sII",
        _PROG_TYPE_CGROUP_DEVICE,
        len(instructions) // 8,
        ctypes.addressof(code),
        ctypes.addressof(licence),
        1 if log is not None else 0,
        len(log) if log is not None else 0,
        ctypes.addressof(log) if log is not None else 0,
        0,
        0,
        b"wherry_devices",
        0,
        0,
    )
    return _bpf(_PROG_LOAD, attr, directory)


def _query(cgroup: int, directory: str) -> list[int]:
    ids = (ctypes.c_uint32 * _MAX_PROGRAMS)()
    attr = ctypes.create_string_buffer(
        struct.pack("=IIIIQII", cgroup, _ATTACH_CGROUP_DEVICE, 0, 0, ctypes.addressof(ids), _MAX_PROGRAMS, 0)
    )
    _call(_PROG_QUERY, attr, directory)
    count = struct.unpack_from("=I", attr, 24)[0]
    return list(ids[:count])


def _bpf(command: int, attr: bytes, directory: str) -> int:
    return _call(command, ctypes.create_string_buffer(attr, len(attr)), directory)


def _call(command: int, attr: ctypes.Array[ctypes.c_char], directory: str) -> int:
    number = _SYS_BPF.get(os.uname().machine)
    if number is None:
        raise OSError(errno.ENOSYS, f"bpf(2) has no known number on {os.uname().machine}", directory)
    result = int(_libc.syscall(ctypes.c_long(number), ctypes.c_long(command), attr, ctypes.c_ulong(len(attr))))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"bpf command {command} for the device filter: {os.strerror(code)}", directory)
    return result
