"""Layers applied to mounts, and layers computed from them, between the content store and the snapshotter's worker."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wherry.daemon.content import ContentStore
from wherry.proto import diff_pb2 as pb

if TYPE_CHECKING:
    from wherry.snapshotter.applier import Applier


class Differ:
    def __init__(self, content: ContentStore, applier: Applier) -> None:
        raise NotImplementedError

    async def apply(self, namespace: str, request: pb.ApplyRequest) -> pb.ApplyResponse:
        """Apply the blob `request.diff` to `request.mounts`; returns the descriptor of the uncompressed tar."""
        raise NotImplementedError

    async def diff(self, namespace: str, request: pb.DiffRequest, *, lease: str | None = None) -> pb.DiffResponse:
        """Compute the layer from `left` to `right` into the content store."""
        raise NotImplementedError


class DiffService:
    SERVICE = "containerd.services.diff.v1.Diff"

    def __init__(self, differ: Differ) -> None:
        raise NotImplementedError
