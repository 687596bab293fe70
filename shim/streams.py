"""`wherry.shim.v1.Streams`: a log that is rotated, and clients that join a process's output.

Its messages are some of the task API's, so that shims have no others in their memory (`proto/wherry_shim.proto`).
"""

from __future__ import annotations

from typing import Final

from google.protobuf.empty_pb2 import Empty

from wherry.proto import task_v2_pb2
from wherry.shim.server import Handler, Services
from wherry.shim.task import TaskService

SERVICE: Final = "wherry.shim.v1.Streams"


class StreamService:
    """The streams of the containers of one shim."""

    def __init__(self, tasks: TaskService) -> None:
        self._tasks = tasks

    def services(self) -> Services:
        """The handlers under the service's name."""
        return {
            SERVICE: {
                "Attach": Handler(task_v2_pb2.ExecProcessRequest, self.attach),
                "ReopenLog": Handler(task_v2_pb2.StateRequest, self.reopen_log),
            }
        }

    async def attach(self, request: task_v2_pb2.ExecProcessRequest) -> Empty:
        """Copy a process's output to the FIFOs `stdout` and `stderr`, beside where it goes."""
        io = self._tasks.process(request.id, request.exec_id).io
        io.attach(request.stdout, request.stderr)
        return Empty()

    async def reopen_log(self, request: task_v2_pb2.StateRequest) -> Empty:
        """Go on in the file that now has the log's path."""
        self._tasks.process(request.id, request.exec_id).io.reopen_log()
        return Empty()
