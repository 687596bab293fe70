"""A container's mounts, from the host's view of the root to the container's own.

    prepare      the host's mounts become slaves; the root is bound on itself: a mount point, as pivot_root wants it
    mount_all    config.json's mounts, in order; devices and links in /dev
    restrict     masked and read-only paths, /dev and the root read-only
    enter        pivot_root(2), and the host's mounts are gone

All of it runs in the container's mount namespace, as the process that will be its init. Whatever fails takes the
namespace with it, so nothing has to be undone by hand.
"""

# ruff: noqa: PLC0415 - each command pays only for the modules that it needs; `container.preload` loads them all

from __future__ import annotations

import errno
import os
import stat

from wherry.linux import mounts as m
from wherry.linux import syscalls as sc
from wherry.linux.cgroups.layout import host
from wherry.runtime import devices
from wherry.runtime.errors import ContainerError
from wherry.runtime.root import Root, attach, clone_tree, is_missing

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    Spec = dict[str, Any]

# What may be mounted below /proc: single files that lxcfs and others provide (runc's list)
_PROC_EXCEPTIONS = frozenset(
    f"/proc/{name}"
    for name in (
        "cpuinfo",
        "diskstats",
        "meminfo",
        "stat",
        "swaps",
        "uptime",
        "loadavg",
        "slabinfo",
        "net/dev",
        "sys/kernel/ns_last_pid",
        "sys/crypto/fips_enabled",
    )
)


# file systems that have labels of their own, and no option for one (runc's mountToRootfs)
_UNLABELLED = frozenset({"bind", "proc", "sysfs", "cgroup", "cgroup2", "mqueue"})


class Rootfs:
    """The mounts of one container. cgroup_paths: controller → directory ("" for v2), for mounts of type `cgroup`."""

    def __init__(self, path: str, spec: Spec, bundle: str, cgroup_paths: dict[str, str]) -> None:
        self.path = path
        self.bundle = bundle
        self.linux: Spec = spec.get("linux") or {}
        self.mounts: list[Spec] = spec.get("mounts") or []
        self.readonly = bool((spec.get("root") or {}).get("readonly"))
        self.cgroup_paths = cgroup_paths
        kinds = {item["type"] for item in self.linux.get("namespaces") or []}
        self.in_user_namespace = "user" in kinds
        self.has_cgroup_namespace = "cgroup" in kinds
        self.label = str(self.linux.get("mountLabel") or "")
        self.trees: dict[int, int] = {}
        self.root = Root("/")

    # -- phase 1 ----------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        propagation = m.PROPAGATION.get(self.linux.get("rootfsPropagation") or "rslave", sc.MS_SLAVE | sc.MS_REC)
        sc.mount("", "/", "", propagation)
        if propagation & sc.MS_SHARED:
            self._make_parent_private()
        sc.mount(self.path, self.path, "bind", sc.MS_BIND | sc.MS_REC)
        os.close(self.root.fd)
        self.root = Root(self.path)

    def _make_parent_private(self) -> None:
        """pivot_root(2) refuses a root whose parent mount is shared."""
        shared = [info for info in m.mountinfo() if any(tag.startswith("shared:") for tag in info.propagation)]
        above = [i.target for i in shared if (self.path + "/").startswith(i.target.rstrip("/") + "/")]
        if above:
            sc.mount("", max(above, key=len), "", sc.MS_PRIVATE)

    # -- phase 2 ----------------------------------------------------------------------------------------------------

    def mount_all(self) -> None:
        for number, mount in enumerate(self.mounts):
            self._mount(mount, self.trees.get(number, -1))
        if self._makes_dev():
            devices.make(self.root, self.linux, in_user_namespace=self.in_user_namespace)
            devices.make_links(self.root)

    def _makes_dev(self) -> bool:
        """Not where the configuration binds somebody's /dev."""
        for mount in self.mounts:
            if os.path.normpath(mount["destination"]) == "/dev":
                return mount.get("type") != "bind" and not {"bind", "rbind"} & set(mount.get("options") or ())
        return True

    def _mount(self, mount: Spec, tree: int) -> None:
        destination = os.path.normpath("/" + mount["destination"].lstrip("/"))
        options = m.Options(o for o in mount.get("options") or () if o not in m.OURS)
        source = mount.get("source") or ""
        fstype = mount.get("type") or ""
        if fstype not in _UNLABELLED and not options.flags & sc.MS_BIND:
            options.data = self._labelled(options.data)
        try:
            _check_proc(destination, source, fstype)
            if tree >= 0:
                self._attach(tree, destination)
            elif fstype == "bind" or options.flags & sc.MS_BIND:
                self._bind(source, destination, options, fstype)
            elif fstype in ("cgroup", "cgroup2"):
                self._mount_cgroup(destination, options)
            elif fstype == "tmpfs":
                self._mount_tmpfs(source, destination, options, copy_up="tmpcopyup" in (mount.get("options") or ()))
            else:
                self._mount_filesystem(fstype, source, destination, options)
        except OSError as error:
            flags = m.describe_flags(options.flags)
            detail = f" (flags {flags}, data {options.data!r})" if options.flags or options.data else ""
            missing = fstype == "bind" or options.flags & sc.MS_BIND
            what = f"stat {source}: " if missing and is_missing(error) and not os.path.lexists(source) else ""
            text = (error.strerror or str(error)).lower() if what else f"{error.strerror}{detail}"
            raise ContainerError(f'error mounting "{source}" to rootfs at "{destination}": {what}{text}') from None

    def _labelled(self, data: str) -> str:
        """Options with SELinux's label for all that is in the mount; it has commas, so it is quoted."""
        if not self.label or "context=" in data:
            return data
        return f'{data},context="{self.label}"'.lstrip(",")

    def _mount_filesystem(self, fstype: str, source: str, destination: str, options: m.Options) -> None:
        if fstype in ("proc", "sysfs"):
            # A symlink there would put the container's /proc elsewhere, and a faked one in its place.
            self._refuse_symlink(destination, fstype)
        target = self.root.make_directory(destination)
        try:
            self.root.mount(fstype, source or fstype, target, options.flags, options.data)
        except OSError as error:
            if fstype == "devpts" and error.errno == errno.EINVAL and host().user_namespace:
                # the group of terminals (gid=5) is a group that a namespace with a single id hasn't got
                data = ",".join(item for item in options.data.split(",") if not item.startswith("gid="))
                self.root.mount(fstype, source or fstype, target, options.flags, data)
                return
            if fstype != "sysfs" or not self.in_user_namespace:
                raise
            # without a network namespace of its own a user namespace may not mount sysfs, but it may bind the host's
            options.flags |= sc.MS_BIND | sc.MS_REC
            self.root.bind("/sys", target, options)
        finally:
            os.close(target)
        self.root.adjust(destination, options)

    def _refuse_symlink(self, destination: str, fstype: str) -> None:
        try:
            fd = self.root.open(destination, os.O_PATH | os.O_NOFOLLOW)
        except OSError as error:
            if is_missing(error):
                return
            raise
        try:
            if not stat.S_ISDIR(os.fstat(fd).st_mode):
                raise ContainerError(f'filesystem "{fstype}" must be mounted on ordinary directory')
        finally:
            os.close(fd)

    def _mount_tmpfs(self, source: str, destination: str, options: m.Options, *, copy_up: bool) -> None:
        """Read-only comes last: /dev still gets its nodes, and tmpcopyup its files."""
        data = options.data
        try:
            below = self.root.open(destination, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            below = -1
        else:
            if "mode=" not in data:
                mode = stat.S_IMODE(os.fstat(below).st_mode)
                data = f"mode={mode:o},{data}".rstrip(",")
        target = self.root.make_directory(destination)
        try:
            self.root.mount("tmpfs", source or "tmpfs", target, options.flags & ~sc.MS_RDONLY, data)
        finally:
            os.close(target)
        if below >= 0:
            if copy_up:
                from wherry.runtime import copyup

                over = self.root.open(destination, os.O_RDONLY | os.O_DIRECTORY)
                copyup.copy_tree(below, over)
                os.close(over)
            os.close(below)
        if options.flags & sc.MS_RDONLY and destination != "/dev":
            self._set(destination, sc.MOUNT_ATTR_RDONLY)
        self.root.adjust(destination, options)

    def _set(self, destination: str, attributes: int) -> None:
        fd = self.root.open(destination)
        try:
            sc.mount_setattr(fd, "", sc.AT_EMPTY_PATH, set_=attributes)
        finally:
            os.close(fd)

    def _bind(self, source: str, destination: str, options: m.Options, fstype: str) -> None:
        source = os.path.normpath(os.path.join(self.bundle, source))
        if fstype == "bind" and not options.flags & sc.MS_BIND:
            options.flags |= sc.MS_BIND
        is_directory = stat.S_ISDIR(os.stat(source).st_mode)
        target = self.root.make_directory(destination) if is_directory else self.root.make_file(destination)
        try:
            self.root.bind(source, target, options)
        finally:
            os.close(target)

    def _attach(self, tree: int, destination: str) -> None:
        """An idmapped mount, which the runtime has prepared with the rights that it takes (`idmap.py`)."""
        is_directory = stat.S_ISDIR(os.fstat(tree).st_mode)
        target = self.root.make_directory(destination) if is_directory else self.root.make_file(destination)
        try:
            attach(tree, target)
        finally:
            os.close(target)

    # -- cgroup mounts ----------------------------------------------------------------------------------------------

    def _mount_cgroup(self, destination: str, options: m.Options) -> None:
        if "" in self.cgroup_paths:
            self._mount_cgroup2(destination, options)
            return
        target = self.root.make_directory(destination)
        self.root.mount("tmpfs", "tmpfs", target, options.flags & ~sc.MS_RDONLY, "mode=755")
        os.close(target)
        folders: dict[str, list[str]] = {}
        for controller, path in self.cgroup_paths.items():
            folders.setdefault(path, []).append(controller)
        for path, controllers in folders.items():
            self._mount_hierarchy(destination, path, controllers, options)
        if options.flags & sc.MS_RDONLY:
            self._set(destination, sc.MOUNT_ATTR_RDONLY)
        self.root.adjust(destination, options)

    def _mount_hierarchy(self, destination: str, path: str, controllers: list[str], options: m.Options) -> None:
        names = [name.removeprefix("name=") for name in controllers]
        folder = ",".join(names)
        target = self.root.make_directory(f"{destination}/{folder}")
        try:
            try:
                if not self.has_cgroup_namespace:
                    raise PermissionError(errno.EPERM, "the hierarchy's root isn't the container's")
                data = ",".join(controllers) if "=" not in controllers[0] else f"none,{controllers[0]}"
                self.root.mount("cgroup", "cgroup", target, options.flags, data)
            except OSError as error:
                if error.errno not in (errno.EPERM, errno.EBUSY, errno.EINVAL):
                    raise
                self.root.bind(path, target, options)
        finally:
            os.close(target)
        if len(names) > 1:
            above = self.root.open(destination, os.O_PATH | os.O_DIRECTORY)
            for name in names:
                os.symlink(folder, name, dir_fd=above)
            os.close(above)

    def _mount_cgroup2(self, destination: str, options: m.Options) -> None:
        target = self.root.make_directory(destination)
        try:
            try:
                self.root.mount("cgroup2", "cgroup", target, options.flags, options.data)
            except OSError as error:
                if error.errno not in (errno.EPERM, errno.EBUSY):
                    raise
                self.root.bind(self.cgroup_paths[""], target, options)
        finally:
            os.close(target)
        self.root.adjust(destination, options)

    # -- phase 3 ----------------------------------------------------------------------------------------------------

    def restrict(self) -> None:
        """Called when nothing has to be written any more, before the host's mounts are left: masks need /dev/null."""
        for path in self.linux.get("readonlyPaths") or ():
            self._make_readonly(path)
        masked = self.linux.get("maskedPaths") or ()
        if masked:
            null = devices.host_null()
            try:
                for path in masked:
                    self._mask(path, null)
            finally:
                os.close(null)
        for mount in self.mounts:
            if os.path.normpath(mount["destination"]) == "/dev" and "ro" in (mount.get("options") or ()):
                self._set("/dev", sc.MOUNT_ATTR_RDONLY)
        if self.readonly:
            self._set("/", sc.MOUNT_ATTR_RDONLY)

    def _make_readonly(self, path: str) -> None:
        try:
            target = self.root.open(path)
        except OSError as error:
            if is_missing(error):
                return
            raise ContainerError(f'can\'t make "{path}" read-only: {error.strerror}') from None
        try:
            tree = clone_tree(target, "", recursive=True)
            try:
                sc.mount_setattr(tree, "", sc.AT_EMPTY_PATH, set_=sc.MOUNT_ATTR_RDONLY)
                attach(tree, target)
            finally:
                os.close(tree)
        except OSError as error:
            raise ContainerError(f'can\'t make "{path}" read-only: {error.strerror}') from None
        finally:
            os.close(target)

    def _mask(self, path: str, null: int) -> None:
        try:
            target = self.root.open(path)
        except OSError as error:
            if is_missing(error):
                return
            raise ContainerError(f'can\'t mask path "{path}": {error.strerror}') from None
        try:
            if stat.S_ISDIR(os.fstat(target).st_mode):
                self.root.mount("tmpfs", "tmpfs", target, sc.MS_RDONLY, self._labelled(""))
            else:
                tree = clone_tree(null, "", recursive=False)
                try:
                    attach(tree, target)
                finally:
                    os.close(tree)
        except OSError as error:
            raise ContainerError(f'can\'t mask path "{path}": {error.strerror}') from None
        finally:
            os.close(target)

    # -- phase 4 ----------------------------------------------------------------------------------------------------

    def enter(self, *, no_pivot: bool, has_mount_namespace: bool) -> None:
        if not has_mount_namespace:
            os.chroot(self.path)
            os.chdir("/")
        elif no_pivot:
            self._move_root()
        else:
            self._pivot_root()
        os.close(self.root.fd)
        propagation = self.linux.get("rootfsPropagation")
        if propagation and has_mount_namespace:
            # only now: the flags are those of the root that the container sees
            sc.mount("", "/", "", m.PROPAGATION[propagation])

    def _pivot_root(self) -> None:
        """Old root and new root in one place: the old one then lies on top and is taken away (pivot_root(2), NOTES)."""
        old = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fchdir(self.root.fd)
            try:
                sc.pivot_root(".", ".")
            except OSError as error:
                raise ContainerError(f"error jailing process inside rootfs: pivot_root {error.strerror}") from None
            os.fchdir(old)
            # nothing of the container may reach the host through a mount that is still shared
            sc.mount("", ".", "", sc.MS_SLAVE | sc.MS_REC)
            sc.umount2(".", sc.MNT_DETACH)
            os.chdir("/")
        finally:
            os.close(old)

    def _move_root(self) -> None:
        """For a root on ramfs, which can't be pivoted away: move ours over it, and take what would show it away."""
        for info in m.mountinfo():
            if info.type in ("proc", "sysfs") and not (info.target + "/").startswith(self.path + "/"):
                try:
                    sc.mount("", info.target, "", sc.MS_SLAVE | sc.MS_REC)
                    sc.umount2(info.target, sc.MNT_DETACH)
                except OSError as error:
                    if error.errno not in (errno.EINVAL, errno.EPERM, errno.ENOENT):
                        raise
        os.chdir(self.path)
        sc.mount(self.path, "/", "", sc.MS_MOVE)
        os.chroot(".")
        os.chdir("/")


def _check_proc(destination: str, source: str, fstype: str) -> None:
    if not destination.startswith("/proc"):
        return
    if destination == "/proc":
        if fstype == "proc":
            return
        # binding a /proc over /proc is fine (a container in its host's pid namespace), anything else would fake it
        if source and os.path.isdir(source) and os.path.ismount(source) and os.path.exists(f"{source}/self/ns"):
            return
        raise ContainerError(f'"{destination}" cannot be mounted because it is not of type proc')
    if destination.startswith("/proc/") and destination not in _PROC_EXCEPTIONS:
        raise ContainerError(f'"{destination}" cannot be mounted because it is inside /proc')
