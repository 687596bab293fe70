"""Images for the measurement of pulls, the same ones each time: made from a seed, written as OCI layouts."""

from __future__ import annotations

import hashlib
import json
import random
import tarfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import IO, cast

_EPOCH = 1_700_000_000
_KIND = "application/vnd.oci.image."


@dataclass(frozen=True)
class Layer:
    """`files` of about `mean` bytes in folders of 40, a symbolic and a hard link to every 50th; `large` files of 8 MiB
    beside them; `whiteouts` take away files of the layer of that name below."""

    name: str
    files: int
    mean: int
    large: int = 0
    whiteouts: str = ""


# 80,000 files, 1 GB: a distribution's base, a language's packages, an application with its data
BIG = (
    Layer("base", 18_000, 14_000, large=10),
    Layer("packages", 45_000, 6_500, whiteouts="base"),
    Layer("app", 17_000, 9_000, large=20, whiteouts="packages"),
)
# 20,000 small files in one layer
SMALL = (Layer("small", 20_000, 1_200),)


def write_layout(layers: tuple[Layer, ...], layout: Path) -> None:
    """The image as an OCI layout in the folder `layout`, with the name `latest`; layers are gzipped as others do it."""
    blobs = layout / "blobs" / "sha256"
    blobs.mkdir(parents=True)
    with ProcessPoolExecutor() as processes:
        made = list(processes.map(_write_layer, layers, [blobs] * len(layers)))
    config = {
        "architecture": "amd64",
        "os": "linux",
        "config": {},
        "rootfs": {"type": "layers", "diff_ids": [diff_id for _, _, diff_id in made]},
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": f"{_KIND}manifest.v1+json",
        "config": _put(blobs, json.dumps(config).encode(), "config.v1+json"),
        "layers": [
            {"mediaType": f"{_KIND}layer.v1.tar+gzip", "digest": digest, "size": size} for digest, size, _ in made
        ],
    }
    entry = _put(blobs, json.dumps(manifest).encode(), "manifest.v1+json")
    entry["annotations"] = {"org.opencontainers.image.ref.name": "latest"}
    (layout / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [entry]}))
    (layout / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')


def _put(blobs: Path, data: bytes, kind: str) -> dict[str, object]:
    digest = hashlib.sha256(data).hexdigest()
    (blobs / digest).write_bytes(data)
    return {"mediaType": f"{_KIND}{kind}", "digest": f"sha256:{digest}", "size": len(data)}


class _Output:
    """Compresses, hashes and writes what a tar is made of."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._zlib = zlib.compressobj(6, zlib.DEFLATED, 31)
        self.plain, self.packed = hashlib.sha256(), hashlib.sha256()
        self.size = 0

    def write(self, data: bytes) -> int:
        self.plain.update(data)
        self._put(self._zlib.compress(data))
        return len(data)

    def end(self) -> None:
        self._put(self._zlib.flush())

    def _put(self, data: bytes) -> None:
        self.packed.update(data)
        self.size += self._file.write(data)


def _write_layer(layer: Layer, blobs: Path) -> tuple[str, int, str]:
    """Returns the blob's digest and size, and the diff ID."""
    path = blobs / f"{layer.name}.part"
    with path.open("wb") as file:
        output = _Output(file)
        with tarfile.open(fileobj=cast("IO[bytes]", output), mode="w|", format=tarfile.PAX_FORMAT) as archive:
            for info, data in _entries(layer):
                archive.addfile(info, BytesIO(data))
        output.end()
    path.rename(blobs / output.packed.hexdigest())
    return f"sha256:{output.packed.hexdigest()}", output.size, f"sha256:{output.plain.hexdigest()}"


def _entries(layer: Layer) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    chance = random.Random(f"wherry {layer.name}")
    contents = _contents(chance)
    for number in range(layer.files):
        folder = _folder(layer.name, number)
        if number % 40 == 0:
            if number % 2000 == 0:
                yield _info(folder.rpartition("/")[0], tarfile.DIRTYPE), b""
            yield _info(folder, tarfile.DIRTYPE), b""
        size = min(int(chance.expovariate(1 / layer.mean)), 40 * layer.mean)
        at = chance.randrange(len(contents) - size)
        name = f"{folder}/file{number}.py"
        yield _info(name, tarfile.REGTYPE, size=size), contents[at : at + size]
        if number % 50 == 0:
            yield _info(f"{name}.link", tarfile.SYMTYPE, link=name.rpartition("/")[2]), b""
            yield _info(f"{name}.hard", tarfile.LNKTYPE, link=name), b""
    for number in range(layer.large):
        at = chance.randrange(len(contents) // 2)
        data = contents[at:] + contents[:at]
        yield _info(f"{layer.name}/large{number}.so", tarfile.REGTYPE, size=8 << 20), data[: 8 << 20]
    for number in range(0, 2000 if layer.whiteouts else 0, 40):
        folder = _folder(layer.whiteouts, number)
        yield _info(f"{folder}/.wh.file{number}.py", tarfile.REGTYPE), b""


def _folder(name: str, number: int) -> str:
    return f"{name}/part{number // 2000}/folder{number // 40}"


def _info(name: str, kind: bytes, *, size: int = 0, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname, info.mtime = kind, size, link, _EPOCH
    info.mode = 0o755 if kind == tarfile.DIRTYPE else 0o644
    return info


def _contents(chance: random.Random) -> bytes:
    """12 MiB of which gzip leaves two fifths: words as in sources, and bytes as in what is compressed already."""
    words = [bytes(chance.choices(b"abcdefghijklmnopqrstuvwxyz_", k=chance.randint(2, 12))) for _ in range(5000)]
    pieces = []
    size = 0
    while size < 12 << 20:
        piece = chance.randbytes(4000) if chance.random() < 0.2 else b" ".join(chance.choices(words, k=2000))
        pieces.append(piece)
        size += len(piece)
    return b"".join(pieces)
