"""Namespaces for an ordinary user, in which the user is root: what `wherryd` without root lives in.

There it may mount, make namespaces and give files to other ids, all of it inside of what the host lets the user do:
its root is the user, its other ids are those that /etc/subuid and /etc/subgid grant (through newuidmap(1) and
newgidmap(1); without them there is one id alone). See user_namespaces(7).

The namespaces outlive the daemon: the shims of the containers that go on live in them, and so must the next daemon, or
it would see neither their mounts nor their processes' rights. A process of a few kilobytes (`wherry.core.idle`) holds
them; the file `rootless` in the state folder says which one.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pwd
import shutil
import signal
import subprocess
from typing import NamedTuple, NoReturn

from wherry.core import idle, places
from wherry.core.errors import FailedPrecondition
from wherry.linux import syscalls as sc
from wherry.linux.process import is_alive, start_time

HOLDER = "rootless"
_TOOLS = {"newuidmap": "/etc/subuid", "newgidmap": "/etc/subgid"}


class Range(NamedTuple):
    """Ids that a user may use besides its own: `size` of them from `first` on, as the host numbers them."""

    first: int
    size: int


def granted(path: str, user: str, uid: int) -> list[Range]:
    """What subuid(5) or subgid(5) grants a user; lines that can't be read are left out, as shadow's tools do."""
    found = []
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            lines = file.read().splitlines()
    except OSError:
        return []
    for line in lines:
        name, _, rest = line.strip().partition(":")
        first, _, count = rest.partition(":")
        if name in {user, str(uid)} and first.isdigit() and count.isdigit() and int(count):
            found.append(Range(int(first), int(count)))
    return found


def enter(state: str) -> None:
    """Become root of the user's namespaces, which are made where they aren't there yet; for processes with one thread.

    `state` is the daemon's state folder. The environment says afterwards whose namespaces these are
    (`core/places.py`). Raises FailedPrecondition where the host doesn't allow it, with what to change.
    """
    places.private(state)
    lock = os.open(os.path.join(state, f"{HOLDER}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    uid = os.getuid()
    holder = _holder(state)
    if holder:
        _join(holder)
        os.setresgid(0, 0, 0)
        os.setresuid(0, 0, 0)
    else:
        become_root()
    os.environ[places.INSIDE] = str(uid)
    if not holder:
        sc.mount("", "/", "", sc.MS_REC | sc.MS_SLAVE)
        _leave_holder(state)
    os.close(lock)


def become_root() -> None:
    """New namespaces for this process alone, which has one thread, and its root. Raises FailedPrecondition."""
    _make()
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)


def settle(state: str) -> str:
    """The daemon is the only one on its folders now: somebody holds the namespaces, and has cgroups for containers.

    Returns "", or why there are no cgroups (also "" for root's daemon, which needs none of it).
    """
    if not os.environ.get(places.INSIDE):
        return ""
    if not _holder(state):
        # the daemon before us was leaving when we joined its namespaces
        _leave_holder(state)
    from wherry.linux.cgroups import delegation  # noqa: PLC0415 - `unshare` and clients do without

    return delegation.claim(_holder(state))


def leave(state: str) -> None:
    """The daemon ends: with no container left, nobody needs the namespaces any more."""
    holder = _holder(state) if os.environ.get(places.INSIDE) else 0
    if not holder:
        return
    tasks = os.path.join(state, "tasks")
    with contextlib.suppress(FileNotFoundError):
        if any(os.listdir(os.path.join(tasks, namespace)) for namespace in os.listdir(tasks)):
            return
    os.unlink(os.path.join(state, HOLDER))
    os.kill(holder, signal.SIGKILL)


def _holder(state: str) -> int:
    """The process that holds the namespaces of an earlier daemon; 0 where there is none any more."""
    try:
        with open(os.path.join(state, HOLDER), encoding="ascii") as file:
            pid, started = map(int, file.read().split())
    except (OSError, ValueError):
        return 0
    return pid if is_alive(pid, started) else 0


def _join(pid: int) -> None:
    # the user namespace first: it gives the right to enter the other one
    for kind, flag in (("user", sc.CLONE_NEWUSER), ("mnt", sc.CLONE_NEWNS)):
        fd = os.open(f"/proc/{pid}/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            sc.setns(fd, flag)
        except OSError as error:
            raise FailedPrecondition(f"can't join the namespaces of process {pid}: {error.strerror}") from error
        finally:
            os.close(fd)


def _make() -> None:
    """New namespaces with the user's ids. The mappings can only be written from outside: a child stays there."""
    parent = os.getpid()
    to_child, from_parent = os.pipe()
    from_child, to_parent = os.pipe()
    child = os.fork()
    if not child:
        os.close(from_parent)
        os.close(from_child)
        _map(parent, to_child, to_parent)
    os.close(to_child)
    os.close(to_parent)
    try:
        sc.unshare(sc.CLONE_NEWUSER | sc.CLONE_NEWNS)
    except OSError as error:
        os.close(from_parent)
        os.waitpid(child, 0)
        why, hints = refusal(error)
        raise FailedPrecondition(f"{why}; the host needs: {', '.join(hints)}" if hints else why) from error
    os.write(from_parent, b"\n")
    os.close(from_parent)
    with os.fdopen(from_child) as answer:
        text = answer.read()
    os.waitpid(child, 0)
    if text != "ok":
        raise FailedPrecondition(text or "the ids of the user namespace were not mapped")


def _map(pid: int, ready: int, answer: int) -> NoReturn:
    """The child: maps ids as soon as the parent has its namespaces, and says how it went."""
    text = "the ids of the user namespace were not mapped"
    try:
        if os.read(ready, 1):
            text = map_ids(pid)
    finally:
        os.write(answer, text.encode())
        os._exit(0)


def map_ids(pid: int) -> str:
    """Write the maps of a process in a new user namespace; "ok", or what stands in the way."""
    uid, gid = os.getuid(), os.getgid()
    try:
        user = pwd.getpwuid(uid).pw_name
    except KeyError:
        user = str(uid)
    subuids, subgids = (granted(path, user, uid) for path in _TOOLS.values())
    if subuids and subgids:
        for (tool, path), own, ranges in zip(_TOOLS.items(), (uid, gid), (subuids, subgids), strict=True):
            if shutil.which(tool) is None:
                return f"{path} grants ids, but {tool} is missing: install the package uidmap (shadow-utils)"
            words, inside = [tool, str(pid), "0", str(own), "1"], 1
            for item in ranges:
                words += [str(inside), str(item.first), str(item.size)]
                inside += item.size
            done = subprocess.run(words, capture_output=True, text=True, check=False)
            if done.returncode:
                return f"{tool} failed: {done.stderr.strip() or done.returncode}"
        return "ok"
    try:
        for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1\n"), ("gid_map", f"0 {gid} 1\n")):
            with open(f"/proc/{pid}/{name}", "w", encoding="ascii") as file:
                file.write(text)
    except OSError as error:
        return f"can't map the user's own id: {error.strerror}"
    return "ok"


def _leave_holder(state: str) -> None:
    """A process that holds the namespaces for as long as the user's containers may run."""
    program = os.memfd_create("wherry-rootless")
    os.write(program, idle.program())
    child = os.fork()
    if not child:
        try:
            os.setsid()
            null = os.open(os.devnull, os.O_RDWR)
            for number in range(3):
                os.dup2(null, number)
            # nor the sockets that systemd handed over to the daemon
            os.closerange(3, program)
            os.closerange(program + 1, max(program, *map(int, os.listdir("/proc/self/fd"))) + 1)
            os.chdir("/")
            os.execve(program, ["wherry-rootless", state], {})
        finally:
            os._exit(127)
    os.close(program)
    path = os.path.join(state, HOLDER)
    with open(f"{path}.new", "w", encoding="ascii") as file:
        file.write(f"{child} {start_time(child)}\n")
    os.replace(f"{path}.new", path)


def refusal(error: OSError) -> tuple[str, list[str]]:
    """Why a user may have no user namespace, and what an administrator has to change for it."""
    hints = []
    for path, wanted, hint in (
        ("/proc/sys/kernel/unprivileged_userns_clone", "1", "sysctl kernel.unprivileged_userns_clone=1"),
        ("/proc/sys/kernel/apparmor_restrict_unprivileged_userns", "0", "an AppArmor profile that allows userns"),
        ("/proc/sys/user/max_user_namespaces", "", "sysctl user.max_user_namespaces=15000"),
    ):
        try:
            with open(path, encoding="ascii") as file:
                value = file.read().strip()
        except OSError:
            continue
        if (wanted and value != wanted) or (not wanted and value == "0"):
            hints.append(hint)
    return f"an ordinary user may not make a user namespace here ({error.strerror})", hints
