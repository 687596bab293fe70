"""The node's part for streams: addresses for exec, attach and port-forward; the server starts with the first."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING

from wherry.core.durations import parse_duration
from wherry.core.errors import InvalidArgument
from wherry.cri.streaming import certificate
from wherry.cri.streaming.listening import Listening, StreamServer
from wherry.cri.streaming.processes import Processes, netns_of, running
from wherry.cri.streaming.remote import ATTACH, EXEC, PORTS, Call
from wherry.cri.streaming.tokens import Tokens
from wherry.proto import cri_pb2 as cri

if TYPE_CHECKING:
    from wherry.cri.node import Node
    from wherry.cri.settings import Settings


class Streaming:
    """Exec, Attach and PortForward of the CRI: each answers an address, good for one use within a minute."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._tokens = Tokens()
        self._server: StreamServer | None = None
        self._starting = asyncio.Lock()
        node.on_close(self.close)

    async def exec_url(self, request: cri.ExecRequest) -> str:
        """For a further process in a container that runs. Raises InvalidArgument, NotFound, FailedPrecondition."""
        _check("container_id", request.container_id)
        _check_streams(request)
        if not request.cmd:
            raise InvalidArgument("missing required cmd: there is nothing to execute")
        call = Call(
            EXEC,
            running(self._node.records, request.container_id),
            tuple(request.cmd),
            request.tty,
            request.stdin,
            request.stdout,
            request.stderr,
        )
        return (await self._started()).url(call)

    async def attach_url(self, request: cri.AttachRequest) -> str:
        """For the streams of a container's own process. Raises InvalidArgument, NotFound, FailedPrecondition."""
        _check("container_id", request.container_id)
        _check_streams(request)
        container = running(self._node.records, request.container_id)
        call = Call(ATTACH, container, (), request.tty, request.stdin, request.stdout, request.stderr)
        return (await self._started()).url(call)

    async def port_forward_url(self, request: cri.PortForwardRequest) -> str:
        """For connections to ports within a pod. Raises InvalidArgument, NotFound, FailedPrecondition."""
        _check("pod_sandbox_id", request.pod_sandbox_id)
        for port in request.port:
            if not 0 < port <= 0xFFFF:
                raise InvalidArgument(f"port {port}: there are ports from 1 to 65535")
        await netns_of(self._node.records, request.pod_sandbox_id)
        pod = self._node.records.pod(request.pod_sandbox_id).id
        return (await self._started()).url(Call(PORTS, pod, ports=tuple(request.port)))

    async def close(self) -> None:
        """End all streams; what they streamed from goes on."""
        if self._server is not None:
            await self._server.close()

    async def _started(self) -> StreamServer:
        async with self._starting:
            if self._server is None:
                records = self._node.records
                folder = os.path.join(self._node.places.state, "cri", "fifo")
                server = StreamServer(
                    await _listening(self._node.settings),
                    self._tokens,
                    Processes(self._node.client, records, folder).run,
                    lambda pod: netns_of(records, pod),
                )
                await server.start()
                self._server = server
            return self._server


async def _listening(settings: Settings) -> Listening:
    pair, tls = settings.x509_key_pair_streaming, None
    if settings.enable_tls_streaming:
        tls = await certificate.context(pair.tls_cert_file, pair.tls_key_file)
    port = settings.stream_server_port or "0"
    if not (port.isascii() and port.isdigit() and int(port) <= 0xFFFF):
        raise InvalidArgument(f"stream_server_port = {port!r}: expected a port")
    idle = parse_duration(settings.stream_idle_timeout or "0")
    return Listening(settings.stream_server_address or "127.0.0.1", int(port), idle, tls)


def _check(name: str, value: str) -> None:
    if not value:
        raise InvalidArgument(f"missing required {name}")


def _check_streams(request: cri.ExecRequest | cri.AttachRequest) -> None:
    if request.tty and request.stderr:
        raise InvalidArgument("tty and stderr cannot both be true")
    if not (request.stdin or request.stdout or request.stderr):
        raise InvalidArgument("one of stdin, stdout, or stderr must be set")
