"""A shim that speaks gRPC (`"protocol": "grpc"` in what its start action prints; Kata's and Windows' may).

Imported when the first of them is met: ours and runc's speak ttrpc.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from typing import Any, Final, cast

import grpc
import grpc.aio
from google.protobuf.message import Message

from wherry.core.errors import Unavailable, WherryError, from_code
from wherry.proto.ttrpc.calls import ClientClosed, ConnectionLost, find_method

_OPTIONS: Final = (
    ("grpc.default_authority", "localhost"),
    # one connection: what asks again after its end would ask another process
    ("grpc.enable_retries", 0),
    ("grpc.use_local_subchannel_pool", 1),
)


class GrpcShim:
    """A connection as `daemon.link.Connection` has it. It isn't made again when it ends."""

    def __init__(self, address: str, on_close: Callable[[WherryError], None]) -> None:
        self._address = address
        self._on_close = on_close
        self._channel = grpc.aio.insecure_channel(address, options=_OPTIONS)
        self._ended: asyncio.Future[WherryError] = asyncio.get_running_loop().create_future()
        self._watch: asyncio.Task[None] | None = None

    @classmethod
    async def connect(cls, address: str, limit: float, on_close: Callable[[WherryError], None]) -> GrpcShim:
        """Connect within `limit` seconds to `unix:///path` or a bare path. Raises Unavailable."""
        path = address.removeprefix("unix://")
        if "://" in path:
            raise Unavailable(f"shim at {address}: only unix sockets are supported")
        try:  # gRPC alone would try for the whole time, whoever is there or not
            async with asyncio.timeout(limit):
                _, writer = await asyncio.open_unix_connection(path)
            writer.close()
            shim = cls(f"unix:{path}", on_close)
            try:
                await asyncio.wait_for(shim._channel.channel_ready(), limit)
            except BaseException:
                await shim._channel.close(None)
                raise
        except (OSError, TimeoutError) as error:
            raise Unavailable(f"shim at {address}: {str(error) or 'no answer in time'}: unavailable") from error
        shim._watch = asyncio.get_running_loop().create_task(shim._watch_channel())
        return shim

    @property
    def closed(self) -> bool:
        """Whether it has ended."""
        return self._ended.done()

    async def wait_closed(self) -> WherryError:
        """Wait for its end; the reason."""
        return await asyncio.shield(self._ended)

    async def close(self) -> None:
        """End it."""
        self._end(ClientClosed(f"{self._address}: closed by this side"))
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.wait([self._watch])
        await self._channel.close(None)

    async def call(
        self,
        service: str,
        name: str,
        request: Message,
        *,
        timeout: float | None = None,  # noqa: ASYNC109 - the shim is told too
        metadata: Mapping[str, str] | None = None,
    ) -> Message:
        """Call a method. Raises what the shim answered, DeadlineExceeded, ConnectionLost."""
        if self.closed:
            raise ConnectionLost(f"{self._address}: the connection has ended")
        method = find_method(service, name)
        call: grpc.aio.UnaryUnaryMultiCallable[Any, Message] = self._channel.unary_unary(
            method.path, lambda message: message.SerializeToString(), method.response.FromString
        )
        answer = asyncio.ensure_future(
            _answered(call(request, timeout=timeout, metadata=tuple((metadata or {}).items())))
        )
        try:
            # a call on its way ends with the connection, whatever gRPC thinks of trying again
            await asyncio.wait(
                cast("set[asyncio.Future[Any]]", {answer, self._ended}), return_when=asyncio.FIRST_COMPLETED
            )
            if not answer.done():
                raise ConnectionLost(f"{self._address}: the connection ended during {method.path}")
            return answer.result()
        finally:
            answer.cancel()

    async def _watch_channel(self) -> None:
        state = grpc.ChannelConnectivity.READY
        while state is grpc.ChannelConnectivity.READY:
            await self._channel.wait_for_state_change(state)
            state = self._channel.get_state()
        self._end(ConnectionLost(f"{self._address}: the shim hung up"))

    def _end(self, why: WherryError) -> None:
        if not self._ended.done():
            self._ended.set_result(why)
            with contextlib.suppress(WherryError):
                self._on_close(why)


async def _answered(call: grpc.aio.UnaryUnaryCall[Any, Message]) -> Message:
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        raise from_code(int(error.code().value[0]), error.details() or error.code().name) from None
