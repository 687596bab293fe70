"""A gRPC door before a shim that speaks ttrpc: `python -m tests.daemon.grpc_proxy TTRPC_ADDRESS GRPC_ADDRESS FD`.

`FD` is closed when it listens.
"""

from __future__ import annotations

import asyncio
import os
import sys

import grpc
import grpc.aio

from wherry.core.errors import WherryError
from wherry.proto import task_v3_pb2  # noqa: F401  # declares the service
from wherry.proto.ttrpc.calls import find_method
from wherry.proto.ttrpc.client import TtrpcClient


async def proxy(behind: str, address: str, tell: int) -> None:
    """Serve gRPC at `address`, passing calls on to the ttrpc shim `behind` until that ends."""
    client = await TtrpcClient.connect(behind)
    codes = {code.value[0]: code for code in grpc.StatusCode}

    class Handler(grpc.GenericRpcHandler):  # type: ignore[type-arg]
        def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:  # type: ignore[type-arg]
            _, service, name = str(details.method).split("/")
            method = find_method(service, name)

            async def answer(request: bytes, context: grpc.aio.ServicerContext) -> bytes:  # type: ignore[type-arg]
                try:
                    return (await client.call(service, name, method.request.FromString(request))).SerializeToString()
                except WherryError as error:
                    await context.abort(codes[error.code], error.message)
                    raise

            return grpc.unary_unary_rpc_method_handler(answer)

    server = grpc.aio.server()
    server.add_generic_rpc_handlers((Handler(),))
    server.add_insecure_port(address.replace("unix://", "unix:"))
    await server.start()
    os.close(tell)
    await client.wait_closed()
    os._exit(0)


if __name__ == "__main__":
    asyncio.run(proxy(sys.argv[1], sys.argv[2], int(sys.argv[3])))
