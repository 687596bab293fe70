"""Walks the bundled runtime's way to a container in the fork server, as `warming.py` walks the shim's.

The runtime works in a child of the shim, so what CPython learns there about its code is lost with it; here it is learnt
by the process that all of them are forks of. Containers are made in earnest, with their namespaces and mounts, up to
the point where `start` would execute their program; but not their cgroups: that part works on ordinary files in a
folder of the same shape (cgroup v1; on v2 it isn't walked, because a process can't be born in a folder).
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterable
from typing import Any, Final

from wherry.linux import cgroups
from wherry.linux.cgroups.layout import Mode
from wherry.linux.cgroups.v1 import CgroupV1
from wherry.runtime import borrowed, container, create, default_spec, make, prepare
from wherry.runtime.container import CreateRequest

# in a v1 cgroup's directory: what a container's creation reads and writes
_FILES: Final[dict[str, dict[str, str]]] = {
    "": {"tasks": "", "cgroup.procs": ""},
    "devices": {"devices.allow": "", "devices.deny": "", "devices.list": "a *:* rwm\n"},
    "cpuset": {"cpuset.cpus": "0\n", "cpuset.mems": "0\n"},
}
# where an image has its folders
_FOLDERS: Final = ("bin", "dev", "etc", "proc", "root", "run", "sys", "tmp")


def walk_runtime(folder: str, rounds: Iterable[int]) -> None:
    """Make a container for each round below `folder`, and end it.

    Raises OSError or ContainerError where that can't be done.

    The first one is made by a child: if something here ends who makes containers, it is not the fork server.
    """
    root = f"{folder}/rootfs"
    for path in (folder, root, *(f"{root}/{part}" for part in _FOLDERS)):
        os.mkdir(path)
    for path in (f"{root}/bin/true", f"{root}/etc/passwd"):
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o755))
    paths = _cgroup(f"{folder}/cgroup")
    try:
        container.forked(_one, folder, "0", paths)
        for number in rounds:
            _one(folder, str(number + 1), paths)
    finally:
        # The caller is a subreaper and has no other children. One whose maker died before it told its number is among
        # them; not waited for it would be a zombie for the fork server's life.
        with contextlib.suppress(ChildProcessError):
            while True:
                os.wait()


def _one(folder: str, name: str, paths: dict[str, str]) -> int:
    """Make a container and kill it; the pid. The caller waits for it later, because that takes the kernel a while."""
    plan = create.begin(CreateRequest(f"{folder}/r", f"warm{name}", folder, spec=_spec(), stdio=(0, 1, 2)))
    try:
        plan.cgroup = CgroupV1(paths) if paths else None
        plan.state.save()
        if plan.cgroup is not None:
            plan.cgroup.create()
            plan.cgroup.apply(plan.linux["resources"])
        plan.open_namespaces()
        prepare.open_start_files(plan)
        prepare.open_mounts(plan)
        if not borrowed.serves(plan):
            raise OSError("containers aren't made this way here")
        plan.state.save_spec(plan.spec)

        def recorded(pid: int) -> None:
            make.record(plan, pid)
            # before it is told that it is recorded: until then it ends by itself when this process is killed
            os.kill(pid, signal.SIGKILL)

        return borrowed.spawn(plan, recorded)
    finally:
        plan.close()
        if plan.lock is not None:
            plan.lock.close()
        plan.state.remove()


def _cgroup(folder: str) -> dict[str, str]:
    """A cgroup's directories made of ordinary files; none on v2."""
    layout = cgroups.host()
    if layout.mode is Mode.V2:
        return {}
    paths = {name: f"{folder}/{name.removeprefix('name=')}" for name in layout.v1}
    os.mkdir(folder)
    for controller, path in paths.items():
        os.makedirs(path, exist_ok=True)
        for name, text in {**_FILES[""], **_FILES.get(controller, {})}.items():
            with open(f"{path}/{name}", "w") as file:
                file.write(text)
    return paths


def _spec() -> dict[str, Any]:
    """The usual container, but for a network namespace: it costs the kernel more than all the rest.

    In a user namespace it has one all the same: /sys shows the network, and is mounted by who owns that.
    """
    spec = default_spec.make()
    spec["process"].update(args=["true"], env=["PATH=/usr/bin:/bin"], terminal=False, capabilities=_capabilities())
    spec["root"]["readonly"] = False
    spec["linux"]["namespaces"] = [{"type": kind} for kind in ("pid", "ipc", "uts", "mount")]
    if cgroups.host().user_namespace:
        spec["linux"]["namespaces"].append({"type": "network"})
    spec["mounts"] = [item for item in spec["mounts"] if item["type"] != "cgroup"]
    spec["mounts"].append(
        {"destination": "/run", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]}
    )
    return spec


def _capabilities() -> dict[str, list[str]]:
    names = [f"CAP_{name}" for name in ("CHOWN", "KILL", "SETUID", "SETGID", "NET_BIND_SERVICE", "SYS_CHROOT", "MKNOD")]
    return dict.fromkeys(("bounding", "effective", "permitted"), names)
