"""The content store: verified, resumable, shared between namespaces but not seen by them, and killed half-way."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import AsyncIterator, Iterable, Iterator
from pathlib import Path

import pytest
from google.protobuf.field_mask_pb2 import FieldMask

from tests.daemon.stores import NS, Stores, call, digest_of, killed, stores
from wherry.core.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    OutOfRange,
    ResourceExhausted,
    Unavailable,
    WherryError,
)
from wherry.daemon.content import ContentStore
from wherry.daemon.metadata import Metadata
from wherry.proto import content_pb2 as pb
from wherry.proto.namespaces_pb2 import Namespace

DATA = os.urandom(3 << 20) + b"tail"


async def write(
    all_: Stores, requests: Iterable[pb.WriteContentRequest], namespace: str | None = NS
) -> list[pb.WriteContentResponse]:
    async def stream() -> AsyncIterator[pb.WriteContentRequest]:
        for request in requests:
            yield request

    return [answer async for answer in all_.content_service.write(stream(), call(namespace))]


async def read(all_: Stores, digest: str, offset: int = 0, size: int = 0) -> bytes:
    request = pb.ReadContentRequest(digest=digest, offset=offset, size=size)
    at = max(offset, 0)
    data = b""
    async for answer in all_.content_service.read(request, call()):
        assert answer.offset == at
        assert len(answer.data) <= 1 << 20
        data += answer.data
        at += len(answer.data)
    return data


async def test_write_and_read(tmp_path: Path) -> None:
    digest = digest_of(DATA)
    async with stores(tmp_path) as all_:
        chunk = 700_000
        requests = [pb.WriteContentRequest(action=pb.STAT, ref="r", total=len(DATA), expected=digest)]
        requests += [
            pb.WriteContentRequest(action=pb.WRITE, offset=at, data=DATA[at : at + chunk])
            for at in range(0, len(DATA), chunk)
        ]
        requests.append(
            pb.WriteContentRequest(
                action=pb.COMMIT, offset=len(DATA), total=len(DATA), expected=digest, labels={"a": "b"}
            )
        )
        answers = await write(all_, requests)
        assert answers[0].offset == 0
        assert answers[0].total == len(DATA)
        assert [answer.offset for answer in answers[1:3]] == [chunk, 2 * chunk]
        assert answers[1].digest == digest_of(DATA[:chunk])
        assert answers[-1].digest == digest
        assert answers[-1].offset == len(DATA)

        info = (await all_.content_service.info(pb.InfoRequest(digest=digest), call())).info
        assert (info.digest, info.size, dict(info.labels)) == (digest, len(DATA), {"a": "b"})
        assert all_.blob(digest).read_bytes() == DATA
        assert all_.blob(digest).stat().st_mode & 0o777 == 0o444
        assert await read(all_, digest) == DATA
        assert await read(all_, digest, 5, 7) == DATA[5:12]
        assert await read(all_, digest, 1 << 20, 2 << 20) == DATA[1 << 20 : 3 << 20]
        assert await read(all_, digest, len(DATA) - 3, 100) == DATA[-3:]
        assert await read(all_, digest, len(DATA)) == b""
        with pytest.raises(OutOfRange, match=f"read past object length {len(DATA)} bytes"):
            await read(all_, digest, len(DATA) + 1)
        assert os.listdir(tmp_path / "content" / "ingest") == []
        assert (await all_.content_service.list_statuses(pb.ListStatusesRequest(), call())).statuses == []
        assert all_.topics() == ["/content/create"]


async def test_small_blobs_are_read_from_memory_and_ranges_hold(tmp_path: Path) -> None:
    async with stores(tmp_path) as all_:
        info = await all_.content.put(NS, "r", b"0123456789")
        for _ in range(2):
            assert await read(all_, info.digest) == b"0123456789"
            assert await read(all_, info.digest, 3, 4) == b"3456"
        await all_.content.delete(NS, info.digest)
        with pytest.raises(NotFound):
            await read(all_, info.digest)


async def test_an_empty_blob(tmp_path: Path) -> None:
    async with stores(tmp_path) as all_:
        info = await all_.content.put(NS, "r", b"")
        assert info.digest == digest_of(b"")
        assert await read(all_, info.digest) == b""


async def test_an_interrupted_upload_goes_on_after_a_restart(tmp_path: Path) -> None:
    digest = digest_of(DATA)
    half = len(DATA) // 2
    async with stores(tmp_path) as all_:
        await write(
            all_,
            [
                pb.WriteContentRequest(action=pb.STAT, ref="r", total=len(DATA), expected=digest),
                pb.WriteContentRequest(action=pb.WRITE, data=DATA[:half]),
            ],
        )
    async with stores(tmp_path) as all_:
        status = (await all_.content_service.status(pb.StatusRequest(ref="r"), call())).status
        assert (status.ref, status.offset, status.total, status.expected) == ("r", half, len(DATA), digest)
        assert status.started_at.ToNanoseconds() <= status.updated_at.ToNanoseconds()
        answers = await write(
            all_,
            [
                pb.WriteContentRequest(action=pb.STAT, ref="r", total=len(DATA), expected=digest),
                pb.WriteContentRequest(action=pb.WRITE, offset=half, data=DATA[half:]),
                pb.WriteContentRequest(action=pb.COMMIT, offset=len(DATA), total=len(DATA), expected=digest),
            ],
        )
        assert answers[0].offset == half
        assert answers[0].digest == digest_of(DATA[:half])
        assert await read(all_, digest) == DATA


async def test_a_wrong_offset_is_out_of_range_and_zero_starts_over(tmp_path: Path) -> None:
    async with stores(tmp_path) as all_:
        with pytest.raises(OutOfRange, match="write @3 must occur at current offset 5"):
            await write(
                all_,
                [
                    pb.WriteContentRequest(action=pb.WRITE, ref="r", data=b"12345"),
                    pb.WriteContentRequest(action=pb.WRITE, offset=3, data=b"x"),
                ],
            )
        answers = await write(
            all_,
            [
                pb.WriteContentRequest(action=pb.STAT, ref="r"),
                pb.WriteContentRequest(action=pb.WRITE, offset=0, data=b"new"),
                pb.WriteContentRequest(action=pb.COMMIT, offset=3),
            ],
        )
        assert [answer.offset for answer in answers] == [5, 3, 3]
        assert await read(all_, digest_of(b"new")) == b"new"


async def test_a_wrong_digest_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    wrong = digest_of(b"something else")
    async with stores(tmp_path) as all_:
        with pytest.raises(FailedPrecondition) as error:
            await write(
                all_,
                [
                    pb.WriteContentRequest(action=pb.WRITE, ref="r", data=DATA, expected=wrong),
                    pb.WriteContentRequest(action=pb.COMMIT, offset=len(DATA), expected=wrong),
                ],
            )
        assert error.value.message == (
            f"unexpected commit digest {digest_of(DATA)}, expected {wrong}: failed precondition"
        )
        assert await all_.content.list(NS) == []
        assert await all_.content.list_statuses(NS) == []
        assert os.listdir(tmp_path / "content" / "ingest") == []
        assert os.listdir(tmp_path / "content" / "blobs" / "sha256") == []


async def test_a_wrong_size_is_refused(tmp_path: Path) -> None:
    async with stores(tmp_path) as all_:
        with pytest.raises(FailedPrecondition, match="unexpected commit size 5, expected 4: failed precondition"):
            await write(all_, [pb.WriteContentRequest(action=pb.COMMIT, ref="long", data=b"12345", total=4)])
        assert await all_.content.list_statuses(NS) == []
        # what is too short can be gone on with
        with pytest.raises(FailedPrecondition, match="unexpected commit size 5, expected 6"):
            await write(all_, [pb.WriteContentRequest(action=pb.COMMIT, ref="short", data=b"12345", total=6)])
        assert (await all_.content.status(NS, "short")).offset == 5
        assert await all_.content.list(NS) == []


async def test_a_second_writer_of_a_ref_has_to_wait(tmp_path: Path) -> None:
    async with stores(tmp_path) as all_:
        async with await all_.content.writer(NS, "r") as first:
            with pytest.raises(Unavailable, match=r"ref r locked for \d+\.\d+s"):
                await all_.content.writer(NS, "r")
            async with await all_.content.writer("other", "r") as second:
                assert second.id != first.id
            await first.write(b"abc")
        async with await all_.content.writer(NS, "r") as again:
            assert again.offset == 3


async def test_what_is_there_already_exists(tmp_path: Path) -> None:
    async with stores(tmp_path) as all_:
        info = await all_.content.put(NS, "a", b"data")
        with pytest.raises(AlreadyExists, match=f"content {info.digest}: already exists"):
            await all_.content.writer(NS, "b", expected=info.digest)
        with pytest.raises(AlreadyExists, match=r"blob with expected digest .* exists"):
            await write(
                all_,
                [
                    pb.WriteContentRequest(action=pb.WRITE, ref="c", data=b"data"),
                    pb.WriteContentRequest(action=pb.COMMIT, offset=4, expected=info.digest),
                ],
            )
        with pytest.raises(AlreadyExists, match=f"content {info.digest}: already exists"):
            await write(all_, [pb.WriteContentRequest(action=pb.COMMIT, ref="d", data=b"data")])
        assert await all_.content.list_statuses(NS) == []
        assert os.listdir(tmp_path / "content" / "ingest") == []
        again = await all_.content.put(NS, "e", b"data", labels={"x": "y"})
        assert dict(again.labels) == {"x": "y"}


async def test_namespaces_share_files_and_see_only_their_own(tmp_path: Path) -> None:
    async with stores(tmp_path) as all_:
        info = await all_.content.put(NS, "a", b"data", labels={"mine": "1"})
        for ask in (all_.content.info, all_.content.path):
            with pytest.raises(NotFound, match=f"content digest {info.digest}: not found"):
                ask("other", info.digest)
        with pytest.raises(NotFound):
            await all_.content.delete("other", info.digest)
        assert await all_.content.list("other") == []
        # an upload of what somebody has is complete at once
        answers = await write(
            all_,
            [
                pb.WriteContentRequest(action=pb.STAT, ref="r", total=4, expected=info.digest),
                pb.WriteContentRequest(action=pb.COMMIT, offset=4, total=4, expected=info.digest),
            ],
            "other",
        )
        assert [answer.offset for answer in answers] == [4, 4]
        assert answers[0].digest == info.digest
        assert all_.content.info("other", info.digest).labels == {}
        # the file stays as long as one of them has it
        await all_.content.delete(NS, info.digest)
        await asyncio.gather(*all_.content._tasks)
        assert all_.blob(info.digest).exists()
        await all_.content.delete("other", info.digest)
        await asyncio.gather(*all_.content._tasks)
        assert not all_.blob(info.digest).exists()


async def test_an_upload_that_stands_for_a_blob_can_be_written_on(tmp_path: Path) -> None:
    async with stores(tmp_path) as all_:
        info = await all_.content.put(NS, "a", b"data")
        async with await all_.content.writer("other", "r", expected=info.digest) as writer:
            assert writer.offset == 4
            await writer.write(b"more")
            made = await writer.commit()
        assert made.digest == digest_of(b"datamore")
        assert all_.blob(info.digest).read_bytes() == b"data"
        async with await all_.content.writer("other", "s", expected=info.digest) as writer:
            await writer.truncate()
            await writer.write(b"data")
            made = await writer.commit(4, info.digest)
        assert made.digest == info.digest


async def test_labels_by_mask(tmp_path: Path) -> None:
    async with stores(tmp_path) as all_:
        digest = (await all_.content.put(NS, "a", b"data", labels={"a": "1", "b.c": "2"})).digest

        async def update(labels: dict[str, str], *paths: str) -> dict[str, str]:
            request = pb.UpdateRequest(info=pb.Info(digest=digest, labels=labels), update_mask=FieldMask(paths=paths))
            return dict((await all_.content_service.update(request, call())).info.labels)

        assert await update({"b.c": "3"}, "labels.b.c", "labels.a") == {"b.c": "3"}
        assert await update({"x": "y"}, "labels") == {"x": "y"}
        assert await update({"z": ""}) == {}
        with pytest.raises(InvalidArgument, match='cannot update "size" field on content info'):
            await update({}, "size")
        with pytest.raises(InvalidArgument, match=r"info\.Labels: label key and value length"):
            await update({"k": "v" * 5000})
        digest = digest_of(b"none")
        with pytest.raises(NotFound, match=f"content digest {digest}: not found"):
            await update({})


async def test_list_with_filters(tmp_path: Path) -> None:
    async with stores(tmp_path) as all_:
        made = [await all_.content.put(NS, f"r{i}", b"%d" % i, labels={"odd": str(i % 2)}) for i in range(205)]
        blocks = [
            block async for block in all_.content_service.list(pb.ListContentRequest(filters=["labels.odd==1"]), call())
        ]
        assert [len(block.info) for block in blocks] == [100, 2]
        found = await all_.content.list(NS, [f"digest=={made[7].digest}"])
        assert [info.digest for info in found] == [made[7].digest]


async def test_abort_throws_away_also_under_its_writer(tmp_path: Path) -> None:
    async with stores(tmp_path) as all_:
        async with await all_.content.writer(NS, "r") as writer:
            await writer.write(b"abc")
            await all_.content_service.abort(pb.AbortRequest(ref="r"), call())
            with pytest.raises(NotFound, match="reference r: not found"):
                await writer.write(b"d")
        assert os.listdir(tmp_path / "content" / "ingest") == []
        with pytest.raises(NotFound, match="reference r: not found"):
            await all_.content_service.abort(pb.AbortRequest(ref="r"), call())
        with pytest.raises(NotFound, match='could not get status for ref "r": reference r: not found'):
            await all_.content_service.status(pb.StatusRequest(ref="r"), call())


@pytest.mark.parametrize(
    "digest", ["", "x", "sha256:abc", "md5:" + "0" * 32, "sha256:../../../etc/passwd", "sha256:" + "G" * 64, "x" * 300]
)
async def test_what_is_no_digest_is_refused(tmp_path: Path, digest: str) -> None:
    async with stores(tmp_path) as all_:
        service = all_.content_service
        with pytest.raises(InvalidArgument):
            await service.info(pb.InfoRequest(digest=digest), call())
        with pytest.raises(InvalidArgument):
            await read(all_, digest)
        with pytest.raises(InvalidArgument):
            await service.delete(pb.DeleteContentRequest(digest=digest), call())
        if digest:
            with pytest.raises(InvalidArgument):
                await write(all_, [pb.WriteContentRequest(action=pb.STAT, ref="r", expected=digest)])
            with pytest.raises(InvalidArgument):
                await write(all_, [pb.WriteContentRequest(action=pb.COMMIT, ref="r", data=b"x", expected=digest)])


async def test_what_is_no_upload_is_refused(tmp_path: Path) -> None:
    async with stores(tmp_path) as all_:
        with pytest.raises(InvalidArgument, match="first message must have a reference"):
            await write(all_, [pb.WriteContentRequest(action=pb.STAT)])
        with pytest.raises(InvalidArgument, match="total must not be negative"):
            await write(all_, [pb.WriteContentRequest(action=pb.STAT, ref="r", total=-1)])
        with pytest.raises(OutOfRange):
            await write(all_, [pb.WriteContentRequest(action=pb.WRITE, ref="r", offset=-5, data=b"x")])
        with pytest.raises(FailedPrecondition, match="namespace is required"):
            await write(all_, [pb.WriteContentRequest(action=pb.STAT, ref="r")], None)
        assert await write(all_, []) == []


@pytest.mark.parametrize("ref", ["../../x", "a/b", "x" * 300, "ü\n"])
async def test_a_ref_is_any_text_and_no_path(tmp_path: Path, ref: str) -> None:
    async with stores(tmp_path) as all_:
        async with await all_.content.writer(NS, ref) as writer:
            await writer.write(b"abc")
        assert (await all_.content.status(NS, ref)).offset == 3
        assert sorted(os.listdir(tmp_path)) == [
            "content",
            "metadata.db",
            "metadata.db-shm",
            "metadata.db-wal",
            "snapshotter",
        ]
        assert os.listdir(tmp_path / "content" / "ingest") == [str(writer.id)]


async def test_sixteen_writers_at_once(tmp_path: Path) -> None:
    async with stores(tmp_path) as all_:
        parts = [os.urandom(300_000) for _ in range(16)]

        async def upload(part: bytes) -> None:
            async with await all_.content.writer(NS, digest_of(part), total=len(part)) as writer:
                for at in range(0, len(part), 32_768):
                    await writer.write(part[at : at + 32_768])
                await writer.commit(len(part), digest_of(part))

        await asyncio.gather(*(upload(part) for part in parts))
        assert {info.digest for info in await all_.content.list(NS)} == {digest_of(part) for part in parts}


async def test_two_commits_and_a_removal_of_one_blob_at_once(tmp_path: Path) -> None:
    """A record never stands without its file, whoever comes first."""
    async with stores(tmp_path) as all_:
        for number in range(30):
            data = b"%d" % number
            await all_.content.put("a", "r", data)
            await asyncio.gather(
                all_.content.put("b", "r", data),
                all_.content.put("c", "r", data),
                all_.content.delete("a", digest_of(data)),
            )
            for namespace in ("b", "c"):
                assert await all_.content.read_all(namespace, digest_of(data)) == data
                assert all_.blob(digest_of(data)).exists()


async def test_a_caller_that_goes_away_leaves_no_record_without_its_file(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    async with stores(tmp_path) as all_:
        opened = len(os.listdir("/proc/self/fd"))
        data = [os.urandom(1 << 20) for _ in range(20)]
        for number, part in enumerate(data):
            writing = asyncio.create_task(all_.content.put(NS, f"r{number}", part))
            await asyncio.sleep(number * 0.0003)
            writing.cancel()
            await asyncio.gather(writing, return_exceptions=True)
        await asyncio.sleep(0.2)
        await asyncio.gather(*all_.content._tasks)
        for info in await all_.content.list(NS):
            assert digest_of(all_.blob(info.digest).read_bytes()) == info.digest
        assert len(os.listdir("/proc/self/fd")) == opened
        # and each can be done again
        for number, part in enumerate(data):
            assert (await all_.content.put(NS, f"r{number}", part)).digest == digest_of(part)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(tmp_path)], check=True)
    yield tmp_path
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


async def test_a_full_disk_is_said_and_leaves_nothing(small_disk: Path) -> None:
    async with stores(small_disk) as all_:

        async def upload() -> None:
            async with await all_.content.writer(NS, "big", total=8 << 20) as writer:
                for _ in range(8):
                    await writer.write(os.urandom(1 << 20))
                await writer.commit(8 << 20)

        with pytest.raises(ResourceExhausted, match="no space left on device"):
            await upload()
        assert os.listdir(small_disk / "content" / "ingest") == []
        assert await all_.content.list_statuses(NS) == []
        assert (await all_.content.put(NS, "small", b"fits")).size == 4


async def test_the_start_makes_files_and_records_agree(tmp_path: Path) -> None:
    async with stores(tmp_path) as all_:
        kept = await all_.content.put(NS, "a", b"kept", labels={"containerd.io/gc.root": "1"})
        lost = await all_.content.put(NS, "b", b"lost")
    os.unlink(all_.blob(lost.digest))
    orphan = all_.blob(digest_of(b"orphan"))
    orphan.write_bytes(b"orphan")
    (tmp_path / "content" / "ingest" / "99").mkdir()
    async with stores(tmp_path) as all_:
        assert [info.digest for info in await all_.content.list(NS)] == [kept.digest]
        assert not orphan.exists()
        assert os.listdir(tmp_path / "content" / "ingest") == []


async def test_isolated_namespaces_upload_what_they_want_to_have(tmp_path: Path) -> None:
    data = b"mine" * 1000
    async with stores(tmp_path) as all_:
        content = ContentStore(all_.metadata, str(tmp_path / "content"), isolated=True)
        try:
            info = await content.put(NS, "a", data)
            async with await content.writer("other", "r", total=len(data), expected=info.digest) as writer:
                assert (writer.shared, writer.offset) == ("", 0)
                with pytest.raises(FailedPrecondition):
                    await writer.commit(len(data), info.digest)
            assert await content.list("other") == []
            await content.put("other", "r", data, expected=info.digest)
            assert content.info("other", info.digest).size == len(data)
            # who says that everybody may have its blobs shares them
            offered = Namespace(name=NS, labels={"containerd.io/namespace.shareable": "true"})
            await all_.namespaces.update(offered)
            async with await content.writer("third", "r", expected=info.digest) as writer:
                assert writer.offset == len(data)
                await writer.commit(len(data), info.digest)
        finally:
            await content.close()


KILLED = """
import asyncio, os, sys
from wherry.daemon.content import ContentStore
from wherry.daemon.metadata import Metadata

async def main():
    root = sys.argv[1]
    metadata = await Metadata.open(root + "/metadata.db")
    content = ContentStore(metadata, root + "/content")

    async def forever(worker):
        number = 0
        while True:
            data = os.urandom(200_000)
            info = await content.put("default", f"{worker}-{number}", data)
            if number % 3 == 0:
                await content.delete("default", info.digest)
            else:
                print(info.digest, flush=True)
            number += 1

    await asyncio.gather(*(forever(worker) for worker in range(4)))

asyncio.run(main())
"""


async def test_a_kill_in_the_middle_leaves_no_record_without_its_file(tmp_path: Path) -> None:
    root = tmp_path
    answered: set[str] = set()
    for _ in range(3):
        answered |= set(killed(KILLED, str(root), lines=20))
        metadata = await Metadata.open(str(root / "metadata.db"))
        recorded = {row[0] for row in await metadata.rows("SELECT digest FROM blobs")}
        await metadata.close()
        for digest in recorded:
            path = root / "content" / "blobs" / "sha256" / digest.removeprefix("sha256:")
            assert digest_of(path.read_bytes()) == digest
        assert answered <= recorded
    async with stores(root) as all_:
        files = {f"sha256:{name}" for name in os.listdir(root / "content" / "blobs" / "sha256")}
        assert files == {info.digest for info in await all_.content.list(NS)}


@pytest.mark.parametrize("method", ["info", "update", "delete", "status", "list_statuses", "abort"])
async def test_every_call_needs_a_namespace(tmp_path: Path, method: str) -> None:
    async with stores(tmp_path) as all_:
        request = {
            "info": pb.InfoRequest(),
            "update": pb.UpdateRequest(),
            "delete": pb.DeleteContentRequest(),
            "status": pb.StatusRequest(),
            "list_statuses": pb.ListStatusesRequest(),
            "abort": pb.AbortRequest(),
        }[method]
        with pytest.raises(FailedPrecondition, match="namespace is required"):
            await getattr(all_.content_service, method)(request, call(None))
        with pytest.raises(WherryError):
            await getattr(all_.content_service, method)(request, call("a/b"))
