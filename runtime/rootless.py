"""What differs for an ordinary user: id mappings are written by setuid helpers, cgroups are there where delegated."""

from __future__ import annotations

import errno
import os

from wherry.linux.cgroups.layout import host
from wherry.runtime.errors import ContainerError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from wherry.runtime.plan import Plan

# cpu.shares of a cgroup that nobody changed
_USUAL_SHARES = 1024
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS)


def write_mappings(pid: int, linux: dict[str, Any]) -> None:
    """Write the maps of a new user namespace without rights (user_namespaces(7)).

    One's own id alone everybody may map; ranges take newuidmap(1) and newgidmap(1), which look into /etc/subuid and
    /etc/subgid. ContainerError says which of it is missing.
    """
    for key, file, own, helper in (
        ("uidMappings", "uid_map", os.geteuid(), "newuidmap"),
        ("gidMappings", "gid_map", os.getegid(), "newgidmap"),
    ):
        mappings = linux.get(key) or []
        if len(mappings) == 1 and mappings[0]["size"] == 1 and (mappings[0].get("hostID") or 0) == own:
            if file == "gid_map":
                _write(pid, "setgroups", "deny")  # or it could drop a group that denies something
            _write(pid, file, f"{mappings[0].get('containerID') or 0} {own} 1\n")
        else:
            _help(helper, pid, mappings)


def _write(pid: int, file: str, text: str) -> None:
    try:
        fd = os.open(f"/proc/{pid}/{file}", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, text.encode())
        finally:
            os.close(fd)
    except OSError as error:
        raise ContainerError(f"failed to write {file} of the user namespace: {error.strerror}") from None


def _help(helper: str, pid: int, mappings: list[dict[str, Any]]) -> None:
    words = [helper, str(pid)]
    for item in mappings:
        words += [str(item.get(part) or 0) for part in ("containerID", "hostID", "size")]
    reader, writer = os.pipe()
    try:
        child = os.posix_spawnp(helper, words, os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, writer, 2)])
    except FileNotFoundError:
        os.close(reader)
        raise ContainerError(f"{helper} is missing: mapping more than one's own id takes it (package uidmap)") from None
    finally:
        os.close(writer)
    with open(reader, "rb") as said:
        text = said.read().decode("utf-8", "replace").strip()
    _, status = os.waitpid(child, 0)
    if status:
        raise ContainerError(f"{' '.join(words)} failed (see /etc/subuid and /etc/subgid): {text}")


def forgo_cgroup(plan: Plan, error: OSError) -> bool:
    """Whether a container may do without a cgroup: the caller has no right to make one, and nothing depends on it.

    With limits, or a path that somebody chose, it is an error (runc's rule). Two things are no such wish: the weight of
    CPU that everybody has by default, and a path that a daemon in a user namespace was given, whose clients write the
    same specification for every daemon.
    """
    if error.errno not in _REFUSED:
        return False
    resources = plan.linux.get("resources") or {}
    limits = {key for key, value in resources.items() if value and key != "devices"}
    if (resources.get("cpu") or {}) == {"shares": _USUAL_SHARES}:
        limits.discard("cpu")
    if limits or (plan.linux.get("cgroupsPath") and not host().user_namespace):
        what = f"limits ({', '.join(sorted(limits))})" if limits else "linux.cgroupsPath"
        raise ContainerError(
            f"{what} can't be had without rights: no cgroup is delegated to this user ({error.filename}: "
            f"{error.strerror})"
        ) from None
    return True
