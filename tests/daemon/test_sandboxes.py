"""The store of sandboxes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.daemon.stores import NS, call, stores
from wherry.core.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound
from wherry.proto import sandbox_pb2 as pb
from wherry.proto.types_pb2 import Sandbox


def sandbox(id_: str, runtime: str = "rt", **labels: str) -> Sandbox:
    made = Sandbox(sandbox_id=id_, labels=labels, sandboxer="shim")
    made.runtime.name = runtime
    made.spec.value = b"{}"
    return made


async def test_create_get_update_list_delete(tmp_path: Path) -> None:
    async with stores(tmp_path) as all_:
        service = all_.sandbox_service
        made = (await service.create(pb.StoreCreateRequest(sandbox=sandbox("s1", a="1", b="2")), call())).sandbox
        assert made.created_at.seconds
        assert (await service.get(pb.StoreGetRequest(sandbox_id="s1"), call())).sandbox == made
        with pytest.raises(AlreadyExists, match='sandbox "s1": already exists'):
            await all_.sandboxes.create(NS, sandbox("s1"))
        await all_.sandboxes.create(NS, sandbox("s2"))

        change = sandbox("s1", b="3")
        change.extensions["e"].type_url = "t"
        request = pb.StoreUpdateRequest(sandbox=change, fields=["labels.b", "extensions.e"])
        updated = (await service.update(request, call())).sandbox
        assert dict(updated.labels) == {"a": "1", "b": "3"}
        assert updated.extensions["e"].type_url == "t"
        with pytest.raises(InvalidArgument, match='cannot update "sandboxer" field on sandbox "s1"'):
            await all_.sandboxes.update(NS, change, ["sandboxer"])
        with pytest.raises(InvalidArgument, match=r"sandbox\.Runtime\.Name field is immutable"):
            await all_.sandboxes.update(NS, sandbox("s1", "other"))
        assert dict((await all_.sandboxes.update(NS, change)).labels) == {"b": "3"}

        listed = (await service.list(pb.StoreListRequest(filters=["id==s2"]), call())).list
        assert [each.sandbox_id for each in listed] == ["s2"]
        await service.delete(pb.StoreDeleteRequest(sandbox_id="s1"), call())
        for missing in (
            service.get(pb.StoreGetRequest(sandbox_id="s1"), call()),
            service.delete(pb.StoreDeleteRequest(sandbox_id="s1"), call()),
            all_.sandboxes.update(NS, change),
        ):
            with pytest.raises(NotFound):
                await missing


@pytest.mark.parametrize("id_", ["", "..", "a/b", "x" * 300])
async def test_a_bad_id_is_refused(tmp_path: Path, id_: str) -> None:
    async with stores(tmp_path) as all_:
        with pytest.raises(InvalidArgument, match="invalid sandbox ID"):
            await all_.sandboxes.create(NS, sandbox(id_))


async def test_a_namespace_is_needed(tmp_path: Path) -> None:
    async with stores(tmp_path) as all_:
        with pytest.raises(FailedPrecondition, match="namespace is required"):
            await all_.sandbox_service.list(pb.StoreListRequest(), call(None))
