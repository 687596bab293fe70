"""Containers, images, volumes and networks as docker's `inspect` describes them: scripts rely on these names.

What docker has and Wherry hasn't (links, storage drivers, swarm) is left out or empty.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from wherry.client.finding import name_of, short_image
from wherry.client.states import State, inspect_state, label_json
from wherry.core import container_logs
from wherry.core.errors import NotFound, WherryError
from wherry.core.labels import (
    CONFIG,
    HEALTH,
    HEALTH_CHECK,
    LOG_URI,
    MOUNTS,
    RESTART_POLICY,
    STDIN_OPEN,
    STOP_SIGNAL,
    STOP_TIMEOUT,
    internal,
)

if TYPE_CHECKING:
    from wherry.client.api import Client
    from wherry.client.containers import Container
    from wherry.client.images import Image
    from wherry.client.network import Endpoint, Network, NetworkStatus, Port
    from wherry.client.volumes import Volume


def when(at: float) -> str:
    """A time as docker writes it; its zero where there is none."""
    if not at:
        return "0001-01-01T00:00:00Z"
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(at)) + f"{at % 1:.9f}"[1:] + "Z"


async def container(client: Client, item: Container, *, size: bool = False) -> dict[str, Any]:
    """`inspect` of a container."""
    state = await inspect_state(client, item)
    spec = item.spec or {}
    process = spec.get("process") or {}
    args = [str(word) for word in process.get("args") or ()]
    network = await _network(client, item, state)
    described = {
        "Id": item.id,
        "Created": when(item.created_at),
        "Path": args[0] if args else "",
        "Args": args[1:],
        "State": _state(item, state),
        "Image": await _image_id(client, item.image),
        "ImageName": item.image,
        "LogPath": container_logs.path_of(item.labels.get(LOG_URI, "")),
        "Name": f"/{name_of(item)}",
        "RestartCount": state.restarts,
        "Driver": item.snapshotter,
        "Platform": "linux",
        "Runtime": item.runtime,
        "MountLabel": (spec.get("linux") or {}).get("mountLabel", ""),
        "AppArmorProfile": process.get("apparmorProfile", ""),
        "HostConfig": _host_config(item, spec, network),
        "GraphDriver": {"Name": item.snapshotter, "Data": {"SnapshotKey": item.snapshot_key}},
        "Mounts": label_json(item, MOUNTS).get("mounts") or [],
        "Config": _config(item, spec, process),
        "NetworkSettings": _network_settings(network),
    }
    if size and item.snapshot_key:
        own, total = await client.snapshots(item.snapshotter).sizes(item.snapshot_key)
        described |= {"SizeRw": own, "SizeRootFs": total}
    return described


def _state(item: Container, state: State) -> dict[str, Any]:
    found: dict[str, Any] = {
        "Status": state.status,
        "Running": state.running or state.status == "restarting",
        "Paused": state.status == "paused",
        "Restarting": state.status == "restarting",
        "OOMKilled": state.oom,
        "Dead": state.status == "dead",
        "Pid": state.pid if state.running else 0,
        "ExitCode": state.exit_code,
        "Error": state.error,
        "StartedAt": when(state.started_at),
        "FinishedAt": when(state.finished_at),
    }
    if HEALTH_CHECK in item.labels:
        found["Health"] = label_json(item, HEALTH) or {"Status": "starting", "FailingStreak": 0, "Log": []}
    return found


async def _image_id(client: Client, name: str) -> str:
    """The digest of an image's configuration, which docker calls its id; the name where the image is gone."""
    from wherry.client.manifests import picture

    try:
        return str((await picture(client.content, (await client.images.get(name)).target)).config.digest)
    except WherryError:
        return name


async def _network(client: Client, item: Container, state: State) -> NetworkStatus | None:
    if not state.running:
        return None
    try:
        found = await client.networks.status([item.id])
    except WherryError:
        # a daemon without networks, or a container with none of its
        return None
    return found[0] if found else None


def _id_mappings(linux: Mapping[str, Any]) -> dict[str, list[str]]:
    """As podman shows them: CONTAINER:HOST:SIZE."""
    return {
        name: [
            f"{item.get('containerID') or 0}:{item.get('hostID') or 0}:{item['size']}" for item in linux.get(key) or ()
        ]
        for name, key in (("UidMap", "uidMappings"), ("GidMap", "gidMappings"))
    }


def _policy(item: Container) -> dict[str, Any]:
    name, _, count = item.labels.get(RESTART_POLICY, "no").partition(":")
    return {"Name": name or "no", "MaximumRetryCount": int(count) if count.isdigit() else 0}


def _host_config(item: Container, spec: Mapping[str, Any], network: NetworkStatus | None) -> dict[str, Any]:
    linux = spec.get("linux") or {}
    resources = linux.get("resources") or {}
    memory, cpu = resources.get("memory") or {}, resources.get("cpu") or {}
    config = label_json(item, CONFIG)
    modes = config.get("Namespaces") or {}
    mounts = label_json(item, MOUNTS).get("mounts") or []
    shown = [mount for mount in mounts if mount.get("Type") in {"bind", "volume"}]
    return {
        "Binds": [
            f"{mount.get('Name') or mount.get('Source')}:{mount.get('Destination')}{'' if mount.get('RW') else ':ro'}"
            for mount in shown
        ],
        "NetworkMode": network.mode if network is not None else "",
        "PortBindings": _port_bindings(network.ports if network is not None else ()),
        "RestartPolicy": _policy(item),
        "AutoRemove": "wherry/auto-remove" in item.labels,
        "Privileged": bool(config.get("Privileged")),
        "ReadonlyRootfs": bool((spec.get("root") or {}).get("readonly")),
        "Init": bool(config.get("Init")),
        "IpcMode": modes.get("ipc", "private"),
        "PidMode": modes.get("pid", ""),
        "UTSMode": modes.get("uts", ""),
        "CgroupnsMode": modes.get("cgroupns", ""),
        "UsernsMode": modes.get("userns", "") or ("private" if linux.get("uidMappings") else ""),
        "IDMappings": _id_mappings(linux),
        "CgroupPath": linux.get("cgroupsPath", ""),
        "Memory": memory.get("limit", 0),
        "MemorySwap": memory.get("swap", 0),
        "MemoryReservation": memory.get("reservation", 0),
        "CpuShares": cpu.get("shares", 0),
        "CpuQuota": cpu.get("quota", 0),
        "CpuPeriod": cpu.get("period", 0),
        "NanoCpus": int(cpu["quota"] * 1e9 / cpu["period"]) if cpu.get("quota", 0) > 0 and cpu.get("period") else 0,
        "CpusetCpus": cpu.get("cpus", ""),
        "CpusetMems": cpu.get("mems", ""),
        "PidsLimit": (resources.get("pids") or {}).get("limit"),
        "OomScoreAdj": (spec.get("process") or {}).get("oomScoreAdj", 0),
        "Ulimits": [
            {"Name": str(item["type"]).removeprefix("RLIMIT_").lower(), "Soft": item["soft"], "Hard": item["hard"]}
            for item in (spec.get("process") or {}).get("rlimits") or ()
        ],
        "Sysctls": linux.get("sysctl") or {},
        "Devices": [{"PathInContainer": device.get("path")} for device in linux.get("devices") or ()],
        "MaskedPaths": linux.get("maskedPaths") or [],
        "ReadonlyPaths": linux.get("readonlyPaths") or [],
    }


def _config(item: Container, spec: Mapping[str, Any], process: Mapping[str, Any]) -> dict[str, Any]:
    config = label_json(item, CONFIG)
    user = process.get("user") or {}
    found: dict[str, Any] = {
        "Hostname": spec.get("hostname", ""),
        "Domainname": spec.get("domainname", config.get("Domainname", "")),
        "User": config.get("User", str(user.get("uid") or "")),
        "Tty": bool(process.get("terminal")),
        "OpenStdin": item.labels.get(STDIN_OPEN) == "true",
        "Env": list(process.get("env") or ()),
        "Cmd": config.get("Cmd", list(process.get("args") or ())),
        "Entrypoint": config.get("Entrypoint") or None,
        "Image": config.get("Image") or short_image(item.image),
        "WorkingDir": process.get("cwd", ""),
        "Labels": {key: value for key, value in item.labels.items() if not internal(key)},
        "StopSignal": item.labels.get(STOP_SIGNAL, ""),
    }
    if STOP_TIMEOUT in item.labels:
        found["StopTimeout"] = float(item.labels[STOP_TIMEOUT])
    if HEALTH_CHECK in item.labels:
        found["Healthcheck"] = label_json(item, HEALTH_CHECK)
    return found


def _port_bindings(ports: Sequence[Port]) -> dict[str, list[dict[str, str]]]:
    found: dict[str, list[dict[str, str]]] = {}
    for port in ports:
        entry = {"HostIp": port.host_ip or "0.0.0.0", "HostPort": str(port.host_port)}
        found.setdefault(f"{port.container_port}/{port.protocol}", []).append(entry)
    return found


def _network_settings(network: NetworkStatus | None) -> dict[str, Any]:
    if network is None:
        return {"Ports": {}, "IPAddress": "", "Gateway": "", "MacAddress": "", "SandboxKey": "", "Networks": {}}
    first = network.endpoints[0] if network.endpoints else None
    return {
        "Ports": _port_bindings(network.ports),
        "SandboxKey": network.netns,
        "IPAddress": first.ipv4.partition("/")[0] if first else "",
        "IPPrefixLen": _prefix(first.ipv4) if first else 0,
        "Gateway": first.gateway4 if first else "",
        "MacAddress": first.mac if first else "",
        "Networks": {endpoint.network: _endpoint(endpoint) for endpoint in network.endpoints},
    }


def _prefix(address: str) -> int:
    length = address.partition("/")[2]
    return int(length) if length.isdigit() else 0


def _endpoint(endpoint: Endpoint) -> dict[str, Any]:
    return {
        "IPAddress": endpoint.ipv4.partition("/")[0],
        "IPPrefixLen": _prefix(endpoint.ipv4),
        "Gateway": endpoint.gateway4,
        "GlobalIPv6Address": endpoint.ipv6.partition("/")[0],
        "GlobalIPv6PrefixLen": _prefix(endpoint.ipv6),
        "IPv6Gateway": endpoint.gateway6,
        "MacAddress": endpoint.mac,
        "Aliases": list(endpoint.names),
        "Interface": endpoint.interface,
    }


async def image(client: Client, item: Image, names: Sequence[str] = ()) -> dict[str, Any]:
    """`inspect` of an image, for the platform of this host; `names` are all that it has."""
    from wherry.client.manifests import picture

    look = await picture(client.content, item.target)
    document, settings = look.document, dict(look.settings)
    tags = sorted({*names, item.name})
    return {
        "Id": str(look.config.digest),
        "RepoTags": [short_image(name) for name in tags if "@" not in name],
        "RepoDigests": sorted({f"{short_image(_repository(name))}@{item.target.digest}" for name in tags}),
        "Parent": "",
        "Comment": document.get("comment", ""),
        "Created": document.get("created", ""),
        "Author": document.get("author", ""),
        "Config": settings,
        "Architecture": document.get("architecture", ""),
        "Variant": document.get("variant", ""),
        "Os": document.get("os", ""),
        "Size": sum(layer.size for layer in look.layers) + look.config.size + look.manifest.size,
        "RootFS": {"Type": "layers", "Layers": list(look.diff_ids)},
        "Metadata": {"LastTagTime": when(item.updated_at)},
        "Target": {
            "MediaType": item.target.media_type,
            "Digest": str(item.target.digest),
            "Size": item.target.size,
        },
        "Manifest": str(look.manifest.digest),
    }


def _repository(name: str) -> str:
    """A name without tag and digest."""
    name = name.partition("@")[0]
    head, slash, last = name.rpartition("/")
    return f"{head}{slash}{last.partition(':')[0]}"


def volume(item: Volume) -> dict[str, Any]:
    """`inspect` of a volume."""
    return {
        "CreatedAt": when(item.created_at),
        "Driver": "local",
        "Labels": dict(item.labels),
        "Mountpoint": item.mountpoint,
        "Name": item.name,
        "Options": dict(item.options) or None,
        "Scope": "local",
        "Anonymous": item.anonymous,
        "UsedBy": list(item.containers),
    }


def network(item: Network) -> dict[str, Any]:
    """`inspect` of a network."""
    return {
        "Name": item.name,
        "Id": item.id,
        "Created": when(item.created_at),
        "Scope": "local",
        "Driver": item.driver,
        "EnableIPv6": item.ipv6,
        "IPAM": {
            "Driver": "default",
            "Config": [
                {"Subnet": subnet.subnet, "Gateway": subnet.gateway, "IPRange": subnet.range} for subnet in item.subnets
            ],
        },
        "Internal": item.internal,
        "Containers": {endpoint.container: _endpoint(endpoint) for endpoint in item.endpoints},
        "Options": {"bridge": item.bridge, "mtu": item.mtu, "dns": item.dns, "isolated": item.isolated},
        "Labels": dict(item.labels),
    }


async def any_of(client: Client, reference: str, kind: str = "") -> dict[str, Any]:
    """What `reference` names: a container, an image, a volume or a network, in this order; `kind` asks for one.

    Raises NotFound.
    """
    for name in (kind,) if kind else ("container", "image", "volume", "network"):
        try:
            return await _one(client, reference, name)
        except NotFound:
            if kind:
                raise
        except WherryError:
            # a daemon that has no such thing, or a name that can't be one of that kind
            if kind:
                raise
    raise NotFound(f"no such container, image, volume or network: {reference}")


async def _one(client: Client, reference: str, kind: str) -> dict[str, Any]:
    if kind == "container":
        from wherry.client.finding import find

        return await container(client, await find(client, reference))
    if kind == "image":
        from wherry.client.pictures import find_image

        found = await find_image(client, reference)
        return await image(client, found.image, found.names)
    if kind == "volume":
        return volume(await client.volumes.get(reference))
    return network(await client.networks.get(reference))
