"""Layers from and to the content store, by the real worker processes."""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import tarfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.daemon.stores import NS, Stores, call, digest_of, stores
from wherry.core.errors import FailedPrecondition, InvalidArgument, NotFound, Unimplemented, WherryError
from wherry.daemon.diff import Differ, DiffService
from wherry.proto import diff_pb2 as pb
from wherry.proto import types_pb2
from wherry.snapshotter.applier import Applier
from wherry.snapshotter.wire import mounts_to_proto

TAR = "application/vnd.oci.image.layer.v1.tar"
GZIP = TAR + "+gzip"

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="layers are applied as root")


def archive(**files: str) -> bytes:
    """A tar with these files, names with `__` for a slash."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, text in files.items():
            member = tarfile.TarInfo(name.replace("__", "/"))
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text.encode()))
    return out.getvalue()


@contextlib.asynccontextmanager
async def differ(root: Path) -> AsyncIterator[tuple[Stores, DiffService]]:
    async with stores(root) as all_:
        applier = Applier()
        try:
            yield all_, DiffService(Differ(all_.content, applier))
        finally:
            await applier.close()


async def unpacked(all_: Stores, service: DiffService, data: bytes, media_type: str, name: str) -> types_pb2.Descriptor:
    info = await all_.content.put(NS, f"layer {name}", data)
    mounts = await all_.snapshots.prepare(NS, "overlayfs", f"prepare {name}")
    descriptor = types_pb2.Descriptor(media_type=media_type, digest=info.digest, size=info.size)
    request = pb.ApplyRequest(diff=descriptor, mounts=mounts_to_proto(mounts))
    applied = (await service.apply(request, call())).applied
    await all_.snapshots.commit(NS, "overlayfs", name, f"prepare {name}")
    return applied


async def test_apply_answers_the_uncompressed_descriptor(tmp_path: Path) -> None:
    async with differ(tmp_path) as (all_, service):
        plain = archive(a="one", dir__b="two")
        for media_type, data in {TAR: plain, GZIP: gzip.compress(plain)}.items():
            applied = await unpacked(all_, service, data, media_type, media_type)
            assert (applied.digest, applied.size, applied.media_type) == (digest_of(plain), len(plain), TAR)
            mounts = await all_.snapshots.view(NS, "overlayfs", f"view {media_type}", media_type)
            assert (Path(mounts[0].source) / "dir" / "b").read_text() == "two"


async def test_diff_makes_a_layer_that_applies_to_the_same_tree(tmp_path: Path) -> None:
    async with differ(tmp_path) as (all_, service):
        await unpacked(all_, service, archive(keep="1", gone="2", changed="3"), TAR, "base")
        upper = await all_.snapshots.prepare(NS, "overlayfs", "work", "base")
        folder = Path(next(o for o in upper[0].options if o.startswith("upperdir=")).partition("=")[2])
        (folder / "changed").write_text("new")
        (folder / "added").write_text("more")
        os.mknod(folder / "gone", 0o600 | 0o020000, os.makedev(0, 0))
        lower = await all_.snapshots.view(NS, "overlayfs", "lower", "base")
        request = pb.DiffRequest(
            left=mounts_to_proto(lower), right=mounts_to_proto(upper), ref="my diff", labels={"a": "b"}
        )
        made = (await service.diff(request, call())).diff
        assert made.media_type == GZIP
        info = all_.content.info(NS, made.digest)
        plain = gzip.decompress(all_.blob(made.digest).read_bytes())
        assert info.size == made.size
        assert dict(info.labels) == {"a": "b", "containerd.io/uncompressed": digest_of(plain)}
        with tarfile.open(fileobj=io.BytesIO(plain)) as tar:
            names = {member.name.lstrip("./") for member in tar.getmembers()}
        assert {"changed", "added", ".wh.gone".lstrip("./")} <= names
        assert await all_.content.list_statuses(NS) == []
        # a second time it is there already
        request.labels["c"] = "d"
        again = (await service.diff(request, call())).diff
        assert again.digest == made.digest
        assert all_.content.info(NS, made.digest).labels["c"] == "d"


async def test_what_can_not_be_applied(tmp_path: Path) -> None:
    async with differ(tmp_path) as (all_, service):
        with pytest.raises(NotFound, match=f"content digest {digest_of(b'none')}: not found"):
            await service.apply(pb.ApplyRequest(diff=types_pb2.Descriptor(digest=digest_of(b"none"))), call())
        with pytest.raises(InvalidArgument):
            await service.apply(pb.ApplyRequest(diff=types_pb2.Descriptor(digest="../x")), call())
        with pytest.raises(InvalidArgument, match="without a descriptor"):
            await service.apply(pb.ApplyRequest(), call())
        with pytest.raises(FailedPrecondition, match="namespace is required"):
            await service.apply(pb.ApplyRequest(), call(None))
        junk = await all_.content.put(NS, "junk", b"no archive at all" * 100)
        mounts = mounts_to_proto(await all_.snapshots.prepare(NS, "overlayfs", "k"))
        descriptor = types_pb2.Descriptor(media_type=GZIP, digest=junk.digest, size=junk.size)
        with pytest.raises(InvalidArgument):
            await service.apply(pb.ApplyRequest(diff=descriptor, mounts=mounts), call())
        descriptor.media_type = TAR
        with pytest.raises(InvalidArgument):
            await service.apply(pb.ApplyRequest(diff=descriptor, mounts=mounts), call())
        descriptor.media_type = "text/plain"
        with pytest.raises(Unimplemented):
            await service.apply(pb.ApplyRequest(diff=descriptor, mounts=mounts), call())
        descriptor.size += 1
        with pytest.raises(FailedPrecondition, match="its descriptor says"):
            await service.apply(pb.ApplyRequest(diff=descriptor, mounts=mounts), call())


async def test_a_diff_that_fails_leaves_nothing(tmp_path: Path) -> None:
    async with differ(tmp_path) as (all_, service):
        bad = types_pb2.Mount(type="bind", source=str(tmp_path / "none"), options=["rbind", "ro"])
        with pytest.raises(WherryError):
            await service.diff(pb.DiffRequest(left=[bad], right=[bad], ref="r"), call())
        with pytest.raises(Unimplemented):
            await service.diff(pb.DiffRequest(left=[bad], right=[bad], media_type="text/plain"), call())
        assert await all_.content.list(NS) == []
        assert await all_.content.list_statuses(NS) == []
