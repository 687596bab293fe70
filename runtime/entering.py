"""A further process in a container, made by a list of system calls: no fork of the interpreter, and nothing waits.

What `execute.py` does, written down by the caller as `wherry.linux.calls`, and done by two processes that borrow the
caller's memory and run no Python. So the caller may be the shim itself: it goes on while the process enters the
container, and neither a frozen cgroup, nor a file system that hangs, nor somebody who kills the process there can do it
any harm. (A runtime that lends its whole interpreter, `borrowed_exec.py`, is lost in such a case.)

    caller                         helper                          process
      validates, looks for the
      program, writes the calls
      start ────────────────────────▶ enters the pid namespace (for
      (goes on)                       its children)
                                      vfork ────────────────────────▶ streams, session, signals, cgroups, oom_score_adj,
                                                                      namespaces, limits, user, capabilities, seccomp
                                      ◀──────────────────────────────── execve
      `end` ◀─────────────── exits                                  a child of the caller, which is a subreaper

It is for the common process in the common container. What is uncommon, and what fails in any call, is left to
`execute.py`, which does it over again: nothing was executed then, and the errors are told there.

Two things are read in the container's root, from outside: whether the program is there, and the user's home. They are
looked up below that root alone (openat2(2), RESOLVE_IN_ROOT), through no magic link, and on no other file system than
the root's own, which must be one of those that no process can make hang; everything else is, again, left to the others.
"""

from __future__ import annotations

import ctypes
import os
import stat
import struct

from wherry.core.failpoints import reach
from wherry.linux import calls, capabilities, cgroups, process
from wherry.linux import syscalls as sc
from wherry.linux.cgroups.layout import host
from wherry.linux.namespaces import FLAGS
from wherry.runtime import identity, make, seccomp, spec, state
from wherry.runtime.errors import ContainerError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from wherry.runtime.container import ExecRequest
    from wherry.runtime.state import State

# system calls on x86-64
_CLOSE, _FCHDIR, _UMASK, _SETGROUPS, _SETRESUID, _SETRESGID, _SETSID = 3, 81, 95, 116, 117, 119, 112
_CAPSET, _PRCTL, _KEYCTL, _DUP3, _PRLIMIT, _SETNS, _SECCOMP, _EXECVE = 126, 157, 250, 292, 302, 308, 317, 59
_CLOSE_RANGE, _OPENAT2 = 436, 437
_CAPABILITY_VERSION_3, _WORD = 0x20080522, 0xFFFFFFFF
_SET_MODE_FILTER = 1
# the process's descriptors: the container's init, and what is opened for one call
_INIT, _FILE = 3, 4
# statfs(2), f_type: ext4, XFS, btrfs, tmpfs, overlay, squashfs, EROFS
_LOCAL = frozenset({0xEF53, 0x58465342, 0x9123683E, 0x01021994, 0x794C7630, 0x73717368, 0xE0F5E1E2})
_LOOKUP = sc.RESOLVE_IN_ROOT | sc.RESOLVE_NO_MAGICLINKS | sc.RESOLVE_NO_XDEV
# bytes; a file of users that is larger is left to others
_PASSWD = 256 << 10
# fields of a process that few have, and that aren't done here
_UNCOMMON = ("terminal", "scheduler", "ioPriority", "execCPUAffinity", "apparmorProfile", "selinuxLabel")

_last_capability = 0
# how many processes are in somebody's namespaces with this process's memory
_entering = 0
# configurations that were read: few, a shim has few containers
_known: dict[str, _Container] = {}
_KNOWN = 16


def prepare() -> None:
    """Once, before forking."""
    global _last_capability  # noqa: PLW0603 - the kernel's, for the process and its forks
    calls.prepare()
    _last_capability = min(63, capabilities.last_known())


class _Container:
    """What of a container's configuration matters here: whether it is a common one, and its seccomp filter."""

    __slots__ = ("common", "filter", "filter_flags", "signature")

    def __init__(self, signature: tuple[int, int, int], linux: dict[str, Any]) -> None:
        self.signature = signature
        profile = linux.get("seccomp")
        self.common = not linux.get("personality") and not linux.get("memoryPolicy")
        self.filter, self.filter_flags = b"", 0
        if profile:
            kept = None if seccomp.uses_notify(profile) else seccomp.kept_filter(profile)
            self.common = self.common and kept is not None
            self.filter, self.filter_flags = kept or b"", seccomp.filter_flags(profile)


def _container(found: State) -> _Container:
    path = os.path.join(found.folder, "config.json")
    about = os.stat(path)
    signature = about.st_ino, about.st_mtime_ns, about.st_size
    known = _known.get(path)
    if known is None or known.signature != signature:
        if len(_known) >= _KNOWN:
            _known.clear()
        known = _known[path] = _Container(signature, found.spec().get("linux") or {})
    return known


class Entering:
    """A process on its way into a container. Wait for the `helper`'s end, a child of this process; then `end`."""

    def __init__(self, request: ExecRequest, made: calls.Calls, helper: int) -> None:
        self._request = request
        self._calls = made
        self.helper = helper
        self.lost = 0
        """After `end`: a child that executed nothing and has to be waited for, before `close`."""

    def end(self, status: int) -> int:
        """The process's pid, once it executed its program; 0 where it can't be done this way, and nothing was done.

        `status` is 0 or 1 if the helper exited with that, anything else if not. Raises ContainerError where somebody
        killed the helper.
        """
        pid, (number, _) = self._calls.pid, self._calls.failure
        if status not in (0, 1):
            if pid:
                self.lost = pid
                os.kill(pid, 9)
            raise ContainerError(f"{make.FAILED_START}the runtime was killed", exit_code=255)
        if number:
            self.lost = pid
            return 0
        if self._request.pid_file:
            make.write_pid_file(self._request.pid_file, pid)
        return pid

    def close(self) -> None:
        """Free what both shared with this process: neither runs any more, or executes a program of its own."""
        global _entering  # noqa: PLW0603 - as above
        self._calls.close()
        _entering -= 1
        if not _entering:
            process.set_dumpable(True)


def begin(request: ExecRequest) -> Entering | None:
    """Let a process enter; None where that is left to `execute.exec_process`, which then says what is wrong, if it is.

    The caller is a subreaper, has one thread, and stays in its namespaces and cgroups as the container's maker was.
    """
    if not calls.ready() or request.stdio is None or min(request.stdio) < _INIT or request.console_socket:
        return None
    if request.preserve_fds or request.sub_cgroups or os.geteuid() or host().user_namespace:
        return None
    fds: list[int] = []
    try:
        return _begin(request, request.stdio, fds)
    except (OSError, ValueError, KeyError, struct.error, ContainerError):
        return None
    finally:
        for fd in fds:
            os.close(fd)


def _begin(request: ExecRequest, stdio: tuple[int, int, int], fds: list[int]) -> Entering | None:
    global _entering  # noqa: PLW0603 - as above
    asked = request.process
    spec.validate_process(asked)
    if any(asked.get(name) for name in _UNCOMMON):
        return None
    found = state.load(request.root, request.id)
    kinds = found.namespaces.keys() - {"pid"}
    if found.rdt_class or not found.cgroup_paths or "mount" not in kinds or not kinds.isdisjoint(("user", "time")):
        return None
    init = os.pidfd_open(found.pid)
    fds.append(init)
    # asked after it was opened: the pid is still the container's
    status = found.status()
    if status != state.RUNNING and not (status == state.PAUSED and request.ignore_paused):
        return None
    container = _container(found)
    if not container.common:
        return None
    looked = _look(found.pid, asked)
    if looked is None:
        return None
    cgroup = cgroups.restore(found.cgroup_paths)
    cgroup_fd = cgroup.clone_fd()
    if cgroup_fd >= 0:
        fds.append(cgroup_fd)
    identity.own_streams(stdio, (asked.get("user") or {}).get("uid") or 0)
    made = calls.Calls()
    try:
        _isolate(made, stdio, init)
        _settle(made, asked, found, [] if cgroup_fd >= 0 else list(dict.fromkeys(cgroup.paths.values())))
        made.add(_SETNS, _INIT, sum(FLAGS[kind] for kind in kinds))
        made.add(_CLOSE, _INIT)
        _limit(made, asked)
        made.add(_KEYCTL, sc.KEYCTL_JOIN_SESSION_KEYRING, made.text(f"_ses.{found.id}"), optional=True)
        _become(made, asked, container)
        made.add(_EXECVE, made.text(looked[0]), made.texts(asked["args"]), made.texts(looked[1]))
        helper = [(_SETNS, init, sc.CLONE_NEWPID)] if "pid" in found.namespaces else []
        # nobody in the namespaces may look into the memory, from before somebody with it is there until nobody is
        process.set_dumpable(False)
        _entering += 1
        try:
            entering = Entering(request, made, made.start(helper, cgroup_fd))
        except BaseException:
            _entering -= 1
            if not _entering:
                process.set_dumpable(True)
            raise
    except BaseException:
        made.close()
        raise
    reach("runtime.entering.started")
    return entering


# -- the calls, in the order of `borrowed_exec.py` --------------------------------------------------------------------


def _isolate(made: calls.Calls, stdio: tuple[int, int, int], init: int) -> None:
    """`init.isolate`: of the caller's descriptors none is left but the streams and the container's init."""
    for number, fd in enumerate(stdio):
        made.add(_DUP3, fd, number, 0)
    if init != _INIT:
        made.add(_DUP3, init, _INIT, os.O_CLOEXEC)
    made.add(_CLOSE_RANGE, _INIT + 1, _WORD, 0)
    made.default_signals()
    made.add(_SETSID)


def _settle(made: calls.Calls, asked: dict[str, Any], found: State, directories: list[str]) -> None:
    """The cgroups (of v1), and the score: by the host's files."""
    for directory in directories:
        made.write(f"{directory}/tasks", b"0", _FILE)
    score = asked.get("oomScoreAdj")
    if score is not None:
        made.write("/proc/self/oom_score_adj", str(score).encode(), _FILE)


def _limit(made: calls.Calls, asked: dict[str, Any]) -> None:
    for item in asked.get("rlimits") or ():
        limit = made.data(struct.pack("=2Q", item.get("soft") or 0, item.get("hard") or 0))
        made.add(_PRLIMIT, 0, spec.RLIMITS[item["type"]], limit, 0)


def _become(made: calls.Calls, asked: dict[str, Any], container: _Container) -> None:
    """`init.finish`: rights, user, folder, filter."""
    user = asked.get("user") or {}
    uid, gid, groups = user.get("uid") or 0, user.get("gid") or 0, user.get("additionalGids") or []
    sets, _ = identity.capability_sets(asked.get("capabilities"))
    # without no_new_privs the filter takes the rights that go next; it need not know openat2, so that the folder is
    # opened before it (as runc does), and entered as the user
    early = bool(container.filter) and not asked.get("noNewPrivileges")
    if early:
        _open_folder(made, asked)
        _load_filter(made, container)
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
    made.add(_FCHDIR, _INIT)
    made.add(_CLOSE, _INIT)
    _set_capabilities(made, sets)
    umask = user.get("umask")
    made.add(_UMASK, identity.DEFAULT_UMASK if umask is None else umask)
    if container.filter and not early:
        _load_filter(made, container)


def _open_folder(made: calls.Calls, asked: dict[str, Any]) -> None:
    """The working directory; no way leads out of the root but a magic link (CVE-2024-21626)."""
    how = made.data(struct.pack("=3Q", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, 0, sc.RESOLVE_NO_MAGICLINKS))
    made.add(_OPENAT2, sc.AT_FDCWD, made.text(asked["cwd"]), how, 24)


def _load_filter(made: calls.Calls, container: _Container) -> None:
    """`seccomp.load_filter`."""
    program = made.data(container.filter)
    fprog = made.data(struct.pack("=H6xQ", len(container.filter) // 8, program))
    made.add(_SECCOMP, _SET_MODE_FILTER, container.filter_flags, fprog)


def _set_capabilities(made: calls.Calls, sets: dict[str, int]) -> None:
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


# -- what is looked up in the container's root ------------------------------------------------------------------------


def _look(pid: int, asked: dict[str, Any]) -> tuple[str, list[str]] | None:
    """The program's path and the environment; None where they can't be found out from here."""
    root = os.open(f"/proc/{pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if _kind(root) not in _LOCAL:
            return None
        env = list(asked.get("env") or ())
        program = _program(root, asked["args"][0], env)
        if program is None:
            return None
        if not any(item.startswith("HOME=") for item in env):
            home = _home(root, (asked.get("user") or {}).get("uid") or 0)
            if home is None:
                return None
            env.append(f"HOME={home}")
        return program, env
    finally:
        os.close(root)


def _kind(fd: int) -> int:
    buffer = ctypes.create_string_buffer(256)  # struct statfs, whose first word is f_type
    if sc.libc.fstatfs(ctypes.c_int(fd), buffer):
        raise OSError(ctypes.get_errno(), "fstatfs")
    return int.from_bytes(buffer.raw[:8], "little")


def _program(root: int, name: str, env: list[str]) -> str | None:
    """As `identity.find_program`; None for what isn't found, or isn't an absolute path."""
    if "/" in name:
        return name if name.startswith("/") and _is_program(root, name) else None
    path = ""
    for item in env:
        if item.startswith("PATH="):
            path = item[5:]
    for folder in path.split(":"):
        if not folder.startswith("/"):
            return None
        candidate = os.path.join(folder, name)
        if _is_program(root, candidate):
            return candidate
    return None


def _is_program(root: int, path: str) -> bool:
    try:
        fd = sc.openat2(root, path, os.O_PATH, resolve=_LOOKUP)
    except (FileNotFoundError, NotADirectoryError):
        return False
    try:
        mode = os.fstat(fd).st_mode
    finally:
        os.close(fd)
    return not stat.S_ISDIR(mode) and bool(mode & 0o111)


def _home(root: int, uid: int) -> str | None:
    """As `identity.home_of`; None where the file can't be read in one go."""
    try:
        fd = sc.openat2(root, "etc/passwd", os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY, resolve=_LOOKUP)
    except (FileNotFoundError, NotADirectoryError):
        return "/"
    try:
        about = os.fstat(fd)
        if not stat.S_ISREG(about.st_mode) or about.st_size > _PASSWD:
            return None
        raw = os.read(fd, _PASSWD)
    finally:
        os.close(fd)
    return identity.home_in(raw.decode("utf-8", "surrogateescape").split("\n"), uid)
