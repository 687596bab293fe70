"""The CRI in the daemon: assembled at the first call, or at the start where pods wait for it.

Who isn't part of a Kubernetes cluster pays nothing: neither `wherry.cri` nor its messages are loaded before.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import structlog

from wherry.core.errors import WherryError
from wherry.daemon.config import Config
from wherry.daemon.observed import Observed, Observer
from wherry.daemon.sandboxes import SandboxStore
from wherry.daemon.version import VERSION

if TYPE_CHECKING:
    from wherry.cri.node import Node

log = structlog.get_logger(__name__)

NAMES = ("runtime.v1.RuntimeService", "runtime.v1.ImageService")
# how a configuration turns it off: containerd's names for it, of all generations
PLUGINS = ("io.containerd.grpc.v1.cri", "io.containerd.cri.v1.runtime", "cri")
_NAMESPACE = "k8s.io"
_FILTER = 'labels."io.cri-containerd.kind"==sandbox'


class CriDoor:
    """The CRI's services by name, made when one is asked for."""

    def __init__(
        self, config: Config, services: Sequence[object], sandboxes: SandboxStore, observers: Sequence[Observer] = ()
    ) -> None:
        """`services` are those of the daemon; more may come into the list after this. `observers` watch the calls."""
        self._config = config
        self._services = services
        self._sandboxes = sandboxes
        self._observers = observers
        self._node: Node | None = None
        self._starting: asyncio.Task[None] | None = None

    def services(self) -> Mapping[str, Callable[[], object]]:
        """What makes each service, by its full name."""
        return {NAMES[0]: self._runtime, NAMES[1]: self._images}

    async def start(self) -> None:
        """Where there are pods, look after them; that goes on beside everything else."""
        if await self._sandboxes.list(_NAMESPACE, [_FILTER]):
            self._starting = asyncio.get_running_loop().create_task(self._recover())

    async def close(self) -> None:
        """Pods go on."""
        if self._starting is not None:
            self._starting.cancel()
            await asyncio.gather(self._starting, return_exceptions=True)
        if self._node is not None:
            await self._node.close()

    async def _recover(self) -> None:
        try:
            await self._made().start()
        except (WherryError, OSError) as error:
            log.error("pods can't be looked after; the next call of the CRI tries again", error=str(error))

    def _made(self) -> Node:
        if self._node is None:
            from wherry.cri.door import LocalTransport  # noqa: PLC0415 -- see the module's text
            from wherry.cri.node import Host, Node, Places  # noqa: PLC0415

            config = self._config
            host = Host(
                version=VERSION,
                snapshots={
                    "overlayfs": config.overlayfs.root_path or os.path.join(config.root, "snapshotter", "overlayfs"),
                    "native": config.native.root_path or os.path.join(config.root, "snapshotter", "native"),
                },
                content=os.path.join(config.root, "content"),
                socket=config.grpc.address,
            )
            places = Places(config.root, config.state)
            self._node = Node(LocalTransport(self._services), config.cri_settings(), places, host)
            log.info("CRI", root=config.root, state=config.state)
        return self._node

    def _runtime(self) -> object:
        from wherry.cri.node import RuntimeService  # noqa: PLC0415

        return self._watched(RuntimeService(self._made()))

    def _images(self) -> object:
        from wherry.cri.node import ImageService  # noqa: PLC0415

        return self._watched(ImageService(self._made()))

    def _watched(self, service: object) -> object:
        return Observed(service, self._observers) if self._observers else service
