"""A process that does nothing: the first one of a sandbox, in which all others are started later.

An image need not contain any program that waits, so we bring one: a static ELF file of about two hundred bytes. It
ignores SIGCHLD, whereupon the kernel reaps whatever is orphaned in the container (wait(2), "SA_NOCLDWAIT"), and sleeps
for good. As the first process of a PID namespace it gets no signal that it has no handler for, SIGKILL from outside
excepted (pid_namespaces(7)).
"""

from __future__ import annotations

import os
import struct

from wherry.core.errors import FailedPrecondition

# where a container finds it: below /dev, which is a tmpfs of the container's own, so that no file of the image changes
INSIDE = "/dev/.wherry-idle"

_BASE = 0x400000
_EHDR, _PHDR = 64, 56
# struct sigaction of the kernel (rt_sigaction(2)): handler 1 is SIG_IGN; flags, restorer and mask are nothing
_IGNORE = struct.pack("<QQQQ", 1, 0, 0, 0)

# mov eax,13; mov edi,17; lea rsi,[rip+19]; xor edx,edx; mov r10d,8; syscall: rt_sigaction(SIGCHLD, ignore, NULL, 8)
# 1: mov eax,34; syscall; jmp 1b: pause() again and again
_X86_64 = (
    b"\xb8\x0d\x00\x00\x00\xbf\x11\x00\x00\x00\x48\x8d\x35\x13\x00\x00\x00\x31\xd2\x41\xba\x08\x00\x00\x00\x0f\x05"
    b"\xb8\x22\x00\x00\x00\x0f\x05\xeb\xf7"
)
# the same for AArch64, which has no pause: ppoll(NULL, 0, NULL, NULL, 0)
_AARCH64 = struct.pack(
    "<16I",
    0xD28010C8,  # mov x8, #134
    0xD2800220,  # mov x0, #17
    0x100001C1,  # adr x1, the action below, 56 bytes on
    0xD2800002,  # mov x2, #0
    0xD2800103,  # mov x3, #8
    0xD4000001,  # svc #0
    0xD2800928,  # 1: mov x8, #73
    0xD2800000,  # mov x0, #0
    0xD2800001,  # mov x1, #0
    0xD2800002,  # mov x2, #0
    0xD2800003,  # mov x3, #0
    0xD2800004,  # mov x4, #0
    0xD4000001,  # svc #0
    0x17FFFFF9,  # b 1b
    0xD503201F,  # nop
    0xD503201F,  # nop
)
_MACHINES = {"x86_64": (62, _X86_64), "aarch64": (183, _AARCH64)}


def program(machine: str = "") -> bytes:
    """The ELF file for a machine (`uname -m`; this one's by default). Raises FailedPrecondition for one we lack."""
    machine = machine or os.uname().machine
    if machine not in _MACHINES:
        raise FailedPrecondition(f"no idle process for {machine}: only for {', '.join(_MACHINES)}")
    number, code = _MACHINES[machine]
    body = code + _IGNORE
    start = _EHDR + _PHDR
    size = start + len(body)
    # e_ident: 64 bits, little-endian, version 1 (elf(5)); one segment, readable and executable, holds the file
    header = b"\x7fELF\x02\x01\x01" + bytes(9)
    header += struct.pack("<HHIQQQIHHHHHH", 2, number, 1, _BASE + start, _EHDR, 0, 0, _EHDR, _PHDR, 1, 0, 0, 0)
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, _BASE, _BASE, size, size, 0x10000)
    return header + segment + body


def place(folder: str) -> str:
    """Writes the program into a folder, where it isn't there yet, and returns its path."""
    path = os.path.join(folder, "idle")
    if not os.path.exists(path):
        os.makedirs(folder, mode=0o711, exist_ok=True)
        new = f"{path}.{os.getpid()}.{os.urandom(4).hex()}"
        with open(new, "xb") as file:
            file.write(program())
            os.fchmod(file.fileno(), 0o555)
        os.replace(new, path)
    return path


def mount(path: str) -> dict[str, object]:
    """The mount of the OCI specification that brings it into a container as `INSIDE`."""
    options = ["bind", "ro", "nosuid", "nodev", "exec"]
    return {"type": "bind", "source": path, "destination": INSIDE, "options": options}
