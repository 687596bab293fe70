"""Seccomp profiles, compiled and loaded into a process that then asks the kernel."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import stat
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from wherry.core.seccomp_profile import default_profile
from wherry.runtime import seccomp

pytestmark = pytest.mark.skipif(os.uname().machine != "x86_64", reason="the numbers of calls are x86-64's")
GETPID, KEYCTL, PERSONALITY, UNSHARE, CLONE3, SOCKET, NEWER = 39, 250, 135, 272, 435, 41, 700
GETPPID, KILL, MOUNT = 110, 62, 165
ALLOW_ALL = {"defaultAction": "SCMP_ACT_ALLOW"}
_libc = ctypes.CDLL(None, use_errno=True)


def call(number: int, *arguments: int) -> int:
    """The errno of a system call, 0 if it succeeds."""
    result = _libc.syscall(*(ctypes.c_long(value) for value in (number, *arguments)))
    return ctypes.get_errno() if result < 0 else 0


def inside(profile: dict[str, Any], work: Callable[[], int], cache: str = "", no_new_privs: bool = False) -> int:
    """What `work` returns in a process under the profile; negative for the signal that ended it."""
    program = seccomp.compile_filter(profile, cache)
    pid = os.fork()
    if not pid:
        code = 99
        try:
            if no_new_privs:
                _libc.prctl(38, 1, 0, 0, 0)
                os.setresuid(65534, 65534, 65534)
            seccomp.load_filter(program, seccomp.filter_flags(profile))
            code = work()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def rule(action: str, *names: str, **more: object) -> dict[str, Any]:
    return {**ALLOW_ALL, "syscalls": [{"names": list(names), "action": action, **more}]}


def condition(index: int, op: str, value: int, second: int = 0) -> dict[str, Any]:
    return {"index": index, "op": f"SCMP_CMP_{op}", "value": value, "valueTwo": second}


@pytest.mark.parametrize(
    ("work", "expected"),
    [
        (lambda: call(GETPID), 0),
        (lambda: call(KEYCTL), errno.EPERM),
        (lambda: call(UNSHARE, 0x04000000), errno.EPERM),
        (lambda: call(MOUNT), errno.EPERM),
        (lambda: call(CLONE3, 0, 0), errno.ENOSYS),
        (lambda: call(NEWER), errno.ENOSYS),
        (lambda: call(PERSONALITY, 0xFFFFFFFF), 0),
        (lambda: call(PERSONALITY, 5), errno.EPERM),
        (lambda: call(SOCKET, 1, 1, 0), 0),
        (lambda: call(SOCKET, 40, 1, 0), errno.EPERM),
    ],
)
def test_the_default_profile(work: Callable[[], int], expected: int) -> None:
    assert inside(default_profile(["CAP_CHOWN"]), work) == expected


def test_capabilities_open_their_calls() -> None:
    profile = default_profile(["CAP_SYS_ADMIN"])
    assert inside(profile, lambda: call(MOUNT)) == errno.EFAULT
    assert inside(profile, lambda: call(CLONE3, 0, 0)) == errno.EINVAL
    assert inside(profile, lambda: call(UNSHARE, 0x04000000)) == 0


def test_threads_and_children_work_under_the_default_profile() -> None:
    def work() -> int:
        pid = os.fork()
        if not pid:
            os.execv("/bin/sh", ["sh", "-c", "echo x | cat >/dev/null && exit 5"])
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    assert inside(default_profile([]), work) == 5


@pytest.mark.parametrize("machine", ["x86_64", "aarch64", "riscv64", "ppc64le", "s390x", "armv7l"])
def test_the_default_profile_knows_each_machine(machine: str) -> None:
    profile = default_profile(["CAP_SYS_BOOT"], machine)
    assert profile["architectures"]
    names = [name for entry in profile["syscalls"] for name in entry["names"]]
    assert {"read", "futex", "reboot"} <= set(names)
    if machine == "x86_64":
        assert "arch_prctl" in names
    masked = [entry["args"][0]["index"] for entry in profile["syscalls"] if entry["names"] == ["clone"]]
    assert masked == ([1] if machine == "s390x" else [0])


@pytest.mark.parametrize(
    ("action", "expected"),
    [
        ("SCMP_ACT_ERRNO", errno.EPERM),
        ("SCMP_ACT_KILL", -signal.SIGSYS),
        ("SCMP_ACT_KILL_THREAD", -signal.SIGSYS),
        ("SCMP_ACT_KILL_PROCESS", -signal.SIGSYS),
        ("SCMP_ACT_TRAP", -signal.SIGSYS),
        ("SCMP_ACT_TRACE", errno.ENOSYS),
        ("SCMP_ACT_LOG", 0),
        ("SCMP_ACT_ALLOW", 0),
    ],
)
def test_actions(action: str, expected: int) -> None:
    assert inside(rule(action, "getppid"), lambda: call(GETPPID)) == expected


def test_the_value_of_errno() -> None:
    assert inside(rule("SCMP_ACT_ERRNO", "getppid", errnoRet=errno.EXDEV), lambda: call(GETPPID)) == errno.EXDEV
    profile = {"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": errno.ENOSYS}
    profile["syscalls"] = [{"names": ["exit_group"], "action": "SCMP_ACT_ALLOW"}]
    assert inside(profile, lambda: call(GETPPID)) == errno.ENOSYS


@pytest.mark.parametrize(
    ("op", "value", "second", "hit", "miss"),
    [
        ("EQ", 7, 0, 7, 8),
        ("NE", 7, 0, 8, 7),
        ("LT", 7, 0, 6, 7),
        ("LE", 7, 0, 7, 8),
        ("GT", 7, 0, 8, 7),
        ("GE", 7, 0, 7, 6),
        ("MASKED_EQ", 0xF0, 0x10, 0x1F, 0x2F),
    ],
)
def test_operators(op: str, value: int, second: int, hit: int, miss: int) -> None:
    profile = rule("SCMP_ACT_ERRNO", "kill", errnoRet=errno.EXDEV, args=[condition(1, op, value, second)])
    for number, expected in ((hit, errno.EXDEV), (miss, errno.ESRCH)):
        # no process has the highest pid; a signal above 64 is invalid, which the filter decides before
        assert inside(profile, lambda number=number: call(KILL, 4194304, number)) == expected  # type: ignore[misc]


def test_conditions_on_different_arguments_must_all_hold() -> None:
    conditions = [condition(0, "EQ", 4194304), condition(1, "EQ", 7)]
    profile = rule("SCMP_ACT_ERRNO", "kill", errnoRet=errno.EXDEV, args=conditions)
    assert inside(profile, lambda: call(KILL, 4194304, 7)) == errno.EXDEV
    assert inside(profile, lambda: call(KILL, 4194304, 8)) == errno.ESRCH


def test_conditions_on_the_same_argument_are_alternatives() -> None:
    conditions = [condition(1, "EQ", 7), condition(1, "EQ", 8)]
    profile = rule("SCMP_ACT_ERRNO", "kill", errnoRet=errno.EXDEV, args=conditions)
    assert inside(profile, lambda: call(KILL, 4194304, 7)) == errno.EXDEV
    assert inside(profile, lambda: call(KILL, 4194304, 8)) == errno.EXDEV
    assert inside(profile, lambda: call(KILL, 4194304, 9)) == errno.ESRCH


def test_unknown_calls_are_skipped() -> None:
    assert inside(rule("SCMP_ACT_ERRNO", "no_such_call", "getppid"), lambda: call(GETPPID)) == errno.EPERM


def test_calls_newer_than_the_profile_dont_exist() -> None:
    profile = {"defaultAction": "SCMP_ACT_ERRNO", "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"]}
    profile["syscalls"] = [{"names": ["exit_group", "statx"], "action": "SCMP_ACT_ALLOW"}]  # type: ignore[list-item]
    assert inside(profile, lambda: call(GETPPID)) == errno.EPERM
    assert inside(profile, lambda: call(333)) == errno.ENOSYS  # statx is 332
    assert inside(profile, lambda: call(GETPPID | 0x40000000)) in {errno.EPERM, -signal.SIGSYS}  # x32


def test_without_privileges_no_new_privs_is_enough() -> None:
    assert inside(rule("SCMP_ACT_ERRNO", "getppid"), lambda: call(GETPPID), no_new_privs=True) == errno.EPERM


def test_without_privileges_and_no_new_privs_it_is_refused() -> None:
    program = seccomp.compile_filter(ALLOW_ALL, "")
    pid = os.fork()
    if not pid:
        os.setresuid(65534, 65534, 65534)
        try:
            seccomp.load_filter(program)
        except OSError as error:
            os._exit(error.errno or 1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == errno.EACCES


def test_a_listener_sees_what_is_asked() -> None:
    profile = rule("SCMP_ACT_NOTIFY", "getppid")
    assert seccomp.uses_notify(profile)
    assert not seccomp.uses_notify(default_profile([]))
    program = seccomp.compile_filter(profile, "")
    pid = os.fork()
    if not pid:
        listener = seccomp.load_filter(program, 0, listener=True)
        os._exit(0 if listener >= 0 and not os.get_inheritable(listener) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@pytest.mark.parametrize(
    ("profile", "message"),
    [
        ({}, r"linux\.seccomp\.defaultAction: invalid seccomp action None"),
        ({"defaultAction": "SCMP_ACT_NOTIFY"}, "SCMP_ACT_NOTIFY cannot be used as default action"),
        (rule("SCMP_ACT_NOTIFY", "write"), "SCMP_ACT_NOTIFY cannot be used for the write syscall"),
        (rule("SCMP_ACT_SMILE", "read"), r"syscalls\[0\]\.action: invalid seccomp action 'SCMP_ACT_SMILE'"),
        (rule("SCMP_ACT_ALLOW", "read", errnoRet=3), r"syscalls\[0\]\.errnoRet: only ERRNO and TRACE take a value"),
        (rule("SCMP_ACT_ERRNO", "read", errnoRet=-3), r"syscalls\[0\]\.errnoRet: invalid value -3"),
        (rule("SCMP_ACT_ERRNO"), r"syscalls\[0\]\.names: no system calls named"),
        (rule("SCMP_ACT_ERRNO", "read", args=[condition(6, "EQ", 1)]), "invalid argument index 6"),
        (rule("SCMP_ACT_ERRNO", "read", args=[condition(1, "XX", 1)]), "unknown operator 'SCMP_CMP_XX'"),
        (rule("SCMP_ACT_ERRNO", "read", args=[condition(1, "EQ", -1)]), "invalid value -1"),
        ({**ALLOW_ALL, "architectures": ["SCMP_ARCH_Z80"]}, "unknown architecture 'SCMP_ARCH_Z80'"),
    ],
)
def test_what_is_wrong_is_named(profile: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        seccomp.compile_filter(profile, "")


def test_flags() -> None:
    assert seccomp.filter_flags({}) == 4
    assert seccomp.filter_flags({"flags": []}) == 0
    assert seccomp.filter_flags({"flags": ["SECCOMP_FILTER_FLAG_LOG", "SECCOMP_FILTER_FLAG_TSYNC"]}) == 3
    with pytest.raises(ValueError, match="unknown seccomp flag 'SECCOMP_FILTER_FLAG_X'"):
        seccomp.filter_flags({"flags": ["SECCOMP_FILTER_FLAG_X"]})


def test_a_program_is_kept_and_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seccomp, "_memory", {})
    cache = tmp_path / "kept"
    profile = rule("SCMP_ACT_ERRNO", "getppid", errnoRet=errno.EXDEV)
    program = seccomp.compile_filter(profile, str(cache))
    (kept,) = cache.iterdir()
    assert kept.read_bytes() == program
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    monkeypatch.setattr(seccomp, "_memory", {})
    allow = struct.pack("=HBBI", 0x06, 0, 0, 0x7FFF0000)
    kept.write_bytes(allow)
    assert seccomp.compile_filter(profile, str(cache)) == allow


def test_a_cache_of_somebody_else_is_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seccomp, "_memory", {})
    profile = rule("SCMP_ACT_ERRNO", "getppid", errnoRet=errno.EUCLEAN)
    program = seccomp.compile_filter(profile, str(tmp_path))
    (kept,) = tmp_path.iterdir()
    kept.write_bytes(struct.pack("=HBBI", 0x06, 0, 0, 0x7FFF0000))
    kept.chmod(0o666)
    monkeypatch.setattr(seccomp, "_memory", {})
    assert seccomp.compile_filter(profile, str(tmp_path)) == program
    kept.unlink()
    kept.symlink_to("/etc/passwd")
    monkeypatch.setattr(seccomp, "_memory", {})
    assert seccomp.compile_filter(profile, str(tmp_path)) == program


def test_a_cache_that_cannot_be_written_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seccomp, "_memory", {})
    (tmp_path / "file").touch()
    assert seccomp.compile_filter(ALLOW_ALL, str(tmp_path / "file" / "below"))
