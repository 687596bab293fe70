"""Clients of streaming servers that nobody here wrote: npm's spdy-transport and ws, driven by small scripts."""

from __future__ import annotations

import base64
import json
import os
import subprocess
from pathlib import Path
from typing import Any

from tests.npm import modules
from tests.peers import need

PEERS = Path(__file__).parent / "peers"


def _run(script: str, modules_in: Path, asked: dict[str, Any]) -> dict[str, Any]:
    done = subprocess.run(
        [need("node"), str(PEERS / script)],
        input=json.dumps(asked).encode(),
        capture_output=True,
        timeout=60,
        env={**os.environ, "NODE_PATH": str(modules_in / "node_modules")},
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def wish(
    kind: str, send: bytes = b"", *, fin: bool = False, wait: str = "", port: int = 0, request: str = ""
) -> dict[str, Any]:
    """A stream that the SPDY client opens; `wait`: what must have come before it sends."""
    headers = {"streamtype": kind}
    if port:
        headers["port"] = str(port)
    if request:
        headers["requestID"] = request
    return {"headers": headers, "send": base64.b64encode(send).decode(), "fin": fin, "wait": wait}


def spdy(
    url: str, protocols: list[str], streams: list[dict[str, Any]], seconds: float = 20, *, lenient: bool = False
) -> dict[str, Any]:
    """What spdy-transport's client got: `status`, `protocol`, `accepted`; `data` by streamtype, `ended` the same."""
    asked = {"url": url, "protocols": protocols, "streams": streams, "seconds": seconds, "lenient": lenient}
    answer = _run("spdy_client.js", modules("spdy-transport"), asked)
    kinds = [stream["headers"]["streamtype"] for stream in streams]
    found = answer.pop("streams")
    answer["all"] = [base64.b64decode(each["data"]) for each in found]
    answer["data"] = dict(zip(kinds, answer["all"], strict=True))
    answer["ended"] = {kind: each["ended"] for kind, each in zip(kinds, found, strict=True)}
    return answer


def websocket(url: str, protocols: list[str], send: list[bytes | str], seconds: float = 20) -> dict[str, Any]:
    """What ws's client got: `status`, `protocol`, `code`; `channels`: the bytes of each, `messages` as they came."""
    messages = [
        {"text": each} if isinstance(each, str) else {"binary": base64.b64encode(each).decode()} for each in send
    ]
    asked = {"url": url, "protocols": protocols, "send": messages, "seconds": seconds}
    answer = _run("websocket_client.js", modules("ws"), asked)
    found = [each["text"] if "text" in each else base64.b64decode(each["binary"]) for each in answer["messages"]]
    answer["messages"] = found
    channels: dict[int, bytes] = {}
    for each in found:
        number, data = (int(each[0]), base64.b64decode(each[1:])) if isinstance(each, str) else (each[0], each[1:])
        channels[number] = channels.get(number, b"") + data
    answer["channels"] = channels
    return answer
