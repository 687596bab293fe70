"""A small image for tests, of Debian's static busybox: an OCI layout in a tar, as `ctr images import` reads it."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import platform
import subprocess
import tarfile
from functools import cache
from pathlib import Path
from typing import Any

from tests.peers import need

NAME = "docker.io/library/busybox:test"
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
_FILES = {
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n",
    "etc/group": "root:x:0:\nnobody:x:65534:\n",
}


@cache
def layer() -> bytes:
    """The one layer, an uncompressed tar: busybox, its applets as links, the usual folders, passwd and group."""
    program = Path(need("busybox"))
    applets = subprocess.run([program, "--list"], capture_output=True, text=True, check=True).stdout.split()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for folder in ("bin", "etc", "tmp", "root", "proc", "sys", "dev", "var", "home"):
            _add(tar, folder, tarfile.DIRTYPE, mode=0o1777 if folder == "tmp" else 0o755)
        _add(tar, "bin/busybox", tarfile.REGTYPE, program.read_bytes(), mode=0o755)
        for applet in applets:
            if applet != "busybox":
                _add(tar, f"bin/{applet}", tarfile.SYMTYPE, link="busybox")
        for name, text in _FILES.items():
            _add(tar, name, tarfile.REGTYPE, text.encode(), mode=0o644)
    return buffer.getvalue()


def write_archive(
    path: Path, *, name: str = NAME, layers: list[bytes] | None = None, exposed: tuple[str, ...] = (), **settings: Any
) -> None:
    """Write an OCI image layout as a tar with one image named `name`, whose layers are the given tars, gzipped.

    `settings` are of the configuration (`Cmd`, `User`, …).
    """
    blobs: dict[str, bytes] = {}
    tars = [layer()] if layers is None else layers
    described = [
        _put(blobs, gzip.compress(tar, 1, mtime=0), "application/vnd.oci.image.layer.v1.tar+gzip") for tar in tars
    ]
    config = {
        "architecture": _ARCHITECTURES.get(platform.machine(), platform.machine()),
        "os": "linux",
        "config": {
            "Env": ["PATH=/bin"],
            "Cmd": ["/bin/sh"],
            **({"ExposedPorts": {port: {} for port in exposed}} if exposed else {}),
            **settings,
        },
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(tar).hexdigest()}" for tar in tars]},
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": _put(blobs, json.dumps(config).encode(), "application/vnd.oci.image.config.v1+json"),
        "layers": described,
    }
    entry = _put(blobs, json.dumps(manifest).encode(), "application/vnd.oci.image.manifest.v1+json")
    tag = name.rpartition(":")[2]
    entry["annotations"] = {"io.containerd.image.name": name, "org.opencontainers.image.ref.name": tag}
    with tarfile.open(path, "w") as tar:
        _add(tar, "oci-layout", tarfile.REGTYPE, b'{"imageLayoutVersion":"1.0.0"}')
        _add(tar, "index.json", tarfile.REGTYPE, json.dumps({"schemaVersion": 2, "manifests": [entry]}).encode())
        for digest, data in blobs.items():
            _add(tar, f"blobs/sha256/{digest}", tarfile.REGTYPE, data)


def _put(blobs: dict[str, bytes], data: bytes, media_type: str) -> dict[str, Any]:
    digest = hashlib.sha256(data).hexdigest()
    blobs[digest] = data
    return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(data)}


def _add(tar: tarfile.TarFile, name: str, kind: bytes, data: bytes = b"", *, mode: int = 0o644, link: str = "") -> None:
    info = tarfile.TarInfo(name)
    info.type, info.mode, info.size, info.linkname = kind, mode, len(data), link
    tar.addfile(info, io.BytesIO(data))
