"""Image store to archive: an OCI layout that `docker load` reads too."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable

from wherry.core import mediatypes, reference
from wherry.core.descriptor import Descriptor
from wherry.core.errors import NotFound, WherryError
from wherry.daemon.content import ContentStore
from wherry.daemon.transfer_archive import ArchiveWriter
from wherry.daemon.transfer_image import Selection, check_depth, read_children
from wherry.daemon.transfer_import import NAME, REF_NAME


class Exporter:
    """Writes images of one namespace as an archive."""

    def __init__(self, content: ContentStore, namespace: str, selection: Selection) -> None:
        self._content = content
        self._namespace = namespace
        self._selection = selection
        self.skip_compatibility = False
        self.skip_nondistributable = False
        self._blobs: dict[str, Descriptor] = {}

    async def write(self, images: list[tuple[str, Descriptor]], write: Callable[[bytes], Awaitable[None]]) -> None:
        """Write the archive of these images (name, target). Raises NotFound where content is missing."""
        index = []
        compatible: dict[str, dict[str, object]] = {}
        for name, target in images:
            await self._collect(target)
            index.append(_named(name, target))
            if not self.skip_compatibility:
                await self._docker_entry(name, target, compatible)
        archive = ArchiveWriter(write)
        await archive.folder("blobs")
        for algorithm in sorted({blob.digest.algorithm for blob in self._blobs.values()}):
            await archive.folder(f"blobs/{algorithm}")
        for digest in sorted(self._blobs):
            blob = self._blobs[digest]
            info = self._content.info(self._namespace, digest)
            name = f"blobs/{blob.digest.algorithm}/{blob.digest.encoded}"
            await archive.stream(name, info.size, self._content.read(self._namespace, digest))
        document = {"schemaVersion": 2, "mediaType": mediatypes.OCI_INDEX, "manifests": [d.to_json() for d in index]}
        await archive.file("index.json", json.dumps(document, separators=(",", ":")).encode())
        if compatible:
            data = json.dumps(list(compatible.values()), separators=(",", ":")).encode()
            await archive.file("manifest.json", data)
        await archive.file("oci-layout", b'{"imageLayoutVersion":"1.0.0"}')
        await archive.end()

    async def _collect(self, node: Descriptor, depth: int = 0) -> None:
        """All wanted content below a node."""
        check_depth(node, depth)
        if node.digest in self._blobs:
            return
        if self.skip_nondistributable and mediatypes.is_nondistributable(node.media_type):
            return
        if not self._content.exists(self._namespace, node.digest):
            raise NotFound(f"content digest {node.digest}: not found")
        self._blobs[node.digest] = node
        children = await read_children(self._content, self._namespace, node)
        if mediatypes.is_index(node.media_type):
            chosen = self._selection.choose(children)
            if children and not chosen:
                raise NotFound(f"no manifest of {node.digest} is for the wanted platform: not found")
            children = chosen
        for child in children:
            await self._collect(child, depth + 1)

    async def _docker_entry(self, name: str, target: Descriptor, found: dict[str, dict[str, object]]) -> None:
        """What `docker load` wants to know of an image: the best manifest, its configuration and layers."""
        manifest = target
        while mediatypes.is_index(manifest.media_type):
            chosen = self._selection.choose(await read_children(self._content, self._namespace, manifest))
            chosen = [child for child in chosen if child.digest in self._blobs]
            if not chosen:
                return
            manifest = chosen[0]
        children = await read_children(self._content, self._namespace, manifest)
        if not children or not mediatypes.is_config(children[0].media_type):
            return
        paths = [f"blobs/{child.digest.algorithm}/{child.digest.encoded}" for child in children]
        entry = found.setdefault(manifest.digest, {"Config": paths[0], "RepoTags": [], "Layers": paths[1:]})
        tags = entry["RepoTags"]
        if isinstance(tags, list) and "@" not in name:
            tags.append(name)


def _named(name: str, target: Descriptor) -> Descriptor:
    """The descriptor for the index, with the image's name as containerd and Docker annotate it."""
    try:
        tag = reference.parse(name).tag or name
    except WherryError:
        tag = name
    return target._replace(annotations={**target.annotations, NAME: name, REF_NAME: tag})
