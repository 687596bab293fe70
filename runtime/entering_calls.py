"""What a process does on its way into a container, as system calls: for `entering.py`, in the order of
`borrowed_exec.py`."""

from __future__ import annotations

import os
import struct

from wherry.linux import capabilities
from wherry.linux import syscalls as sc
from wherry.linux.namespaces import FLAGS
from wherry.runtime import identity, kernel, spec

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    from wherry.linux.calls import Calls

# system calls on x86-64
_WRITE, _OPENAT = 1, 257
_CLOSE, _FCHDIR, _UMASK, _SETGROUPS, _SETRESUID, _SETRESGID, _SETSID = 3, 81, 95, 116, 117, 119, 112
_CAPSET, _PRCTL, _KEYCTL, _DUP3, _PRLIMIT, _SETNS, _SECCOMP, _EXECVE = 126, 157, 250, 292, 302, 308, 317, 59
_CLOSE_RANGE, _OPENAT2 = 436, 437
_CAPABILITY_VERSION_3, _WORD = 0x20080522, 0xFFFFFFFF
_SET_MODE_FILTER = 1
# the process's descriptors: the container's init, and what is opened for one call
INIT, _FILE = 3, 4

_last_capability = 0


def prepare() -> None:
    """Once, before forking."""
    global _last_capability  # noqa: PLW0603 - the kernel's, for the process and its forks
    _last_capability = min(63, capabilities.last_known())


def isolate(made: Calls, stdio: tuple[int, int, int], init: int) -> None:
    """`init.isolate`: of the caller's descriptors none is left but the streams and the container's init."""
    for number, fd in enumerate(stdio):
        made.add(_DUP3, fd, number, 0)
    if init != INIT:
        made.add(_DUP3, init, INIT, os.O_CLOEXEC)
    made.add(_CLOSE_RANGE, INIT + 1, _WORD, 0)
    made.default_signals()
    made.add(_SETSID)


def settle(made: Calls, asked: dict[str, Any], directories: list[str]) -> None:
    """The cgroups (of v1), and the score: by the host's files."""
    for directory in directories:
        made.write(f"{directory}/tasks", b"0", _FILE)
    score = asked.get("oomScoreAdj")
    if score is not None:
        made.write("/proc/self/oom_score_adj", str(score).encode(), _FILE)


def enter(made: Calls, kinds: Iterable[str], asked: dict[str, Any]) -> None:
    """All of init's namespaces of these kinds, in one call. (The pid namespace was the helper's business.)

    The label for the exec is written by the host's /proc: the container's could be a fake."""
    label = kernel.label_path(asked)
    if label:
        made.add(_OPENAT, sc.AT_FDCWD, made.text(label), os.O_WRONLY | os.O_CLOEXEC)
    made.add(_SETNS, INIT, sum(FLAGS[kind] for kind in kinds if kind != "pid"))
    made.add(_CLOSE, INIT)
    if label:
        text = kernel.label_text(asked)
        made.add(_WRITE, _FILE, made.data(text), len(text))
        made.add(_CLOSE, _FILE)


def limit(made: Calls, asked: dict[str, Any]) -> None:
    """`make.limit`."""
    for item in asked.get("rlimits") or ():
        limit = made.data(struct.pack("=2Q", item.get("soft") or 0, item.get("hard") or 0))
        made.add(_PRLIMIT, 0, spec.RLIMITS[item["type"]], limit, 0)


def become(made: Calls, asked: dict[str, Any], filter_: tuple[bytes, int]) -> None:
    """`init.finish`: rights, user, folder, filter."""
    user = asked.get("user") or {}
    uid, gid, groups = user.get("uid") or 0, user.get("gid") or 0, user.get("additionalGids") or []
    sets, _ = identity.capability_sets(asked.get("capabilities"))
    # without no_new_privs the filter takes the rights that go next; it need not know openat2, so that the folder is
    # opened before it (as runc does), and entered as the user
    early = bool(filter_[0]) and not asked.get("noNewPrivileges")
    if early:
        _open_folder(made, asked)
        _load_filter(made, *filter_)
    elif asked.get("noNewPrivileges"):
        made.add(_PRCTL, sc.PR_SET_NO_NEW_PRIVS, 1)
    for number in range(_last_capability + 1):
        if not sets["bounding"] >> number & 1:
            made.add(_PRCTL, sc.PR_CAPBSET_DROP, number)
    made.add(_PRCTL, sc.PR_SET_KEEPCAPS, 1)
    made.add(_SETGROUPS, len(groups), made.data(struct.pack(f"={len(groups)}I", *groups)))
    made.add(_SETRESGID, gid, gid, gid)
    made.add(_SETRESUID, uid, uid, uid)
    made.add(_PRCTL, sc.PR_SET_KEEPCAPS, 0)
    # the change of user has set it anew, to what /proc/sys/fs/suid_dumpable says
    made.add(_PRCTL, sc.PR_SET_DUMPABLE, 0)
    if not early:
        _open_folder(made, asked)
    made.add(_FCHDIR, INIT)
    made.add(_CLOSE, INIT)
    _set_capabilities(made, sets)
    umask = user.get("umask")
    made.add(_UMASK, identity.DEFAULT_UMASK if umask is None else umask)
    if filter_[0] and not early:
        _load_filter(made, *filter_)


def join_keyring(made: Calls, container: str) -> None:
    """`kernel.join_keyring`; what init has made it to be it stays."""
    made.add(_KEYCTL, sc.KEYCTL_JOIN_SESSION_KEYRING, made.text(f"_ses.{container}"), optional=True)


def execute(made: Calls, program: str, asked: dict[str, Any], env: list[str]) -> None:
    """The last one."""
    made.add(_EXECVE, made.text(program), made.texts(asked["args"]), made.texts(env))


def help_with(kept: list[int], init: int, *, shares_pids: bool) -> list[tuple[int, ...]]:
    """What the helper does before it makes the process: of the caller's descriptors it has what that needs, so that one
    that hangs holds nobody's streams open; its children's pid namespace is that of this init."""
    calls: list[tuple[int, ...]] = []
    first = 0
    for fd in sorted(set(kept)):
        if fd > first:
            calls.append((_CLOSE_RANGE, first, fd - 1, 0))
        first = fd + 1
    calls.append((_CLOSE_RANGE, first, _WORD, 0))
    return calls if shares_pids else [*calls, (_SETNS, init, sc.CLONE_NEWPID)]


def _open_folder(made: Calls, asked: dict[str, Any]) -> None:
    """The working directory; no way leads out of the root but a magic link (CVE-2024-21626)."""
    how = made.data(struct.pack("=3Q", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, 0, sc.RESOLVE_NO_MAGICLINKS))
    made.add(_OPENAT2, sc.AT_FDCWD, made.text(asked["cwd"]), how, 24)


def _load_filter(made: Calls, program: bytes, flags: int) -> None:
    """`seccomp.load_filter`."""
    fprog = made.data(struct.pack("=H6xQ", len(program) // 8, made.data(program)))
    made.add(_SECCOMP, _SET_MODE_FILTER, flags, fprog)


def _set_capabilities(made: Calls, sets: dict[str, int]) -> None:
    """`capabilities.apply`: what this process doesn't have is left out."""
    _, have, _ = sc.capget()
    permitted = sets["permitted"] & have
    three = sets["effective"] & permitted, permitted, sets["inheritable"] & have
    words = [item & _WORD for item in three] + [item >> 32 for item in three]
    header = made.data(struct.pack("=Ii", _CAPABILITY_VERSION_3, 0))
    made.add(_CAPSET, header, made.data(struct.pack("=6I", *words)))
    made.add(_PRCTL, sc.PR_CAP_AMBIENT, sc.PR_CAP_AMBIENT_CLEAR_ALL)
    for number in range(_last_capability + 1):
        if sets["ambient"] >> number & 1:
            made.add(_PRCTL, sc.PR_CAP_AMBIENT, sc.PR_CAP_AMBIENT_RAISE, number, optional=True)
