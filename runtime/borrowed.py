"""A container's init that is built without a fork: in the runtime's own memory, by a child that borrows it.

What `init.py` does, with these differences. The runtime stands still while its child builds the container
(`wherry.linux.vfork`), so nothing is said between the two; what the runtime does for an init on "ready" the child does
for itself. It ends by executing the waiter, 230 bytes of machine code in a sealed memfd, which is then the container's
init until `start`::

    runtime                            child
      vfork ───────────────────────────▶ namespaces, mounts, terminal, pivot_root, limits, user, capabilities, seccomp
      (stopped)                          executes the waiter
      ◀──────────────────────────────────┤
      writes state.json, pid file        │ reads one byte from a pipe; at its end (the runtime died) it exits
      one byte ─────────────────────────▶│ reads one byte from exec.fifo
                                         ▼ executes the program, or writes the errno to `start.error`

It is for the common container: a pid namespace of its own (a stranger in a shared one could look into the memory that
is borrowed), no user or time namespace (neither may be entered by who shares memory), no hooks before the start, no
security label (the first exec would take it), no seccomp agent, a seccomp filter that lets the waiter do its few calls,
and memory enough that the kernel has no reason to kill in between. All others are forked, as `init.py` has it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct

from wherry.core.failpoints import reach
from wherry.linux import process, vfork
from wherry.linux import syscalls as sc
from wherry.runtime import hooks, init, make
from wherry.runtime.channel import Channel
from wherry.runtime.errors import ContainerError
from wherry.runtime.spec import namespaces_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from wherry.runtime.plan import Plan

# argv[0] has the descriptors of exec.fifo, start.error and the pipe, a byte each, and what start.error begins with;
# argv[1] is the program's path, what follows are its arguments
_WAITER = bytes.fromhex(
    "488b5c2408"  # mov rbx, [rsp+8]: argv[0]
    "440fb623"  # movzx r12d, byte [rbx]: exec.fifo
    "440fb66b01"  # movzx r13d, byte [rbx+1]: start.error
    "440fb67302"  # movzx r14d, byte [rbx+2]: the pipe
    "4489f7"  # mov edi, r14d
    "488d7424f0"  # lea rsi, [rsp-16]
    "ba01000000"  # mov edx, 1
    "31c0"  # xor eax, eax (read)
    "0f05"  # syscall
    "ffc8"  # dec eax
    "0f85a6000000"  # jne lost
    "4489f7"  # mov edi, r14d
    "b803000000"  # mov eax, 3 (close)
    "0f05"  # syscall
    "4489e7"  # wait: mov edi, r12d
    "488d7424f0"  # lea rsi, [rsp-16]
    "ba01000000"  # mov edx, 1
    "31c0"  # xor eax, eax (read)
    "0f05"  # syscall
    "85c0"  # test eax, eax
    "74eb"  # je wait
    "0f8881000000"  # js lost
    "4489e7"  # mov edi, r12d
    "be02000000"  # mov esi, F_SETFD
    "ba01000000"  # mov edx, FD_CLOEXEC
    "b848000000"  # mov eax, 72 (fcntl)
    "0f05"  # syscall
    "4489ef"  # mov edi, r13d
    "be02000000"  # mov esi, F_SETFD
    "ba01000000"  # mov edx, FD_CLOEXEC
    "b848000000"  # mov eax, 72 (fcntl)
    "0f05"  # syscall
    "488b7c2410"  # mov rdi, [rsp+16]: argv[1]
    "488d742418"  # lea rsi, [rsp+24]: argv + 2
    "488b0424"  # mov rax, [rsp]: argc
    "488d54c410"  # lea rdx, [rsp+rax*8+16]: envp
    "b83b000000"  # mov eax, 59 (execve)
    "0f05"  # syscall
    "f7d8"  # neg eax
    "89c5"  # mov ebp, eax
    "4489ef"  # mov edi, r13d
    "488d7303"  # lea rsi, [rbx+3]: the text of argv[0] …
    "488b542410"  # mov rdx, [rsp+16]
    "4829f2"  # sub rdx, rsi
    "48ffca"  # dec rdx: … which ends one byte before argv[1]
    "b801000000"  # mov eax, 1 (write)
    "0f05"  # syscall
    "c1e508"  # shl ebp, 8
    "896c24f0"  # mov dword [rsp-16], ebp
    "4489ef"  # mov edi, r13d
    "488d7424f0"  # lea rsi, [rsp-16]: a zero byte, and the errno
    "ba02000000"  # mov edx, 2
    "b801000000"  # mov eax, 1 (write)
    "0f05"  # syscall
    "bfff000000"  # mov edi, 255
    "eb05"  # jmp leave
    "bf01000000"  # lost: mov edi, 1
    "b8e7000000"  # leave: mov eax, 231 (exit_group)
    "0f05"  # syscall
)
_BASE, _HEADERS = 0x400000, 64 + 56
_EM_X86_64 = 62
# what the waiter calls, and the exec into it, when the container's filter is in place
_CALLS = frozenset({"execve", "execveat", "read", "write", "close", "fcntl", "exit_group"})
_ALLOWED = frozenset({"SCMP_ACT_ALLOW", "SCMP_ACT_LOG"})
# bytes: below this limit of its cgroup the kernel might kill the child for what building a container takes
_MEMORY_LEAST = 32 << 20
# the waiter gets descriptors as bytes, the pipe's comes a few numbers later
_LAST_FD = 0xF0
_CREATE_HOOKS = ("prestart", "createRuntime", "createContainer", "startContainer")

_vfork: vfork.Vfork | None = None
_image = -1


def prepare() -> None:
    """Once, before forking; without it `serves` says no."""
    global _vfork, _image  # noqa: PLW0603 - one for the process and its forks
    made = vfork.prepare()
    if made is None:
        return
    try:
        _image = _make_image()
    except OSError:
        return
    _vfork = made


def _make_image() -> int:
    """The waiter as an ELF file that nobody can change any more (memfd_create(2), F_ADD_SEALS)."""
    size = _HEADERS + len(_WAITER)
    header = struct.pack(
        "<16sHHIQQQIHHHHHH", b"\x7fELF\2\1\1", 2, _EM_X86_64, 1, _BASE + _HEADERS, 64, 0, 0, 64, 56, 1, 0, 0, 0
    )
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, _BASE, _BASE, size, size, 0x1000)
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        fd = os.memfd_create("wherry-init", flags | 0x10)  # MFD_EXEC, Linux 6.3
    except OSError:
        fd = os.memfd_create("wherry-init", flags)
    try:
        os.write(fd, header + segment + _WAITER)
        os.fchmod(fd, 0o555)
        seals = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    except OSError:
        os.close(fd)
        raise
    return fd


# -- for which containers ---------------------------------------------------------------------------------------------


def serves(plan: Plan) -> bool:
    """Whether this container can be built this way."""
    return max(plan.fifo, plan.failure) <= _LAST_FD and suits(plan.spec)


def suits(spec: dict[str, Any]) -> bool:
    """Whether a container of this specification can, which is a valid one, and in this process."""
    if _vfork is None or os.geteuid() != 0:
        return False  # as root of a user namespace it is as for root
    kinds = namespaces_of(spec)
    if kinds.get("pid") != "" or "user" in kinds or "time" in kinds:
        return False
    if any(hooks.of(spec, name) for name in _CREATE_HOOKS):
        return False
    labels = ("apparmorProfile", "selinuxLabel", "scheduler", "ioPriority", "execCPUAffinity")
    linux = spec.get("linux") or {}
    if any(spec["process"].get(name) for name in labels) or linux.get("netDevices") or linux.get("intelRdt"):
        return False
    return enough_memory(linux) and _lets_pass(linux.get("seccomp"))


def machine() -> vfork.Vfork | None:
    """What lends this process's memory; None where nothing is prepared."""
    return _vfork


def enough_memory(linux: dict[str, Any]) -> bool:
    """Whether the kernel has no reason to kill who is in the container's cgroup for the work of a few milliseconds."""
    memory = (linux.get("resources") or {}).get("memory") or {}
    return not 0 < (memory.get("limit") or 0) < _MEMORY_LEAST


def _lets_pass(profile: Mapping[str, Any] | None) -> bool:
    """Whether a filter surely allows `_CALLS`."""
    if not profile:
        return True
    allowed: set[str] = set()
    for rule in profile.get("syscalls") or ():
        names = _CALLS.intersection(rule.get("names") or ())
        if rule.get("action") == "SCMP_ACT_NOTIFY" or (names and rule.get("action") not in _ALLOWED):
            return False
        if not rule.get("args"):
            allowed |= names
    return profile.get("defaultAction") in _ALLOWED or allowed == _CALLS


# -- making it --------------------------------------------------------------------------------------------------------


class _Nobody(Channel):
    """Where `init.py` has the channel to the runtime: only what stays open is asked of it."""

    def fds(self) -> tuple[int, int]:
        return self.reader, _image


def spawn(plan: Plan, recorded: Callable[[int], None]) -> int:
    """Make the container's init, which waits for `start`; its pid. `recorded` is called with it once it is there.

    What can't be done is a ContainerError, and the child is gone.
    """
    gate, opened = os.pipe()
    problems: list[str] = []
    try:
        pid = lend(plan, lambda: _spawn(plan, gate, problems))
    finally:
        os.close(gate)
    try:
        if problems:
            raise ContainerError(make.FAILED_START + problems[0])
        reach("runtime.borrowed.waits")
        recorded(pid)
        with contextlib.suppress(BrokenPipeError):  # killed meanwhile: the container is recorded, and has stopped
            os.write(opened, b"\0")
    except BaseException:
        make.kill(pid)
        raise
    finally:
        os.close(opened)
    return pid


def lend(plan: Plan, spawned: Callable[[], int]) -> int:
    """Call what spawns a child that borrows the memory, and have the plan as it was: the child closed descriptors of
    its own, ours are still open."""
    kept, joined, trees = vars(plan).copy(), dict(plan.joined), dict(plan.trees)
    try:
        return spawned()
    finally:
        vars(plan).update(kept)
        plan.joined, plan.trees = joined, trees
        process.set_dumpable(True)


def _spawn(plan: Plan, gate: int, problems: list[str]) -> int:
    def body(number: int) -> vfork.Program | None:
        phase = init.DURING_INIT
        try:
            if number:
                raise OSError(number, os.strerror(number), "the waiter")
            channel = _Nobody(gate, -1)
            init.isolate(plan, channel)
            make.limit_score(plan, "self")
            init.enter_namespaces(plan)
            reach("runtime.borrowed.namespaces")
            init.build(plan, channel)
            make.limit(plan, 0)
            phase = ""
            program, env = init.finish(plan, channel)
            return _waiter(plan, gate, program, env)
        except BaseException as error:  # noqa: BLE001 - nothing may get out of here, see `vfork`
            text = init.describe(error)
            known = text.startswith(make.FAILED_START)
            problems.append(text.removeprefix(make.FAILED_START) if known else phase + text)
            return None

    if _vfork is None:
        raise ContainerError("nothing is prepared for this")
    return _vfork.spawn(sc.CLONE_NEWPID, plan.cgroup_fd, body)


def _waiter(plan: Plan, gate: int, program: str, env: list[str]) -> vfork.Program:
    """The waiter with its arguments; its three descriptors stay open over the exec into it."""
    fds = (plan.fifo, plan.failure, gate)
    for fd in fds:
        fcntl.fcntl(fd, fcntl.F_SETFD, 0)
    path = os.fsencode(program)
    argv = [bytes(fds) + b"exec " + path + b": ", path, *map(os.fsencode, plan.process["args"])]
    return vfork.Program(_image, argv, [os.fsencode(item) for item in env])
