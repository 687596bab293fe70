"""Publishes what happens to the daemon, in order, however long the daemon is away.

One `Forward` call is on its way at a time: the daemon's handlers run side by side, and two at once could overtake each
other. An event that was sent but not confirmed when the connection broke is sent again; subscribers may see it twice,
never not at all.
"""

from __future__ import annotations

import os
import socket
import time
from collections import deque
from typing import TYPE_CHECKING, Final

from google.protobuf.message import Message

from wherry.core import topics, typeurl
from wherry.core.errors import Code
from wherry.core.failpoints import reach
from wherry.proto import events_pb2, events_ttrpc_pb2, types_pb2
from wherry.proto.ttrpc.frames import Answer, ClientConnection, ProtocolError
from wherry.proto.ttrpc.sockets import MAX_PATH
from wherry.shim.log import log
from wherry.shim.loop import DEFAULT_SIGNALS

if TYPE_CHECKING:
    from wherry.shim.loop import Children, Future, Loop, Timer

TOPICS: Final[dict[type[Message], str]] = {
    events_pb2.TaskCreate: topics.TASK_CREATE,
    events_pb2.TaskStart: topics.TASK_START,
    events_pb2.TaskExit: topics.TASK_EXIT,
    events_pb2.TaskDelete: topics.TASK_DELETE,
    events_pb2.TaskOOM: topics.TASK_OOM,
    events_pb2.TaskExecAdded: topics.TASK_EXEC_ADDED,
    events_pb2.TaskExecStarted: topics.TASK_EXEC_STARTED,
    events_pb2.TaskPaused: topics.TASK_PAUSED,
    events_pb2.TaskResumed: topics.TASK_RESUMED,
    events_pb2.TaskCheckpointed: topics.TASK_CHECKPOINTED,
}
# these are never dropped; of the others the oldest go when so many wait (containerd's queueSize)
KEPT: Final = frozenset({topics.TASK_EXIT, topics.TASK_OOM, topics.TASK_DELETE})
MAX_QUEUED: Final = 2048
# seconds between attempts while the daemon is away: doubling from the first to the last
FIRST_RETRY, LAST_RETRY = 0.05, 2.0
# how long the daemon may take to confirm one event (containerd's publisher allows 5 s)
CONFIRM: Final = 5.0
# refused, and the same the next time
_HOPELESS: Final = frozenset({Code.INVALID_ARGUMENT, Code.UNIMPLEMENTED, Code.PERMISSION_DENIED})
_STREAM: Final = int(socket.SOCK_STREAM) | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
_NAMESPACE: Final = "containerd-namespace-ttrpc"
_SERVICE: Final = "containerd.services.events.ttrpc.v1.Events"


class Publisher:
    """The queue of events and the connection they go out on."""

    def __init__(self, loop: Loop, children: Children) -> None:
        self._loop = loop
        self._children = children
        self._namespace = ""
        self._path = ""
        self._binary = ""
        self._grpc_address = ""
        self.queue: deque[tuple[str, bytes]] = deque()
        """Topics and serialized envelopes that wait, the first one perhaps on its way."""
        self._socket = -1
        self._protocol = ClientConnection()
        self._out = b""
        self._sent_at: int = 0
        self._timer: Timer | None = None
        self._delay = FIRST_RETRY
        self._running = False
        self._emptied: list[Future[None]] = []

    def address(self, namespace: str, address: str, *, binary: str = "", grpc_address: str = "") -> None:
        """Where events go: `address` is the daemon's ttrpc socket; where it is "" the `publish` command of `binary` is
        run for each event (daemons that don't say where they listen). With neither, events are dropped."""
        self._namespace = namespace
        self._path = address.removeprefix("unix://")
        self._binary = binary
        self._grpc_address = grpc_address

    def publish(self, event: Message) -> None:
        """Queue an event (one of `TOPICS`), with the time as it is now."""
        if not self._path and not self._binary:
            return
        topic = TOPICS[type(event)]
        envelope = types_pb2.Envelope(namespace=self._namespace, topic=topic)
        envelope.timestamp.FromNanoseconds(time.time_ns())
        envelope.event.CopyFrom(typeurl.pack(event))
        if len(self.queue) >= MAX_QUEUED:
            self._make_room()
        self.queue.append((topic, envelope.SerializeToString()))
        if self._timer is None:
            self._go_on()

    def _make_room(self) -> None:
        for index, (topic, _) in enumerate(self.queue):
            # the first one may be on its way
            if index and topic not in KEPT:
                del self.queue[index]
                return

    def retry_now(self) -> None:
        """The daemon showed itself: don't wait for the next attempt."""
        if self.queue and self._timer is not None and not self._sent_at:
            self._timer.cancel()
            self._timer = None
            self._go_on()

    def emptied(self) -> Future[None]:
        """Settled once nothing waits to be published any more."""
        future: Future[None] = self._loop.future()
        if self.queue:
            self._emptied.append(future)
        else:
            future.set(None)
        return future

    # -- sending ---------------------------------------------------------------------------------------------------

    def _go_on(self) -> None:
        self._timer = None
        if not self.queue:
            waiting, self._emptied = self._emptied, []
            for future in waiting:
                future.set(None)
            return
        if not self._path:
            self._run_binary()
            return
        if self._socket < 0 and not self._connect():
            self._again()
            return
        if not self._sent_at:
            self._send()

    def _connect(self) -> bool:
        # the C type: the class around it is of no use for a connection that is a descriptor from here on
        sock = socket.SocketType(socket.AF_UNIX, _STREAM)
        try:
            # a unix socket connects at once, or says EAGAIN when the backlog is full
            if len(os.fsencode(self._path)) <= MAX_PATH:
                sock.connect(self._path)
            else:
                folder, name = os.path.split(self._path)
                fd = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
                try:
                    sock.connect(f"/proc/self/fd/{fd}/{name}")
                finally:
                    os.close(fd)
        except OSError:
            sock.close()
            return False
        self.connected(sock.detach())
        return True

    def connected(self, fd: int) -> None:
        """Send over this connection, a non-blocking socket's descriptor that is the publisher's from now on."""
        self._socket = fd
        self._protocol = ClientConnection()
        self._loop.on_read(fd, self._readable)

    def _send(self) -> None:
        request = events_ttrpc_pb2.ForwardRequest()
        request.envelope.ParseFromString(self.queue[0][1])
        self._sent_at, self._out = self._protocol.call(
            _SERVICE,
            "Forward",
            request.SerializeToString(),
            timeout_nano=int(CONFIRM * 1e9),
            metadata={_NAMESPACE: self._namespace},
        )
        self._timer = self._loop.later(CONFIRM, self._lost)
        self._writable()
        reach("shim.event.sent")

    def _writable(self) -> None:
        if self._socket < 0:
            return
        try:
            sent = os.write(self._socket, self._out)
        except BlockingIOError:
            sent = 0
        except OSError:
            self._lost()
            return
        self._out = self._out[sent:]
        self._loop.on_write(self._socket, self._writable if self._out else None)

    def _readable(self) -> None:
        if self._socket < 0:
            return
        try:
            data = os.read(self._socket, 65536)
            answers = self._protocol.receive(data) if data else None
        except BlockingIOError:
            return
        except (OSError, ProtocolError):
            answers = None
        if answers is None:
            self._lost()
            return
        for answer in answers:
            if isinstance(answer, Answer) and answer.stream_id == self._sent_at:
                self._confirmed(answer)

    def _confirmed(self, answer: Answer) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._sent_at = 0
        if answer.code:
            log("error", f"forward event: {answer.message}", topic=self.queue[0][0])
            if answer.code not in _HOPELESS:
                self._again()
                return
        self._delay = FIRST_RETRY
        reach("shim.event.confirmed")
        self.queue.popleft()
        self._go_on()

    def _lost(self) -> None:
        """The connection is of no use any more; what was sent and not confirmed is still first in the queue."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._sent_at = 0
        self._out = b""
        if self._socket >= 0:
            self._loop.forget(self._socket)
            os.close(self._socket)
            self._socket = -1
        if self.queue:
            self._again()

    def _again(self) -> None:
        self._timer = self._loop.later(self._delay, self._go_on)
        self._delay = min(self._delay * 2, LAST_RETRY)

    # -- the publish command ---------------------------------------------------------------------------------------

    def _run_binary(self) -> None:
        if self._running:
            return
        topic, data = self.queue[0]
        event = types_pb2.Envelope.FromString(data).event.SerializeToString()
        command = [self._binary, "--address", self._grpc_address, "publish", "--topic", topic]
        command += ["--namespace", self._namespace]
        read, write = os.pipe2(os.O_CLOEXEC)
        try:
            # an event is a few hundred bytes, a pipe holds 64 kB
            os.write(write, event)
            with self._children:
                pid = os.posix_spawn(
                    self._binary,
                    command,
                    os.environ,
                    file_actions=[(os.POSIX_SPAWN_DUP2, read, 0)],
                    setsigdef=DEFAULT_SIGNALS,
                )
                ended = self._children.exited(pid)
        except OSError as error:
            log("error", f"publish command: {error}", topic=topic)
            self._again()
            return
        finally:
            os.close(read)
            os.close(write)
        self._running = True

        def done() -> None:
            self._running = False
            if ended.result().status == 0:
                self.queue.popleft()
                self._delay = FIRST_RETRY
                self._go_on()
            else:
                self._again()

        ended.add_callback(done)

    def close(self) -> None:
        """Give up what is left and close the connection."""
        self.queue.clear()
        self._lost()
