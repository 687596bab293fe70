"""Layers applied to mounts, and layers computed from them, between the content store and the snapshotter's worker."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence

from wherry.core.digest import Digest
from wherry.core.errors import FailedPrecondition, InvalidArgument
from wherry.core.labels import UNCOMPRESSED
from wherry.daemon.content import ContentStore
from wherry.daemon.namespaces import require_namespace
from wherry.linux.mounts import Mount
from wherry.proto import diff_pb2 as pb
from wherry.proto import types_pb2
from wherry.proto.service import Context
from wherry.snapshotter.applier import Applied, Applier
from wherry.snapshotter.wire import mounts_from_proto

# what a layer is made as where the caller doesn't say, as in containerd
DEFAULT_LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"


class Differ:
    """Applies and computes layers; the bytes come from and go to the content store's files."""

    def __init__(self, content: ContentStore, applier: Applier) -> None:
        self._content = content
        self._applier = applier

    async def apply(
        self, namespace: str, layer: types_pb2.Descriptor, mounts: Sequence[Mount], *, sync_fs: bool = False
    ) -> Applied:
        """Apply the blob `layer` to `mounts`.

        Raises NotFound (the blob), FailedPrecondition (another size than the descriptor says), InvalidArgument (no
        archive), Unimplemented (the media type), ResourceExhausted (the disk).
        """
        digest = Digest.parse(layer.digest)
        info = self._content.info(namespace, digest)
        if layer.size and layer.size != info.size:
            raise FailedPrecondition(
                f"layer {digest} has {info.size} bytes, its descriptor says {layer.size}: failed precondition"
            )
        path = self._content.path(namespace, digest)
        return await self._applier.apply(mounts, path, layer.media_type, sync_fs=sync_fs)

    async def diff(
        self,
        namespace: str,
        lower: Sequence[Mount],
        upper: Sequence[Mount],
        *,
        media_type: str = "",
        ref: str = "",
        labels: Mapping[str, str] | None = None,
        source_date_epoch: int | None = None,
        lease: str | None = None,
    ) -> types_pb2.Descriptor:
        """Compute the layer from `lower` to `upper` into the content store; one that is there already is fine.

        Its content has the label `containerd.io/uncompressed`. `source_date_epoch` in seconds caps its times.
        """
        media_type = media_type or DEFAULT_LAYER
        ref = ref or f"diff-{secrets.token_hex(8)}"
        async with await self._content.writer(namespace, ref, lease=lease) as writer:
            try:
                await writer.truncate()
                made = await self._applier.diff(
                    lower, upper, media_type, writer.path, source_date_epoch=source_date_epoch
                )
                # hashed again: a blob is in the store only when what is on disk has its digest
                await writer.adopt()
                wanted = {**(labels or {}), UNCOMPRESSED: made.diff_id}
                await self._content.commit_or_label(writer, made.size, made.digest, wanted)
            except BaseException:
                await writer.discard()
                raise
        return types_pb2.Descriptor(media_type=made.media_type, digest=made.digest, size=made.size)


class DiffService:
    """containerd.services.diff.v1."""

    SERVICE = "containerd.services.diff.v1.Diff"

    def __init__(self, differ: Differ) -> None:
        self._differ = differ

    async def apply(self, request: pb.ApplyRequest, context: Context) -> pb.ApplyResponse:
        """Answers the descriptor of the uncompressed archive."""
        namespace = require_namespace(context)
        if not request.HasField("diff"):
            raise InvalidArgument("apply without a descriptor: invalid argument")
        mounts = mounts_from_proto(request.mounts)
        applied = await self._differ.apply(namespace, request.diff, mounts, sync_fs=request.sync_fs)
        descriptor = types_pb2.Descriptor(media_type=applied.media_type, digest=applied.digest, size=applied.size)
        return pb.ApplyResponse(applied=descriptor)

    async def diff(self, request: pb.DiffRequest, context: Context) -> pb.DiffResponse:
        """Answers the descriptor of the layer."""
        epoch = request.source_date_epoch.seconds if request.HasField("source_date_epoch") else None
        made = await self._differ.diff(
            require_namespace(context),
            mounts_from_proto(request.left),
            mounts_from_proto(request.right),
            media_type=request.media_type,
            ref=request.ref,
            labels=request.labels,
            source_date_epoch=epoch,
            lease=context.lease,
        )
        return pb.DiffResponse(diff=made)
