"""What the networks have to know of other containers: who is meant by a name, and which process is its first one."""

from __future__ import annotations

from wherry.core.errors import NotFound
from wherry.core.labels import CONTAINER_NAME
from wherry.core.names import quote
from wherry.daemon.containers import ContainerStore
from wherry.daemon.network_settings import settings_of
from wherry.daemon.shims import Shims
from wherry.proto.task_types_pb2 import Status

# seconds for a shim to say what it has
_STATE = 5.0


class Peers:
    """The containers and tasks of a daemon, as its networks see them."""

    def __init__(self, shims: Shims, containers: ContainerStore) -> None:
        self._shims = shims
        self._containers = containers

    async def pid(self, namespace: str, identity: str) -> int:
        """The first process of a container that runs. Raises NotFound; Unavailable where its shim is mute."""
        shim = await self._shims.get(namespace, identity)
        state = await shim.state(_STATE)
        if state.status == Status.STOPPED:
            raise NotFound(f"container {quote(identity)} isn't running: not found")
        return state.pid

    def wants_network(self, namespace: str, identity: str) -> bool:
        """Whether a container asks for a network of ours."""
        try:
            settings = settings_of(self._containers.get(namespace, identity))
        except NotFound:
            return False
        return settings is not None and settings.mode in ("bridge", "networks")

    async def identity(self, namespace: str, name: str) -> str:
        """The id of the container that is meant by an id or a name. Raises NotFound."""
        try:
            return self._containers.get(namespace, name).id
        except NotFound:
            for container in await self._containers.list(namespace):
                if container.labels.get(CONTAINER_NAME) == name:
                    return container.id
            raise
