"""An image made from this host: a shell, a few tools, the libraries they link to; an OCI layout in a tar file."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import tarfile
from collections.abc import Iterable
from io import BytesIO

from wherry.cli.elf import Libraries, is_elf
from wherry.core.descriptor import Descriptor
from wherry.core.digest import Digest
from wherry.core.errors import NotFound
from wherry.core.mediatypes import OCI_CONFIG, OCI_INDEX, OCI_LAYER_GZIP, OCI_MANIFEST
from wherry.core.platforms import host

# folders that programs and runtimes expect, with their modes
FOLDERS = {"dev": 0o755, "etc": 0o755, "proc": 0o555, "root": 0o700, "run": 0o755, "sys": 0o555, "tmp": 0o1777}
FILES = {
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n",
    "etc/group": "root:x:0:\nnogroup:x:65534:\n",
}


def locate(tool: str) -> str:
    """The path of a program of this host; raises NotFound where there is none."""
    path = shutil.which(tool, path=os.environ.get("PATH", "") + ":/usr/bin:/bin:/usr/sbin:/sbin")
    if path is None:
        raise NotFound(f"this host has no {tool}")
    return path


def files_for(tools: Iterable[str]) -> dict[str, str]:
    """The files of an image: the place in it (without the first slash), and the file of this host.

    Tools land in /bin under their own name, libraries where the host's loader finds them.
    """
    libraries = Libraries()
    files: dict[str, str] = {}
    for tool in tools:
        path = locate(tool)
        files[f"bin/{os.path.basename(tool)}"] = path
        if is_elf(path):
            for needed in libraries.needs(path)[1:]:
                files[needed.lstrip("/")] = needed
    return files


def layer(files: dict[str, str]) -> bytes:
    """The files as a tar file, the same bytes for the same files."""
    out = BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        folders = dict(FOLDERS)
        for place in [*files, *FILES]:
            parent = os.path.dirname(place)
            while parent:
                folders.setdefault(parent, 0o755)
                parent = os.path.dirname(parent)
        for name, mode in sorted(folders.items()):
            member = _member(name, mode)
            member.type = tarfile.DIRTYPE
            archive.addfile(member)
        for place, text in FILES.items():
            member = _member(place, 0o644)
            member.size = len(text.encode())
            archive.addfile(member, BytesIO(text.encode()))
        for place, source in sorted(files.items()):
            member = _member(place, 0o755)
            member.size = os.path.getsize(source)
            with open(source, "rb") as file:
                archive.addfile(member, file)
    return out.getvalue()


def _member(name: str, mode: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.mode = mode
    return member


def write(path: str, name: str, tools: Iterable[str]) -> dict[str, str]:
    """Writes the image `name` as an OCI layout in a tar file, and returns what is in it (see `files_for`)."""
    files = files_for(tools)
    blobs: dict[Digest, bytes] = {}

    def blob(media_type: str, data: bytes) -> Descriptor:
        digest = Digest.of(data)
        blobs[digest] = data
        return Descriptor(media_type, digest, len(data))

    plain = layer(files)
    packed = blob(OCI_LAYER_GZIP, gzip.compress(plain, 1, mtime=0))
    folders = sorted({f"/{os.path.dirname(place)}" for place in files if ".so" in os.path.basename(place)})
    config = {
        **host().to_json(),
        "config": {
            # the image has no ld.so.cache: the loader is told where the libraries are
            "Env": ["PATH=/bin", f"LD_LIBRARY_PATH={':'.join(folders)}"],
            "Cmd": ["/bin/sh"],
        },
        "rootfs": {"type": "layers", "diff_ids": [Digest.of(plain)]},
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": blob(OCI_CONFIG, json.dumps(config).encode()).to_json(),
        "layers": [packed.to_json()],
    }
    top = blob(OCI_MANIFEST, json.dumps(manifest).encode()).with_annotations({"io.containerd.image.name": name})
    index = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [top.to_json()]}
    documents = {
        "oci-layout": json.dumps({"imageLayoutVersion": "1.0.0"}).encode(),
        "index.json": json.dumps(index).encode(),
        **{f"blobs/sha256/{digest.encoded}": data for digest, data in blobs.items()},
    }
    with tarfile.open(path, "w") as archive:
        for place, data in documents.items():
            member = _member(place, 0o644)
            member.size = len(data)
            archive.addfile(member, BytesIO(data))
    return files
