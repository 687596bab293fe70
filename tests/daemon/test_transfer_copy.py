"""Images from registry to registry, and looked at without pulling; artifacts; what many pulls share."""

from __future__ import annotations

import asyncio
import json

import pytest
from aiohttp import web

from tests.daemon.stores import NS, call
from tests.daemon.test_transfer import LAYERS, Serve, chain, nothing_left, place, rig, serving, tree
from tests.daemon.transfer_rig import (
    Image,
    Rig,
    image_store,
    make_image,
    make_index,
    platform_message,
    publish,
    registry_end,
    tar,
)
from tests.registry.conftest import registry, serve
from wherry.core import mediatypes
from wherry.core.descriptor import Descriptor
from wherry.core.digest import Digest
from wherry.core.errors import FailedPrecondition, InvalidArgument, NotFound, ResourceExhausted
from wherry.core.platforms import host, parse
from wherry.daemon.config import Limits
from wherry.daemon.transfer_registry import RegistryService
from wherry.proto import wherry_registry_pb2 as pb
from wherry.registry.resolver import Resolver

__all__ = ["place", "registry", "rig", "serve"]
OTHER = parse("linux/s390x") if host().architecture != "s390x" else parse("linux/amd64")


def artifact(config: bytes = b"{}") -> Image:
    """A manifest of things that are no image: an empty configuration, a document, a type that nobody knows."""
    made = Image(Descriptor("", Digest.of(b""), 0))
    manifest = {
        "schemaVersion": 2,
        "mediaType": mediatypes.OCI_MANIFEST,
        "artifactType": "application/x-test",
        "config": made.put(config, mediatypes.OCI_EMPTY).to_json(),
        "layers": [
            made.put(b"a signature", "application/x-unknown").to_json(),
            made.put(b"a text", "text/plain").to_json(),
        ],
    }
    made.target = made.put(json.dumps(manifest).encode(), mediatypes.OCI_MANIFEST)
    return made


# -- copying


async def test_an_index_goes_from_registry_to_registry(rig: Rig, place: str, registry: str) -> None:
    index = make_index([make_image(LAYERS), make_image(LAYERS[:1], OTHER)])
    await publish(index, place)
    target = f"{registry}/copied/whole:v2"
    await rig.transfer(registry_end(place), registry_end(target))
    async with Resolver() as resolver:
        assert (await resolver.resolve(target))[1].digest == index.target.digest
        for descriptor, data in index.blobs.values():
            assert b"".join([c async for c in resolver.fetcher(target).fetch(descriptor)]) == data
    # nothing of it was stored here
    assert await rig.stores.content.list(NS) == []
    assert "complete" in rig.events("layer-")
    rig.progress.clear()
    await rig.transfer(registry_end(place), registry_end(target))
    assert set(rig.events("layer-")) == {"waiting", "already exists"}
    await nothing_left(rig)


async def test_one_platform_of_an_index_is_copied_as_itself(rig: Rig, place: str, registry: str) -> None:
    first, second = make_image(LAYERS), make_image(LAYERS[:1], OTHER)
    await publish(make_index([first, second]), place)
    target = f"{registry}/copied/one:v1"
    source = pb.CopySource(registry=registry_end(place), platforms=[platform_message(OTHER)])
    await rig.transfer(source, registry_end(target))
    async with Resolver() as resolver:
        assert (await resolver.resolve(target))[1].digest == second.target.digest
    source.platforms[0].architecture = "riscv64"
    with pytest.raises(FailedPrecondition, match="0 of its 2 manifests"):
        await rig.transfer(source, registry_end(target))


async def test_what_a_registry_lies_about_is_not_passed_on(rig: Rig, registry: str, serve: Serve) -> None:
    image = make_image(LAYERS)
    layer = next(d for d, _ in image.blobs.values() if "layer" in d.media_type)
    target = f"{registry}/copied/lie:v1"
    for name, text in {layer.digest: "DIGEST_INVALID", image.target.digest: "content of sha256"}.items():
        server = await serve(serving(image, {name: b"x" * image.blobs[name][0].size}))
        with pytest.raises((InvalidArgument, FailedPrecondition), match=text):
            await rig.transfer(registry_end(f"{server.address}/x:v1"), registry_end(target))
    async with Resolver() as resolver:
        with pytest.raises(NotFound):
            await resolver.resolve(target)


# -- looking


async def test_inspecting_without_pulling(rig: Rig, place: str) -> None:
    first, second = make_image(LAYERS), make_image(LAYERS[:1], OTHER)
    index = make_index([first, second])
    await publish(index, place)
    service = RegistryService(rig.service.registries)

    async def look(**options: object) -> list[pb.Document]:
        request = pb.InspectRequest(registry=registry_end(place), **options)  # type: ignore[arg-type]
        return list((await service.inspect(request, call())).documents)

    (root,) = await look()
    assert (root.target.digest, root.data) == (index.target.digest, index.blobs[index.target.digest][1])
    _, manifest, config = await look(platforms=[platform_message(OTHER)])
    assert manifest.target.digest == second.target.digest
    assert manifest.platform.architecture == OTHER.architecture
    assert json.loads(config.data)["architecture"] == OTHER.architecture
    assert len(await look(all_platforms=True)) == 5
    with pytest.raises(NotFound, match="no match for platform"):
        await look(platforms=[platform_message(parse("linux/riscv64"))])
    assert await rig.stores.content.list(NS) == []


async def test_tags(rig: Rig, place: str) -> None:
    service = RegistryService(rig.service.registries)
    repository = place.rpartition(":")[0]
    with pytest.raises(NotFound, match=f"{repository}: not found"):
        await service.tags(pb.TagsRequest(registry=registry_end(repository)), call())
    for tag in ("b", "a", "c"):
        await publish(make_image(LAYERS[:1]), f"{repository}:{tag}")
    answer = await service.tags(pb.TagsRequest(registry=registry_end(repository)), call())
    assert list(answer.tags) == ["a", "b", "c"]
    with pytest.raises(InvalidArgument, match="no repository"):
        await service.tags(pb.TagsRequest(registry=registry_end(place)), call())


# -- artifacts


async def test_artifacts_are_stored(rig: Rig, place: str, registry: str) -> None:
    made = artifact()
    await publish(made, place)
    await rig.pull(place, image_store(place))
    for descriptor, _ in made.blobs.values():
        assert rig.stores.content.exists(NS, descriptor.digest)
    await rig.stores.collector.collect()
    assert rig.stores.content.exists(NS, Digest.of(b"a signature"))
    pushed = f"{registry}/copied/artifact:v1"
    await rig.transfer(image_store(place, unpack=False, platforms=[]), registry_end(pushed))
    await rig.transfer(registry_end(pushed), registry_end(f"{registry}/copied/artifact:v2"))


async def test_a_manifest_of_a_type_that_nobody_knows(rig: Rig, serve: Serve) -> None:
    image = make_image(LAYERS[:1])
    image.target = image.put(b'{"what": "ever"}', "application/vnd.example.thing+json")
    server = await serve(serving(image))
    await rig.pull(f"{server.address}/x:v1", image_store("x"))
    assert rig.stores.images.get(NS, "x").target.media_type == "application/vnd.example.thing+json"
    assert rig.stores.content.exists(NS, image.target.digest)


# -- limits


async def test_ten_thousand_layers(rig: Rig, serve: Serve) -> None:
    image = make_image(LAYERS[:1])
    manifest = json.loads(image.blobs[image.target.digest][1])
    manifest["layers"] = [
        {**manifest["layers"][0], "digest": str(Digest.of(b"%d" % number)), "size": 9} for number in range(10_000)
    ]
    image.target = image.put(json.dumps(manifest).encode(), mediatypes.OCI_MANIFEST)
    server = await serve(serving(image))
    with pytest.raises(ResourceExhausted, match=r"10000 layers.*500 that limits\.image_layers"):
        await rig.pull(f"{server.address}/x:v1", image_store("x"))
    # none of them was asked for
    assert len(server.seen) == 2
    await nothing_left(rig)


@pytest.mark.parametrize(
    ("limits", "text"),
    [
        (Limits(image_parts=3), r"4 parts or more.*limits\.image_parts"),
        (Limits(document_bytes=100), r"bytes.*100 that limits\.document_bytes"),
        (Limits(image_layers=2), r"3 layers.*2 that limits\.image_layers"),
    ],
)
async def test_limits_of_the_configuration(rig: Rig, serve: Serve, limits: Limits, text: str) -> None:
    rig.service._limits = rig.service.registries.limits = limits
    server = await serve(serving(make_image(LAYERS)))
    with pytest.raises(ResourceExhausted, match=text):
        await rig.pull(f"{server.address}/x:v1", image_store("x"))
    await nothing_left(rig)


async def test_indexes_within_indexes(rig: Rig, serve: Serve) -> None:
    image = make_image(LAYERS[:1])
    for _ in range(2000):
        image = make_index([image])
    server = await serve(serving(image))
    with pytest.raises(InvalidArgument, match="more than 16 deep"):
        await rig.pull(f"{server.address}/x:v1", image_store("x", platforms=[]))
    with pytest.raises(InvalidArgument, match="more than 16 deep"):
        await rig.transfer(registry_end(f"{server.address}/x:v1"), registry_end(f"{server.address}/y:v1"))
    assert len(server.seen) < 100
    await nothing_left(rig)


# -- many at once


async def test_pulls_at_once_fetch_and_unpack_once(rig: Rig, serve: Serve) -> None:
    image = make_image([*LAYERS, tar({"noise": b"n" * 1000})])
    normal = serving(image)
    applied = 0
    apply = rig.service._applier.apply

    async def counting(*args: object, **options: object) -> object:
        nonlocal applied
        applied += 1
        return await apply(*args, **options)  # type: ignore[arg-type]

    async def slow(request: web.Request) -> web.StreamResponse:
        if request.method == "GET":
            await asyncio.sleep(0.1)
        return await normal(request)

    rig.service._applier.apply = counting  # type: ignore[assignment,method-assign]
    server = await serve(slow)
    ref = f"{server.address}/x:v1"
    await asyncio.gather(*(rig.pull(ref, image_store(f"name-{number}")) for number in range(4)))
    fetched = [request.path for request in server.seen if request.method == "GET"]
    assert len(fetched) == len(set(fetched)) == len(image.blobs)
    assert applied == 4
    assert len(await rig.stores.images.list(NS)) == 4
    await rig.stores.collector.collect()
    assert (await tree(rig, chain(image)))["noise"] == b"n" * 1000
    await rig.stores.images.delete(NS, "name-0")


async def test_whoever_waited_takes_over(rig: Rig, serve: Serve) -> None:
    """The pull that fetches is given up; the other one, which waited for it, goes on where it was."""
    image = make_image([tar({"noise": bytes(100)})])
    normal = serving(image)
    layer = next(d for d, _ in image.blobs.values() if "layer" in d.media_type)
    asked = asyncio.Event()

    async def stuck(request: web.Request) -> web.StreamResponse:
        if request.path.endswith(layer.digest) and not asked.is_set():
            asked.set()
            await asyncio.sleep(30)
        return await normal(request)

    server = await serve(stuck)
    first = asyncio.create_task(rig.pull(f"{server.address}/x:v1", image_store("first")))
    await asyncio.wait_for(asked.wait(), 30)
    second = asyncio.create_task(rig.pull(f"{server.address}/x:v1", image_store("second")))
    while not any(message.name.startswith("layer-") for message in rig.progress):
        await asyncio.sleep(0.01)
        if second.done() or len(server.seen) >= 5:
            break
    first.cancel()
    await asyncio.wait_for(second, 60)
    await asyncio.gather(first, return_exceptions=True)
    assert [image.name for image in await rig.stores.images.list(NS)] == ["second"]
    assert await rig.stores.leases.list(NS) == []


async def test_a_mirror_that_gives_something_else(
    rig: Rig, serve: Serve, tmp_path_factory: pytest.TempPathFactory
) -> None:
    image = make_image(LAYERS)
    layer = next(d for d, _ in image.blobs.values() if "layer" in d.media_type)
    good = await serve(serving(image))
    bad = await serve(serving(image, {layer.digest: bytes(layer.size)}))
    folder = tmp_path_factory.mktemp("hosts")
    (folder / "team.example").mkdir()
    (folder / "team.example" / "hosts.toml").write_text(
        f'server = "http://{good.address}"\n[host."http://{bad.address}"]\n'
    )
    await rig.transfer(registry_end("team.example/x:v1", host_dir=str(folder)), image_store("x"))
    assert [r.path.rpartition("/")[2] for r in good.seen] == [layer.digest]
    assert len(await tree(rig, chain(image))) == 3
