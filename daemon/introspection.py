"""`containerd.services.introspection.v1.Introspection`: what the daemon is made of, and which daemon it is."""

from __future__ import annotations

import asyncio
import contextlib
import os
import uuid
from collections.abc import Mapping, Sequence

from google.protobuf import any_pb2, empty_pb2
from google.rpc import status_pb2

from wherry.core.errors import DeadlineExceeded, InvalidArgument, NotFound, Unavailable
from wherry.core.filters import Adaptor, compile_filters
from wherry.core.typeurl import is_a, pack, unpack_as
from wherry.daemon import runtimes
from wherry.daemon.config import RuntimeHandler
from wherry.daemon.plugins import Plugin, Plugins
from wherry.daemon.version import VERSION
from wherry.proto import introspection_pb2 as pb
from wherry.proto.service import Context
from wherry.proto.types_pb2 import Platform, RuntimeInfo, RuntimeRequest, RuntimeVersion

_INFO_SECONDS = 10.0  # for a stranger's shim to describe itself


class IntrospectionService:
    """`identity` is a file that keeps the daemon's uuid over restarts, made when first asked for."""

    SERVICE = "containerd.services.introspection.v1.Introspection"

    def __init__(self, plugins: Plugins, identity: str, handlers: Mapping[str, RuntimeHandler]) -> None:
        self._plugins = plugins
        self._identity = identity
        self._handlers = handlers

    async def plugins(self, request: pb.PluginsRequest, context: Context) -> pb.PluginsResponse:
        """The plugins that the filters match (`type`, `id`, `platforms`, `capabilities`)."""
        matches = compile_filters(request.filters)
        found = [_message(plugin) for plugin in self._plugins.all if matches(_adaptor(plugin))]
        return pb.PluginsResponse(plugins=found)

    async def plugin_info(self, request: pb.PluginInfoRequest, context: Context) -> pb.PluginInfoResponse:
        """One plugin; with a RuntimeRequest in `options` also what the named runtime's shim says of itself."""
        for plugin in self._plugins.all:
            if (plugin.type, plugin.id) == (request.type, request.id):
                break
        else:
            raise NotFound(f"plugin {request.type}.{request.id}: not found")
        response = pb.PluginInfoResponse(plugin=_message(plugin))
        if request.HasField("options"):
            if not is_a(request.options, RuntimeRequest):
                raise InvalidArgument(f"unexpected options of type {request.options.type_url}: invalid argument")
            info = await self._runtime(unpack_as(request.options, RuntimeRequest))
            response.extra.CopyFrom(pack(info))
        return response

    async def server(self, request: empty_pb2.Empty, context: Context) -> pb.ServerResponse:
        """The daemon's uuid, pid and pid namespace."""
        return pb.ServerResponse(uuid=self._uuid(), pid=os.getpid(), pidns=os.stat("/proc/self/ns/pid").st_ino)

    def _uuid(self) -> str:
        with contextlib.suppress(OSError), open(self._identity, encoding="ascii") as file:
            return str(uuid.UUID(file.read().strip()))
        value = str(uuid.uuid4())
        draft = f"{self._identity}.new"
        with open(draft, "w", encoding="ascii") as file:
            file.write(value)
        os.rename(draft, self._identity)
        return value

    async def _runtime(self, request: RuntimeRequest) -> RuntimeInfo:
        launch = runtimes.resolve(request.runtime_path, self._handlers)
        if not launch.binary:
            return RuntimeInfo(name=launch.runtime, version=RuntimeVersion(version=VERSION), options=request.options)
        return await _ask(launch.binary, request.options)


async def _ask(binary: str, options: any_pb2.Any) -> RuntimeInfo:
    """What a shim binary answers to `-info` (containerd 2.0 and later): a RuntimeInfo on its standard output."""
    process = await asyncio.create_subprocess_exec(
        binary,
        "-info",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(_INFO_SECONDS):
            out, err = await process.communicate(options.SerializeToString())
    except TimeoutError:
        process.kill()
        await process.wait()
        raise DeadlineExceeded(f"{binary} -info: no answer within {_INFO_SECONDS:g} s") from None
    if process.returncode != 0:
        raise Unavailable(f"{binary} -info: exit status {process.returncode}: {err.decode(errors='replace').strip()}")
    return RuntimeInfo.FromString(out)


def _message(plugin: Plugin) -> pb.Plugin:
    message = pb.Plugin(
        type=plugin.type,
        id=plugin.id,
        requires=plugin.requires,
        platforms=[
            Platform(os=each.os, architecture=each.architecture, variant=each.variant) for each in plugin.platforms
        ],
        exports=dict(plugin.exports),
        capabilities=plugin.capabilities,
    )
    if plugin.error is not None:
        message.init_err.CopyFrom(status_pb2.Status(code=plugin.error.code, message=plugin.error.message))
    return message


def _adaptor(plugin: Plugin) -> Adaptor:
    def look_up(path: Sequence[str]) -> str | None:
        values = {
            "type": plugin.type,
            "id": plugin.id,
            "platforms": ",".join(f"{each.os}/{each.architecture}" for each in plugin.platforms),
            "capabilities": ",".join(plugin.capabilities),
        }
        return values.get(path[0]) or None if len(path) == 1 else None

    return look_up
