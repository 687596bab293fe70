"""The gRPC door: services without a transport, served by grpc.aio on a unix socket.

One table from the path of a call to its handler, made from the descriptors; errors become a status here, once; the
caller's metadata and deadline become a `Context`. Where the caller goes away, grpc.aio cancels the handler's task.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any

import grpc
import grpc.aio
import structlog
from google.protobuf.message import DecodeError, Message

from wherry.core.errors import InvalidArgument, WherryError
from wherry.daemon.addresses import own, short_path, tight_umask
from wherry.proto.service import Context, Method, methods

log = structlog.get_logger(__name__)

_Handler = Any  # grpc.RpcMethodHandler; grpc's aio handlers are untyped in its stubs
_CODES = {code.value[0]: code for code in grpc.StatusCode}


class GrpcServer:
    """The server. `bind` it once, then `start`."""

    def __init__(self, services: Iterable[object], *, max_receive: int, max_send: int) -> None:
        """`services` as wherry.proto.service describes them; sizes in bytes of one message."""
        options = [
            ("grpc.so_reuseport", 0),
            ("grpc.max_receive_message_length", max_receive),
            ("grpc.max_send_message_length", max_send),
            # clients with keepalive (the Go client pings each 10 s) are no attackers on a local socket
            ("grpc.http2.min_ping_interval_without_data_ms", 1000),
            ("grpc.http2.max_ping_strikes", 0),
        ]
        self._server = grpc.aio.server(options=options)
        self._names = contextlib.ExitStack()
        self._table = Table()
        for service in services:
            self._table.add(service)
        self._server.add_generic_rpc_handlers((self._table,))

    def bind(self, path: str, *, uid: int = 0, gid: int = 0) -> None:
        """Listen on a unix socket, with its mode and owner from the first moment on.

        The caller holds the address's lock: whatever is at the path is replaced. Raises OSError with the path.
        """
        # gRPC removes the file by the name it was given when it stops: the name must mean the same until then
        short = self._names.enter_context(short_path(path))
        with contextlib.suppress(FileNotFoundError):
            os.unlink(short)
        try:
            with tight_umask():
                bound = self._server.add_insecure_port(f"unix:{short}")
        except RuntimeError as error:
            raise OSError(f"can't listen on {path}: {error}") from error
        if not bound:
            raise OSError(f"can't listen on {path}")
        own(short, uid=uid, gid=gid)

    async def start(self) -> None:
        """Serve."""
        await self._server.start()

    async def stop(self, grace: float) -> None:
        """Take no more calls; give those that run `grace` seconds, then cancel them."""
        await self._server.stop(grace)
        self._names.close()


class Table(grpc.GenericRpcHandler):  # type: ignore[type-arg]  # generic only in its stubs
    """From a call's path to its handler; an unknown path answers UNIMPLEMENTED in the words of Go's servers."""

    def __init__(self) -> None:
        self._handlers: dict[str, _Handler] = {}
        self._services: set[str] = set()

    def add(self, service: object) -> None:
        """Serve one more service; a method that it lacks answers UNIMPLEMENTED."""
        name: str = service.SERVICE  # type: ignore[attr-defined]
        self._services.add(name)
        for method in methods(name).values():
            if (function := getattr(service, method.attribute, None)) is not None:
                self._handlers[method.path] = _handler(method, function)

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> _Handler | None:
        """grpc asks this for each call."""
        path = handler_call_details.method
        handler = self._handlers.get(path)
        if handler is not None:
            return handler
        service, _, name = path.lstrip("/").partition("/")
        known = service in self._services
        return _refuse(f"unknown method {name} for service {service}" if known else f"unknown service {service}")


def _handler(method: Method, call: Callable[[Any, Context], Any]) -> _Handler:
    """The grpc handler of one method. Requests are parsed inside it, so that a malformed one gets an error of ours."""
    behave = (_streaming if method.server_streaming else _unary)(method, call)
    kinds = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }
    return kinds[method.client_streaming, method.server_streaming](behave, None, _serialize)


def _serialize(message: Message) -> bytes:
    return message.SerializeToString()


def _parse(method: Method, data: bytes) -> Message:
    try:
        return method.request.FromString(data)
    except DecodeError as error:
        raise InvalidArgument(
            f"{method.path}: the request is no {method.request.DESCRIPTOR.full_name}: {error}"
        ) from None


async def _parse_all(method: Method, requests: AsyncIterator[bytes]) -> AsyncIterator[Message]:
    async for data in requests:
        yield _parse(method, data)


def _unary(method: Method, call: Callable[[Any, Context], Awaitable[Message]]) -> Callable[..., Awaitable[Message]]:
    parse: Callable[[Method, Any], Any] = _parse_all if method.client_streaming else _parse

    async def behave(request: Any, rpc: grpc.aio.ServicerContext[Any, Any]) -> Message:
        began = time.perf_counter()
        try:
            return await call(parse(method, request), _context(rpc))
        except Exception as error:
            await _abort(rpc, method, error)
            raise
        finally:
            _log_call(method, began)

    return behave


def _streaming(
    method: Method, call: Callable[[Any, Context], AsyncIterator[Message]]
) -> Callable[..., AsyncIterator[Message]]:
    parse: Callable[[Method, Any], Any] = _parse_all if method.client_streaming else _parse

    async def behave(request: Any, rpc: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Message]:
        began = time.perf_counter()
        try:
            # a generator that is left half-way must let go of what it holds now, not when it is collected
            async with contextlib.aclosing(call(parse(method, request), _context(rpc))) as responses:  # type: ignore[type-var]
                async for response in responses:
                    yield response
        except Exception as error:
            await _abort(rpc, method, error)
            raise
        finally:
            _log_call(method, began)

    return behave


def _refuse(text: str) -> _Handler:
    async def behave(request: Any, rpc: grpc.aio.ServicerContext[Any, Any]) -> None:
        await rpc.abort(grpc.StatusCode.UNIMPLEMENTED, text)

    return grpc.unary_unary_rpc_method_handler(behave)


def _context(rpc: grpc.aio.ServicerContext[Any, Any]) -> Context:
    metadata: dict[str, str] = {}
    for key, value in rpc.invocation_metadata() or ():
        if isinstance(value, str):
            metadata.setdefault(key, value)
    remaining = rpc.time_remaining()
    return Context(metadata, None if remaining is None else time.monotonic() + remaining, "grpc")


async def _abort(rpc: grpc.aio.ServicerContext[Any, Any], method: Method, error: Exception) -> None:
    """End the call with the error's status; returns only where the call was ended before."""
    if isinstance(error, grpc.aio.AbortError):
        return
    code, text = status_of(error, method.path)
    with contextlib.suppress(grpc.aio.UsageError):  # the caller was faster and cancelled
        await rpc.abort(_CODES[code], text)


def status_of(error: Exception, path: str) -> tuple[int, str]:
    """The status code and text for an error; what is no error of ours is a bug and is logged with its traceback."""
    if isinstance(error, WherryError):
        return int(error.code), error.message
    if isinstance(error, TimeoutError):
        return grpc.StatusCode.DEADLINE_EXCEEDED.value[0], f"{path}: {error or 'timed out'}: deadline exceeded"
    log.error("call failed", method=path, exc_info=error)
    return grpc.StatusCode.UNKNOWN.value[0], f"{path}: {type(error).__name__}: {error}"


def _log_call(method: Method, began: float) -> None:
    log.debug("call", method=method.path, ms=round((time.perf_counter() - began) * 1000, 3))
