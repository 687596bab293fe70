"""What stands between `kubectl` and a node: as much of an API server and of a kubelet as its streams need.

One pod, `box` in `default`. A request for a stream is made by CRI, and its connection handed to the node's streaming
server byte by byte, so that kubectl and that server speak with each other.
"""

from __future__ import annotations

import contextlib
import json
import select
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.cri.kubelet import ContainerdLab, WherryLab

_RESOURCES = {
    "kind": "APIResourceList",
    "groupVersion": "v1",
    "resources": [{"name": "pods", "singularName": "", "namespaced": True, "kind": "Pod", "verbs": ["get"]}],
}


class Relay:
    """Streams of one container in one pod."""

    def __init__(self, lab: WherryLab | ContainerdLab, pod: str, container: str, config: Any) -> None:
        self.lab = lab
        self.pod = pod
        self.container = container
        self.config = config
        relay = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                path = urlsplit(self.path).path
                known: dict[str, Any] = {
                    "/api": {"kind": "APIVersions", "versions": ["v1"]},
                    "/apis": {"kind": "APIGroupList", "apiVersion": "v1", "groups": []},
                    "/api/v1": _RESOURCES,
                    "/api/v1/namespaces/default/pods/box": relay.described(),
                }
                body = json.dumps(known.get(path, {"kind": "Status", "status": "Failure", "code": 404})).encode()
                self.send_response(200 if path in known else 404)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_POST(self) -> None:
                self.close_connection = True
                relay.join(self.connection, self.path, str(self.headers))

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002
                """Not on stderr."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def described(self) -> dict[str, Any]:
        """The pod, as the API has it."""
        fields = {"tty": self.config.tty, "stdin": self.config.stdin, "stdinOnce": self.config.stdin_once}
        return {
            "kind": "Pod",
            "apiVersion": "v1",
            "metadata": {"name": "box", "namespace": "default"},
            "spec": {"containers": [{"name": "box", **fields}]},
            "status": {"phase": "Running", "containerStatuses": [{"name": "box", "ready": True}]},
        }

    def url(self, path: str) -> str:
        """Where the node serves what is asked for."""
        parts = urlsplit(path)
        asked = parse_qs(parts.query)
        kind = parts.path.rpartition("/")[2]
        if kind == "portforward":
            return str(self.lab.kubelet.PortForward(pod_sandbox_id=self.pod).url)
        wanted = {name: asked.get(name) == ["true"] for name in ("stdin", "stdout", "stderr", "tty")}
        if kind == "attach":
            return str(self.lab.kubelet.Attach(container_id=self.container, **wanted).url)
        return str(self.lab.kubelet.Exec(container_id=self.container, cmd=asked["command"], **wanted).url)

    def join(self, client: socket.socket, path: str, headers: str) -> None:
        """Hand a connection over."""
        url = urlsplit(self.url(path))
        with socket.create_connection((url.hostname, url.port)) as server:
            server.sendall(f"POST {url.path} HTTP/1.1\r\n".encode() + headers.strip().replace("\n", "\r\n").encode())
            server.sendall(b"\r\n\r\n")
            pair = {client: server, server: client}
            with contextlib.suppress(OSError):
                while True:
                    for source in select.select(list(pair), [], [], 60)[0]:
                        data = source.recv(65536)
                        if not data:
                            return
                        pair[source].sendall(data)

    def close(self) -> None:
        """Listen no more."""
        self._server.shutdown()
        self._server.server_close()


@contextlib.contextmanager
def relayed(lab: WherryLab | ContainerdLab, pod: str, container: str, config: Any) -> Iterator[Relay]:
    """A relay for the time of a block."""
    relay = Relay(lab, pod, container, config)
    try:
        yield relay
    finally:
        relay.close()
