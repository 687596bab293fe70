"""A container's OCI specification: from the CRI's configuration, its pod, and what its image says.

Nothing here talks to a daemon. What is made is what containerd's CRI plugin makes (the annotations
`io.kubernetes.cri.*`, cgroup paths, the order of variables), so that runtimes, tools and habits made for it go on.
"""

from __future__ import annotations

import fnmatch
import json
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from wherry.client import cdi, devices, limits
from wherry.client.spec import merge_env
from wherry.client.spec_defaults import PATH, default_spec
from wherry.client.users import ROOT, User
from wherry.core.errors import FailedPrecondition, InvalidArgument
from wherry.cri import container_mounts, container_security, selinux
from wherry.cri.records import NAMESPACE, Pod
from wherry.cri.settings import Handler, Settings
from wherry.proto import cri_pb2 as cri

_CDI_PREFIX = "cdi.k8s.io/"
_ANNOTATION = "io.kubernetes.cri."
# OOM scores that processes of the kernel's users may have (proc(5))
_OOM_SCORES = range(-1000, 1001)


@dataclass(frozen=True, slots=True)
class Making:
    """All that a specification is made of.

    `image` is the `config` of the image's configuration, `image_name` what the kubelet calls it. `mounts` are further
    binds (volumes that the image declares), `target_pid` the process of the container whose PID namespace is joined.
    """

    id: str
    pod: Pod
    config: cri.ContainerConfig
    image: Mapping[str, Any]
    image_name: str
    folder: str
    settings: Settings
    handler: Handler
    user: User = ROOT
    mounts: Sequence[cri.Mount] = field(default_factory=tuple)
    target_pid: int = 0

    @property
    def context(self) -> cri.LinuxContainerSecurityContext:
        """What the kubelet says of its rights."""
        return self.config.linux.security_context


def build(making: Making) -> dict[str, Any]:
    """The specification. Looks at the host's files where mounts or devices are asked for: not for an event loop then.

    Raises InvalidArgument, FailedPrecondition, NotFound.
    """
    spec = _base(making)
    _process(spec, making)
    _mounts(spec, making)
    config, context = making.config, making.context
    for item in config.devices:
        path = os.path.realpath(item.host_path)
        devices.add_path(spec, path, item.container_path or item.host_path, item.permissions or "rwm")
    _own_devices(spec, making)
    container_security.apply(
        spec,
        context,
        pod_privileged=making.pod.facts.privileged,
        handler=making.handler,
        settings=making.settings,
    )
    _resources(spec, making)
    _namespaces(spec, making)
    _annotate(spec, making)
    _cdi(spec, making)
    return spec


def _base(making: Making) -> dict[str, Any]:
    """The defaults, or the file that the handler names; limits and scores that are defaults elsewhere aren't here."""
    spec = default_spec(NAMESPACE, making.id)
    if making.handler.base_runtime_spec:
        spec = _from_file(making.handler.base_runtime_spec, spec)
    else:
        del spec["process"]["rlimits"]
        spec["linux"]["resources"].pop("cpu", None)
    spec["linux"]["cgroupsPath"] = cgroup_path(making.pod.facts.cgroup, making.id)
    spec["root"] = {"path": "rootfs", **({"readonly": True} if making.context.readonly_rootfs else {})}
    return spec


def _from_file(path: str, spec: dict[str, Any]) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            found = json.load(file)
    except (OSError, ValueError) as error:
        raise FailedPrecondition(f"base_runtime_spec {path} can't be read: {error}") from error
    if not isinstance(found, dict):
        raise FailedPrecondition(f"base_runtime_spec {path} is no JSON object")
    for key in ("process", "linux"):
        found[key] = {**spec[key], **(found.get(key) or {})}
    found["linux"]["resources"] = {**spec["linux"]["resources"], **(found["linux"].get("resources") or {})}
    return {**spec, **found}


# -- the process


def _process(spec: dict[str, Any], making: Making) -> None:
    config, image, process = making.config, making.image, spec["process"]
    process["args"] = arguments(config, image)
    process["cwd"] = config.working_dir or str(image.get("WorkingDir") or "/")
    hostname = making.pod.config.hostname or socket.gethostname()
    env = [PATH, *(["TERM=xterm"] if config.tty else []), f"HOSTNAME={hostname}"]
    env = merge_env(env, [str(item) for item in image.get("Env") or ()])
    process["env"] = merge_env(env, [f"{item.key}={item.value}" for item in config.envs])
    process["user"] = making.user.json()
    if config.tty:
        process["terminal"] = True


def arguments(config: cri.ContainerConfig, image: Mapping[str, Any]) -> list[str]:
    """Kubernetes' rule: `command` replaces the image's entrypoint and its command, `args` the command alone.

    Raises InvalidArgument where nothing is to be run.
    """
    command, args = list(config.command), list(config.args)
    if not command:
        args = args or [str(item) for item in image.get("Cmd") or ()]
        command = [str(item) for item in image.get("Entrypoint") or ()]
    if not command and not args:
        raise InvalidArgument("no command specified: invalid argument")
    return [*command, *args]


# -- files


def _mounts(spec: dict[str, Any], making: Making) -> None:
    context, settings, linux = making.context, making.settings, spec["linux"]
    options = context.selinux_options if context.HasField("selinux_options") else None
    process, mount = selinux.container_labels(options, making.pod.facts.selinux, settings)
    if process and not context.privileged:
        spec["process"]["selinuxLabel"], linux["mountLabel"] = process, mount
    spec["mounts"] = container_mounts.defaults(spec)
    if making.handler.cgroup_writable:
        spec["mounts"][-1]["options"][-1] = "rw"
    given = list(making.config.mounts)
    ours = container_mounts.of_pod([*given, *making.mounts], making.folder, context, relabels=bool(mount))
    container_mounts.put(spec, [*making.mounts, *ours, *given], mount)


def _own_devices(spec: dict[str, Any], making: Making) -> None:
    """Devices belong to the container's user, where the configuration says so."""
    context = making.context
    if not making.settings.device_ownership_from_security_context:
        return
    for entry in spec["linux"].get("devices") or ():
        if context.HasField("run_as_user"):
            entry["uid"] = context.run_as_user.value
        if context.HasField("run_as_group"):
            entry["gid"] = context.run_as_group.value


def _cdi(spec: dict[str, Any], making: Making) -> None:
    """Devices by name: the field's, and those of annotations (before Kubernetes had the field)."""
    names = [item.name for item in making.config.CDI_devices]
    for key, value in sorted(making.config.annotations.items()):
        if key.startswith(_CDI_PREFIX):
            names += [name for name in value.split(",") if name]
    if not names:
        return
    if not making.settings.enable_cdi:
        raise FailedPrecondition("CDI devices are asked for, and enable_cdi is off: failed precondition")
    for name in names:
        if not cdi.is_name(name):
            raise InvalidArgument(f"invalid CDI device {name!r}: expected vendor.com/class=name: invalid argument")
    cdi.apply(spec, names, tuple(making.settings.cdi_spec_dirs))


# -- limits


def _resources(spec: dict[str, Any], making: Making) -> None:
    linux, process = making.config.linux, spec["process"]
    process["oomScoreAdj"] = oom_score(linux.resources.oom_score_adj, making.settings)
    for name, part in resources(linux.resources, making.settings).items():
        spec["linux"]["resources"][name] = part
    if making.settings.disable_cgroup:
        spec["linux"].pop("cgroupsPath", None)
        spec["linux"]["resources"] = {}


def resources(wanted: cri.LinuxContainerResources, settings: Settings) -> dict[str, Any]:
    """`linux.resources` with what is asked for and nothing else; 0 is nothing. Raises FailedPrecondition.

    Memory without a limit for swap gets none on top of it: `swap` counts both.
    """
    found: dict[str, Any] = {}
    cpu = {
        "period": wanted.cpu_period,
        "quota": wanted.cpu_quota,
        "shares": wanted.cpu_shares,
        "cpus": wanted.cpuset_cpus,
        "mems": wanted.cpuset_mems,
    }
    if given := {key: value for key, value in cpu.items() if value}:
        found["cpu"] = given
    memory: dict[str, Any] = {}
    if wanted.memory_limit_in_bytes:
        memory["limit"] = wanted.memory_limit_in_bytes
    if (swap := wanted.memory_swap_limit_in_bytes or wanted.memory_limit_in_bytes) and limits.counts_swap():
        memory["swap"] = swap
    if memory:
        found["memory"] = memory
    if wanted.hugepage_limits and not settings.disable_hugetlb_controller:
        if has_hugepages():
            found["hugepageLimits"] = [
                {"pageSize": item.page_size, "limit": item.limit} for item in wanted.hugepage_limits
            ]
        elif not settings.tolerate_missing_hugetlb_controller:
            raise FailedPrecondition(
                "huge pages limits are specified but hugetlb cgroup controller is missing. Please set "
                "tolerate_missing_hugetlb_controller to `true` to ignore this error: failed precondition"
            )
    if wanted.unified:
        found["unified"] = dict(wanted.unified)
    return found


def has_hugepages() -> bool:
    """Whether the host limits huge pages."""
    if os.path.isdir("/sys/fs/cgroup/hugetlb"):
        return True
    try:
        with open("/sys/fs/cgroup/cgroup.controllers", encoding="ascii") as file:
            return "hugetlb" in file.read().split()
    except OSError:
        return False


def oom_score(wanted: int, settings: Settings) -> int:
    """The score, no lower than our own where the configuration says so. Raises InvalidArgument."""
    if wanted not in _OOM_SCORES:
        raise InvalidArgument(f"oom_score_adj {wanted} isn't between -1000 and 1000: invalid argument")
    if settings.restrict_oom_score_adj:
        with open("/proc/self/oom_score_adj", encoding="ascii") as file:
            return max(wanted, int(file.read()))
    return wanted


def cgroup_path(parent: str, identity: str) -> str:
    """`linux.cgroupsPath` below a pod's cgroup; a slice's has systemd's form."""
    base = parent.rstrip("/").rpartition("/")[2]
    if base.endswith(".slice"):
        return f"{base}:cri-containerd:{identity}"
    return os.path.join(parent or f"/{NAMESPACE}", identity)


# -- surroundings


def _namespaces(spec: dict[str, Any], making: Making) -> None:
    """Those of the pod by their paths, those that are its own new; what the pod shares with the host is the host's."""
    paths, options = dict(making.pod.facts.namespaces), making.context.namespace_options
    kinds: list[dict[str, str]] = [{"type": "mount"}]
    kinds += [{"type": kind, "path": paths[kind]} for kind in ("network", "ipc", "uts") if kind in paths]
    if options.pid == cri.TARGET:
        kinds.append({"type": "pid", "path": f"/proc/{making.target_pid}/ns/pid"})
    elif options.pid == cri.CONTAINER:
        kinds.append({"type": "pid"})
    elif options.pid == cri.POD:
        # a pod whose own options said otherwise has none to share
        kinds.append({"type": "pid", "path": paths["pid"]} if "pid" in paths else {"type": "pid"})
    facts = making.pod.facts
    if facts.uid_map:
        kinds.append({"type": "user", "path": paths["user"]} if "user" in paths else {"type": "user"})
        for name, ranges in (("uidMappings", facts.uid_map), ("gidMappings", facts.gid_map)):
            spec["linux"][name] = [{"containerID": a, "hostID": b, "size": size} for a, b, size in ranges]
        if "network" not in paths:
            _bind_sys(spec)
    if not making.context.privileged and os.path.exists("/sys/fs/cgroup/cgroup.controllers"):
        kinds.append({"type": "cgroup"})
    spec["linux"]["namespaces"] = kinds


def _bind_sys(spec: dict[str, Any]) -> None:
    """sysfs shows a network namespace, and only the root of that one's user namespace may mount it."""
    for mount in spec["mounts"]:
        if mount["type"] == "sysfs":
            mount |= {"type": "bind", "source": "/sys", "options": ["rbind", "nosuid", "noexec", "nodev", "ro"]}


def _annotate(spec: dict[str, Any], making: Making) -> None:
    pod, config = making.pod.config, making.config
    found = {
        **passed(pod.annotations, making.handler.pod_annotations),
        **passed(config.annotations, making.handler.container_annotations),
    }
    for name, value in {
        "container-type": "container",
        "sandbox-id": making.pod.id,
        "sandbox-namespace": pod.metadata.namespace,
        "sandbox-uid": pod.metadata.uid,
        "sandbox-name": pod.metadata.name,
        "container-name": config.metadata.name,
        "image-name": making.image_name,
    }.items():
        found[_ANNOTATION + name] = value
    spec["annotations"] = {**(spec.get("annotations") or {}), **found}


def passed(annotations: Mapping[str, str], patterns: Sequence[str]) -> dict[str, str]:
    """Those annotations that a handler passes on: its patterns are globs."""
    return {
        key: value
        for key, value in annotations.items()
        if any(fnmatch.fnmatchcase(key, pattern) for pattern in patterns)
    }
