"""`wherry.tasks.v1.Tasks`: how a process ended, in words, and what goes on with its output.

A shim of ours keeps the words in the bundle beside the exit.
"""

from __future__ import annotations

import structlog
from google.protobuf.empty_pb2 import Empty

from wherry.core import topics
from wherry.daemon import foreign_logs
from wherry.daemon.bundle import Bundle, NotedExit
from wherry.daemon.ends import timestamp
from wherry.daemon.events import Exchange
from wherry.daemon.link import Limits
from wherry.daemon.namespaces import require_namespace
from wherry.daemon.shims import Shims
from wherry.daemon.starting import SIGKILLED
from wherry.proto import events_pb2, task_v2_pb2
from wherry.proto import wherry_shim_pb2 as _shim  # noqa: F401  # declares the service
from wherry.proto import wherry_tasks_pb2 as pb
from wherry.proto.service import Context
from wherry.proto.task_types_pb2 import STOPPED
from wherry.proto.types_pb2 import Envelope

log = structlog.get_logger(__name__)

_STREAMS = "wherry.shim.v1.Streams"


class ExplainService:
    """Reads what shims kept; logs it where a process was killed for lack of memory. Asks shims about streams."""

    SERVICE = "wherry.tasks.v1.Tasks"

    def __init__(self, folder: str, shims: Shims, exchange: Exchange, limits: Limits) -> None:
        """`folder` is that of the bundles."""
        self._folder = folder
        self._shims = shims
        self._limits = limits
        exchange.watch(topics.TASK_EXIT, self._saw_exit)

    async def explain(self, request: pb.ExplainRequest, context: Context) -> pb.ExplainResponse:
        """What became of a process."""
        shim = await self._shims.get(require_namespace(context), request.container_id)
        state = await shim.state(self._limits.state, request.exec_id)
        if state.status != STOPPED:
            return pb.ExplainResponse(pid=state.pid)
        kept = _exit(shim.bundle, request.exec_id)
        if kept is None:  # a stranger's shim
            return pb.ExplainResponse(
                exited=True, pid=state.pid, exit_status=state.exit_status, exited_at=state.exited_at
            )
        return pb.ExplainResponse(
            exited=True,
            pid=kept.pid,
            exit_status=kept.exit_status,
            exited_at=timestamp(kept.exited_at_ns),
            reason=kept.reason,
        )

    async def attach(self, request: pb.AttachRequest, context: Context) -> Empty:
        """Copy a process's output to FIFOs, too."""
        shim = await self._shims.get(require_namespace(context), request.container_id)
        if shim.launch.binary and not request.exec_id:
            await foreign_logs.ask(shim.bundle, do="attach", stdout=request.stdout, stderr=request.stderr)
            return Empty()
        asked = task_v2_pb2.ExecProcessRequest(
            id=request.container_id, exec_id=request.exec_id, stdout=request.stdout, stderr=request.stderr
        )
        return await shim.call("Attach", asked, Empty, service=_STREAMS)

    async def reopen_log(self, request: pb.ReopenLogRequest, context: Context) -> Empty:
        """Let a log go on in the file that has its path now."""
        shim = await self._shims.get(require_namespace(context), request.container_id)
        if shim.launch.binary and not request.exec_id:
            await foreign_logs.ask(shim.bundle, do="reopen")
            return Empty()
        asked = task_v2_pb2.StateRequest(id=request.container_id, exec_id=request.exec_id)
        return await shim.call("ReopenLog", asked, Empty, service=_STREAMS)

    def _saw_exit(self, envelope: Envelope) -> None:
        event = events_pb2.TaskExit.FromString(envelope.event.value)
        if event.exit_status != SIGKILLED:
            return
        exec_id = event.id if event.id != event.container_id else ""
        kept = _exit(Bundle(self._folder, envelope.namespace, event.container_id), exec_id)
        if kept is not None and kept.reason:
            log.warning(
                "process was killed", namespace=envelope.namespace, id=event.container_id, exec_id=exec_id,
                pid=kept.pid, reason=kept.reason,
            )  # fmt: skip


def reason_of(folder: str, namespace: str, identity: str) -> str:
    """Why the first process of a container was killed, as its shim noted it in the bundle below `folder`; or ""."""
    kept = _exit(Bundle(folder, namespace, identity), "")
    return kept.reason if kept is not None else ""


def _exit(bundle: Bundle, exec_id: str) -> NotedExit | None:
    return next((end for end in bundle.exits() if end.exec_id == exec_id), None)
