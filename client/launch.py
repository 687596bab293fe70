"""From an image to a container that can run: the record, its snapshot, and the mounts for its task.

The order needs no lease and few calls: the record is written first and names its snapshot, so that the garbage
collector spares the snapshot from its first moment on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from wherry.client import users
from wherry.client.containers import Container
from wherry.client.manifests import Picture, picture
from wherry.client.network import NetworkOptions, extensions
from wherry.client.spec import SpecOptions, build
from wherry.core.errors import InvalidArgument, NotFound, Unimplemented, WherryError
from wherry.core.labels import OWN, STOP_SIGNAL
from wherry.core.tuples import NamedTuple
from wherry.core.typeurl import pack

if TYPE_CHECKING:
    from google.protobuf.any_pb2 import Any as Packed
    from google.protobuf.message import Message

    from wherry.client.api import Client
    from wherry.client.images import Image
    from wherry.client.values import Mount
    from wherry.core.platforms import Platform

RUNTIME = "io.containerd.runc.v2"
# what a daemon does for a container by itself: nothing that an image may ask for
_NOT_FROM_IMAGES = (OWN, "containerd.io/restart.")


class Launch(NamedTuple):
    """What to make.

    `image` is the image's full name; "" with `spec.rootfs`, a folder of the host that is no snapshot. `document` is a
    whole specification that replaces the one made from `spec`. `user` is `NAME|UID[:GROUP|GID]`, None for the image's.
    `network` None leaves the network to the specification. `groups` are further groups of the process, names of the
    image or numbers. `adapt` changes the specification that was made from `spec` in place, given the image's `config`.
    `found` is the image and its parts where the caller has looked them up already.
    """

    id: str
    image: str = ""
    spec: SpecOptions = SpecOptions()
    document: Mapping[str, Any] | None = None
    user: str | None = None
    labels: Mapping[str, str] = MappingProxyType({})
    snapshotter: str = ""
    snapshot_labels: Mapping[str, str] = MappingProxyType({})
    runtime: str = RUNTIME
    runtime_options: Message | None = None
    platform: Platform | None = None
    network: NetworkOptions | None = None
    groups: Sequence[str] = ()
    adapt: Callable[[dict[str, Any], Mapping[str, Any]], None] | None = None
    found: tuple[Image, Picture] | None = None


class Launched(NamedTuple):
    """A container and the mounts of its root; none where the root is a folder of the host."""

    container: Container
    mounts: tuple[Mount, ...]


async def create(client: Client, launch: Launch) -> Launched:
    """Makes the container, unpacking the image where nobody did; nothing is left of it when this raises.

    Raises NotFound without the image, AlreadyExists where the id is taken, InvalidArgument.
    """
    if not launch.image:
        return await _without_image(client, launch)
    if launch.found is not None:
        image, look = launch.found
    else:
        image = await client.images.find(launch.image)
        look = await picture(client.content, image.target, launch.platform)
    snapshotter = launch.snapshotter or await client.namespaces.default_snapshotter()
    spec = _spec(client, launch, look)
    record = Container(
        id=launch.id,
        image=image.name,
        labels=_labels(launch, image, look),
        runtime=launch.runtime,
        runtime_options=_options(launch),
        spec=spec,
        snapshotter=snapshotter,
        snapshot_key=launch.id,
        extensions=await _network(client, launch, look),
    )
    container = await client.containers.create(record)
    try:
        mounts = await _prepare(client, launch, look, snapshotter)
        try:
            container = await _set_user(client, container, launch, look, mounts)
        except BaseException:
            with contextlib.suppress(WherryError):
                await client.tidying().snapshots(snapshotter).remove(launch.id)
            raise
    except BaseException:
        with contextlib.suppress(WherryError):
            await client.tidying().containers.delete(launch.id)
        raise
    return Launched(container, tuple(mounts))


async def remove(client: Client, container: Container) -> None:
    """Removes a container and its snapshot, in time of its own; a snapshot that is gone already is no error."""
    client = client.tidying()
    if container.snapshot_key and container.snapshotter:
        with contextlib.suppress(NotFound):
            await client.snapshots(container.snapshotter).remove(container.snapshot_key)
    await client.containers.delete(container.id)


async def _without_image(client: Client, launch: Launch) -> Launched:
    if not launch.spec.rootfs and launch.document is None:
        raise InvalidArgument("a container needs an image, a root folder or a whole specification")
    spec = _spec(client, launch, None)
    if launch.user:
        user = users.resolve(launch.user, lambda _: "")
        spec["process"]["user"] = user.json()
    record = Container(
        id=launch.id,
        labels=dict(launch.labels),
        runtime=launch.runtime,
        runtime_options=_options(launch),
        spec=spec,
        extensions=await _network(client, launch, None),
    )
    return Launched(await client.containers.create(record), ())


async def _network(client: Client, launch: Launch, look: Picture | None) -> Mapping[str, Packed]:
    """The extension that asks for a network; none where a daemon has no networks and nobody insists."""
    if launch.network is None:
        return {}
    if launch.network.mode not in {"none", "host"}:
        try:
            await client.networks.check()
        except Unimplemented:
            if not launch.network.optional:
                raise
            return {}
    return extensions(launch.network, look.settings if look is not None else None)


def _spec(client: Client, launch: Launch, look: Picture | None) -> dict[str, Any]:
    if launch.document is not None:
        return dict(launch.document)
    settings = look.settings if look is not None else {}
    spec = build(client.namespace, launch.id, launch.spec, settings)
    if launch.adapt is not None:
        launch.adapt(spec, settings)
    return spec


def _options(launch: Launch) -> Any:
    return None if launch.runtime_options is None else pack(launch.runtime_options)


def _labels(launch: Launch, image: Image, look: Picture) -> dict[str, str]:
    labels = look.settings.get("Labels") or {}
    ours = {str(key): str(value) for key, value in labels.items() if not str(key).startswith(_NOT_FROM_IMAGES)}
    return {
        **ours,
        **{key: value for key, value in image.labels.items() if not key.startswith(_NOT_FROM_IMAGES)},
        STOP_SIGNAL: look.settings.get("StopSignal") or "SIGTERM",
        **launch.labels,
    }


async def _prepare(client: Client, launch: Launch, look: Picture, snapshotter: str) -> list[Mount]:
    snapshots = client.snapshots(snapshotter)
    try:
        return await snapshots.prepare(launch.id, look.chain_id, launch.snapshot_labels)
    except NotFound:
        from wherry.client.unpack import unpack

        chain = await unpack(client, look, snapshotter)
        return await snapshots.prepare(launch.id, chain, launch.snapshot_labels)


async def _set_user(
    client: Client, container: Container, launch: Launch, look: Picture, mounts: list[Mount]
) -> Container:
    """Looks the user up in the container's own files; the record is written again only where the answer isn't root."""
    if launch.document is not None:
        return container
    wanted = look.settings.get("User") or "" if launch.user is None else launch.user
    try:
        read = users.reader(mounts)
        user = users.resolve(wanted, read)
        if launch.groups:
            user = user._replace(groups=tuple(dict.fromkeys([*user.groups, *users.group_ids(launch.groups, read)])))
    except InvalidArgument:
        if wanted or launch.groups:
            raise
        # root without the files of the image: no permission to read them, or another host's
        user = users.ROOT
    if user == users.ROOT:
        return container
    spec = dict(container.spec or {})
    spec["process"] = {**spec["process"], "user": user.json()}
    changed = Container(id=container.id, spec=spec)
    return await client.containers.update(changed, ["spec"])
