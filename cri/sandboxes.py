"""The daemon's sandboxes (`containerd.services.sandbox.v1.Controller`), as pods use them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from wherry.client.transport import Calls
from wherry.core import typeurl
from wherry.core.errors import NotFound
from wherry.proto import sandbox_pb2 as pb
from wherry.proto import types_pb2

_SERVICE = "containerd.services.sandbox.v1.Controller"
# what a shim says of one that lives
_READY = "SANDBOX_READY"


class Started(NamedTuple):
    """A sandbox that runs: its process (0: none), and the paths of the namespaces that containers join, by kind."""

    pid: int
    namespaces: Mapping[str, str]


class Sandboxes:
    """Sandboxes by id; their records are in the store already."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    async def run(
        self, identity: str, rootfs: Iterable[types_pb2.Mount], annotations: Mapping[str, str], netns: str
    ) -> Started:
        """Create and start it. Raises what its shim ran into."""
        request = pb.ControllerCreateRequest(
            sandbox_id=identity, rootfs=rootfs, annotations=annotations, netns_path=netns
        )
        await self._calls.unary(f"{_SERVICE}/Create", request, pb.ControllerCreateResponse)
        asked = pb.ControllerStartRequest(sandbox_id=identity)
        answer = await self._calls.unary(f"{_SERVICE}/Start", asked, pb.ControllerStartResponse)
        return Started(answer.pid, _namespaces(typeurl.unpack_json(answer.spec) if answer.spec.value else {}))

    async def lives(self, identity: str) -> bool:
        """Whether it runs. Raises what its shim says, but for NotFound."""
        try:
            request = pb.ControllerStatusRequest(sandbox_id=identity)
            answer = await self._calls.unary(f"{_SERVICE}/Status", request, pb.ControllerStatusResponse)
        except NotFound:
            return False
        return answer.state == _READY

    async def wait(self, identity: str) -> int:
        """Its process's exit status, as soon as it has ended."""
        request = pb.ControllerWaitRequest(sandbox_id=identity)
        answer = await self._calls.unary(f"{_SERVICE}/Wait", request, pb.ControllerWaitResponse, endless=True)
        return answer.exit_status

    async def shut_down(self, identity: str) -> None:
        """End it with all that is in it; fine where it is gone."""
        request = pb.ControllerShutdownRequest(sandbox_id=identity)
        await self._calls.unary(f"{_SERVICE}/Shutdown", request, pb.ControllerShutdownResponse)


def _namespaces(spec: Mapping[str, Any]) -> dict[str, str]:
    entries = (spec.get("linux") or {}).get("namespaces") or []
    return {str(entry["type"]): str(entry["path"]) for entry in entries if entry.get("path")}
