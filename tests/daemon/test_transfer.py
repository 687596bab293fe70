"""Pull, push, import, export, tag by the daemon: with a real registry, and what goes wrong on the way."""

from __future__ import annotations

import asyncio
import gzip
import io
import json
import os
import random
import subprocess
import tarfile
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from aiohttp import web

from tests.daemon.stores import NS, call
from tests.daemon.transfer_rig import (
    Image,
    Rig,
    image_store,
    make_image,
    make_index,
    platform_message,
    publish,
    registry_end,
    rig_on,
    tar,
)
from tests.registry.conftest import Handler, Server, registry, serve
from wherry.core import platforms, typeurl
from wherry.core.digest import Digest, chain_id
from wherry.core.errors import (
    Aborted,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
    Unimplemented,
    WherryError,
)
from wherry.core.platforms import parse
from wherry.proto import transfer_pb2
from wherry.proto import transfer_types_pb2 as types

__all__ = ["registry", "serve"]
Serve = Callable[[Handler], Awaitable[Server]]
LAYERS = [
    tar({"etc/a": b"one", "etc/b": b"gone", "bin/x": b"x" * 100_000}),
    tar({"etc/b": None, "etc/c": b"three"}),
    tar({"etc/a": b"changed"}),
]


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with rig_on(tmp_path) as made:
        yield made


@pytest.fixture
def place(registry: str, request: pytest.FixtureRequest) -> str:
    """A repository of its own for each test."""
    name = "".join(char if char.isalnum() else "-" for char in request.node.name.lower()).strip("-")
    return f"{registry}/{name[:80].strip('-')}:v1"


def chain(image: Image) -> str:
    """The chain id of an image's top layer."""
    for descriptor, data in image.blobs.values():
        if "config" in descriptor.media_type:
            return chain_id(json.loads(data)["rootfs"]["diff_ids"])
    raise AssertionError("no configuration")


async def tree(rig: Rig, snapshot: str, snapshotter: str = "overlayfs") -> dict[str, bytes]:
    """The files of a snapshot, mounted."""
    mounts = await rig.stores.snapshots.view(NS, snapshotter, f"look-{snapshot}", snapshot)
    folder = rig.stores.root / "look"
    folder.mkdir(exist_ok=True)
    for mount in mounts:
        mount.mount(str(folder))
    try:
        return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}
    finally:
        subprocess.run(["umount", str(folder)], check=True)  # noqa: ASYNC221
        await rig.stores.snapshots.remove(NS, snapshotter, f"look-{snapshot}")


async def nothing_left(rig: Rig) -> None:
    """No image, lease, snapshot or upload is left of a transfer that failed."""
    assert await rig.stores.images.list(NS) == []
    assert await rig.stores.leases.list(NS) == []
    assert await rig.stores.snapshots.list(NS, "overlayfs", ['kind=="Active"', "kind==active"]) == []


# -- pull


@pytest.mark.parametrize("snapshotter", ["overlayfs", "native"])
async def test_a_pull_brings_labels_snapshots_and_the_image(rig: Rig, place: str, snapshotter: str) -> None:
    image = make_image(LAYERS)
    await publish(image, place)
    await rig.pull(place, image_store(place, snapshotter, labels={"mine": "1"}))
    stored = rig.stores.images.get(NS, place)
    assert (stored.target.digest, stored.labels["mine"]) == (image.target.digest, "1")
    manifest = rig.stores.content.info(NS, image.target.digest)
    config = manifest.labels["containerd.io/gc.ref.content.config"]
    layers = [manifest.labels[f"containerd.io/gc.ref.content.l.{n}"] for n in range(3)]
    assert manifest.labels["containerd.io/distribution.source.127.0.0.1"] == place.partition("/")[2][:-3]
    top = rig.stores.content.info(NS, config).labels[f"containerd.io/gc.ref.snapshot.{snapshotter}"]
    assert top == chain(image)
    for layer, data in zip(layers, LAYERS, strict=True):
        assert rig.stores.content.info(NS, layer).labels["containerd.io/uncompressed"] == Digest.of(data)
    files = await tree(rig, top, snapshotter)
    assert files == {"bin/x": b"x" * 100_000, "etc/a": b"changed", "etc/c": b"three"}
    assert await rig.stores.leases.list(NS) == []


async def test_progress_is_told_in_containerds_words(rig: Rig, place: str) -> None:
    image = make_image(LAYERS)
    await publish(image, place)
    await rig.pull(place, image_store(place))
    told = [message.event for message in rig.progress if not message.parents]
    assert told == [
        f"Resolving from OCI Registry ({place})",
        f"Pulling from OCI Registry ({place})",
        "fetching image content",
        "saved",
        f"Completed pull from OCI Registry ({place})",
    ]
    assert rig.events("manifest-") == ["waiting", "complete"]
    layers = {message.name for message in rig.progress if message.name.startswith("layer-")}
    assert len(layers) == len(LAYERS)
    for name in layers:
        assert rig.events(name)[0] == "waiting"
        assert rig.events(name)[-1] == "extracted"
    layer = next(message for message in rig.progress if message.name.startswith("layer-"))
    assert list(layer.parents) == [f"manifest-{image.target.digest}"]
    rig.progress.clear()
    await rig.pull(place, image_store(place))
    assert "already exists" in rig.events("layer-")


async def test_only_the_wanted_platform_is_fetched(rig: Rig, place: str) -> None:
    here, other = make_image(LAYERS[:1]), make_image([tar({"other": b"1"})], parse("linux/s390x"))
    index = make_index([other, here])
    await publish(index, place)
    await rig.pull(place, image_store(place))
    assert rig.stores.content.exists(NS, here.target.digest)
    assert not rig.stores.content.exists(NS, other.target.digest)
    labels = rig.stores.content.info(NS, index.target.digest).labels
    assert [labels[f"containerd.io/gc.ref.content.m.{n}"] for n in range(2)] == [
        other.target.digest,
        here.target.digest,
    ]
    await rig.pull(place, image_store(place, all_metadata=True))
    assert rig.stores.content.exists(NS, other.target.digest)
    assert not any(rig.stores.content.exists(NS, d.digest) for d, _ in other.blobs.values() if "layer" in d.media_type)
    await rig.pull(place, image_store(place, platforms=[]))
    assert all(rig.stores.content.exists(NS, digest) for digest in index.blobs)


async def test_no_manifest_for_the_platform(rig: Rig, place: str) -> None:
    await publish(make_index([make_image(LAYERS[:1], parse("linux/s390x"))]), place)
    with pytest.raises(NotFound, match="no match for platform"):
        await rig.pull(place, image_store(place))
    await nothing_left(rig)


async def test_a_hard_link_into_a_layer_below(rig: Rig, place: str) -> None:
    image = make_image([tar({"a": b"data"}), tar({"b": b"2"}), tar({"x": b"1"}, {"link": "a"})])
    await publish(image, place)
    await rig.pull(place, image_store(place))
    assert await tree(rig, chain(image)) == {"a": b"data", "b": b"2", "x": b"1", "link": b"data"}


async def test_the_callers_lease_holds_what_came(rig: Rig, place: str) -> None:
    await publish(make_image(LAYERS), place)
    await rig.stores.leases.create(NS, "mine")
    await rig.pull(place, image_store(place), lease="mine")
    held = {(item.type, item.id) for item in await rig.stores.leases.list_resources(NS, "mine")}
    assert sum(kind == "content" for kind, _ in held) == 5
    assert sum(kind.startswith("snapshots/") for kind, _ in held) == 3


async def test_two_pulls_at_once_share_the_work(rig: Rig, place: str) -> None:
    noise = random.Random(1).randbytes(3_000_000)
    image = make_image([tar({"noise": noise}), tar({"etc/c": b"3"})])
    await publish(image, place)
    await asyncio.gather(*(rig.pull(place, image_store(f"{place}-{n}")) for n in range(3)))
    assert len(await rig.stores.images.list(NS)) == 3
    assert await tree(rig, chain(image)) == {"noise": noise, "etc/c": b"3"}
    assert await rig.stores.snapshots.list(NS, "overlayfs", ["kind==active"]) == []


async def test_another_namespace_needs_no_second_download(rig: Rig, place: str) -> None:
    image = make_image(LAYERS)
    await publish(image, place)
    await rig.pull(place, image_store(place))
    await rig.pull(place, image_store(place), namespace="other")
    assert rig.stores.images.get("other", place).target.digest == image.target.digest
    assert (await rig.stores.snapshots.stat("other", "overlayfs", chain(image))).name == chain(image)


async def test_what_is_not_there(rig: Rig, place: str) -> None:
    with pytest.raises(NotFound, match=f"failed to resolve image: {place}: not found"):
        await rig.pull(place, image_store(place))
    await nothing_left(rig)


# -- registries and images that are wrong


def serving(image: Image, replaced: dict[str, bytes] | None = None) -> Handler:
    """A registry that has one image under every tag, some of its blobs replaced."""

    async def handler(request: web.Request) -> web.StreamResponse:
        name = request.path.rpartition("/")[2]
        digest = name if name in image.blobs else image.target.digest
        descriptor, data = image.blobs[digest]
        return web.Response(
            body=(replaced or {}).get(digest, data),
            headers={"Docker-Content-Digest": digest, "Content-Type": descriptor.media_type},
        )

    return handler


async def test_a_blob_that_is_not_what_its_digest_says(rig: Rig, serve: Serve) -> None:
    image = make_image(LAYERS)
    layer = next(d for d, _ in image.blobs.values() if "layer" in d.media_type)
    server = await serve(serving(image, {layer.digest: os.urandom(layer.size)}))
    with pytest.raises(FailedPrecondition, match="unexpected commit digest"):
        await rig.pull(f"{server.address}/x:v1", image_store("x"))
    await nothing_left(rig)
    assert not rig.stores.content.exists(NS, layer.digest)
    # the other layers' uploads may be gone on with, this one not
    with pytest.raises(NotFound):
        await rig.stores.content.status(NS, f"layer-{layer.digest}")


@pytest.mark.parametrize(
    ("image", "text"),
    [
        (make_image([b"this is no archive" * 100]), "failed to extract layer"),
        (make_image(LAYERS, diff_ids=[str(Digest.of(b"x"))]), "mismatched image rootfs and manifest layers"),
        (make_image(LAYERS[:1], diff_ids=[str(Digest.of(b"x"))]), "failed to extract layer"),
        (make_image(LAYERS[:1], diff_ids=["nonsense"]), "invalid checksum digest format"),
        (make_image([LAYERS[0][:50_000]]), "failed to extract layer"),
    ],
    ids=["no-archive", "count", "other-diff-id", "no-diff-id", "cut-short"],
)
async def test_an_image_that_can_not_be_unpacked(rig: Rig, serve: Serve, image: Image, text: str) -> None:
    server = await serve(serving(image))
    with pytest.raises(InvalidArgument, match=text):
        await rig.pull(f"{server.address}/x:v1", image_store("x"))
    await nothing_left(rig)
    assert await rig.stores.snapshots.list(NS, "overlayfs") == []


@pytest.mark.parametrize("off", [-10, 10, 1 << 40])
async def test_a_size_that_is_not_the_blobs(rig: Rig, serve: Serve, off: int) -> None:
    image = make_image(LAYERS)
    manifest = json.loads(image.blobs[image.target.digest][1])
    manifest["layers"][0]["size"] += off
    image.target = image.put(json.dumps(manifest).encode(), image.target.media_type)
    server = await serve(serving(image))
    with pytest.raises((Aborted, Unavailable), match="bytes"):
        await rig.pull(f"{server.address}/x:v1", image_store("x"))
    assert await rig.stores.images.list(NS) == []
    assert await rig.stores.snapshots.list(NS, "overlayfs") == []
    assert not rig.stores.content.exists(NS, manifest["layers"][0]["digest"])


@pytest.mark.parametrize("manifest", [b"{", b"[]", b'{"config": 1}', b'{"layers": [{"digest": "x"}]}'])
async def test_a_manifest_that_is_none(rig: Rig, serve: Serve, manifest: bytes) -> None:
    image = make_image(LAYERS[:1])
    image.target = image.put(manifest, image.target.media_type)
    server = await serve(serving(image))
    with pytest.raises(InvalidArgument, match=f"manifest-{image.target.digest}"):
        await rig.pull(f"{server.address}/x:v1", image_store("x"))
    await nothing_left(rig)


async def test_a_pull_that_is_given_up_goes_on_the_next_time(rig: Rig, serve: Serve) -> None:
    noise = random.Random(2).randbytes(3_000_000)
    image = make_image([tar({"noise": noise})])
    normal = serving(image)
    layer = next(d for d, _ in image.blobs.values() if "layer" in d.media_type)
    reached = asyncio.Event()

    async def slow(request: web.Request) -> web.StreamResponse:
        if not request.path.endswith(layer.digest):
            return await normal(request)
        data = image.blobs[layer.digest][1]
        start = int(request.headers.get("Range", "bytes=0-")[6:-1])
        response = web.StreamResponse(status=206 if start else 200)
        response.content_length = layer.size - start
        response.headers["Content-Range"] = f"bytes {start}-{layer.size - 1}/{layer.size}"
        await response.prepare(request)
        end = layer.size if reached.is_set() else 2_000_000
        await response.write(data[start:end])
        if not reached.is_set():
            reached.set()
            await asyncio.sleep(30)
        return response

    server = await serve(slow)
    pulling = asyncio.create_task(rig.pull(f"{server.address}/x:v1", image_store("x")))
    await asyncio.wait_for(reached.wait(), 30)
    while (await rig.stores.content.status(NS, f"layer-{layer.digest}")).offset < 2_000_000:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    pulling.cancel()
    await asyncio.gather(pulling, return_exceptions=True)
    # its lease stays, so that what came isn't collected, until the same is pulled
    assert len(await rig.stores.leases.list(NS)) == 1
    await rig.stores.collector.collect()
    await rig.pull(f"{server.address}/x:v1", image_store("x"))
    assert await rig.stores.leases.list(NS) == []
    ranges = [r.headers.get("Range") for r in server.seen if r.path.endswith(layer.digest)]
    assert ranges == [None, "bytes=2000000-"]
    assert await tree(rig, chain(image)) == {"noise": noise}


async def test_a_full_disk(tmp_path: Path, serve: Serve) -> None:
    image = make_image([tar({"noise": random.Random(3).randbytes(8_000_000)})])
    server = await serve(serving(image))
    root = tmp_path / "small"
    root.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(root)], check=True)  # noqa: ASYNC221
    try:
        async with rig_on(root) as rig:
            with pytest.raises(ResourceExhausted):
                await rig.pull(f"{server.address}/x:v1", image_store("x"))
            await nothing_left(rig)
            server.handler = serving(make_image(LAYERS))
            await rig.pull(f"{server.address}/x:v1", image_store("y"))
    finally:
        subprocess.run(["umount", "-l", str(root)], check=True)  # noqa: ASYNC221


async def test_credentials_come_from_the_client(rig: Rig, serve: Serve) -> None:
    image = make_image(LAYERS[:1])
    normal = serving(image)

    async def handler(request: web.Request) -> web.StreamResponse:
        if request.headers.get("Authorization") != "Basic bWU6cGFzcw==":
            return web.Response(status=401, headers={"WWW-Authenticate": 'Basic realm="x"'})
        return await normal(request)

    server = await serve(handler)
    ref = f"{server.address}/x:v1"
    async with rig.stream("auth") as stream:
        pulling = asyncio.create_task(rig.transfer(registry_end(ref, auth_stream="auth"), image_store("x")))
        question = await stream.receive()
        assert isinstance(question, types.AuthRequest)
        assert (question.host, question.reference) == (server.address, ref)
        assert list(question.wwwauthenticate) == ['Basic realm="x"']
        await stream.send(types.AuthResponse(authType=types.CREDENTIALS, username="me", secret="pass"))
        await pulling
    await rig.transfer(registry_end(ref, headers={"Authorization": "Basic bWU6cGFzcw=="}), image_store("y"))
    with pytest.raises(Unauthenticated):
        await rig.pull(ref, image_store("z"))
    assert [image.name for image in await rig.stores.images.list(NS)] == ["x", "y"]


@pytest.mark.parametrize("scheme", ["Basic", "Bearer"])
async def test_a_mirror_does_not_learn_the_users_password(rig: Rig, serve: Serve, tmp_path: Path, scheme: str) -> None:
    normal = serving(make_image(LAYERS[:1]))
    secret = f"{scheme} bWU6cGFzcw=="

    async def handler(request: web.Request) -> web.StreamResponse:
        if request.headers.get("Authorization") != secret:
            return web.Response(status=401, headers={"WWW-Authenticate": 'Basic realm="x"'})
        return await normal(request)

    mirror, server = await serve(handler), await serve(handler)
    folder = tmp_path / "hosts" / server.address
    folder.mkdir(parents=True)
    (folder / "hosts.toml").write_text(f'[host."http://{mirror.address}"]\n')
    source = registry_end(f"{server.address}/x:v1", headers={"Authorization": secret}, host_dir=str(tmp_path / "hosts"))
    await rig.transfer(source, image_store("x"))
    assert mirror.seen
    assert [request for request in mirror.seen if "Authorization" in request.headers] == []


# -- push, tag


async def test_push_and_tag(rig: Rig, place: str) -> None:
    image = make_image(LAYERS)
    await publish(image, place)
    await rig.pull(place, image_store(place, unpack=False))
    await rig.transfer(types.ImageStore(name=place), types.ImageStore(name="copy"))
    elsewhere = place.replace(":v1", "-copy:v2")
    await rig.transfer(types.ImageStore(name="copy"), registry_end(elsewhere))
    assert rig.progress[-1].event == f"Completed push to OCI Registry ({elsewhere})"
    await rig.pull(elsewhere, image_store(elsewhere), namespace="other")
    assert rig.stores.images.get("other", elsewhere).target.digest == image.target.digest
    with pytest.raises(NotFound, match='image "absent": not found'):
        await rig.transfer(types.ImageStore(name="absent"), registry_end(elsewhere))


async def test_one_platform_of_an_index_is_pushed_as_itself(rig: Rig, place: str) -> None:
    here, other = make_image(LAYERS[:1]), make_image(LAYERS[1:], parse("linux/s390x"))
    await publish(make_index([here, other]), place)
    await rig.pull(place, image_store(place, unpack=False))
    elsewhere = place.replace(":v1", "-one:v1")
    with pytest.raises(NotFound):
        await rig.transfer(types.ImageStore(name=place), registry_end(elsewhere))
    source = types.ImageStore(name=place, platforms=[platform_message(platforms.host())])
    await rig.transfer(source, registry_end(elsewhere))
    await rig.pull(elsewhere, image_store(elsewhere, unpack=False))
    assert rig.stores.images.get(NS, elsewhere).target.digest == here.target.digest


# -- archives


async def export(rig: Rig, *names: str) -> bytes:
    source = types.ImageStore(extra_references=[types.ImageReference(name=name) for name in names])
    async with rig.stream("export") as stream:
        exporting = asyncio.create_task(rig.transfer(source, types.ImageExportStream(stream="export")))
        archive = b""
        await stream.send(types.WindowUpdate(update=1000))
        while (message := await stream.receive()) is not None:
            assert isinstance(message, types.Data)
            assert len(message.data) <= 32768
            archive += message.data
            await stream.send(types.WindowUpdate(update=len(message.data)))
        await exporting
    return archive


async def load(rig: Rig, archive: bytes, store: types.ImageStore) -> None:
    async with rig.stream("import") as stream:
        importing = asyncio.create_task(rig.transfer(types.ImageImportStream(stream="import"), store))
        for at in range(0, len(archive), 32768):
            await stream.send(types.Data(data=archive[at : at + 32768]))
        await stream.close_send()
        await importing


def prefix(name: str, **more: bool) -> list[types.ImageReference]:
    return [types.ImageReference(name=name, is_prefix=True, **more)]


@pytest.mark.parametrize("compress", [bytes, gzip.compress], ids=["plain", "gzip"])
async def test_export_and_import(rig: Rig, place: str, compress: Callable[[bytes], bytes]) -> None:
    image = make_image(LAYERS)
    await publish(image, place)
    await rig.pull(place, image_store(place))
    archive = await export(rig, place)
    with tarfile.open(fileobj=io.BytesIO(archive)) as opened:
        names = opened.getnames()
        documents = {name: json.load(opened.extractfile(name) or io.BytesIO()) for name in names if ".json" in name}
    assert {"oci-layout", "index.json", "manifest.json"} <= set(names)
    assert documents["manifest.json"][0]["RepoTags"] == [place]
    await rig.stores.images.delete(NS, place)
    store = image_store("", extra_references=prefix("unused", allow_overwrite=True))
    await load(rig, compress(archive), store)
    assert rig.stores.images.get(NS, place).target.digest == image.target.digest
    with pytest.raises(NotFound, match="no image name found"):
        await load(rig, archive, image_store("", extra_references=prefix("foreign/name")))
    await load(rig, archive, image_store("", extra_references=prefix("by/digest", add_digest=True)))
    assert rig.stores.images.get(NS, f"by/digest@{image.target.digest}").target.digest == image.target.digest
    assert await rig.stores.leases.list(NS) == []


async def test_what_docker_save_writes(rig: Rig) -> None:
    config = json.dumps(
        {
            "architecture": platforms.host().architecture,
            "os": "linux",
            "rootfs": {"type": "layers", "diff_ids": [str(Digest.of(LAYERS[0])), str(Digest.of(LAYERS[1]))]},
        }
    ).encode()
    manifest = json.dumps([{"Config": "c.json", "RepoTags": ["app:1"], "Layers": ["1/layer.tar", "2/layer.tar"]}])
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        files = {
            "c.json": config,
            "0/layer.tar": LAYERS[0],
            "2/layer.tar": LAYERS[1],
            "manifest.json": manifest.encode(),
        }
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("1/layer.tar")
        link.type, link.linkname = tarfile.SYMTYPE, "../0/layer.tar"
        archive.addfile(link)
    await load(rig, buffer.getvalue(), image_store("", extra_references=prefix("x", allow_overwrite=True)))
    (stored,) = await rig.stores.images.list(NS)
    assert stored.name == "docker.io/library/app:1"
    top = chain_id([Digest.of(LAYERS[0]), Digest.of(LAYERS[1])])
    assert await tree(rig, top) == {"bin/x": b"x" * 100_000, "etc/a": b"one", "etc/c": b"three"}


def _layout(blob_name: str, blob: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        info = tarfile.TarInfo(blob_name)
        info.size = len(blob)
        archive.addfile(info, io.BytesIO(blob))
    return buffer.getvalue()


@pytest.mark.parametrize(
    "archive",
    [
        b"",
        b"no archive at all" * 100,
        os.urandom(5000),
        tar({"some/file": b"x"}),
        LAYERS[0][:5000],
        gzip.compress(LAYERS[0])[:-20],
        _layout("blobs/sha256/" + "0" * 64, b"x"),
        _layout("blobs/sha256/../../../etc/passwd", b"x"),
        _layout("index.json", b"{"),
    ],
    ids=["empty", "text", "noise", "other", "cut", "gzip-cut", "wrong-digest", "path", "json"],
)
async def test_archives_that_are_none(rig: Rig, archive: bytes) -> None:
    with pytest.raises(InvalidArgument):
        await load(rig, archive, image_store("x"))
    await nothing_left(rig)
    assert await rig.stores.content.list_statuses(NS) == []


async def test_exporting_what_is_not_there(rig: Rig) -> None:
    with pytest.raises(NotFound):
        await export(rig, "absent")


# -- the service


async def test_ends_that_do_not_fit(rig: Rig) -> None:
    with pytest.raises(Unimplemented, match=r"ImageImportStream to containerd\.types\.transfer\.OCIRegistry"):
        await rig.transfer(types.ImageImportStream(stream="x"), registry_end("x/y:z"))
    with pytest.raises(NotFound, match='stream "gone": not found'):
        await rig.transfer(types.ImageImportStream(stream="gone"), image_store("x"))
    with pytest.raises(NotFound, match="snapshotter zfs"):
        await rig.pull("x/y:z", image_store("x", "zfs"))
    request = transfer_pb2.TransferRequest(source=typeurl.pack(registry_end("x/y:z")))
    for context in (call(), call(None)):
        with pytest.raises(WherryError):
            await rig.service.transfer(request, context)
    request.destination.CopyFrom(typeurl.pack(image_store("x")))
    request.options.progress_stream = "gone"
    with pytest.raises(NotFound, match='stream "gone": not found'):
        await rig.service.transfer(request, call())
