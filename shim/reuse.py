"""`wherry.shim.v1.Reuse`: a shim whose container is gone becomes the next one's.

    daemon                                shim
      │  (the container was deleted)        │
      │  Vacate                             │
      ├────────────────────────────────────>│ what is to be told was told: no socket, folder, log, name any more
      │  Occupy(words of a spawn)           │
      ├────────────────────────────────────>│ folder, log, socket, name of the next container
      │  Create, …                          │

The fork, the memory that a process writes to for the first time, and its end are half of what a short container costs.
A vacant shim is reached by one connection only, the daemon's, and ends with it: it never meets a newer daemon.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from google.protobuf.empty_pb2 import Empty
from google.protobuf.wrappers_pb2 import BytesValue

from wherry.core.errors import FailedPrecondition
from wherry.core.failpoints import reach
from wherry.proto.ttrpc import sockets
from wherry.shim.birth import bind, own_streams, parameters_of, show
from wherry.shim.server import Handler, Services
from wherry.shim.words import REUSE, ShimWords, split

if TYPE_CHECKING:
    from wherry.shim.serving import Life


class ReuseService:
    """One container after the other in one process."""

    def __init__(self, life: Life) -> None:
        self._life = life

    def services(self) -> Services:
        """The handlers under the service's name."""
        return {REUSE: {"Vacate": Handler(Empty, self.vacate), "Occupy": Handler(BytesValue, self.occupy)}}

    async def vacate(self, request: Empty) -> Empty:
        """Forget the container, once the daemon has confirmed all that is told of it."""
        life = self._life
        await life.publisher.emptied()
        reach("shim.vacate.emptied")
        if not life.can_vacate:
            raise FailedPrecondition("the shim is in use: failed precondition")
        life.vacate()
        reach("shim.vacate.done")
        return Empty()

    async def occupy(self, request: BytesValue) -> Empty:
        """Be another container's shim."""
        life = self._life
        if not life.vacant:
            raise FailedPrecondition("the shim is in use: failed precondition")
        reach("shim.occupy.asked")
        words = ShimWords(*split(request.value))
        parameters = parameters_of(words)
        own_streams(parameters.bundle, words.log_level)
        try:
            listener = bind(parameters.socket)
        except OSError:  # a file that nobody listens on is there, or the path is too long for the short way
            listener = sockets.bind(parameters.socket, replace=True)
        try:
            show(parameters)
        except BaseException:
            listener.close()
            os.unlink(parameters.socket)
            raise
        reach("shim.occupy.bound")
        life.occupy(listener, parameters)
        return Empty()
