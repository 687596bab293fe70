"""A service of every kind of call, made for tests from a descriptor (no .proto file), and its implementation."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from google.protobuf import descriptor_pb2, descriptor_pool, wrappers_pb2
from google.protobuf.message import Message

from wherry.core.errors import NotFound
from wherry.proto.service import Context

SERVICE = "wherry.test.Echo"
Text = wrappers_pb2.StringValue
KINDS = {
    "Unary": (False, False),
    "Collect": (True, False),
    "Count": (False, True),
    "Chat": (True, True),
    "Slow": (False, False),
    "Fail": (False, False),
    "Crash": (False, False),
    "Absent": (False, False),
    "Ignore": (True, False),
}


def _define() -> None:
    file = descriptor_pb2.FileDescriptorProto(
        name="wherry/test/echo.proto",
        package="wherry.test",
        syntax="proto3",
        dependency=["google/protobuf/wrappers.proto"],
    )
    service = file.service.add(name="Echo")
    for name, (client, server) in KINDS.items():
        service.method.add(
            name=name,
            input_type=".google.protobuf.StringValue",
            output_type=".google.protobuf.StringValue",
            client_streaming=client,
            server_streaming=server,
        )
    descriptor_pool.Default().Add(file)


_define()


class Echo:
    """Answers with what it was told; remembers the last context and what became of `Slow`."""

    SERVICE = SERVICE

    def __init__(self) -> None:
        self.context: Context | None = None
        self.cancelled = asyncio.Event()
        self.started = asyncio.Event()

    async def unary(self, request: Message, context: Context) -> Message:
        self.context = context
        return request

    async def collect(self, requests: AsyncIterator[Text], context: Context) -> Message:
        return Text(value=",".join([item.value async for item in requests]))

    async def count(self, request: Text, context: Context) -> AsyncIterator[Message]:
        for number in range(int(request.value)):
            yield Text(value=str(number))
        if int(request.value) == 3:
            raise NotFound("no fourth: not found")

    async def chat(self, requests: AsyncIterator[Text], context: Context) -> AsyncIterator[Message]:
        async for item in requests:
            yield Text(value=item.value.upper())

    async def slow(self, request: Message, context: Context) -> Message:
        self.context = context
        self.started.set()
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        return request

    async def fail(self, request: Text, context: Context) -> Message:
        raise NotFound(f'container "{request.value}" in namespace "default": not found')

    async def crash(self, request: Message, context: Context) -> Message:
        raise ZeroDivisionError("a bug")

    async def ignore(self, requests: AsyncIterator[Text], context: Context) -> Message:
        await asyncio.sleep(30)
        return Text()
