"""Archives for tests: made entry by entry, also such as no archiver would make."""

from __future__ import annotations

import gzip
import io
import tarfile
from collections.abc import Mapping

GZIP = "application/vnd.oci.image.layer.v1.tar+gzip"
ZSTD = "application/vnd.oci.image.layer.v1.tar+zstd"
PLAIN = "application/vnd.oci.image.layer.v1.tar"
DOCKER = "application/vnd.docker.image.rootfs.diff.tar.gzip"

TYPES = {
    "file": tarfile.REGTYPE,
    "dir": tarfile.DIRTYPE,
    "link": tarfile.LNKTYPE,
    "symlink": tarfile.SYMTYPE,
    "char": tarfile.CHRTYPE,
    "fifo": tarfile.FIFOTYPE,
}


class Archive:
    """Chained calls add entries; `plain` and `gzipped` give the bytes."""

    def __init__(self, form: int = tarfile.PAX_FORMAT) -> None:
        self._buffer = io.BytesIO()
        self._tar = tarfile.open(fileobj=self._buffer, mode="w", format=form)  # noqa: SIM115

    def add(
        self,
        kind: str,
        name: str,
        data: bytes = b"",
        *,
        to: str = "",
        mode: int | None = None,
        owner: tuple[int, int] = (0, 0),
        mtime: float = 1_600_000_000,
        device: tuple[int, int] = (0, 0),
        pax: Mapping[str, str] | None = None,
    ) -> Archive:
        info = tarfile.TarInfo(name)
        info.type = TYPES[kind]
        info.size = len(data)
        info.linkname = to
        info.mode = mode if mode is not None else (0o755 if kind == "dir" else 0o644)
        info.uid, info.gid = owner
        info.mtime = mtime
        info.devmajor, info.devminor = device
        info.pax_headers = dict(pax or {})
        self._tar.addfile(info, io.BytesIO(data))
        return self

    def file(self, name: str, data: bytes = b"x", **more: object) -> Archive:
        return self.add("file", name, data, **more)  # type: ignore[arg-type]

    def dir(self, name: str, **more: object) -> Archive:
        return self.add("dir", name, **more)  # type: ignore[arg-type]

    @property
    def plain(self) -> bytes:
        self._tar.close()
        return self._buffer.getvalue()

    @property
    def gzipped(self) -> bytes:
        return gzip.compress(self.plain, 1, mtime=0)
