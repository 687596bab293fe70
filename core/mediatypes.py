"""Media types of images: OCI's, Docker's schema 2, and what can be told from one."""

from __future__ import annotations

OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_EMPTY = "application/vnd.oci.empty.v1+json"
OCI_LAYER = "application/vnd.oci.image.layer.v1.tar"
OCI_LAYER_GZIP = "application/vnd.oci.image.layer.v1.tar+gzip"
OCI_LAYER_ZSTD = "application/vnd.oci.image.layer.v1.tar+zstd"
OCI_LAYER_NONDISTRIBUTABLE = "application/vnd.oci.image.layer.nondistributable.v1.tar"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_MANIFEST_V1 = "application/vnd.docker.distribution.manifest.v1+prettyjws"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
DOCKER_LAYER = "application/vnd.docker.image.rootfs.diff.tar"
DOCKER_LAYER_GZIP = "application/vnd.docker.image.rootfs.diff.tar.gzip"
DOCKER_LAYER_ZSTD = "application/vnd.docker.image.rootfs.diff.tar.zstd"
DOCKER_LAYER_FOREIGN = "application/vnd.docker.image.rootfs.foreign.diff.tar"
DOCKER_LAYER_FOREIGN_GZIP = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"
OCTET_STREAM = "application/octet-stream"

INDEXES = frozenset({OCI_INDEX, DOCKER_LIST})
MANIFESTS = frozenset({OCI_MANIFEST, DOCKER_MANIFEST})
CONFIGS = frozenset({OCI_CONFIG, DOCKER_CONFIG})


def bare(media_type: str) -> str:
    """The media type without parameters (`; charset=utf-8`)."""
    return media_type.partition(";")[0].strip()


def is_index(media_type: str) -> bool:
    """A list of manifests: OCI's index or Docker's manifest list."""
    return bare(media_type) in INDEXES


def is_manifest(media_type: str) -> bool:
    """A manifest of one image."""
    return bare(media_type) in MANIFESTS


def is_config(media_type: str) -> bool:
    """An image configuration that names root filesystem layers."""
    return bare(media_type) in CONFIGS


def is_layer(media_type: str) -> bool:
    """A layer of a root filesystem, in any compression."""
    return bare(media_type).startswith((OCI_LAYER, OCI_LAYER_NONDISTRIBUTABLE, DOCKER_LAYER, DOCKER_LAYER_FOREIGN))


def is_nondistributable(media_type: str) -> bool:
    """A layer that is not pushed unless asked for (Windows base layers)."""
    return bare(media_type).startswith((OCI_LAYER_NONDISTRIBUTABLE, DOCKER_LAYER_FOREIGN))


def compression(media_type: str) -> str | None:
    """`gzip`, `zstd` or "" (none) of a layer's media type; None where it doesn't tell.

    Docker's plain type tells nothing: old builders used it for gzip too, the content decides (containerd does so).
    """
    kind = bare(media_type)
    if kind.endswith(("+gzip", ".gzip")):
        return "gzip"
    if kind.endswith(("+zstd", ".zstd")):
        return "zstd"
    if kind in {OCI_LAYER, OCI_LAYER_NONDISTRIBUTABLE}:
        return ""
    return None
