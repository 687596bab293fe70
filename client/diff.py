"""Layers applied to mounts, and layers computed from them, by the daemon."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from wherry.client.transport import Calls
from wherry.client.values import Mount, descriptor_from, descriptor_message
from wherry.core.descriptor import Descriptor
from wherry.core.mediatypes import OCI_LAYER_GZIP
from wherry.proto import diff_pb2 as pb

_SERVICE = "containerd.services.diff.v1.Diff"


class Diff:
    """The daemon's way between layers and mounts."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    async def apply(self, layer: Descriptor, mounts: Iterable[Mount]) -> Descriptor:
        """Unpacks a layer onto mounts; the answer describes it uncompressed (its digest is the layer's diff id)."""
        request = pb.ApplyRequest(diff=descriptor_message(layer), mounts=[mount.message() for mount in mounts])
        answer = await self._calls.unary(f"{_SERVICE}/Apply", request, pb.ApplyResponse)
        return descriptor_from(answer.applied)

    async def compute(
        self,
        lower: Iterable[Mount],
        upper: Iterable[Mount],
        *,
        media_type: str = OCI_LAYER_GZIP,
        ref: str = "",
        labels: Mapping[str, str] | None = None,
    ) -> Descriptor:
        """Writes what `upper` has over `lower` into the content store, as a layer."""
        request = pb.DiffRequest(
            left=[mount.message() for mount in lower],
            right=[mount.message() for mount in upper],
            media_type=media_type,
            ref=ref,
            labels=dict(labels or {}),
        )
        answer = await self._calls.unary(f"{_SERVICE}/Diff", request, pb.DiffResponse)
        return descriptor_from(answer.diff)
