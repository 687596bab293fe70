"""`restore`: a container from what `checkpoint` wrote. criu makes the processes; the rest is as in `create.py`.

criu is started from a mount namespace of its own, in which the root is bound to a place below the state's folder (it
wants a mount point there), so that nothing is left to unmount whoever is killed. Before it gets its request it is in
the container's cgroup, and so is what it makes, of which the first process becomes the caller's child.
"""

from __future__ import annotations

import os
import stat

from wherry.core.errors import WherryError
from wherry.linux import syscalls as sc
from wherry.linux.cgroups.layout import own_cgroups
from wherry.linux.mounts import Options as MountOptions
from wherry.linux.namespaces import open_namespace
from wherry.runtime import console, create, criu, hooks, make, prepare, quickjson
from wherry.runtime import criu_messages as messages
from wherry.runtime.checkpoint import DESCRIPTORS, EXTERNAL, Folders, host_mounts, inside
from wherry.runtime.errors import PRECONDITION, ContainerError
from wherry.runtime.root import Root
from wherry.runtime.spec import namespaces_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Self

    from wherry.runtime.checkpoint import Options
    from wherry.runtime.container import CreateRequest
    from wherry.runtime.plan import Plan

_LOG = "restore.log"
_ROOT = "criu-root"
#: What criu calls the namespaces that it joins itself.
_NAMES = {"mount": "mnt", "uts": "uts", "ipc": "ipc", "user": "user", "time": "time"}


def restore(request: CreateRequest, options: Options) -> int:
    """See `container.restore`."""
    if os.geteuid():
        raise ContainerError("restore takes root: criu does", PRECONDITION)
    criu.version(options.criu)
    plan = create.begin(request)
    try:
        plan.kinds = namespaces_of(plan.spec)
        create.make_cgroup(plan, request)
        plan.state.save_spec(plan.spec)
        prepare.open_console(plan, request.console_socket, request.console_fd)
        hooks.preload(plan.spec)
        os.mkdir(os.path.join(plan.state.folder, _ROOT), 0o755)
        try:
            return _converse(plan, request, options)
        finally:
            os.rmdir(os.path.join(plan.state.folder, _ROOT))
    except BaseException as error:
        create.undo(plan, error)
        if isinstance(error, (OSError, WherryError, ValueError)):
            raise ContainerError(create.text_of(error)) from error
        raise
    finally:
        create.end(plan, request)


def _converse(plan: Plan, request: CreateRequest, options: Options) -> int:
    """Start criu, have it restore, and record what it made; returns init's pid."""
    restored = 0

    def notified(script: str, pid: int, fds: list[int]) -> None:
        nonlocal restored
        if script == "setup-namespaces":
            _run_hooks(plan, pid)
        elif script == "orphan-pts-master" and fds and plan.console >= 0:
            console.send_master(plan.console, fds[0], "/dev/pts/0")
        elif script == "post-restore":  # it is there, and still stands still: from here on the state names it
            restored = pid
            make.record(plan, pid)
            if request.pid_file:
                make.write_pid_file(request.pid_file, pid)

    inherited = _external_namespaces(plan)
    with _Mounts():
        _mount_root(plan)
        folders = Folders(options, make=False)
        swrk = criu.Swrk(options.criu, passed=list(plan.joined.values()), stdio=plan.stdio)
    try:
        opts = {**folders.opts, **_opts(plan, options)}
        opts["inherit_fd"] = inherited + _inherited_pipes(options.image_path)
        opts["cg_root"] = _move_into_cgroup(plan, swrk.pid)
        answer = swrk.ask({"type": messages.RESTORE, "opts": opts}, notified)
        return restored or int((answer.get("restore") or {}).get("pid", 0))
    except BaseException as error:
        if isinstance(error, ContainerError):
            error.message += criu.quoted(folders.logs, _LOG)
        if restored:
            make.kill(restored)
        raise
    finally:
        swrk.close()
        folders.close()


def _move_into_cgroup(plan: Plan, pid: int) -> list[dict[str, str]]:
    """What criu makes is where criu is; and that is what the roots of its images' cgroups are now."""
    if plan.cgroup is not None:
        plan.cgroup.add(pid)
    return [{"ctrl": name, "path": path} for name, path in own_cgroups(pid).items()]


def _opts(plan: Plan, options: Options) -> dict[str, Any]:
    """What only restoring asks for."""
    path = os.path.realpath(os.path.join(plan.state.folder, _ROOT))
    root = Root(plan.state.rootfs)
    try:
        mounts = {inside(root, to): source for to, source in host_mounts(plan.spec, plan.state.cgroup_paths)}
    finally:
        os.close(root.fd)
    mounts["/dev/null"] = "/dev/null"  # what lies on masked files
    return {
        **options.common(plan.state.annotations),
        "log_file": _LOG,
        "evasive_devices": True,
        "rst_sibling": True,
        "root": path,
        "ext_mnt": [
            {"key": to, "val": os.path.normpath(os.path.join(plan.state.bundle, source))}
            for to, source in mounts.items()
        ],
        "join_ns": [
            {"ns": _NAMES[kind], "ns_file": path} for kind, path in plan.kinds.items() if path and kind in _NAMES
        ],
        "lsm_profile": options.lsm_profile or None,
        "lsm_mount_context": options.lsm_mount_context or None,
    }


def _external_namespaces(plan: Plan) -> list[dict[str, Any]]:
    """Open the namespaces that criu doesn't restore but enters (`plan.joined`); how it finds them there."""
    inherited = []
    for kind, path in plan.kinds.items():
        if path and kind == "cgroup":
            raise ContainerError("criu can't restore a container into another cgroup namespace", PRECONDITION)
        if not path or kind not in EXTERNAL:
            continue
        inherited.append({"key": EXTERNAL[kind][1], "fd": criu.FIRST_PASSED + len(plan.joined)})
        try:
            plan.joined[kind] = open_namespace(path)  # closed with the plan
        except OSError as error:
            raise ContainerError(f"failed to open {path}: {error.strerror}") from None
    return inherited


def _inherited_pipes(folder: str) -> list[dict[str, Any]]:
    """Standard streams that were pipes when the container was written are the caller's now."""
    path = os.path.join(folder, DESCRIPTORS)
    with open(path, "rb") as file:
        try:
            names = quickjson.loads(file.read())
        except ValueError as error:
            raise ContainerError(f"{path}: not JSON: {error}") from None
    return [{"key": name, "fd": fd} for fd, name in enumerate(names[:3]) if isinstance(name, str) and "pipe:" in name]


def _run_hooks(plan: Plan, pid: int) -> None:
    values = {**plan.state.oci("creating"), "pid": pid}
    hooks.run(plan.spec, "prestart", values)
    hooks.run(plan.spec, "createRuntime", values)


# -- the mounts that criu begins with ---------------------------------------------------------------------------------


class _Mounts:
    """A mount namespace for criu: this process makes it, opens what criu is to find in it, starts criu, and leaves.

    (criu reaches its folders through our descriptors, and mounts in them: so they have to be of its own namespace.)
    """

    def __enter__(self) -> Self:
        self._before = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
        self._cwd = os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        sc.unshare(sc.CLONE_NEWNS)
        sc.mount("", "/", "", sc.MS_SLAVE | sc.MS_REC)
        return self

    def __exit__(self, *_: object) -> None:
        sc.setns(self._before, sc.CLONE_NEWNS)
        os.fchdir(self._cwd)
        os.close(self._before)
        os.close(self._cwd)


def _mount_root(plan: Plan) -> None:
    """The root, and in it every mount point that criu will want: it mounts, and makes no folders for it."""
    path = os.path.join(plan.state.folder, _ROOT)
    sc.mount(plan.state.rootfs, path, "bind", sc.MS_BIND | sc.MS_REC)
    root = Root(path)
    tmpfs: list[str] = []
    bound: list[int] = []
    for mount in plan.spec.get("mounts") or ():
        to = os.path.normpath("/" + mount["destination"].lstrip("/"))
        if any(to.startswith(above + "/") for above in tmpfs) or mount.get("type") in ("cgroup", "cgroup2"):
            continue  # criu brings back what was on a tmpfs, and on cgroup mounts the kernel does
        if mount.get("type") == "tmpfs":
            tmpfs.append(to)
        options = MountOptions(mount.get("options") or ())
        if mount.get("type") != "bind" and not options.flags & sc.MS_BIND:
            os.close(root.make_directory(to))
            continue
        source = os.path.normpath(os.path.join(plan.state.bundle, mount.get("source") or ""))
        is_directory = stat.S_ISDIR(os.stat(source).st_mode)
        target = root.make_directory(to) if is_directory else root.make_file(to)
        # bound for now, because a later mount may want a place within it
        root.bind(source, target, MountOptions(("rbind",)))
        os.close(target)
        bound.append(root.open(to))
    for fd in reversed(bound):
        sc.umount2(f"/proc/self/fd/{fd}", sc.MNT_DETACH)
        os.close(fd)
    os.close(root.fd)
