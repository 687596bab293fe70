"""Images: names for descriptors. A name is any text; what it points to need not be there (yet).

Rules and texts are containerd's (core/metadata/images.go, plugins/services/images). An image is a root for the garbage
collector, so storing one is synced.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

from google.protobuf import empty_pb2
from google.protobuf.timestamp_pb2 import Timestamp

from wherry.core import topics
from wherry.core.digest import Digest
from wherry.core.errors import AlreadyExists, InvalidArgument, NotFound
from wherry.core.filters import Adaptor, compile_filters, fields
from wherry.core.labels import GC_EXPIRE
from wherry.core.names import quote
from wherry.daemon.fields import apply_mask, now, settle_labels, take_key, take_map
from wherry.daemon.gc import Collector
from wherry.daemon.leases import IMAGES, hold, release
from wherry.daemon.metadata import Metadata
from wherry.daemon.namespaces import Publish, ensure_namespace, require_namespace, unheard
from wherry.proto import images_pb2 as pb
from wherry.proto import types_pb2
from wherry.proto.service import Context

_GET = "SELECT record FROM images WHERE namespace = ? AND name = ?"


class ImageStore:
    """Images by namespace and name."""

    def __init__(self, metadata: Metadata, publish: Publish | None = None) -> None:
        self._metadata = metadata
        self._publish = publish or unheard

    def get(self, namespace: str, name: str) -> pb.Image:
        """Raises NotFound."""
        row = self._metadata.row(_GET, (namespace, name))
        if row is None:
            raise NotFound(f"image {quote(name)}: not found")
        return pb.Image.FromString(row[0])

    async def list(self, namespace: str, filters: Sequence[str] = ()) -> Sequence[pb.Image]:
        """Those that one of the filters matches, by name.

        Fields: `name`, `target.digest`, `target.mediatype`, `labels."key"`, `annotations."key"`.
        """
        matches = compile_filters(filters)
        query = "SELECT record FROM images WHERE namespace = ? ORDER BY name"

        def work(connection: sqlite3.Connection) -> list[pb.Image]:
            found = (pb.Image.FromString(row[0]) for row in connection.execute(query, (namespace,)))
            return [image for image in found if matches(_fields(image))]

        return await self._metadata.read(work)

    async def create(
        self, namespace: str, image: pb.Image, *, lease: str | None = None, epoch: Timestamp | None = None
    ) -> pb.Image:
        """Store a new image, with `epoch` or this moment as its times. Raises AlreadyExists, InvalidArgument."""
        made = pb.Image()
        made.CopyFrom(image)
        _settle(made)
        made.created_at.CopyFrom(epoch or now())
        made.updated_at.CopyFrom(made.created_at)
        record = made.SerializeToString()

        def work(connection: sqlite3.Connection) -> None:
            ensure_namespace(connection, namespace)
            _hold_expiring(connection, namespace, lease, made)
            try:
                connection.execute("INSERT INTO images VALUES (?, ?, ?)", (namespace, made.name, record))
            except sqlite3.IntegrityError:
                raise AlreadyExists(f"image {quote(made.name)}: already exists") from None

        await self._metadata.write(work, durable=True)
        self._publish(namespace, topics.IMAGE_CREATE, pb.ImageCreate(name=made.name, labels=made.labels))
        return made

    async def update(
        self,
        namespace: str,
        image: pb.Image,
        paths: Sequence[str] = (),
        *,
        lease: str | None = None,
        epoch: Timestamp | None = None,
    ) -> pb.Image:
        """Replace what `paths` names: `target`, `labels`, `labels.KEY`, `annotations`, `annotations.KEY`.

        Without paths the whole image is replaced. Raises NotFound, InvalidArgument.
        """
        if not image.name:
            raise InvalidArgument("image name is required for update: invalid argument")

        def work(connection: sqlite3.Connection) -> pb.Image:
            row = connection.execute(_GET, (namespace, image.name)).fetchone()
            if row is None:
                raise NotFound(f"image {quote(image.name)}: not found")
            old = pb.Image.FromString(row[0])
            updated = _updated(old, image, paths)
            _settle(updated)
            _hold_expiring(connection, namespace, lease, updated)
            updated.created_at.CopyFrom(old.created_at)
            updated.updated_at.CopyFrom(epoch or now())
            connection.execute(
                "UPDATE images SET record = ? WHERE namespace = ? AND name = ?",
                (updated.SerializeToString(), namespace, image.name),
            )
            return updated

        updated = await self._metadata.write(work, durable=True)
        self._publish(namespace, topics.IMAGE_UPDATE, pb.ImageUpdate(name=updated.name, labels=updated.labels))
        return updated

    async def put(self, namespace: str, image: pb.Image, *, lease: str | None = None) -> pb.Image:
        """Create it, or replace target and labels where the name is there (what a pull does)."""
        while True:
            try:
                return await self.create(namespace, image, lease=lease)
            except AlreadyExists:
                try:
                    return await self.update(namespace, image, lease=lease)
                except NotFound:
                    continue  # deleted in between

    async def delete(
        self, namespace: str, name: str, target: types_pb2.Descriptor | None = None, *, lease: str | None = None
    ) -> None:
        """Delete the name; with `target` only if it still points to that digest. Raises NotFound."""

        def work(connection: sqlite3.Connection) -> None:
            row = connection.execute(_GET, (namespace, name)).fetchone()
            if row is None:
                raise NotFound(f"image {quote(name)}: not found")
            digest = pb.Image.FromString(row[0]).target.digest
            if target is not None and target.digest and target.digest != digest:
                raise NotFound(f"image {quote(name)} has target {digest}, not {target.digest}: not found")
            release(connection, namespace, lease, IMAGES, name)
            connection.execute("DELETE FROM images WHERE namespace = ? AND name = ?", (namespace, name))

        await self._metadata.write(work, durable=True, removes=True)
        self._publish(namespace, topics.IMAGE_DELETE, pb.ImageDelete(name=name))


def _updated(old: pb.Image, image: pb.Image, paths: Sequence[str]) -> pb.Image:
    """The image after an update with this mask."""
    updated = pb.Image()
    if not paths:
        updated.CopyFrom(image)
        return updated
    updated.CopyFrom(old)
    for path in paths:
        if path == "annotations":
            take_map(updated.target.annotations, image.target.annotations)
        elif path.startswith("annotations."):
            take_key(updated.target.annotations, image.target.annotations, path.removeprefix("annotations."))
        else:
            what = f"image {quote(image.name)}"
            fields_ = {"labels": "labels", "target": "target"}
            apply_mask(updated, image, [path], fields=fields_, maps=("labels",), what=what)
    return updated


def _hold_expiring(connection: sqlite3.Connection, namespace: str, lease: str | None, image: pb.Image) -> None:
    """An image that expires is held by the caller's lease; others are roots by themselves."""
    if GC_EXPIRE in image.labels:
        hold(connection, namespace, lease, IMAGES, image.name)


def _settle(image: pb.Image) -> None:
    """Check an image that is about to be stored. Raises InvalidArgument."""
    if not image.name:
        raise InvalidArgument("image name must not be empty: invalid argument")
    settle_labels(image.labels, "image.Labels")
    try:
        Digest.parse(image.target.digest)
    except InvalidArgument as error:
        raise InvalidArgument(f"Target.Digest {quote(image.target.digest)} invalid: {error.message}") from None
    if image.target.size <= 0:
        raise InvalidArgument("Target.Size must be greater than zero: invalid argument")
    if not image.target.media_type:
        raise InvalidArgument("Target.MediaType must be set: invalid argument")


def _fields(image: pb.Image) -> Adaptor:
    target = image.target
    return fields(
        {
            "name": image.name,
            "target": {"digest": target.digest, "mediatype": target.media_type},
            "labels": image.labels,
            "annotations": target.annotations,
        }
    )


class ImageService:
    """containerd.services.images.v1."""

    SERVICE = "containerd.services.images.v1.Images"

    def __init__(self, store: ImageStore, collector: Collector) -> None:
        self._store = store
        self._collector = collector

    async def get(self, request: pb.GetImageRequest, context: Context) -> pb.GetImageResponse:
        """One image."""
        return pb.GetImageResponse(image=self._store.get(require_namespace(context), request.name))

    async def list(self, request: pb.ListImagesRequest, context: Context) -> pb.ListImagesResponse:
        """Those that match."""
        return pb.ListImagesResponse(images=await self._store.list(require_namespace(context), request.filters))

    async def create(self, request: pb.CreateImageRequest, context: Context) -> pb.CreateImageResponse:
        """A new one."""
        namespace = require_namespace(context)
        if not request.image.name:
            raise InvalidArgument("Image.Name required")
        epoch = request.source_date_epoch if request.HasField("source_date_epoch") else None
        made = await self._store.create(namespace, request.image, lease=context.lease, epoch=epoch)
        return pb.CreateImageResponse(image=made)

    async def update(self, request: pb.UpdateImageRequest, context: Context) -> pb.UpdateImageResponse:
        """What the mask names."""
        namespace = require_namespace(context)
        if not request.image.name:
            raise InvalidArgument("Image.Name required")
        epoch = request.source_date_epoch if request.HasField("source_date_epoch") else None
        paths = request.update_mask.paths
        updated = await self._store.update(namespace, request.image, paths, lease=context.lease, epoch=epoch)
        return pb.UpdateImageResponse(image=updated)

    async def delete(self, request: pb.DeleteImageRequest, context: Context) -> empty_pb2.Empty:
        """With `sync` the answer comes after what it alone referenced is gone."""
        target = request.target if request.HasField("target") else None
        await self._store.delete(require_namespace(context), request.name, target, lease=context.lease)
        if request.sync:
            await self._collector.collect_all()
        return empty_pb2.Empty()
