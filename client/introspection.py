"""What a daemon is made of, which one it is, and its version."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

from google.protobuf.empty_pb2 import Empty

from wherry.client.transport import Calls
from wherry.core.errors import Code
from wherry.core.tuples import NamedTuple
from wherry.proto import introspection_pb2 as pb
from wherry.proto import version_pb2

_SERVICE = "containerd.services.introspection.v1.Introspection"


class Version(NamedTuple):
    """A daemon's version and the revision that it was built from."""

    version: str
    revision: str


class Server(NamedTuple):
    """Which daemon answers: an id that survives restarts, its pid, its pid namespace's inode number."""

    uuid: str
    pid: int
    pidns: int


class Plugin(NamedTuple):
    """A part of the daemon. `error` is empty for one that works."""

    type: str
    id: str
    platforms: tuple[str, ...] = ()
    requires: tuple[str, ...] = ()
    exports: Mapping[str, str] = MappingProxyType({})
    capabilities: tuple[str, ...] = ()
    error: str = ""
    skipped: bool = False

    @property
    def status(self) -> str:
        """`ok`, `skip` (not for this host) or `error`."""
        if not self.error:
            return "ok"
        return "skip" if self.skipped else "error"


def _parse(message: pb.Plugin) -> Plugin:
    platforms = ("/".join(filter(None, (p.os, p.architecture, p.variant))) for p in message.platforms)
    return Plugin(
        type=message.type,
        id=message.id,
        platforms=tuple(platforms),
        requires=tuple(message.requires),
        exports=dict(message.exports),
        capabilities=tuple(message.capabilities),
        error=(message.init_err.message or "error") if message.HasField("init_err") else "",
        # containerd tells it by the text alone: its plugins that aren't for this host say "skip plugin"
        skipped=message.init_err.code == Code.UNIMPLEMENTED or "skip plugin" in message.init_err.message,
    )


class Introspection:
    """Questions about the daemon itself."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    async def version(self) -> Version:
        """The daemon's version."""
        path = "containerd.services.version.v1.Version/Version"
        answer = await self._calls.unary(path, Empty(), version_pb2.VersionResponse)
        return Version(answer.version, answer.revision)

    async def server(self) -> Server:
        """Which daemon answers."""
        answer = await self._calls.unary(f"{_SERVICE}/Server", Empty(), pb.ServerResponse)
        return Server(answer.uuid, answer.pid, answer.pidns)

    async def plugins(self, filters: Iterable[str] = ()) -> list[Plugin]:
        """The parts of the daemon that one of the filters lets through."""
        answer = await self._calls.unary(f"{_SERVICE}/Plugins", pb.PluginsRequest(filters=filters), pb.PluginsResponse)
        return [_parse(item) for item in answer.plugins]
