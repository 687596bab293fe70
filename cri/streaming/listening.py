"""The streaming server: HTTP on loopback, `/exec/TOKEN`, `/attach/TOKEN`, `/portforward/TOKEN`."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from dataclasses import dataclass
from typing import Any, Final

import structlog
from aiohttp import web

from wherry.core.errors import Unavailable
from wherry.cri.streaming import ports_websocket, remote_spdy, remote_websocket
from wherry.cri.streaming.carrier import Raw
from wherry.cri.streaming.front import Front, Head, answer
from wherry.cri.streaming.ports import Netns
from wherry.cri.streaming.ports_spdy import PROTOCOL, PortForward
from wherry.cri.streaming.remote import PORTS, VERSIONS, Call, Run
from wherry.cri.streaming.remote_spdy import CREATION
from wherry.cri.streaming.spdy_connection import SpdyConnection
from wherry.cri.streaming.tokens import Tokens

log = structlog.get_logger(__name__)

_VERSION: Final = "X-Stream-Protocol-Version"
_ACCEPTED: Final = "X-Accepted-Stream-Protocol-Versions"
# bytes of one message of a WebSocket's client, which sends 32 KiB at a time
_MAX_MESSAGE: Final = 16 << 20
# seconds between the pings that keep a WebSocket (and find out that nobody is there)
_HEARTBEAT: Final = 30.0
# connections at once; a token lets one in, whoever has none gets an answer and is gone
_BACKLOG: Final = 128


@dataclass(frozen=True)
class Listening:
    """Where the server listens. `idle`: seconds without traffic after which a stream is ended, 0: never.

    `creation`: seconds that an SPDY client may take to open its streams.
    """

    address: str = "127.0.0.1"
    port: int = 0
    idle: float = 4 * 3600.0
    tls: ssl.SSLContext | None = None
    creation: float = CREATION


class StreamServer:
    """One server. `runner` does exec and attach, `netns` finds a pod's network namespace."""

    def __init__(self, listening: Listening, tokens: Tokens, runner: Run, netns: Netns) -> None:
        self._listening = listening
        self._tokens = tokens
        self._runner = runner
        self._netns = netns
        self._server: asyncio.Server | None = None
        self._web = web.Server(self._handle, access_log=None)
        self._waiting: set[asyncio.BaseTransport] = set()
        self._serving: set[asyncio.Task[Any]] = set()
        self.base = ""
        """Scheme, host and port."""

    async def start(self) -> None:
        """Listen. Raises Unavailable."""
        here = self._listening
        loop = asyncio.get_running_loop()
        try:
            self._server = await loop.create_server(
                lambda: Front(self._upgrade, self._web, self._waiting),
                here.address,
                here.port,
                ssl=here.tls,
                backlog=_BACKLOG,
            )
        except OSError as error:
            raise Unavailable(f"the streaming server can't listen on {here.address}:{here.port}: {error}") from error
        host, port = self._server.sockets[0].getsockname()[:2]
        name = f"[{host}]" if ":" in host else host
        self.base = f"{'https' if here.tls is not None else 'http'}://{name}:{port}"
        log.info("streaming server", address=self.base)

    def url(self, call: Call) -> str:
        """An address at which a call can be made, once. Raises ResourceExhausted."""
        return f"{self.base}/{call.kind}/{self._tokens.put(call)}"

    async def close(self) -> None:
        """Stop listening and end what streams; processes go on."""
        if self._server is not None:
            self._server.close()
        for transport in list(self._waiting):
            transport.close()
        for task in list(self._serving):
            task.cancel()
        if self._serving:
            await asyncio.wait(self._serving, timeout=5)
        await self._web.shutdown(timeout=5)

    def _call(self, path: str) -> Call | None:
        _, kind, token, *rest = [*path.partition("?")[0].split("/"), "", ""]
        if any(rest[:-2]) or not token:
            return None
        call = self._tokens.take(token)
        return call if call is not None and call.kind == kind else None

    # -- SPDY ------------------------------------------------------------------------------------------------------

    def _upgrade(self, transport: asyncio.Transport, head: Head, first: bytes) -> None:
        call = self._call(head.target)
        if call is None:
            answer(transport, 404, "Not Found", "404 page not found")
            return
        if head.method not in ("GET", "POST"):
            answer(transport, 405, "Method Not Allowed", "a stream is asked for by POST or GET", "Allow: GET, POST")
            return
        if "upgrade" not in [word.lower() for word in head.words("connection")]:
            answer(transport, 400, "Bad Request", "unable to upgrade: missing upgrade headers in request")
            return
        ours = [PROTOCOL] if call.kind == PORTS else list(VERSIONS)
        theirs = head.words(_VERSION.lower())
        if not theirs:
            answer(transport, 400, "Bad Request", f"unable to upgrade: {_VERSION} is required")
            return
        chosen = next((name for name in theirs if name in ours), "")
        if not chosen:
            text = f"unable to upgrade: unable to negotiate protocol: client supports {theirs}, server accepts {ours}"
            answer(transport, 403, "Forbidden", text, *(f"{_ACCEPTED}: {name}" for name in ours))
            return
        lines = [
            "HTTP/1.1 101 Switching Protocols",
            "Connection: Upgrade",
            "Upgrade: SPDY/3.1",
            f"{_VERSION}: {chosen}",
        ]
        transport.write("\r\n".join(lines).encode() + b"\r\n\r\n")
        connection = SpdyConnection(Raw(transport, first), self._listening.idle)
        if call.kind == PORTS:
            self._spawn(PortForward(connection, call, self._netns, self._listening.creation).serve())
        else:
            version = VERSIONS[chosen]
            self._spawn(remote_spdy.serve(connection, call, version, self._runner, self._listening.creation))

    def _spawn(self, coroutine: Any) -> None:
        task = asyncio.create_task(coroutine)
        self._serving.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._serving.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a stream ended with a bug", error=repr(error), exc_info=error)

    # -- everything else -------------------------------------------------------------------------------------------

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        call = self._call(request.path)
        if call is None:
            return _plain(404, "404 page not found")
        if request.headers.get("Upgrade", "").lower() != "websocket":
            return _plain(400, "unable to upgrade: missing upgrade headers in request")
        asked = [name.strip() for name in request.headers.get("Sec-WebSocket-Protocol", "").split(",") if name.strip()]
        ours = (
            [ports_websocket.TUNNEL, *ports_websocket.PROTOCOLS] if call.kind == PORTS else remote_websocket.PROTOCOLS
        )
        chosen = next((name for name in asked if name in ours), None) if asked else ""
        if chosen is None:
            return _plain(403, f"requested protocol(s) are not supported: {asked}; supports {[*filter(None, ours)]}")
        socket = web.WebSocketResponse(
            protocols=(chosen,) if chosen else (), heartbeat=_HEARTBEAT, max_msg_size=_MAX_MESSAGE, compress=False
        )
        try:
            await socket.prepare(request)
        except web.HTTPException as error:
            return _plain(400, f"unable to upgrade: {error.text}")
        except ConnectionError:
            return socket
        task = asyncio.current_task()
        if task is not None:
            self._serving.add(task)
        try:
            with contextlib.suppress(ConnectionError):
                await self._serve_websocket(socket, call, chosen)
        finally:
            if task is not None:
                self._serving.discard(task)
        return socket

    async def _serve_websocket(self, socket: web.WebSocketResponse, call: Call, protocol: str) -> None:
        if protocol == ports_websocket.TUNNEL:
            await ports_websocket.serve_tunnel(socket, call, self._netns, self._listening.idle)
        elif call.kind == PORTS:
            await ports_websocket.serve(socket, call, protocol, self._netns, self._listening.idle)
        else:
            await remote_websocket.serve(socket, call, protocol, self._runner, self._listening.idle)


def _plain(status: int, text: str) -> web.Response:
    answer = web.Response(status=status, text=text + "\n", headers={"X-Content-Type-Options": "nosniff"})
    answer.force_close()
    return answer
