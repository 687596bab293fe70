"""Control groups of containers: v2, v1 and hybrid hosts behind one class.

    cgroup = plan(spec["linux"].get("cgroupsPath", ""), container_id)
    cgroup.create(); cgroup.apply(resources)
    fd = cgroup.clone_fd()        # v2: clone3(CLONE_INTO_CGROUP, cgroup=fd); v1: -1, the child calls cgroup.join()
    ...
    cgroup = restore(paths)       # later, from the paths in the state file
    cgroup.kill(); cgroup.delete()

On a hybrid host containers live in the v1 hierarchies, as with runc.
"""

# ruff: noqa: PLC0415 - a host has one version; who forks loads both before (`wherry.runtime.container.preload`)

from __future__ import annotations

from wherry.linux.cgroups.interface import Cgroup, OomWatch, Stats
from wherry.linux.cgroups.layout import Layout, Mode, host

TYPE_CHECKING = False  # typing alone would cost as much as a container's cgroups; type checkers know the name
if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Cgroup", "Layout", "Mode", "OomWatch", "Stats", "host", "plan", "restore"]


def plan(cgroups_path: str, container_id: str, *, exact: bool = False) -> Cgroup:
    """The cgroup for the spec's `linux.cgroupsPath`; makes nothing.

    An absolute path is below the root of the hierarchy, or of the part of it that an ordinary user was given (unless it
    is `exact`, because systemd said it); a relative one is below the caller's own cgroup (on v2 beside
    it: a cgroup with processes can't delegate controllers); an empty one means the container's id as a relative path
    (rules of runc's fs drivers). Raises ValueError for a path that leaves the hierarchy.
    """
    layout = host()
    if layout.mode is Mode.V2:
        from wherry.linux.cgroups.v2 import CgroupV2

        return CgroupV2.plan(layout, cgroups_path, container_id, exact=exact)
    from wherry.linux.cgroups.v1 import CgroupV1

    return CgroupV1.plan(layout, cgroups_path, container_id)


def restore(paths: Mapping[str, str]) -> Cgroup:
    """The cgroup with these directories (`Cgroup.paths` of the object that made it)."""
    if "" in paths:
        from wherry.linux.cgroups.v2 import CgroupV2

        unified = host().v2
        return CgroupV2(paths[""], unified.mountpoint if unified is not None else "/sys/fs/cgroup")
    from wherry.linux.cgroups.v1 import CgroupV1

    return CgroupV1(dict(paths))
