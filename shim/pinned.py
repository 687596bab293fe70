"""A pod without a pause process: namespaces that a mount of their file keeps alive, and where pids are shared, a
process that is PID 1 for all of them.

    BUNDLE/ns/ipc, uts, net, pid      what the pod's containers join by path
    BUNDLE/sandbox.json               the reaper's pid and start time, for whoever cleans up after the shim

Called in a forked child of the shim, which unshares what the pod is to have and binds its own namespaces to files. The
reaper is a grandchild; the shim, being a subreaper, becomes its parent. It has nothing that a container in its pid
namespace could take by /proc/1: no descriptor, an empty read-only root, no capability, no rights of root.

A pod with a user namespace (`user`, with uidMappings and gidMappings) has all of its other namespaces within it. A
child makes them; its users are mapped, and the files are bound, from outside.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
from typing import Any, Final, NoReturn

from wherry.core import errors
from wherry.linux import capabilities, mounts
from wherry.linux import syscalls as sc
from wherry.linux.namespaces import FLAGS, PROC_NAMES, path_of
from wherry.linux.process import is_alive, set_dumpable, set_process_title, start_time
from wherry.runtime import kernel
from wherry.shim.state_files import write_file

# what containers of a pod can share; their mounts are their own
KINDS: Final = ("network", "ipc", "uts", "pid", "user")
# the user that pause images run as; nobody has it
_NOBODY: Final = 65535
_FOLDER: Final = "ns"
_RECORD: Final = "sandbox.json"
_HERE: Final = -100  # AT_FDCWD


def wanted(spec: dict[str, Any], netns: str) -> tuple[dict[str, str], list[str]]:
    """The namespaces of a pod's specification: those that are joined by path, and those that are made.

    `netns` is the network namespace where the specification names none. Raises InvalidArgument for kinds that a pod
    can't have.
    """
    joined: dict[str, str] = {}
    made: list[str] = []
    for entry in (spec.get("linux") or {}).get("namespaces") or []:
        kind, path = str(entry.get("type")), str(entry.get("path") or "")
        if kind in ("mount", "cgroup"):  # each container has its own
            continue
        if kind not in KINDS:
            raise errors.InvalidArgument(f"a sandbox can't have a {kind} namespace without a process: invalid argument")
        path = path or (netns if kind == "network" else "")
        if path:
            joined[kind] = path
        else:
            made.append(kind)
    if netns and "network" not in made:
        joined.setdefault("network", netns)
    linux = spec.get("linux") or {}
    if "user" in made and not (linux.get("uidMappings") and linux.get("gidMappings")):
        raise errors.InvalidArgument("a sandbox's user namespace needs uidMappings and gidMappings: invalid argument")
    if "user" in made and joined:
        raise errors.InvalidArgument(
            f"a sandbox with a user namespace can't join namespaces of others ({', '.join(joined)}): invalid argument"
        )
    return joined, made


def pin(bundle: str, spec: dict[str, Any], joined: dict[str, str], made: list[str]) -> int:
    """Make the namespaces and bind them to files; the reaper's pid, 0 for none. In a child that ends after this."""
    os.makedirs(f"{bundle}/{_FOLDER}", 0o711, exist_ok=True)
    if "user" in made:
        return _pin_owned(bundle, spec, made)
    if "network" in joined:  # for the network's sysctls
        fd = os.open(joined["network"], os.O_RDONLY | os.O_CLOEXEC)
        sc.setns(fd, sc.CLONE_NEWNET)
        os.close(fd)
    _unshare(spec, made)
    for kind in made:
        if kind != "pid":
            _bind(path_of(kind), pinned_path(bundle, kind))
    if "pid" not in made:
        return 0
    os.chdir(f"{bundle}/{_FOLDER}")
    reaper = _start_reaper()
    _keep(bundle, reaper)
    return reaper


def _unshare(spec: dict[str, Any], made: list[str]) -> None:
    """Make all but the pid and the user namespace, and set in them what the specification says."""
    flags = 0
    for kind in made:
        if kind not in ("pid", "user"):
            flags |= FLAGS[kind]
    sc.unshare(flags)
    if "uts" in made:
        kernel.set_names(spec)
    if "network" in made:
        kernel.loopback_up()
    kernel.write_sysctls((spec.get("linux") or {}).get("sysctl") or {})


def _keep(bundle: str, reaper: int) -> None:
    # before anything can fail: who cleans up must know of it
    write_file(f"{bundle}/{_RECORD}", json.dumps({"pid": reaper, "started": start_time(reaper)}).encode())
    _bind(path_of("pid", reaper), pinned_path(bundle, "pid"))


def _pin_owned(bundle: str, spec: dict[str, Any], made: list[str]) -> int:
    """`pin` where all of it belongs to a user namespace."""
    asked, answer = os.pipe()
    wait, go = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(asked)
        os.close(go)
        _make_owned(bundle, spec, made, answer, wait)
    os.close(answer)
    os.close(wait)
    reaper = 0
    try:
        _expect(asked, "unshared")
        for key, name in (("uidMappings", "uid_map"), ("gidMappings", "gid_map")):
            entries = (spec.get("linux") or {}).get(key) or []
            lines = [f"{each['containerID']} {each['hostID']} {each['size']}" for each in entries]
            with open(f"/proc/{pid}/{name}", "w") as file:
                file.write("\n".join(lines))
        os.write(go, b"mapped")
        reaper = int(_expect(asked, "made"))
        for kind in made:
            if kind != "pid":
                _bind(path_of(kind, pid), pinned_path(bundle, kind))
        if reaper:
            _keep(bundle, reaper)
    except BaseException:
        if reaper:
            os.kill(reaper, signal.SIGKILL)
        raise
    finally:
        os.close(go)  # the child ends
        os.close(asked)
        os.waitpid(pid, 0)
    return reaper


def _expect(fd: int, word: str) -> str:
    """What follows a word that the child sends; a child that can't go on sends another one."""
    said = os.read(fd, 4096).decode(errors="replace")
    head, _, rest = said.partition(" ")
    if head != word:
        raise errors.Internal(f"the sandbox's user namespace: {said or 'its maker died'}")
    return rest


def _make_owned(bundle: str, spec: dict[str, Any], made: list[str], answer: int, wait: int) -> NoReturn:
    """The child of `_pin_owned`: it is there until what it made was bound to files."""
    try:
        set_process_title(["/pause"], "pause")  # for the reaper, which has no right to it
        os.chdir(f"{bundle}/{_FOLDER}")  # whose path may be closed to the pod's users
        sc.unshare(sc.CLONE_NEWUSER)
        os.write(answer, b"unshared ")
        if os.read(wait, 16) == b"mapped":
            os.setresgid(0, 0, 0)
            os.setresuid(0, 0, 0)
            _unshare(spec, made)
            reaper = _start_reaper(title=False) if "pid" in made else 0
            os.write(answer, f"made {reaper}".encode())
            os.read(wait, 1)  # the other end is closed when all is bound
    except BaseException as error:  # noqa: BLE001  # told to the parent, which raises it
        with contextlib.suppress(OSError):
            os.write(answer, f"{type(error).__name__}: {error}".encode()[:4000])
    finally:
        os._exit(0)


def pinned_path(bundle: str, kind: str) -> str:
    """Where a namespace is found."""
    return f"{bundle}/{_FOLDER}/{PROC_NAMES.get(kind, kind)}"


def unpin(bundle: str) -> None:
    """Undo `pin`, also after a shim that died; fine if there is nothing."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        with open(f"{bundle}/{_RECORD}", "rb") as file:
            record = json.load(file)
        if is_alive(int(record["pid"]), int(record["started"])):
            os.kill(int(record["pid"]), signal.SIGKILL)
    folder = f"{bundle}/{_FOLDER}"
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return
    for name in names:
        mounts.unmount_all(f"{folder}/{name}", sc.MNT_DETACH)
        os.unlink(f"{folder}/{name}")
    os.rmdir(folder)


def _bind(namespace: str, path: str) -> None:
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o444))
    sc.mount(namespace, path, "", sc.MS_BIND)


def _start_reaper(*, title: bool = True) -> int:
    """PID 1 of a new pid namespace, which gets its `title`. The working directory is the folder of the namespaces."""
    sc.unshare(sc.CLONE_NEWPID)
    ready, tell = os.pipe()
    pid = os.fork()
    if not pid:
        _reap_for_ever(tell, title)
    os.close(tell)
    said = os.read(ready, 4096)  # "" when it died
    os.close(ready)
    if said != b"ready":
        raise errors.Internal(f"the sandbox's first process: {said.decode(errors='replace') or 'it died'}")
    return pid


def _mount_empty() -> int:
    """An empty file system over the working directory; its root. By descriptor: the path there may be closed to us."""
    made = sc.fsopen("tmpfs")
    for key, value in (("size", "4k"), ("nr_inodes", "2"), ("mode", "555")):
        sc.fsconfig_string(made, key, value)
    sc.fsconfig_create(made)
    root = sc.fsmount(made, sc.MOUNT_ATTR_NOSUID | sc.MOUNT_ATTR_NODEV | sc.MOUNT_ATTR_NOEXEC)
    sc.move_mount(root, "", _HERE, ".", sc.MOVE_MOUNT_F_EMPTY_PATH)
    os.close(made)
    return root


def _reap_for_ever(tell: int, title: bool) -> NoReturn:
    """PID 1 of the pod: reaps what nobody else waits for, does nothing else, and can be killed from outside alone."""
    try:
        os.setsid()
        if title:
            set_process_title(["/pause"], "pause")
        null = os.open("/dev/null", os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        os.dup2(tell, 3)
        os.set_inheritable(3, False)
        sc.close_range(4)
        sc.unshare(sc.CLONE_NEWNS)
        sc.mount("", "/", "", sc.MS_REC | sc.MS_PRIVATE)
        empty = _mount_empty()
        os.fchdir(empty)
        os.close(empty)
        sc.pivot_root(".", ".")
        sc.umount2(".", sc.MNT_DETACH)
        sc.mount("", "/", "", sc.MS_REMOUNT | sc.MS_BIND | sc.MS_RDONLY | sc.MS_NOSUID | sc.MS_NODEV | sc.MS_NOEXEC)
        capabilities.drop_bounding(0)
        os.setgroups([])
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)
        sc.prctl(sc.PR_SET_NO_NEW_PRIVS, 1)
        set_dumpable(False)
        # the kernel reaps for a parent that ignores its children's ends; other signals don't reach PID 1
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)
        os.write(3, b"ready")
        os.close(3)
        while True:
            signal.pause()
    except BaseException as error:  # noqa: BLE001  # nothing may return into the shim's code
        with contextlib.suppress(OSError):
            os.write(3, f"{type(error).__name__}: {error}".encode()[:4000])
    finally:
        os._exit(1)
