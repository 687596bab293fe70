"""What a host allows an ordinary user: checks of `wherry doctor`, which `wherry info` shows, too."""

from __future__ import annotations

import ctypes
import errno
import os
import pwd
import shutil
import stat
import tempfile
from collections.abc import Callable

from wherry.client.finding_host import FAILURE, OK, WARNING, Check, Finding, in_child, read, tools
from wherry.core import places
from wherry.linux import fuse
from wherry.linux import syscalls as sc
from wherry.linux.cgroups.layout import Mode, host
from wherry.linux.rootless import granted, refusal


def _user_namespace() -> Finding:
    """Tried out: a child makes one."""
    code = in_child(lambda: sc.unshare(sc.CLONE_NEWUSER | sc.CLONE_NEWNS))
    if not code:
        return Finding("user namespaces", OK, "may be made")
    why, hints = refusal(OSError(code, os.strerror(code)))
    return Finding("user namespaces", FAILURE, why, "; ".join(hints))


def _granted_ids() -> Finding:
    uid = places.user_id()
    name = _name(uid)
    uids, gids = granted("/etc/subuid", name, uid), granted("/etc/subgid", name, uid)
    if not (uids and gids):
        advice = f"as root: usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {name}"
        return Finding("ids", WARNING, "only one's own: all files of images belong to it", advice)
    for tool in ("newuidmap", "newgidmap"):
        path = shutil.which(tool)
        if path is None:
            return Finding("ids", FAILURE, f"granted, but {tool} is missing", "install uidmap (shadow-utils)")
        if not _has_rights(path):
            advice = f"as root: chmod u+s {path}, or setcap cap_set{tool[3]}id=ep {path}; and no nosuid mount"
            return Finding("ids", FAILURE, f"granted, but {path} has lost its rights", advice)
    total = min(sum(item.size for item in uids), sum(item.size for item in gids))
    if total < 65535:
        return Finding("ids", WARNING, f"{total} besides one's own", "images use ids up to 65535: grant 65536")
    return Finding("ids", OK, f"{total} besides one's own")


def _name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _has_rights(path: str) -> bool:
    if os.statvfs(path).f_flag & os.ST_NOSUID:
        return False
    if os.stat(path).st_mode & stat.S_ISUID:
        return True
    try:
        return bool(os.getxattr(path, "security.capability"))
    except OSError:
        return False


def _overlay() -> Finding:
    """Tried out where the images are: by the kernel, else by the program."""
    asked = os.environ.get("WHERRY_OVERLAY", "")
    code = 0 if asked in {"fuse", "copies"} else _try_overlay()
    if not code and not asked:
        return Finding("layers", OK, "overlayfs by the kernel")
    if asked != "copies" and fuse.program() and os.access("/dev/fuse", os.R_OK | os.W_OK):
        return Finding("layers", OK, "overlayfs by fuse-overlayfs")
    advice = "Linux 5.11 or newer and a local file system; or install fuse-overlayfs, and let users open /dev/fuse"
    why = f"WHERRY_OVERLAY={asked}" if asked else f"the kernel refuses overlays: {os.strerror(code)}"
    return Finding("layers", WARNING, f"full copies, which are slow: {why}", advice)


def _try_overlay() -> int:
    """0, or the errno with which an overlay in a user namespace is refused."""
    place = places.root()
    while not os.path.isdir(place):
        place = os.path.dirname(place)
    try:
        folder = tempfile.mkdtemp(prefix=".wherry-doctor-", dir=place)
    except OSError as error:
        return error.errno or 1

    def work() -> None:
        uid, gid = os.getuid(), os.getgid()
        sc.unshare(sc.CLONE_NEWUSER | sc.CLONE_NEWNS)
        for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
            with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
                file.write(text)
        for name in ("lower", "upper", "work", "merged"):
            os.mkdir(f"{folder}/{name}")
        layers = f"lowerdir={folder}/lower,upperdir={folder}/upper,workdir={folder}/work,userxattr"
        sc.mount("overlay", f"{folder}/merged", "overlay", 0, layers)

    try:
        return in_child(work)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _delegated() -> Finding:
    """Which controllers systemd's user manager was given (v2)."""
    if host().mode != Mode.V2:
        return Finding(
            "limits", WARNING, "none: not on cgroup version 1", "without delegation --memory and others are refused"
        )
    place = f"/sys/fs/cgroup/user.slice/user-{places.user_id()}.slice/user@{places.user_id()}.service"
    try:
        with open(f"{place}/cgroup.controllers", encoding="ascii") as file:
            controllers = file.read().split()
    except OSError:
        advice = "loginctl enable-linger, or log in by a login manager: systemd's user manager delegates cgroups"
        return Finding("limits", WARNING, "no cgroup of one's own", advice)
    wanted = {"cpu", "memory", "pids"}
    if wanted - set(controllers):
        drop_in = "/etc/systemd/system/user@.service.d/delegate.conf: [Service] Delegate=cpu cpuset io memory pids"
        return Finding(
            "limits", WARNING, f"only {', '.join(controllers) or 'nothing'} delegated", f"as root, in {drop_in}"
        )
    return Finding("limits", OK, ", ".join(controllers))


def _runtime_folder() -> Finding:
    folder = os.environ.get("XDG_RUNTIME_DIR")
    if not folder:
        return Finding("XDG_RUNTIME_DIR", WARNING, f"not set: {places.runtime_folder()} is used", "log in, or set it")
    if not os.access(folder, os.W_OK):
        return Finding("XDG_RUNTIME_DIR", FAILURE, f"{folder} can't be written", "log in as this user (not with su)")
    return Finding("XDG_RUNTIME_DIR", OK, folder)


def _lingering() -> Finding | None:
    if not os.path.isdir("/run/systemd/system"):
        return None
    name = _name(places.user_id())
    if os.path.exists(f"/var/lib/systemd/linger/{name}"):
        return Finding("lingering", OK, "containers go on after the last logout")
    return Finding("lingering", WARNING, "containers end with the last logout", f"loginctl enable-linger {name}")


def _network() -> Finding:
    found = tools("network", ("pasta", "slirp4netns"), "networks without root", "passt, or slirp4netns")
    if found.status == OK and not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        return Finding("network", WARNING, f"{found.found}, but /dev/net/tun can't be opened", "as root: modprobe tun; "
                       "chmod 666 /dev/net/tun (udev's default)")  # fmt: skip
    return found


def _named_networks() -> Finding:
    """Tried out: a child makes a bridge and a table of rules in a network namespace of its own."""

    def work() -> None:
        sc.unshare(sc.CLONE_NEWUSER | sc.CLONE_NEWNET)
        library = ctypes.CDLL("libnftables.so.1")
        library.nft_ctx_new.restype = ctypes.c_void_p
        rules = ctypes.c_char_p(b"table inet wherry_doctor { }")
        if library.nft_run_cmd_from_buffer(ctypes.c_void_p(library.nft_ctx_new(0)), rules):
            raise OSError(errno.EOPNOTSUPP, "nftables")

    code = in_child(work)
    if code:
        return Finding("named networks", WARNING, "no rules of nftables", "install libnftables1; modprobe nf_tables")
    return Finding("named networks", OK, "bridges and rules in a namespace of one's own")


def _low_ports() -> Finding:
    first = int(read("/proc/sys/net/ipv4/ip_unprivileged_port_start") or 1024)
    return Finding("ports", OK, f"{first} and above can be published")


def _ping() -> Finding:
    low, high = map(int, read("/proc/sys/net/ipv4/ping_group_range").split() or ("1", "0"))
    if low <= os.getgid() <= high:
        return Finding("ping", OK, "without rights")
    return Finding("ping", WARNING, "not to the outside", "sysctl net.ipv4.ping_group_range='0 2147483647'")


def _quotas() -> Finding:
    """Each container has a keyring of its own, and what runs in it may watch files: both are counted by user."""
    keys, watches = read("/proc/sys/kernel/keys/maxkeys"), read("/proc/sys/fs/inotify/max_user_instances")
    few = [f"kernel.keys.maxkeys={keys}"] if keys.isdigit() and int(keys) < 200 else []
    few += [f"fs.inotify.max_user_instances={watches}"] if watches.isdigit() and int(watches) < 128 else []
    if few:
        return Finding("quotas", WARNING, ", ".join(few), "raise them where many containers run: sysctl")
    return Finding("quotas", OK, f"{keys} keys, {watches} watchers of files")


CHECKS: tuple[Check, ...] = (
    _user_namespace,
    _granted_ids,
    _runtime_folder,
    _overlay,
    _delegated,
    _lingering,
    _network,
    _named_networks,
    _low_ports,
    _ping,
    _quotas,
)

SHOWN: tuple[Callable[[], Finding], ...] = (_granted_ids, _overlay, _network, _named_networks, _low_ports, _delegated)
"""What `wherry info` says."""
