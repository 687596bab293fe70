"""The seccomp filters of a process, taken out of the kernel and run: ptrace(2), seccomp(2), bpf(4). For root."""

from __future__ import annotations

import ctypes
import os
import struct

_SEIZE, _INTERRUPT, _GET_FILTER, _DETACH = 0x4206, 0x4207, 0x420C, 17
_ALLOW = 0x7FFF0000
_X86_64 = 0xC000003E
_WALL = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_libc.ptrace.restype = ctypes.c_long

Instruction = tuple[int, int, int, int]

# what a container might want, by its x86-64 number
SYSTEM_CALLS = {
    "read": 0, "openat": 257, "clone": 56, "execve": 59, "ptrace": 101, "mount": 165, "umount2": 166, "pivot_root": 155,
    "chroot": 161, "reboot": 169, "sethostname": 170, "init_module": 175, "delete_module": 176, "finit_module": 313,
    "kexec_load": 246, "kexec_file_load": 320, "add_key": 248, "request_key": 249, "keyctl": 250, "unshare": 272,
    "setns": 308, "bpf": 321, "userfaultfd": 323, "perf_event_open": 298, "open_by_handle_at": 304, "iopl": 172,
    "ioperm": 173, "swapon": 167, "settimeofday": 164, "clock_settime": 227, "acct": 163, "quotactl": 179,
    "nfsservctl": 180, "process_vm_readv": 310, "kcmp": 312, "lookup_dcookie": 212, "fanotify_init": 300,
    "open_tree": 428, "move_mount": 429, "fsopen": 430, "fsmount": 432, "mount_setattr": 442, "mknod": 133,
    "syslog": 103, "personality": 135, "socket": 41, "io_uring_setup": 425, "name_to_handle_at": 303, "vhangup": 153,
    "uselib": 134,
}  # fmt: skip


def filters(pid: int) -> list[list[Instruction]]:
    """All filters of a process."""
    _ptrace(_SEIZE, pid, 0, 0)
    try:
        _ptrace(_INTERRUPT, pid, 0, 0)
        os.waitpid(pid, _WALL)
        found = []
        for index in range(64):
            try:
                count = _ptrace(_GET_FILTER, pid, index, 0)
            except OSError:
                break
            data = ctypes.create_string_buffer(count * 8)
            _ptrace(_GET_FILTER, pid, index, ctypes.addressof(data))
            found.append([struct.unpack_from("=HBBI", data, 8 * number) for number in range(count)])
        return found
    finally:
        _ptrace(_DETACH, pid, 0, 0)


def _ptrace(request: int, pid: int, address: int, data: int) -> int:
    result = int(_libc.ptrace(request, pid, address, data))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def allows(programs: list[list[Instruction]], number: int) -> bool:
    """Whether a call with all arguments 0 passes every filter."""
    data = struct.pack("=iIQ6Q", number, _X86_64, 0, 0, 0, 0, 0, 0, 0)
    return all(_run(program, data) & 0x7FFF0000 == _ALLOW for program in programs)


def _run(program: list[Instruction], data: bytes) -> int:
    """What a classic BPF program returns, as far as seccomp's use it."""
    a = x = at = 0
    memory = [0] * 16
    while True:
        code, yes, no, k = program[at]
        at += 1
        kind = code & 7
        if code == 0x20:  # LD | W | ABS
            a = struct.unpack_from("=I", data, k)[0]
        elif code == 0x00:  # LD | IMM
            a = k
        elif code == 0x60:  # LD | MEM
            a = memory[k]
        elif code == 0x02:  # ST
            memory[k] = a
        elif kind == 5:  # JMP
            at += k if code == 0x05 else (yes if _jumps(code, a, x if code & 8 else k) else no)
        elif code == 0x06:  # RET | K
            return k
        elif code == 0x16:  # RET | A
            return a
        elif code == 0x54:  # ALU | AND | K
            a &= k
        elif code == 0x07:  # MISC | TAX
            x = a
        else:
            raise ValueError(f"instruction {code:#x}")


def _jumps(code: int, a: int, value: int) -> bool:
    test = code & 0xF0
    if test == 0x10:
        return a == value
    if test == 0x20:
        return a > value
    if test == 0x30:
        return a >= value
    return bool(a & value)
