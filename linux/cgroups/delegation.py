"""The part of the unified tree that an ordinary user may use: limits for containers without root.

systemd's user manager was given a part of its own (user@.service: `Delegate=`), and hands parts of that on. So that
containers stay where they are when the daemon ends or is started anew, theirs is not the daemon's cgroup (one with
controllers below it can't be entered again, EBUSY), but a scope with a life of its own: the process that holds the
user's namespaces (`linux/rootless.py`) lives in it, in a child, because a cgroup with processes has no controllers:

    user@1000.service/app.slice/wherry-containers-PID.scope/          Delegate=yes
        holder/                                                       the process PID
        NAMESPACE/ID/                                                 containers, as their cgroupsPath says

Who puts a process into a cgroup must be allowed to write where both ways meet (cgroups(7), "Delegation containment").
A daemon that was started from a login session or over SSH is outside of the manager's part, and so are the shims that
it forks; one that a command in some service started would end with that service. So a daemon that is no service itself
has itself moved into a scope of its own first.
"""

from __future__ import annotations

import os
import posixpath

from wherry.linux.cgroups import systemd
from wherry.linux.cgroups.layout import DELEGATED, Mode, host, own_cgroups
from wherry.linux.dbus import DBusError

_HOLDER = "holder"
# a manager that doesn't answer must not keep the daemon from starting
_PATIENCE = 5.0


def claim(holder: int) -> str:
    """Get a part of the tree for a user's containers; for the daemon, in its user namespace, before it serves.

    `holder` is the process that holds the namespaces. The layout names the part afterwards, and the environment, for
    the fork server. Returns "", or why there is none.
    """
    os.environ.pop(DELEGATED, None)
    layout = host()
    layout.delegated = ""
    if layout.mode != Mode.V2 or layout.v2 is None:
        return "cgroups of version 1 can't be delegated"
    tree = layout.v2.mountpoint
    try:
        base = _of(holder) or _ask(holder, tree)
        _come_near(tree, base)
    except (OSError, DBusError) as error:
        return f"systemd's user manager gives none ({error})"
    os.environ[DELEGATED] = layout.delegated = base
    return ""


def _of(holder: int) -> str:
    """The part that the holder lives in since an earlier daemon; "" where it lives in none."""
    base, name = posixpath.split(own_cgroups(holder)[""])
    return base if name == _HOLDER and posixpath.basename(base) == _scope(holder) else ""


def _scope(holder: int) -> str:
    return f"wherry-containers-{holder}.scope"


def _ask(holder: int, tree: str) -> str:
    systemd.Unit(_scope(holder), user=True).adopt(holder, "Containers of wherryd", _PATIENCE)
    base = own_cgroups(holder)[""]
    if posixpath.basename(base) != _scope(holder):
        raise OSError(f"process {holder} was left in {base}")
    place = f"{tree}{base}/{_HOLDER}"
    os.mkdir(place, 0o755)
    with open(f"{place}/cgroup.procs", "w", encoding="ascii") as file:
        file.write(str(holder))
    return base


def _come_near(tree: str, base: str) -> None:
    """Make sure that this process may put others into the part, as its shims will, and ends with nobody else."""
    own, pid = own_cgroups()[""], os.getpid()
    if posixpath.basename(own) == f"wherryd-{pid}.scope":
        return
    common = posixpath.commonpath([own, base])
    service = os.environ.get("SYSTEMD_EXEC_PID") == str(pid)  # systemd.exec(5)
    if not service or not os.access(f"{tree}{common}/cgroup.procs", os.W_OK):
        systemd.Unit(f"wherryd-{pid}.scope", user=True).adopt(pid, "wherryd", _PATIENCE)
