"""A container as people ask for it (`docker run`'s options), made into what `wherry.client.launch` creates.

What `ctr` makes of an image and what docker makes of it differ: this is docker's way. The default seccomp profile is
on, set-user-ID programs work, the control groups can be seen, /run is the image's, volumes that the image declares are
made, and the container has a name beside its id. A daemon needs nothing but the record to start it again.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from wherry.client import limits as limiting
from wherry.client import mounting, security
from wherry.client.finding import SHORT, check_free, find
from wherry.client.launch import RUNTIME, Launch, Launched, create, remove
from wherry.client.lifecycle import policy_labels
from wherry.client.limits import Limits
from wherry.client.manifests import picture
from wherry.client.mounting import Wish
from wherry.client.names import random_id, random_name
from wherry.client.security import Security
from wherry.client.spec import SpecOptions
from wherry.client.states import label_json
from wherry.core import container_logs, quickjson
from wherry.core.errors import AlreadyExists, InvalidArgument, NotFound, WherryError
from wherry.core.labels import (
    AUTO_REMOVE,
    CONFIG,
    CONTAINER_NAME,
    HEALTH_CHECK,
    LOG_URI,
    MOUNTS,
    RESTART_LOG_URI,
    RESTART_POLICY,
    RESTART_STATUS,
    STDIN_OPEN,
    STOP_SIGNAL,
    STOP_TIMEOUT,
)
from wherry.core.platforms import best
from wherry.core.tuples import NamedTuple

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from wherry.client.api import Client
    from wherry.client.images import Image
    from wherry.client.manifests import Picture
    from wherry.client.network import NetworkOptions
    from wherry.client.userns import Users
    from wherry.core.platforms import Platform

_CGROUPS = {
    "destination": "/sys/fs/cgroup",
    "type": "cgroup",
    "source": "cgroup",
    "options": ["ro", "nosuid", "noexec", "nodev"],
}
# what shares a namespace of the host with a container, beside the namespace itself
_SHARED_SHM = ("/dev/shm", "/dev/mqueue")
_KINDS = {"ipc": "ipc", "pid": "pid", "uts": "uts", "cgroupns": "cgroup"}
# of a mount whose files the container's root owns though they are the host's root's
IDMAP = "idmap"


class Recipe(NamedTuple):
    """What to make; the defaults ask for nothing.

    `name` "" has one made up. `entrypoint` None is the image's, else it replaces that and the image's command.
    `user` None is the image's. `restart` is docker's policy (`on-failure:3`), `running` says that it will be started at
    once. `namespaces` maps `ipc`, `pid`, `uts`, `cgroupns` and `userns` to docker's modes (`host`, `private`,
    `container:ID`, `auto` …); `uidmap` and `gidmap` (`CONTAINER:HOST:SIZE`) make a user namespace, too. `health` is the
    `Healthcheck` of an image's configuration (`{"Test": ["NONE"]}` for none); None is the image's. `shm_size` is in
    bytes. `auto_remove` is "true" where the daemon removes it at once, "attached" where somebody reads the rest of its
    output first.
    """

    image: str
    command: Sequence[str] = ()
    name: str = ""
    entrypoint: Sequence[str] | None = None
    env: Sequence[str] = ()
    cwd: str = ""
    user: str | None = None
    groups: Sequence[str] = ()
    tty: bool = False
    stdin_open: bool = False
    hostname: str = ""
    domainname: str = ""
    labels: Mapping[str, str] = MappingProxyType({})
    annotations: Mapping[str, str] = MappingProxyType({})
    mounts: Sequence[Wish] = ()
    mounts_from: Sequence[str] = ()
    limits: Limits = Limits()
    ulimits: Sequence[str] = ()
    oom_score_adj: int | None = None
    shm_size: int = 0
    sysctls: Mapping[str, str] = MappingProxyType({})
    namespaces: Mapping[str, str] = MappingProxyType({})
    uidmap: Sequence[str] = ()
    gidmap: Sequence[str] = ()
    cgroup_parent: str = ""
    privileged: bool = False
    read_only: bool = False
    cap_add: Sequence[str] = ()
    cap_drop: Sequence[str] = ()
    security: Security = Security()
    devices: Sequence[str] = ()
    device_rules: Sequence[str] = ()
    gpus: Sequence[str] = ()
    init: bool = False
    restart: str = ""
    running: bool = False
    auto_remove: str = ""
    health: Mapping[str, Any] | None = None
    stop_signal: str = ""
    stop_timeout: float | None = None
    log_uri: str = ""
    network: NetworkOptions | None = None
    platform: Platform | None = None
    snapshotter: str = ""
    runtime: str = RUNTIME
    runtime_options: Message | None = None
    rootfs: str = ""


async def make(client: Client, recipe: Recipe) -> Launched:
    """Makes the container, not started; nothing is left of it when this raises.

    Raises NotFound without the image, AlreadyExists where the name is taken, InvalidArgument.
    """
    found = await _image(client, recipe)
    settings: Mapping[str, Any] = found[1].settings if found is not None else {}
    kitchen = _Kitchen(client, recipe, settings)
    try:
        for attempt in range(10):
            launch = await kitchen.launch(found, attempt)
            try:
                launched = await create(client, launch)
                await kitchen.populate(launched)
                return launched
            except AlreadyExists:
                # a made up name that somebody else has is made up anew
                if recipe.name:
                    raise
        raise AlreadyExists("no free name was found for the container: give it one with --name")
    except BaseException:
        await kitchen.take_back()
        raise


async def _image(client: Client, recipe: Recipe) -> tuple[Image, Picture] | None:
    if recipe.rootfs:
        return None
    image = await client.images.find(recipe.image)
    look = await picture(client.content, image.target, recipe.platform)
    if recipe.platform is not None and best(recipe.platform, [look.platform]) is None:
        raise NotFound(f"image {recipe.image} is here for {look.platform}, not for {recipe.platform}")
    return image, look


class _Kitchen:
    """One container in the making."""

    def __init__(self, client: Client, recipe: Recipe, settings: Mapping[str, Any]) -> None:
        self._client = client
        self._recipe = recipe
        self._settings = settings
        self._id = random_id()
        self._fresh: list[str] = []
        self._unfilled: list[tuple[str, str]] = []
        self._mounts: list[dict[str, Any]] = []
        self._shown: list[dict[str, Any]] = []
        self._prepared = False
        self._paths: dict[str, str] = {}
        self._users: Users | None = None

    async def launch(self, found: tuple[Image, Picture] | None, attempt: int) -> Launch:
        recipe = self._recipe
        name = recipe.name or random_name(attempt)
        if recipe.name:
            await check_free(self._client, name)
        if not self._prepared:
            await self._prepare()
        return Launch(
            id=self._id,
            image=found[0].name if found is not None else "",
            spec=SpecOptions(
                args=self._args(),
                env=[f"HOSTNAME={self._hostname()}", *recipe.env],
                cwd=recipe.cwd,
                tty=recipe.tty,
                read_only=recipe.read_only,
                rootfs=recipe.rootfs,
                annotations=recipe.annotations,
                hostname=self._hostname(),
            ),
            user=recipe.user,
            groups=recipe.groups,
            labels=self._labels(name),
            snapshotter=recipe.snapshotter,
            snapshot_labels=self._users.labels() if self._users is not None else {},
            runtime=recipe.runtime,
            runtime_options=self._runtime_options(),
            platform=recipe.platform,
            network=self._network(name),
            adapt=self._adapt,
            found=found,
        )

    def _runtime_options(self) -> Message | None:
        options = self._recipe.runtime_options
        if self._users is None or self._recipe.runtime != RUNTIME:
            return options
        from wherry.client.runtimes import owned

        # its root owns its streams, or it could not open /dev/stdout
        return owned(options, *self._users.root())

    async def take_back(self) -> None:
        """Removes the volumes that were made for a container that isn't to be."""
        for name in self._fresh:
            with contextlib.suppress(WherryError):
                await self._client.tidying().volumes.remove(name)

    async def populate(self, launched: Launched) -> None:
        """Puts what the image has into the volumes that are fresh; raises what is in the way, and removes all again."""
        if not self._unfilled:
            return
        from wherry.client import copies

        try:
            for folder, path in self._unfilled:
                copies.fill(folder, launched.mounts, path)
        except BaseException:
            with contextlib.suppress(WherryError):
                await remove(self._client, launched.container)
            raise

    # -- what has to be asked of the daemon

    async def _prepare(self) -> None:
        wishes = mounting.merge(self._recipe.mounts)
        own = {wish.target for wish in wishes}
        others: dict[str, Wish] = {}
        for text in self._recipe.mounts_from:
            others |= {wish.target: wish for wish in await mounts_from(self._client, text)}
        wishes += [wish for target, wish in others.items() if target not in own]
        taken = {wish.target for wish in wishes}
        declared = [Wish("volume", path) for path in self._settings.get("Volumes") or {} if path not in taken]
        await self._find_users()
        for asked in mounting.merge([*wishes, *declared]):
            wish = asked
            mounting.check_source(wish)
            source, name = wish.source, ""
            if wish.type == "volume":
                source, name = await self._volume(wish)
                if self._users is not None:
                    # what lies in a volume belongs to ids of containers, whichever the host has for them
                    wish = wish._replace(options=(*wish.options, IDMAP))
            elif IDMAP in wish.options and self._users is None:
                raise InvalidArgument(
                    f"the option idmap of the mount at {wish.target} needs --userns auto, or a mapping"
                )
            self._mounts.append(mounting.to_spec(wish, source))
            self._shown.append(mounting.shown(wish, source, name))
        for kind, mode in self._recipe.namespaces.items():
            if kind != "userns":
                self._paths[kind] = await namespace_path(self._client, kind, mode)
        self._prepared = True

    async def _find_users(self) -> None:
        recipe, mode = self._recipe, self._recipe.namespaces.get("userns", "")
        if mode in {"", "host"} and not (recipe.uidmap or recipe.gidmap):
            return
        from wherry.client import userns

        self._users = await userns.users_for(self._client, mode, recipe.uidmap, recipe.gidmap)
        if self._users is None:
            return
        if recipe.namespaces.get("pid") == "host":
            raise InvalidArgument(
                "--userns and --pid host can't be used together: its root may not mount the host's /proc"
            )
        if recipe.privileged:
            raise InvalidArgument(
                "--userns and --privileged can't be used together: one takes away what the other gives (--cap-add ALL "
                "gives all rights within the user namespace)"
            )
        if not recipe.rootfs:
            name = recipe.snapshotter or await self._client.namespaces.default_snapshotter()
            await userns.check_snapshotter(self._client, name)

    async def _volume(self, wish: Wish) -> tuple[str, str]:
        volumes = self._client.volumes
        try:
            if not wish.source:
                raise NotFound("a nameless volume is always a new one")
            volume = await volumes.get(wish.source)
        except NotFound:
            labels = {item.partition("=")[0]: item.partition("=")[2] for item in wish.labels}
            volume = await volumes.create(wish.source, labels=labels)
            if not wish.source:
                self._fresh.append(volume.name)
        from wherry.client import copies

        if wish.copy_up and copies.is_empty(volume.mountpoint):
            self._unfilled.append((volume.mountpoint, wish.target))
        return volume.mountpoint, volume.name

    # -- what follows from the recipe alone

    def _args(self) -> list[str]:
        recipe, settings = self._recipe, self._settings
        if recipe.entrypoint is not None:
            args = [*recipe.entrypoint, *recipe.command]
        else:
            args = [*(settings.get("Entrypoint") or ()), *(recipe.command or settings.get("Cmd") or ())]
        if not args:
            raise InvalidArgument(f"no command given, and {recipe.image} names none: put one after the image")
        if recipe.init:
            from wherry.client import init

            args = [init.INSIDE, "--", *args]
        return args

    def _hostname(self) -> str:
        recipe = self._recipe
        network = recipe.network
        if network is not None and network.mode == "host" and not recipe.hostname:
            return os.uname().nodename
        return recipe.hostname or self._id[:SHORT]

    def _network(self, name: str) -> NetworkOptions | None:
        network = self._recipe.network
        if network is None:
            return None
        return network._replace(names=[name, *network.names], hostname=network.hostname or self._hostname())

    def _labels(self, name: str) -> dict[str, str]:
        recipe = self._recipe
        labels = {**recipe.labels, CONTAINER_NAME: name, **policy_labels(recipe.restart)}
        if recipe.auto_remove:
            if RESTART_POLICY in labels:
                raise InvalidArgument("--rm and --restart can't be used together: one removes what the other keeps")
            labels[AUTO_REMOVE] = recipe.auto_remove
        if recipe.stop_signal:
            labels[STOP_SIGNAL] = recipe.stop_signal
        if recipe.stop_timeout is not None:
            labels[STOP_TIMEOUT] = f"{recipe.stop_timeout:g}"
        if recipe.stdin_open:
            labels[STDIN_OPEN] = "true"
        if recipe.log_uri:
            labels[LOG_URI] = _log_of(recipe.log_uri.replace("{id}", self._id), name)
        if RESTART_POLICY in labels:
            # containerd's own monitor looks there
            labels |= {RESTART_LOG_URI: labels[LOG_URI]} if LOG_URI in labels else {}
            labels |= {RESTART_STATUS: "running"} if recipe.running else {}
        if self._shown:
            labels[MOUNTS] = quickjson.dumps({"mounts": self._shown})
        health = recipe.health if recipe.health is not None else self._settings.get("Healthcheck")
        if health and health.get("Test") and health["Test"][0] != "NONE":
            labels[HEALTH_CHECK] = quickjson.dumps(health)
        labels[CONFIG] = quickjson.dumps(self._config())
        return labels

    def _config(self) -> dict[str, Any]:
        """What `inspect` shows and start needs, and the specification doesn't say."""
        recipe, settings = self._recipe, self._settings
        entrypoint = recipe.entrypoint if recipe.entrypoint is not None else settings.get("Entrypoint")
        command = recipe.command or (() if recipe.entrypoint is not None else settings.get("Cmd"))
        config: dict[str, Any] = {
            "Entrypoint": list(entrypoint or ()),
            "Cmd": list(command or ()),
            "User": recipe.user if recipe.user is not None else settings.get("User") or "",
            "Image": recipe.image,
        }
        modes = {kind: mode for kind, mode in recipe.namespaces.items() if mode}
        more: dict[str, Any] = {"Namespaces": modes, "Init": recipe.init, "Privileged": recipe.privileged}
        config |= {key: value for key, value in more.items() if value}
        if recipe.domainname:
            config["Domainname"] = recipe.domainname
        return config

    def _adapt(self, spec: dict[str, Any], settings: Mapping[str, Any]) -> None:
        recipe, linux = self._recipe, spec["linux"]
        spec["mounts"] = [mount for mount in spec["mounts"] if mount["destination"] != "/run"] + [dict(_CGROUPS)]
        if recipe.shm_size:
            for mount in spec["mounts"]:
                if mount["destination"] == "/dev/shm":
                    mount["options"] = [item for item in mount["options"] if not item.startswith("size=")]
                    mount["options"].append(f"size={recipe.shm_size}")
        asked = limiting.resources(recipe.limits)
        linux["resources"]["cpu"] = asked.pop("cpu", {"shares": 1024})
        linux["resources"].update(asked)
        spec["process"]["rlimits"] = limiting.rlimits(recipe.ulimits)
        if recipe.oom_score_adj is not None:
            spec["process"]["oomScoreAdj"] = recipe.oom_score_adj
        if recipe.sysctls:
            linux["sysctl"] = dict(recipe.sysctls)
        if recipe.domainname:
            spec["domainname"] = recipe.domainname
        self._set_cgroup(spec)
        security.apply(spec, recipe.security, privileged=recipe.privileged, add=recipe.cap_add, drop=recipe.cap_drop)
        if self._users is not None:
            self._users.put(spec)
        for kind in _KINDS:
            set_namespace(spec, kind, recipe.namespaces.get(kind, ""), self._paths.get(kind, ""))
        self._add_devices(spec)
        added = list(self._mounts)
        if recipe.init:
            from wherry.client import init

            added.insert(0, init.mount())
        spec["mounts"] = mounting.put(spec["mounts"], added)

    def _set_cgroup(self, spec: dict[str, Any]) -> None:
        recipe, linux = self._recipe, spec["linux"]
        if recipe.cgroup_parent:
            parent = recipe.cgroup_parent
            # systemd's form names a slice, cgroupfs' a folder
            linux["cgroupsPath"] = (
                f"{parent}:wherry:{self._id}" if parent.endswith(".slice") else f"/{parent.strip('/')}/{self._id}"
            )

    def _add_devices(self, spec: dict[str, Any]) -> None:
        recipe = self._recipe
        if not (recipe.devices or recipe.gpus or recipe.device_rules):
            return
        from wherry.client import devices

        devices.add(spec, recipe.devices, recipe.gpus, recipe.device_rules)


async def mounts_from(client: Client, text: str) -> list[Wish]:
    """The binds and volumes of `CONTAINER[:ro]`, for another container; raises NotFound, InvalidArgument."""
    reference, _, mode = text.partition(":")
    if mode not in {"", "ro", "rw", "z", "Z"}:
        raise InvalidArgument(f"--volumes-from {text!r}: expected CONTAINER or CONTAINER:ro")
    mounts = label_json(await find(client, reference), MOUNTS).get("mounts") or ()
    return [
        Wish(
            str(mount["Type"]),
            str(mount["Destination"]),
            str(mount.get("Name") or mount.get("Source") or ""),
            read_only=mode == "ro" or not mount.get("RW", True),
            copy_up=False,
        )
        for mount in mounts
        if mount.get("Type") in {"bind", "volume"}
    ]


async def namespace_path(client: Client, kind: str, mode: str) -> str:
    """The path of the namespace that `container:ID` means, as the host has it now; "" for other modes.

    Raises NotFound, InvalidArgument where that container doesn't run.
    """
    word, colon, reference = mode.partition(":")
    if word != "container" or not colon:
        return ""
    other = await find(client, reference)
    try:
        task = await client.tasks.get(other.id)
    except NotFound:
        raise InvalidArgument(f"--{kind} {mode}: container {reference} doesn't run") from None
    return f"/proc/{task.pid}/ns/{'cgroup' if kind == 'cgroupns' else kind}"


def set_namespace(spec: dict[str, Any], kind: str, mode: str, path: str) -> None:
    """Gives a specification the namespace that docker's mode asks for; raises InvalidArgument."""
    if not mode:
        return
    linux, name = spec["linux"], _KINDS[kind]
    word = mode.partition(":")[0]
    if word not in {"host", "private", "shareable", "none", "container"} or (word == "none" and kind != "ipc"):
        raise InvalidArgument(f"--{kind} {mode!r}: it is host, private or container:NAME")
    linux["namespaces"] = [item for item in linux["namespaces"] if item["type"] != name]
    if word == "container":
        linux["namespaces"].append({"type": name, "path": path})
    elif word != "host":
        linux["namespaces"].append({"type": name})
    if kind == "ipc" and word in {"host", "container"}:
        _share_shm(spec, "" if word == "host" else path)
    if kind == "ipc" and word == "none":
        spec["mounts"] = [mount for mount in spec["mounts"] if mount["destination"] != "/dev/shm"]
    if kind == "uts" and word == "host":
        spec.pop("hostname", None)


def _share_shm(spec: dict[str, Any], path: str) -> None:
    """POSIX shared memory and queues are files: who shares the namespace shares them too."""
    root = path.removesuffix("/ns/ipc") + "/root" if path else ""
    for mount in list(spec["mounts"]):
        place = mount["destination"]
        if place in _SHARED_SHM and not os.path.exists(f"{root}{place}"):
            spec["mounts"].remove(mount)
        elif place in _SHARED_SHM:
            mount |= {"type": "bind", "source": f"{root}{place}", "options": ["rbind", "nosuid", "noexec", "nodev"]}


def _log_of(uri: str, name: str) -> str:
    """A log of ours also notes the container's name, for who looks while no daemon runs."""
    if not container_logs.folder_of(uri):
        return uri
    return f"{uri}{'&' if '?' in uri else '?'}name={name}"
