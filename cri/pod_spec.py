"""What a pod is, as an OCI specification: namespaces alone, or a pause container's process in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from wherry.client import spec_defaults
from wherry.core.errors import InvalidArgument
from wherry.cri.settings import Settings
from wherry.proto import cri_pb2 as cri

# a pause container's share of the processor and its place when memory runs out, as containerd has them
_SHARES: Final = 2
OOM_SCORE: Final = -998
# kinds of sysctls that belong to a namespace of the pod; elsewhere they would be the host's
_OF_NETWORK: Final = ("net.",)
_OF_IPC: Final = ("kernel.shm", "kernel.msg", "kernel.sem", "fs.mqueue.")

Mapping3 = list[list[int]]


def on_host(config: cri.PodSandboxConfig) -> bool:
    """Whether a pod is on the host's network."""
    return config.linux.security_context.namespace_options.network == cri.NODE


def user_mappings(config: cri.PodSandboxConfig) -> tuple[Mapping3, Mapping3]:
    """A pod's users and groups as (container, host, length); empty without a user namespace. Raises InvalidArgument."""
    options = config.linux.security_context.namespace_options.userns_options
    if not config.linux.security_context.namespace_options.HasField("userns_options") or options.mode == cri.NODE:
        if options.uids or options.gids:
            raise InvalidArgument("user namespace mappings without a user namespace: invalid argument")
        return [], []
    if options.mode != cri.POD:
        mode = cri.NamespaceMode.Name(options.mode)
        raise InvalidArgument(f"unsupported mode of a user namespace: {mode}: invalid argument")
    found: list[Mapping3] = []
    for what, entries in (("uids", options.uids), ("gids", options.gids)):
        if len(entries) != 1:
            raise InvalidArgument(
                f"user namespace: {what}: one mapping is supported, there are {len(entries)}: invalid argument"
            )
        if not entries[0].length:
            raise InvalidArgument(f"user namespace: {what}: a mapping of no length: invalid argument")
        found.append([[entry.container_id, entry.host_id, entry.length] for entry in entries])
    if on_host(config):
        raise InvalidArgument("a pod with a user namespace can't be on the host's network: invalid argument")
    return found[0], found[1]


def sysctls(config: cri.PodSandboxConfig, settings: Settings) -> dict[str, str]:
    """Those that a pod asks for and those that the node sets. Raises InvalidArgument for one that isn't the pod's."""
    values = dict(config.linux.sysctls)
    options = config.linux.security_context.namespace_options
    for name in values:
        plain = name.replace("/", ".")
        if plain.startswith(_OF_NETWORK) and on_host(config):
            raise InvalidArgument(f"sysctl {name!r} can't be set in a pod on the host's network: invalid argument")
        if plain.startswith(_OF_IPC) and options.ipc == cri.NODE:
            raise InvalidArgument(f"sysctl {name!r} can't be set in a pod with the host's IPC: invalid argument")
        if not plain.startswith((*_OF_NETWORK, *_OF_IPC)) and plain not in ("kernel.hostname", "kernel.domainname"):
            raise InvalidArgument(f"sysctl {name!r} is not in a separate kernel namespace: invalid argument")
    if not on_host(config):
        if settings.enable_unprivileged_ports:
            values.setdefault("net.ipv4.ip_unprivileged_port_start", "0")
        if settings.enable_unprivileged_icmp and not user_mappings(config)[0]:
            values.setdefault("net.ipv4.ping_group_range", "0 2147483647")
    return values


def waits_for_network(values: Mapping[str, str]) -> bool:
    """Whether a sysctl is of an interface, which must be there first."""
    parts = [name.replace("/", ".").split(".") for name in values]
    return any(part[:1] == ["net"] and part[2:3] in (["conf"], ["neigh"]) and part[3] not in ("all", "default", "lo")
               for part in parts if len(part) > 4)  # fmt: skip


def namespaces_only(
    config: cri.PodSandboxConfig, settings: Settings, netns: str, maps: tuple[Mapping3, Mapping3]
) -> dict[str, Any]:
    """The specification of a pod without a process of its own; see docs/shim.md."""
    options = config.linux.security_context.namespace_options
    entries: list[dict[str, str]] = []
    if maps[0]:
        entries.append({"type": "user"})
    if not on_host(config):
        entries.append({"type": "network", "path": netns} if netns else {"type": "network"})
        entries.append({"type": "uts"})
    if options.ipc == cri.POD:
        entries.append({"type": "ipc"})
    if options.pid == cri.POD:
        entries.append({"type": "pid"})
    linux: dict[str, Any] = {"namespaces": entries}
    if values := sysctls(config, settings):
        linux["sysctl"] = values
    _map(linux, maps)
    spec: dict[str, Any] = {"ociVersion": spec_defaults.OCI_VERSION, "linux": linux}
    if config.hostname and not on_host(config):
        spec["hostname"] = config.hostname
    return spec


def _map(linux: dict[str, Any], maps: tuple[Mapping3, Mapping3]) -> None:
    for key, entries in (("uidMappings", maps[0]), ("gidMappings", maps[1])):
        if entries:
            linux[key] = [{"containerID": a, "hostID": b, "size": c} for a, b, c in entries]


def with_pause(
    spec: dict[str, Any],
    config: cri.PodSandboxConfig,
    *,
    identity: str,
    image: Mapping[str, Any],
    shm: str,
    resolv_conf: str,
    cgroups_path: str,
    oom_score: int,
) -> dict[str, Any]:
    """The specification `namespaces_only` with the process of a pause image, whose `config` is `image`."""
    command = [*(image.get("Entrypoint") or []), *(image.get("Cmd") or [])]
    if not command:
        raise InvalidArgument("the sandbox image names no command: invalid argument")
    made = spec_defaults.default_spec("k8s.io", identity)
    process = made["process"]
    context = config.linux.security_context
    process |= {"args": command, "env": list(image.get("Env") or []), "cwd": image.get("WorkingDir") or "/"}
    process["oomScoreAdj"] = oom_score
    uid = context.run_as_user.value if context.HasField("run_as_user") else _number(image.get("User"))
    gid = context.run_as_group.value if context.HasField("run_as_group") else uid and _number(image.get("User"), 1)
    process["user"] = {"uid": uid, "gid": gid, "additionalGids": list(context.supplemental_groups)}
    made["root"]["readonly"] = True
    made["mounts"] = [entry for entry in made["mounts"] if entry["destination"] not in ("/dev/shm", "/run")]
    options = ["rbind", "ro", "nosuid", "nodev", "noexec"]
    made["mounts"] += [
        {"destination": "/dev/shm", "type": "bind", "source": shm, "options": options},
        {"destination": "/etc/resolv.conf", "type": "bind", "source": resolv_conf, "options": options},
    ]
    linux = made["linux"]
    linux |= spec["linux"]
    kinds = {entry["type"] for entry in linux["namespaces"]}
    linux["namespaces"] = [*linux["namespaces"], {"type": "mount"}]
    if "pid" not in kinds and context.namespace_options.pid != cri.NODE:
        linux["namespaces"].append({"type": "pid"})
    linux["resources"] = {"devices": spec_defaults.device_rules(), "cpu": {"shares": _SHARES}}
    linux["cgroupsPath"] = cgroups_path
    if "hostname" in spec:
        made["hostname"] = spec["hostname"]
    made["annotations"] = notes(config, identity)
    return made


def notes(config: cri.PodSandboxConfig, identity: str) -> dict[str, str]:
    """What containerd says of a pod in its specification; other runtimes' shims read it."""
    metadata = config.metadata
    return {
        "io.kubernetes.cri.container-type": "sandbox",
        "io.kubernetes.cri.sandbox-id": identity,
        "io.kubernetes.cri.sandbox-name": metadata.name,
        "io.kubernetes.cri.sandbox-namespace": metadata.namespace,
        "io.kubernetes.cri.sandbox-uid": metadata.uid,
        "io.kubernetes.cri.sandbox-log-directory": config.log_directory,
    }


def _number(user: object, at: int = 0) -> int:
    """A numeric user or group of an image's `User` ("65535:65535"); 0 for a name: no files are looked at here."""
    parts: Sequence[str] = str(user or "").split(":")
    return int(parts[at]) if len(parts) > at and parts[at].isdigit() else 0
