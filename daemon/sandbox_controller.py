"""Sandboxes that run: `containerd.services.sandbox.v1.Controller`, and the same in-process, for the CRI service.

A sandbox is a pod: a shim of its own, in which its containers' tasks live, too (those whose record names it). What it
is stands in its record's `spec`, an OCI specification as JSON: with a process it runs one (a pause image), without it
has namespaces alone, kept by files; see [docs/shim.md]. Its life:

    Store.Create, Create ──► Start ──► tasks come and go ──► Stop ──► Shutdown, Store.Delete

The shim holds what runs; a restarted daemon finds it again by the sandbox's bundle.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from google.protobuf import any_pb2

from wherry.core import typeurl
from wherry.core.errors import InvalidArgument, NotFound, Unavailable
from wherry.core.names import check_identifier, quote
from wherry.daemon import runtimes
from wherry.daemon.bundle import Bundle
from wherry.daemon.config import Config
from wherry.daemon.ends import timestamp
from wherry.daemon.link import SANDBOX, Limits, Shim
from wherry.daemon.namespaces import require_namespace
from wherry.daemon.sandboxes import SandboxStore
from wherry.daemon.shims import Shims
from wherry.proto import runtime_sandbox_pb2 as shim_api
from wherry.proto import sandbox_pb2 as pb
from wherry.proto import types_pb2
from wherry.proto.service import Context

# the names that clients give this controller: none, and containerd's for the one that asks a shim
_NAMES = frozenset({"", "shim"})
# seconds beyond what the caller grants a sandbox to stop
_STOP_SLACK = 20.0


@dataclass(frozen=True, slots=True)
class Started:
    """A sandbox that runs.

    `pid` is its process's, 0 where it has none. `namespaces` are the paths that its containers join, by the OCI
    specification's kinds. `endpoint` is where its shim listens, as `ttrpc+unix:///path`, `version` of the task API.
    """

    pid: int
    created_at_ns: int
    namespaces: Mapping[str, str]
    endpoint: str
    version: int
    spec: any_pb2.Any


class SandboxController:
    """The sandboxes of one daemon."""

    def __init__(self, config: Config, tasks: str, shims: Shims, store: SandboxStore) -> None:
        """`tasks` is the folder of the bundles."""
        self._config = config
        self._folder = tasks
        self._limits = Limits.of(config)
        self._shims = shims
        self._store = store

    async def create(
        self,
        namespace: str,
        sandbox: types_pb2.Sandbox,
        *,
        rootfs: Iterable[types_pb2.Mount] = (),
        options: any_pb2.Any | None = None,
        netns_path: str = "",
        annotations: Mapping[str, str] | None = None,
    ) -> None:
        """Start a shim for a sandbox and make the sandbox in it; `start` lets it run.

        Its record must be in the store: a sandbox without one is ended when the daemon starts again. `options` are the
        runtime's, in place of the record's. Raises AlreadyExists, InvalidArgument, NotFound for a runtime that isn't
        installed, and what the shim ran into.
        """
        id_ = check_identifier("invalid sandbox ID", sandbox.sandbox_id)
        launch = runtimes.resolve(sandbox.runtime.name, self._config.runtimes)
        launch = replace(launch, group=id_, sandbox=True)
        given = options if options is not None and options.type_url else sandbox.runtime.options
        merged = runtimes.options(given, launch, self._config.runtimes)
        bundle = Bundle(self._folder, namespace, id_)
        request = shim_api.CreateSandboxRequest(
            sandbox_id=id_,
            bundle_path=bundle.path,
            rootfs=rootfs,
            options=merged,
            netns_path=netns_path,
            annotations=annotations or {},
        )
        spec = self._spec(sandbox, annotations or {})
        await self._shims.create_sandbox(bundle, spec, launch, merged, request)

    async def start(self, namespace: str, id: str) -> Started:  # noqa: A002 -- the field's name
        """Let it run. Raises NotFound, FailedPrecondition where it does already."""
        shim = await self._shims.get_sandbox(namespace, id)
        asked = shim_api.StartSandboxRequest(sandbox_id=id)
        answer = await shim.call("StartSandbox", asked, shim_api.StartSandboxResponse, shim.limits.create, SANDBOX)
        boot = shim.bootstrap
        return Started(
            answer.pid,
            answer.created_at.ToNanoseconds(),
            _namespaces(answer.spec),
            f"{boot.protocol}+{boot.address}",
            boot.version,
            answer.spec,
        )

    async def stop(self, namespace: str, id: str, within: float = 0) -> None:  # noqa: A002
        """End its process, in `within` seconds (0: the shim's own limit). Its namespaces stay until `shutdown`."""
        shim = await self._shims.get_sandbox(namespace, id)
        request = shim_api.StopSandboxRequest(sandbox_id=id, timeout_secs=int(within))
        limit = within + _STOP_SLACK
        await shim.call("StopSandbox", request, shim_api.StopSandboxResponse, limit, SANDBOX)

    async def wait(self, namespace: str, id: str) -> shim_api.WaitSandboxResponse:  # noqa: A002
        """Its end, as soon as there is one; also where its shim dies."""
        shim = await self._shims.get_sandbox(namespace, id)
        request = shim_api.WaitSandboxRequest(sandbox_id=id)
        try:
            return await shim.call("WaitSandbox", request, shim_api.WaitSandboxResponse, None, SANDBOX)
        except Unavailable:
            dead = await self._shims.fate(shim)
            return shim_api.WaitSandboxResponse(exit_status=dead.exit_status, exited_at=timestamp(dead.exited_at_ns))

    async def status(self, namespace: str, id: str, verbose: bool = False) -> shim_api.SandboxStatusResponse:  # noqa: A002
        """What its shim says. Raises NotFound for one that isn't there (any more)."""
        shim = await self._shims.get_sandbox(namespace, id)
        return await self._status(shim, verbose)

    async def namespaces(self, namespace: str, id: str) -> Mapping[str, str]:  # noqa: A002
        """The paths of the namespaces that containers join, by kind; also after a restart of the daemon."""
        status = await self.status(namespace, id, verbose=True)
        try:
            value = json.loads(status.info["namespaces"])
            return {str(kind): str(path) for kind, path in value.items()}
        except (KeyError, ValueError, AttributeError):
            return {}

    async def platform(self, namespace: str, id: str) -> types_pb2.Platform:  # noqa: A002
        """What runs in it."""
        shim = await self._shims.get_sandbox(namespace, id)
        request = shim_api.PlatformRequest(sandbox_id=id)
        return (await shim.call("Platform", request, shim_api.PlatformResponse, service=SANDBOX)).platform

    async def metrics(self, namespace: str, id: str) -> types_pb2.Metric:  # noqa: A002
        """Those of its process; without data where it has none."""
        shim = await self._shims.get_sandbox(namespace, id)
        request = shim_api.SandboxMetricsRequest(sandbox_id=id)
        limit = self._limits.state
        answer = await shim.call("SandboxMetrics", request, shim_api.SandboxMetricsResponse, limit, SANDBOX)
        return answer.metrics

    async def shutdown(self, namespace: str, id: str) -> None:  # noqa: A002
        """End it with all that is left in it. One that isn't there is fine: that is what was wanted."""
        try:
            shim = await self._shims.get_sandbox(namespace, id)
        except NotFound:
            return
        await self._shims.end_sandbox(shim)

    # -- helpers

    async def _status(self, shim: Shim, verbose: bool) -> shim_api.SandboxStatusResponse:
        request = shim_api.SandboxStatusRequest(sandbox_id=shim.bundle.id, verbose=verbose)
        limit = self._limits.state
        return await shim.call("SandboxStatus", request, shim_api.SandboxStatusResponse, limit, SANDBOX)

    def _spec(self, sandbox: types_pb2.Sandbox, annotations: Mapping[str, str]) -> bytes:
        """The specification for the bundle, with those annotations of the pod that its handler passes on."""
        if not sandbox.HasField("spec"):
            return b"{}"
        value = typeurl.unpack_json(sandbox.spec)
        if not isinstance(value, dict):
            raise InvalidArgument(f"spec of sandbox {quote(sandbox.sandbox_id)} is no JSON object: invalid argument")
        handler = self._config.runtimes.get(sandbox.runtime.name)
        if handler is not None and (passed := runtimes.passed_annotations(annotations, handler.pod_annotations)):
            value["annotations"] = {**value.get("annotations", {}), **passed}
        return json.dumps(value).encode()


def _namespaces(spec: any_pb2.Any) -> dict[str, str]:
    if not spec.value:
        return {}
    entries = (typeurl.unpack_json(spec).get("linux") or {}).get("namespaces") or []
    return {entry["type"]: os.fspath(entry["path"]) for entry in entries if entry.get("path")}


class SandboxControllerService:
    """containerd.services.sandbox.v1.Controller."""

    SERVICE = "containerd.services.sandbox.v1.Controller"

    def __init__(self, controller: SandboxController, store: SandboxStore) -> None:
        self._controller = controller
        self._store = store

    async def create(self, request: pb.ControllerCreateRequest, context: Context) -> pb.ControllerCreateResponse:
        """Make it. What the request doesn't say of the sandbox, its record does."""
        namespace = _namespace(request.sandboxer, context)
        sandbox = self._store.get(namespace, request.sandbox_id or request.sandbox.sandbox_id)
        if request.HasField("sandbox"):
            for field in ("runtime", "spec"):
                if request.sandbox.HasField(field):
                    getattr(sandbox, field).CopyFrom(getattr(request.sandbox, field))
        await self._controller.create(
            namespace,
            sandbox,
            rootfs=request.rootfs,
            options=_runtime_options(request.options),
            netns_path=request.netns_path,
            annotations=dict(request.annotations),
        )
        return pb.ControllerCreateResponse(sandbox_id=sandbox.sandbox_id)

    async def start(self, request: pb.ControllerStartRequest, context: Context) -> pb.ControllerStartResponse:
        """Run it."""
        started = await self._controller.start(_namespace(request.sandboxer, context), request.sandbox_id)
        return pb.ControllerStartResponse(
            sandbox_id=request.sandbox_id,
            pid=started.pid,
            created_at=timestamp(started.created_at_ns),
            address=started.endpoint,
            version=started.version,
            spec=started.spec,
        )

    async def stop(self, request: pb.ControllerStopRequest, context: Context) -> pb.ControllerStopResponse:
        """End its process."""
        namespace = _namespace(request.sandboxer, context)
        await self._controller.stop(namespace, request.sandbox_id, request.timeout_secs)
        return pb.ControllerStopResponse()

    async def wait(self, request: pb.ControllerWaitRequest, context: Context) -> pb.ControllerWaitResponse:
        """Its end."""
        end = await self._controller.wait(_namespace(request.sandboxer, context), request.sandbox_id)
        return pb.ControllerWaitResponse(exit_status=end.exit_status, exited_at=end.exited_at)

    async def status(self, request: pb.ControllerStatusRequest, context: Context) -> pb.ControllerStatusResponse:
        """What it does."""
        namespace = _namespace(request.sandboxer, context)
        status = await self._controller.status(namespace, request.sandbox_id, request.verbose)
        return pb.ControllerStatusResponse(
            sandbox_id=request.sandbox_id,
            pid=status.pid,
            state=status.state,
            info=dict(status.info),
            created_at=status.created_at,
            exited_at=status.exited_at if status.HasField("exited_at") else None,
            extra=status.extra if status.HasField("extra") else None,
        )

    async def platform(self, request: pb.ControllerPlatformRequest, context: Context) -> pb.ControllerPlatformResponse:
        """What runs in it."""
        namespace = _namespace(request.sandboxer, context)
        return pb.ControllerPlatformResponse(platform=await self._controller.platform(namespace, request.sandbox_id))

    async def metrics(self, request: pb.ControllerMetricsRequest, context: Context) -> pb.ControllerMetricsResponse:
        """What it uses."""
        namespace = _namespace(request.sandboxer, context)
        return pb.ControllerMetricsResponse(metrics=await self._controller.metrics(namespace, request.sandbox_id))

    async def update(self, request: pb.ControllerUpdateRequest, context: Context) -> pb.ControllerUpdateResponse:
        """The record is the store's; of what runs nothing can be changed. Raises NotFound."""
        await self._controller.status(_namespace(request.sandboxer, context), request.sandbox_id)
        return pb.ControllerUpdateResponse()

    async def shutdown(self, request: pb.ControllerShutdownRequest, context: Context) -> pb.ControllerShutdownResponse:
        """Remove it."""
        await self._controller.shutdown(_namespace(request.sandboxer, context), request.sandbox_id)
        return pb.ControllerShutdownResponse()


def _namespace(sandboxer: str, context: Context) -> str:
    if sandboxer not in _NAMES:
        raise NotFound(f"sandbox controller {quote(sandboxer)}: not found")
    return require_namespace(context)


def _runtime_options(packed: any_pb2.Any) -> any_pb2.Any | None:
    return packed if packed.type_url else None
