"""A content descriptor: what a thing is, its digest and its size (OCI image specification, "Content Descriptors")."""

from __future__ import annotations

import binascii
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from wherry.core.digest import Digest
from wherry.core.errors import InvalidArgument
from wherry.core.platforms import Platform
from wherry.core.tuples import NamedTuple


class Descriptor(NamedTuple):
    """One descriptor. `size` is in bytes; `data` is the content itself where it was embedded.

    Two are the same where type, digest and size are: what else is there is said about the content, not part of it.
    """

    media_type: str
    digest: Digest
    size: int
    annotations: Mapping[str, str] = MappingProxyType({})
    platform: Platform | None = None
    urls: tuple[str, ...] = ()
    artifact_type: str = ""
    data: bytes | None = None

    def __eq__(self, other: object) -> bool:
        return tuple(self[:3]) == tuple(other[:3]) if isinstance(other, Descriptor) else NotImplemented

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(self[:3])

    @classmethod
    def from_json(cls, value: object, where: str = "descriptor") -> Descriptor:
        """Read a decoded JSON object. `where` leads the error. Raises InvalidArgument."""
        if not isinstance(value, dict):
            raise InvalidArgument(f"{where}: not an object: invalid argument")
        media_type = value.get("mediaType", "")
        digest, size = value.get("digest"), value.get("size")
        if not isinstance(media_type, str):
            raise InvalidArgument(f"{where}: mediaType is no string: invalid argument")
        if not isinstance(digest, str):
            raise InvalidArgument(f"{where}: digest is missing: invalid argument")
        if not isinstance(size, int) or isinstance(size, bool) or size < 0:
            raise InvalidArgument(f"{where}: size is no count of bytes: invalid argument")
        platform, urls = value.get("platform"), value.get("urls")
        return cls(
            media_type=media_type,
            digest=Digest.parse(digest),
            size=size,
            annotations=_strings(value.get("annotations"), f"{where}: annotations"),
            platform=None if platform is None else Platform.from_json(platform, f"{where}: platform"),
            urls=tuple(url for url in urls if isinstance(url, str)) if isinstance(urls, list) else (),
            artifact_type=str(value.get("artifactType") or ""),
            data=_data(value.get("data"), where),
        )

    def to_json(self) -> dict[str, Any]:
        """The JSON object, its keys in the order of the specification."""
        out: dict[str, Any] = {"mediaType": self.media_type, "digest": str(self.digest), "size": self.size}
        if self.urls:
            out["urls"] = list(self.urls)
        if self.annotations:
            out["annotations"] = dict(self.annotations)
        if self.data is not None:
            out["data"] = binascii.b2a_base64(self.data, newline=False).decode()
        if self.platform is not None:
            out["platform"] = self.platform.to_json()
        if self.artifact_type:
            out["artifactType"] = self.artifact_type
        return out

    def with_annotations(self, annotations: Mapping[str, str]) -> Descriptor:
        """The same descriptor with these annotations added."""
        return self._replace(annotations={**self.annotations, **annotations})


def _strings(value: object, where: str) -> Mapping[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise InvalidArgument(f"{where}: not an object of strings: invalid argument")
    return value


def _data(value: object, where: str) -> bytes | None:
    if not isinstance(value, str):
        return None
    try:
        return binascii.a2b_base64(value, strict_mode=True)
    except ValueError as error:
        raise InvalidArgument(f"{where}: data is not base64: invalid argument") from error
