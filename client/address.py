"""Where the daemon is, and the way to it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from wherry.client.api import Client
from wherry.core import places
from wherry.core.errors import PermissionDenied, Unavailable

if TYPE_CHECKING:
    from wherry.client.transport import Transport

DEFAULT_NAMESPACE = "default"
# a socket's connection that isn't accepted in this time (seconds) belongs to a daemon that hangs
CONNECT_TIMEOUT = 10.0


def default_address() -> str:
    """The daemon's gRPC socket: WHERRY_ADDRESS, CONTAINERD_ADDRESS, else `wherryd`'s default."""
    return os.environ.get("WHERRY_ADDRESS") or os.environ.get("CONTAINERD_ADDRESS") or places.address()


def default_namespace() -> str:
    """The namespace: WHERRY_NAMESPACE, CONTAINERD_NAMESPACE, else `default`."""
    return os.environ.get("WHERRY_NAMESPACE") or os.environ.get("CONTAINERD_NAMESPACE") or DEFAULT_NAMESPACE


async def connect(
    address: str | None = None,
    *,
    namespace: str | None = None,
    timeout: float | None = None,  # noqa: ASYNC109 - the limit of each call that is made later
    connect_timeout: float | None = CONNECT_TIMEOUT,
    patience: float = 0.0,
) -> Client:
    """A client over gRPC for programs with asyncio.

    `address` is the path of the gRPC socket of `wherryd` or containerd; it and `namespace` come from the environment
    where they aren't given. With `patience` a call waits so many seconds for a daemon that went away and can be made
    again without harm (`wherry.client.patience`). Raises Unavailable where nobody answers within `connect_timeout`
    seconds.
    """
    from wherry.client.grpc_async import GrpcTransport
    from wherry.client.patience import PatientTransport

    where = address or default_address()
    check_socket(where)
    transport = GrpcTransport(where)
    try:
        await transport.ready(connect_timeout)
    except BaseException:
        await transport.close()
        raise
    chosen = PatientTransport(transport, patience) if patience else transport
    return Client.over(chosen, namespace or default_namespace(), timeout=timeout)


def check_socket(address: str) -> None:
    """Raises Unavailable where there is no such file, PermissionDenied where it may not be reached."""
    try:
        os.stat(address)
    except PermissionError:
        raise PermissionDenied(f"no permission to reach {address}") from None
    except OSError:
        raise Unavailable(f"no daemon at {address}: there is no such socket") from None


def connect_blocking(address: str, connect_timeout: float | None = CONNECT_TIMEOUT) -> Transport:
    """A transport without an event loop: ttrpc on ADDRESS.ttrpc, gRPC on ADDRESS where ttrpc has no such services.

    containerd listens on `.ttrpc` too, but only for events of its shims; the version service tells the two apart.
    Raises Unavailable, PermissionDenied.
    """
    from wherry.client.ttrpc_blocking import BlockingTtrpcTransport
    from wherry.proto.ttrpc import sockets

    beside = f"{address}.ttrpc"
    try:
        transport = BlockingTtrpcTransport(beside, connect_timeout)
        transport.connect()
    except Unavailable:
        # nothing there: gRPC would try again for as long as it may, a person wants to know now
        check_socket(address)
        try:
            sockets.connect(address, connect_timeout).close()
        except Unavailable as error:
            if isinstance(error.__cause__, PermissionError):
                raise PermissionDenied(f"no permission to reach {address}: it is for root or its group") from None
            raise
        return _grpc(address, connect_timeout)
    transport.fall_back = lambda: _grpc(address, connect_timeout)
    return transport


def _grpc(address: str, connect_timeout: float | None) -> Transport:
    from wherry.client.grpc_blocking import BlockingGrpcTransport

    transport = BlockingGrpcTransport(address)
    transport.ready(connect_timeout)
    return transport
