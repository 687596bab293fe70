"""Logs in Kubernetes' format under shims of other projects, which write none: a program of ours does (`binary://`).

It is `wherry.shim.crilogger`, a process for each container that ends with its streams, so that the log goes on while no
daemon runs; it listens at `BUNDLE/cri-log.sock`.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from typing import Final
from urllib.parse import parse_qs, quote, unquote

from wherry.core import container_logs
from wherry.core.errors import DeadlineExceeded, FailedPrecondition
from wherry.daemon.bundle import Bundle
from wherry.proto.ttrpc import sockets

_SOCKET: Final = "cri-log.sock"
# seconds; what is asked for takes no time
_LIMIT: Final = 10.0


def uri_of(uri: str, bundle: Bundle, stdin: str = "") -> str:
    """What another project's shim is told in place of a log of ours; other URIs as they are.

    `stdin` is the FIFO of the container's input, which the program holds open.
    """
    if not uri.startswith(f"{container_logs.CRI}://"):
        return container_logs.plain_of(uri)
    path, _, query = uri.partition("://")[2].partition("?")
    limit = int(parse_qs(query).get("max-line", ["0"])[0])
    arguments = f"{unquote(path)!r}, {limit}, {os.path.join(bundle.path, _SOCKET)!r}, {stdin!r}"
    code = f"from wherry.shim.crilogger import main; main({arguments})"
    # one argument and its value: shims put several in any order
    return f"binary://{sys.executable}?-IOOc={quote(code, safe='')}"


async def ask(bundle: Bundle, **request: str) -> None:
    """Ask a container's program to `do` something. Raises FailedPrecondition, Unavailable, DeadlineExceeded."""
    try:
        async with asyncio.timeout(_LIMIT):
            sock = sockets.connect(os.path.join(bundle.path, _SOCKET), timeout=0)
            reader, writer = await asyncio.open_unix_connection(sock=sock)
            try:
                writer.write(json.dumps(request).encode() + b"\n")
                answer = json.loads(await reader.readline() or b'{"error": "its log has ended"}')
            finally:
                writer.close()
    except TimeoutError:
        raise DeadlineExceeded(f"the log of {bundle.id} didn't answer within {_LIMIT:g} s") from None
    if "error" in answer:
        raise FailedPrecondition(str(answer["error"]))
