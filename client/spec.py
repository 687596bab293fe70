"""The OCI runtime specification of a container, made from an image's configuration and what a user asks for.

The meaning of each option is that of the same option of containerd's `ctr`; the order in which they apply is its order
too (a later one wins). Nothing here talks to a daemon.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from wherry.client.spec_defaults import PATH, capabilities, default_spec
from wherry.core import places, quickjson
from wherry.core.errors import InvalidArgument
from wherry.core.tuples import NamedTuple

# the period of the CFS quota that `--cpus` is made of, in microseconds: the kernel's default
CPU_PERIOD = 100_000
ALL_DEVICES: list[dict[str, Any]] = [{"allow": True, "access": "rwm"}]


class SpecOptions(NamedTuple):
    """What a user may ask for; the defaults change nothing.

    `args` replaces the image's command and entrypoint. `cgroup` None keeps the default path, "" leaves the cgroup out.
    `memory` is in bytes, `cpus` in whole CPUs, `cpu_quota` and `cpu_period` in microseconds.
    `namespaces` are pairs of type and path. `mounts` are mounts of the specification.
    """

    args: Sequence[str] = ()
    env: Sequence[str] = ()
    cwd: str = ""
    hostname: str = ""
    tty: bool = False
    read_only: bool = False
    privileged: bool = False
    net_host: bool = False
    allow_new_privs: bool = False
    mounts: Sequence[Mapping[str, Any]] = ()
    namespaces: Sequence[tuple[str, str]] = ()
    annotations: Mapping[str, str] = MappingProxyType({})
    cap_add: Sequence[str] = ()
    cap_drop: Sequence[str] = ()
    devices: Sequence[str] = ()
    seccomp: bool = False
    seccomp_profile: str = ""
    apparmor_profile: str = ""
    cpus: float = 0.0
    cpu_shares: int = 1024
    cpu_quota: int = -1
    cpu_period: int = 0
    cpuset_cpus: str = ""
    cpuset_mems: str = ""
    memory: int = 0
    pids: int = 0
    cgroup: str | None = None
    rootfs_propagation: str = ""
    rdt_class: str = ""
    rootfs: str = ""


def build(
    namespace: str, container: str, options: SpecOptions, settings: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The specification. `settings` is the `config` of the image's configuration, None without an image.

    Raises InvalidArgument for what can't be asked for (no command, a device that isn't there, a malformed mount).
    """
    spec = default_spec(namespace, container)
    _process(spec, options, settings or {})
    _root(spec, options)
    _privileges(spec, options)
    _host(spec, options)
    _limits(spec, options)
    _devices(spec, options)
    if options.annotations:
        spec["annotations"] = dict(options.annotations)
    return spec


def merge_env(base: Iterable[str], over: Iterable[str]) -> list[str]:
    """Variables of `base` with those of `over`: same names replaced in place, `NAME` without a value taken away."""
    merged = {item.partition("=")[0]: item for item in base}
    for item in over:
        name, equals, _ = item.partition("=")
        if equals:
            merged[name] = item
        else:
            merged.pop(name, None)
    return list(merged.values())


def _process(spec: dict[str, Any], options: SpecOptions, settings: Mapping[str, Any]) -> None:
    process = spec["process"]
    env = merge_env(settings.get("Env") or [PATH], options.env)
    if options.tty:
        process["terminal"] = True
        env = merge_env(["TERM=xterm"], env)
    process["env"] = env
    args = list(options.args) or [*(settings.get("Entrypoint") or ()), *(settings.get("Cmd") or ())]
    if not args:
        raise InvalidArgument("no command given, and the image names none")
    process["args"] = args
    process["cwd"] = options.cwd or settings.get("WorkingDir") or "/"
    if not process["cwd"].startswith("/"):
        raise InvalidArgument(f"working directory {process['cwd']!r} isn't an absolute path")
    if options.hostname:
        spec["hostname"] = options.hostname


def _root(spec: dict[str, Any], options: SpecOptions) -> None:
    if options.rootfs:
        spec["root"]["path"] = os.path.abspath(options.rootfs)
    if options.read_only:
        spec["root"]["readonly"] = True
    if options.rootfs_propagation:
        spec["linux"]["rootfsPropagation"] = options.rootfs_propagation
    spec["mounts"] += [dict(mount) for mount in options.mounts]


def _privileges(spec: dict[str, Any], options: SpecOptions) -> None:
    process, linux = spec["process"], spec["linux"]
    names: list[str] = list(process["capabilities"]["bounding"])
    if options.privileged:
        names = own_capabilities()
        linux["maskedPaths"], linux["readonlyPaths"] = [], []
        for mount in spec["mounts"]:
            if mount.get("type") in {"sysfs", "cgroup"}:
                mount["options"] = ["rw" if option == "ro" else option for option in mount["options"]]
    names += [name for name in map(capability, options.cap_add) if name not in names]
    dropped = set(map(capability, options.cap_drop))
    process["capabilities"] = capabilities([name for name in names if name not in dropped and "CAP_ALL" not in dropped])
    if options.allow_new_privs:
        process["noNewPrivileges"] = False
    if options.apparmor_profile:
        process["apparmorProfile"] = options.apparmor_profile
    if options.seccomp and not options.privileged:
        linux["seccomp"] = seccomp_of(options.seccomp_profile, process["capabilities"]["bounding"])
    if options.rdt_class:
        linux["intelRdt"] = {"closID": options.rdt_class}


def seccomp_of(path: str, bounding: Sequence[str]) -> dict[str, Any]:
    """`linux.seccomp` from a file, "" is the default profile for these capabilities; raises InvalidArgument."""
    if not path:
        from wherry.core.seccomp_profile import default_profile

        return dict(default_profile(bounding))
    try:
        with open(path, "rb") as file:
            profile = quickjson.loads(file.read())
    except OSError as error:
        raise InvalidArgument(f"can't read the seccomp profile {path}: {error.strerror}") from error
    except ValueError as error:
        raise InvalidArgument(f"the seccomp profile {path} is no JSON: {error}") from error
    if not isinstance(profile, dict):
        raise InvalidArgument(f"the seccomp profile {path} is no JSON object")
    return profile


def _host(spec: dict[str, Any], options: SpecOptions) -> None:
    """What is shared with the host or with other containers."""
    linux = spec["linux"]
    if options.net_host:
        linux["namespaces"] = [item for item in linux["namespaces"] if item["type"] != "network"]
        for path in ("/etc/hosts", "/etc/resolv.conf"):
            if os.path.exists(path):
                spec["mounts"].append({"destination": path, "type": "bind", "source": path, "options": ["rbind", "ro"]})
        spec["process"]["env"] = merge_env(spec["process"]["env"], [f"HOSTNAME={os.uname().nodename}"])
    for kind, path in options.namespaces:
        linux["namespaces"] = [item for item in linux["namespaces"] if item["type"] != kind]
        linux["namespaces"].append({"type": kind, "path": path})
    if options.cgroup is not None:
        linux["cgroupsPath"] = options.cgroup
        if not options.cgroup:
            del linux["cgroupsPath"]


def _limits(spec: dict[str, Any], options: SpecOptions) -> None:
    resources = spec["linux"]["resources"]
    cpu: dict[str, Any] = resources["cpu"]
    cpu["shares"] = options.cpu_shares
    if options.cpus > 0:
        cpu["quota"], cpu["period"] = int(options.cpus * CPU_PERIOD), CPU_PERIOD
    if options.cpu_quota != -1:
        cpu["quota"] = options.cpu_quota
    if options.cpu_period:
        cpu["period"] = options.cpu_period
    if options.cpuset_cpus:
        cpu["cpus"] = options.cpuset_cpus
    if options.cpuset_mems:
        cpu["mems"] = options.cpuset_mems
    if options.memory:
        resources["memory"] = {"limit": options.memory}
    if options.pids:
        resources["pids"] = {"limit": options.pids}


def _devices(spec: dict[str, Any], options: SpecOptions) -> None:
    linux = spec["linux"]
    devices: list[dict[str, Any]] = []
    if options.privileged:
        devices += host_devices("/dev")
        linux["resources"]["devices"] = list(ALL_DEVICES)
    for item in options.devices:
        place, _, rest = item.partition(":")
        target, _, access = rest.partition(":")
        found = host_devices(place) if os.path.isdir(place) else [device(place)]
        for entry in found:
            if target:
                entry["path"] = target + entry["path"].removeprefix(place)
            devices.append(entry)
            linux["resources"]["devices"].append(
                {
                    "allow": True,
                    "type": entry["type"],
                    "major": entry["major"],
                    "minor": entry["minor"],
                    "access": access or "rwm",
                }
            )
    if devices:
        linux["devices"] = list({entry["path"]: entry for entry in devices}.values())


def device(path: str) -> dict[str, Any]:
    """A device of the host as the specification has it; raises InvalidArgument where it is none."""
    try:
        info = os.stat(path)
    except OSError as error:
        raise InvalidArgument(f"device {path}: {error.strerror}") from error
    kind = "c" if stat.S_ISCHR(info.st_mode) else "b" if stat.S_ISBLK(info.st_mode) else ""
    if not kind:
        raise InvalidArgument(f"{path} isn't a device")
    return {
        "path": path,
        "type": kind,
        "major": os.major(info.st_rdev),
        "minor": os.minor(info.st_rdev),
        "fileMode": stat.S_IMODE(info.st_mode),
        "uid": info.st_uid,
        "gid": info.st_gid,
    }


# what a container has of its own under /dev
_OWN = {"pts", "shm", "fd", "mqueue", ".lxc", ".lxd-mounts", ".udev"}


def host_devices(top: str) -> list[dict[str, Any]]:
    """All devices of the host below a folder, without those that a container has of its own."""
    found: list[dict[str, Any]] = []
    for folder, folders, names in os.walk(top):
        folders[:] = [name for name in folders if name not in _OWN]
        for name in names:
            path = os.path.join(folder, name)
            if name == "console" or os.path.islink(path):
                continue
            try:
                found.append(device(path))
            except InvalidArgument:
                # no device, or gone since it was listed
                continue
    return found


def capability(name: str) -> str:
    """A capability's name with the prefix that the specification wants."""
    upper = name.upper()
    return upper if upper.startswith("CAP_") else f"CAP_{upper}"


def own_capabilities() -> list[str]:
    """The effective capabilities of this process: what a privileged container gets.

    An ordinary user's gets all that the kernel knows, over the user's own namespace (user_namespaces(7)).
    """
    from wherry.client.capabilities import NAMES

    if places.is_users():
        with open("/proc/sys/kernel/cap_last_cap", encoding="ascii") as file:
            return list(NAMES[: int(file.read()) + 1])
    with open("/proc/self/status", encoding="ascii") as status:
        line = next(line for line in status if line.startswith("CapEff:"))
    bits = int(line.split()[1], 16)
    return [name for number, name in enumerate(NAMES) if bits >> number & 1]


def mount(text: str) -> dict[str, Any]:
    """A mount from `type=bind,src=/a,dst=/b,options=rbind:ro`; raises InvalidArgument."""
    parsed: dict[str, Any] = {"options": []}
    names = {"type": "type", "source": "source", "src": "source", "destination": "destination", "dst": "destination"}
    for part in text.split(","):
        key, equals, value = part.partition("=")
        if not equals and key != "options":
            raise InvalidArgument(f"invalid mount specification: expected key=value, got {part!r} in {text!r}")
        if key == "options":
            parsed["options"] = [option for option in value.split(":") if option]
        elif key in names:
            parsed[names[key]] = value
        else:
            raise InvalidArgument(f"mount option {key!r} not supported in {text!r}")
    if not parsed.get("destination", "").startswith("/"):
        raise InvalidArgument(f"a mount needs an absolute destination (dst=/…): {text!r}")
    return parsed
