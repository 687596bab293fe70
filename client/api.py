"""The client: one object per daemon and namespace, with one part for each noun of the API."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Self

from wherry.client.transport import Calls, Transport

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from wherry.client.containers import Containers
    from wherry.client.content import Content
    from wherry.client.diff import Diff
    from wherry.client.events import Events
    from wherry.client.gc import Gc
    from wherry.client.images import Images
    from wherry.client.introspection import Introspection, Version
    from wherry.client.leases import Leases
    from wherry.client.namespaces import Namespaces
    from wherry.client.network import Networks
    from wherry.client.registries import Registries
    from wherry.client.snapshots import Snapshots
    from wherry.client.tasks import Tasks
    from wherry.client.transfer import Transfer
    from wherry.client.volumes import Volumes

# what a lease that nobody ends lives for, in seconds: containerd's clients say a day
LEASE_SECONDS = 24 * 3600
# for removing what an interrupted command leaves behind: what is in the way of it for longer stays in the way
TIDY_SECONDS = 30.0


class Client:
    """A daemon, seen from one namespace.

    The parts are made when they are asked for, and so are their modules: the command line pays only for what a command
    uses. Nothing is kept between calls but the connection.
    """

    def __init__(self, calls: Calls) -> None:
        self.calls = calls

    @classmethod
    def over(
        cls,
        transport: Transport,
        namespace: str = "default",
        *,
        timeout: float | None = None,
        deadline: float | None = None,
    ) -> Client:
        """A client over a transport; `timeout` (seconds) holds for each call that isn't endless by nature."""
        return cls(Calls(transport, namespace, timeout=timeout, deadline=deadline))

    @property
    def namespace(self) -> str:
        """The namespace that every call is about."""
        return self.calls.namespace

    @property
    def containers(self) -> Containers:
        """Containers as metadata."""
        from wherry.client.containers import Containers

        return Containers(self.calls)

    @property
    def content(self) -> Content:
        """Blobs and uploads."""
        from wherry.client.content import Content

        return Content(self.calls)

    @property
    def diff(self) -> Diff:
        """Layers applied and computed."""
        from wherry.client.diff import Diff

        return Diff(self.calls)

    @property
    def events(self) -> Events:
        """The event bus."""
        from wherry.client.events import Events

        return Events(self.calls)

    @property
    def gc(self) -> Gc:
        """The garbage collector; `wherryd` alone has it."""
        from wherry.client.gc import Gc

        return Gc(self.calls)

    @property
    def images(self) -> Images:
        """Images as names."""
        from wherry.client.images import Images

        return Images(self.calls)

    @property
    def introspection(self) -> Introspection:
        """The daemon itself."""
        from wherry.client.introspection import Introspection

        return Introspection(self.calls)

    @property
    def leases(self) -> Leases:
        """What the garbage collector spares."""
        from wherry.client.leases import Leases

        return Leases(self.calls)

    @property
    def namespaces(self) -> Namespaces:
        """The daemon's tenants."""
        from wherry.client.namespaces import Namespaces

        return Namespaces(self.calls)

    @property
    def networks(self) -> Networks:
        """Networks, and what containers have of them."""
        from wherry.client.network import Networks

        return Networks(self.calls)

    @property
    def registries(self) -> Registries:
        """Registries, looked at without pulling."""
        from wherry.client.registries import Registries

        return Registries(self.calls)

    @property
    def tasks(self) -> Tasks:
        """Containers that run."""
        from wherry.client.tasks import Tasks

        return Tasks(self.calls)

    @property
    def transfer(self) -> Transfer:
        """Images on their way to and from registries and archives."""
        from wherry.client.transfer import Transfer

        return Transfer(self.calls)

    @property
    def volumes(self) -> Volumes:
        """Folders that outlive containers; `wherryd` alone has them."""
        from wherry.client.volumes import Volumes

        return Volumes(self.calls)

    def snapshots(self, snapshotter: str = "overlayfs") -> Snapshots:
        """The snapshots of one snapshotter."""
        from wherry.client.snapshots import Snapshots

        return Snapshots(self.calls, snapshotter)

    async def version(self) -> Version:
        """The daemon's version."""
        return await self.introspection.version()

    def tidying(self) -> Client:
        """The same daemon, with time of its own to remove what was begun: also after this client's time is over."""
        return Client(self.calls.with_seconds(TIDY_SECONDS))

    def within(self, namespace: str) -> Client:
        """The same daemon in another namespace."""
        return Client(self.calls.with_namespace(namespace))

    @asynccontextmanager
    async def lease(self, *, expires: float = LEASE_SECONDS) -> AsyncIterator[Client]:
        """A client whose work is under a lease, which ends with the block (or `expires` seconds from now)."""
        lease = await self.leases.create(expires=expires)
        try:
            yield Client(self.calls.with_lease(lease.id))
        finally:
            await self.leases.delete(lease.id)

    async def close(self) -> None:
        """Ends the connection."""
        await self.calls.transport.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
