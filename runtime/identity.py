"""Who the container's process is: user, groups, capabilities, umask, working directory, environment, program.

The order is that of runc's `finalizeNamespace`; what each step needs, the next one takes away.
"""

from __future__ import annotations

import os
import stat

from wherry.linux import capabilities
from wherry.linux import syscalls as sc
from wherry.linux.cgroups.layout import host
from wherry.runtime.errors import NOT_FOUND, ContainerError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

DEFAULT_UMASK = 0o022


def become(process: dict[str, Any], *, preserve_fds: int = 0) -> list[str]:
    """Turn into the configured user; the names of capabilities that are unknown here come back.

    Descriptors above those to keep are marked close-on-exec, here and not at exec, because a filter of seccomp's may
    be in place by then.
    """
    user = process.get("user") or {}
    wanted = process.get("capabilities")
    sets, unknown = capability_sets(wanted)
    sc.close_range(3 + preserve_fds, flags=sc.CLOSE_RANGE_CLOEXEC)
    for fd in range(3, 3 + preserve_fds):
        os.set_inheritable(fd, True)
    # Without `capabilities` there are none (config.md: absent means not set), as runc has it.
    capabilities.drop_bounding(sets["bounding"])
    sc.prctl(sc.PR_SET_KEEPCAPS, 1)
    own_streams((0, 1, 2), user.get("uid") or 0)
    set_user(user)
    sc.prctl(sc.PR_SET_KEEPCAPS, 0)
    change_directory(process["cwd"])
    capabilities.apply(sets["effective"], sets["permitted"], sets["inheritable"], sets["ambient"])
    umask = user.get("umask")
    os.umask(DEFAULT_UMASK if umask is None else umask)
    return unknown


def capability_sets(wanted: dict[str, list[str]] | None) -> tuple[dict[str, int], list[str]]:
    """The bits of the five sets, and the names that are unknown here."""
    sets, unknown = {}, []
    for name in ("bounding", "effective", "permitted", "inheritable", "ambient"):
        sets[name], strange = capabilities.mask((wanted or {}).get(name) or [])
        unknown += [item for item in strange if item not in unknown]
    return sets, unknown


def own_streams(fds: tuple[int, int, int], uid: int) -> None:
    """The user owns its standard streams (a log's pipe, a terminal), so that it may open /dev/stdout. Never /dev/null,
    which is everybody's; where the filesystem refuses (a read-only one, a foreign owner) it stays as it is."""
    null = os.makedev(1, 3)
    for fd in fds:
        try:
            info = os.fstat(fd)
            if info.st_uid != uid and not (stat.S_ISCHR(info.st_mode) and info.st_rdev == null):
                os.fchown(fd, uid, -1)
        except OSError:
            continue


def set_user(user: dict[str, Any]) -> None:
    """setgroups, setgid, setuid. In a user namespace whose setgroups is denied, groups can't be dropped, only kept."""
    gids = user.get("additionalGids") or []
    uid, gid = user.get("uid") or 0, user.get("gid") or 0
    try:
        os.setgroups(gids)
    except PermissionError:
        # where the whole engine lives in a user namespace with one id, no other group could be in force anyway
        if gids and not host().user_namespace:
            raise ContainerError("unable to set additional groups: setgroups is denied here") from None
    try:
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
    except OSError as error:
        raise ContainerError(f"setuid to {uid}:{gid}: {(error.strerror or '').lower()}") from None


def change_directory(cwd: str) -> None:
    """chdir, and see that the result is inside the root: a cwd like /proc/self/fd/7 may lead out (CVE-2024-21626)."""
    try:
        os.chdir(cwd)
    except OSError as error:
        text = (error.strerror or "").lower()
        raise ContainerError(f'chdir to cwd ("{cwd}") set in config.json failed: {text}', NOT_FOUND) from None
    try:
        inside = os.getcwd().startswith("/")  # "(unreachable)/…" for a folder that isn't below our root
    except OSError:
        inside = False
    if not inside:
        raise ContainerError("current working directory is outside of container mount namespace root")


def environment(process: dict[str, Any]) -> list[str]:
    """The environment as given, with HOME added from /etc/passwd where it is missing (runc does so)."""
    env = list(process.get("env") or ())
    if not any(item.startswith("HOME=") for item in env):
        env.append(f"HOME={home_of((process.get('user') or {}).get('uid') or 0)}")
    return env


def home_of(uid: int) -> str:
    """The home folder that the container's /etc/passwd gives; "/" without one."""
    try:
        with open("/etc/passwd", encoding="utf-8", errors="surrogateescape") as file:
            return home_in(file, uid)
    except OSError:
        return "/"


def home_in(lines: Iterable[str], uid: int) -> str:
    """The same, of these lines of a passwd(5)."""
    for line in lines:
        fields = line.rstrip("\n").split(":")
        if len(fields) > 5 and fields[2] == str(uid):
            return fields[5] or "/"
    return "/"


def find_program(name: str, env: list[str]) -> str:
    """The path that exec will get: runc's words for what can't be, because callers look at them.

    `exec: "x": executable file not found in $PATH`, `exec: "/x": stat /x: no such file or directory`,
    `exec: "/x": permission denied`.
    """
    if "/" in name:
        problem = _not_executable(name)
        if problem:
            raise ContainerError(f'exec: "{name}": {problem}', NOT_FOUND)
        return name
    path = ""
    for item in env:
        if item.startswith("PATH="):
            path = item[5:]
    for folder in path.split(":"):
        candidate = os.path.join(folder or ".", name)
        if not _not_executable(candidate):
            return candidate
    raise ContainerError(f'exec: "{name}": executable file not found in $PATH', NOT_FOUND)


def _not_executable(path: str) -> str:
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        text = (error.strerror or "").lower()
        return f"stat {path}: {text}"
    return "" if not stat.S_ISDIR(mode) and mode & 0o111 else "permission denied"
