"""The store of sandboxes (their controller is the tasks' business)."""

from __future__ import annotations

from collections.abc import Sequence

from wherry.daemon.metadata import Metadata
from wherry.proto import types_pb2


class SandboxStore:
    def __init__(self, metadata: Metadata) -> None:
        raise NotImplementedError

    def get(self, namespace: str, id: str) -> types_pb2.Sandbox:  # noqa: A002
        raise NotImplementedError

    async def list(self, namespace: str, filters: Sequence[str] = ()) -> list[types_pb2.Sandbox]:
        raise NotImplementedError

    async def create(self, namespace: str, sandbox: types_pb2.Sandbox) -> types_pb2.Sandbox:
        raise NotImplementedError

    async def update(self, namespace: str, sandbox: types_pb2.Sandbox, paths: Sequence[str] = ()) -> types_pb2.Sandbox:
        raise NotImplementedError

    async def delete(self, namespace: str, id: str) -> None:  # noqa: A002
        raise NotImplementedError


class SandboxService:
    SERVICE = "containerd.services.sandbox.v1.Store"

    def __init__(self, store: SandboxStore) -> None:
        raise NotImplementedError
