"""Shims that are somebody else's: the start protocol as containerd speaks it to a binary.

The binary is run with `start` in the bundle and prints where the shim listens: a plain address (containerd 1.6), JSON
(1.7 to 2.2) or a `BootstrapResult` (2.3). When the shim died it is run with `delete`.

What it reads changed with 2.3, from the options in an `Any` to `BootstrapParams`, and no shim tells beforehand which of
them it reads: an `Any` even parses as the other. Shims of before are the many, so they are asked in the old way first;
one of after refuses that before it does anything and says so, and is asked in the new way.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import DecodeError

from wherry.core import errors
from wherry.proto import bootstrap_pb2, task_v2_pb2

# what the daemon tells a shim at most to answer with, and what ours answers (containerd's CurrentShimVersion)
TASK_API_VERSION: Final = 3
# the `delete` action kills and unmounts; containerd gives it 5 s (io.containerd.timeout.shim.cleanup)
DELETE_TIMEOUT: Final = 10.0
# the start action of a stranger's shim is an exec and an exec again, on a loaded machine
FOREIGN_START_TIMEOUT: Final = 30.0
# whose start protocol it is that we speak
_CONTAINERD_VERSION: Final = "2.3.0"


@dataclass(frozen=True, slots=True)
class Bootstrap:
    """How to reach a shim: what the daemon keeps in `bootstrap.json` beside the bundle.

    `address` is `unix:///path`, `protocol` "ttrpc" or "grpc", `version` of the task API 2 or 3; `pid` 0 where the start
    protocol doesn't tell it (a stranger's shim).
    """

    address: str
    protocol: str = "ttrpc"
    version: int = TASK_API_VERSION
    pid: int = 0

    @property
    def path(self) -> str:
        """The socket's path without `unix://`."""
        return self.address.removeprefix("unix://")


@dataclass(frozen=True, slots=True)
class ForeignShim:
    """How a shim binary is called (containerd's `pkg/shim/util.go:Command`).

    `binary` is an absolute path; `publish_binary` a program that the shim may call as
    `BINARY --address ADDRESS publish --topic TOPIC --namespace NAMESPACE` with an `Any` on its stdin.
    """

    binary: str
    namespace: str
    id: str
    bundle: str
    grpc_address: str
    ttrpc_address: str
    publish_binary: str = ""
    debug: bool = False
    env: Mapping[str, str] = field(default_factory=dict)

    @property
    def publisher(self) -> str:
        """The program that publishes events."""
        return self.publish_binary or sys.argv[0]

    def arguments(self, action: str) -> list[str]:
        """The command line for the action "start" or "delete"."""
        command = [self.binary, "-namespace", self.namespace, "-address", self.grpc_address]
        command += ["-publish-binary", self.publisher, "-id", self.id]
        if action == "delete":
            command += ["-bundle", self.bundle]
        if self.debug:
            command.append("-debug")
        return [*command, action]

    def environment(self) -> dict[str, str]:
        """The daemon's environment with what shims look for in it."""
        return {
            **os.environ,
            "GOMAXPROCS": "2",  # fewer stacks in a Go shim
            "MAX_SHIM_VERSION": str(TASK_API_VERSION),
            "TTRPC_ADDRESS": self.ttrpc_address,
            "GRPC_ADDRESS": self.grpc_address,
            "NAMESPACE": self.namespace,
            **self.env,
        }


class ShimLog:
    """The reading end of `BUNDLE/log`, the FIFO that a stranger's shim writes its log to.

    A shim opens it for writing and waits for a reader, so open this before the `start` action, and again when the
    daemon comes back. `sink` gets whole lines without their newline.
    """

    def __init__(self, bundle: str, sink: Callable[[str], None]) -> None:
        path = os.path.join(bundle, "log")
        with contextlib.suppress(FileExistsError):
            os.mkfifo(path, 0o700)
        # for reading and writing: never at its end, whoever comes and goes
        self._fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        self._sink = sink
        self._rest = b""
        asyncio.get_running_loop().add_reader(self._fd, self._read)

    def _read(self) -> None:
        try:
            data = os.read(self._fd, 65536)
        except BlockingIOError:
            return
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > 65536:  # no newline in so much: not a log, don't hoard it
            lines, self._rest = [*lines, self._rest], b""
        for line in lines:
            self._sink(line.decode(errors="replace"))

    def close(self) -> None:
        """Stop reading."""
        if self._fd >= 0:
            asyncio.get_running_loop().remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1


async def start_foreign_shim(
    shim: ForeignShim, options: AnyMessage | None = None, *, within: float = FOREIGN_START_TIMEOUT
) -> Bootstrap:
    """Run a shim's `start` action in its bundle and return where it listens.

    `options` is the runtime's options as the container has them, serialized on the shim's stdin. Open a `ShimLog` on
    the bundle first. Raises Unavailable with what the shim said, NotFound when there is no such binary.
    """
    stdin = options.SerializeToString() if options is not None else b""
    command = shim.arguments("start")
    try:
        output = await _run(shim.binary, command, shim, stdin, within, merge=True)
    except errors.Unavailable as error:
        if not wants_bootstrap(error.message):
            raise
        output = await _run(shim.binary, command, shim, bootstrap_params(shim, options), within, merge=True)
    return parse_start_response(output)


def wants_bootstrap(said: str) -> bool:
    """Whether a shim's refusal to start means that it reads `BootstrapParams` alone (containerd 2.3.4 and later)."""
    return "bootstrap" in said.lower()


def bootstrap_params(shim: ForeignShim, options: AnyMessage | None) -> bytes:
    """What a shim of containerd 2.3 reads from its stdin."""
    params = bootstrap_pb2.BootstrapParams(
        instance_id=shim.id,
        namespace=shim.namespace,
        log_level=bootstrap_pb2.LOG_LEVEL_DEBUG if shim.debug else bootstrap_pb2.LOG_LEVEL_INFO,
        containerd_version=_CONTAINERD_VERSION,
        containerd_ttrpc_address=shim.ttrpc_address,
        containerd_grpc_address=shim.grpc_address,
        containerd_binary=shim.publisher,
    )
    if options is not None and options.type_url:
        params.extensions.add(value=options)
    return params.SerializeToString()


async def delete_shim(shim: ForeignShim, *, within: float = DELETE_TIMEOUT) -> task_v2_pb2.DeleteResponse:
    """Run a shim's `delete` action, which cleans up after a shim that died. Raises as `start_foreign_shim`."""
    output = await _run(shim.binary, shim.arguments("delete"), shim, b"", within, merge=False)
    try:
        return task_v2_pb2.DeleteResponse.FromString(output)
    except DecodeError:
        raise errors.Unavailable(f"{shim.binary} delete: answered no DeleteResponse: {output[:200]!r}") from None


def parse_start_response(output: bytes) -> Bootstrap:
    """What a shim's `start` action printed: a plain address, JSON or a `BootstrapResult`.

    Raises InvalidArgument for anything else, Unimplemented for a task API newer than 3.
    """
    text = output.strip()
    bootstrap = _from_json(text) or _from_protobuf(output) or _from_address(text)
    if bootstrap is None:
        raise errors.InvalidArgument(f"the shim's start action printed no address: {text[:200]!r}")
    if bootstrap.version > TASK_API_VERSION:
        raise errors.Unimplemented(f"unsupported shim version ({bootstrap.version})")
    if bootstrap.protocol.lower() not in ("ttrpc", "grpc"):
        raise errors.InvalidArgument(f'unexpected protocol: "{bootstrap.protocol}"')
    return bootstrap


def _from_json(text: bytes) -> Bootstrap | None:
    try:
        value = json.loads(text)
        if not isinstance(value, dict) or int(value.get("version", 0)) < 2:
            return None
        return Bootstrap(str(value["address"]), str(value.get("protocol", "ttrpc")), int(value["version"]))
    except (ValueError, KeyError, TypeError):
        return None


def _from_protobuf(output: bytes) -> Bootstrap | None:
    # a plain address never parses as a result with a version and an address: "unix" as a tag has no valid wire type
    try:
        result = bootstrap_pb2.BootstrapResult.FromString(output)
    except DecodeError:
        return None
    if result.version < 2 or not result.address:
        return None
    return Bootstrap(result.address, result.protocol or "ttrpc", result.version)


def _from_address(text: bytes) -> Bootstrap | None:
    # containerd takes the whole output as the address of a version 2 shim
    try:
        address = text.decode()
    except UnicodeDecodeError:
        return None
    if not address or "\n" in address or address.startswith("{"):
        return None
    return Bootstrap(address, "ttrpc", 2)


async def _run(
    binary: str, command: Sequence[str], shim: ForeignShim, stdin: bytes, within: float, *, merge: bool
) -> bytes:
    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            cwd=shim.bundle,
            env=shim.environment(),
        )
    except FileNotFoundError as error:
        raise errors.NotFound(f"shim {binary} not found: {error}") from error
    except OSError as error:
        raise errors.Unavailable(f"shim {binary} can't be started: {error}") from error
    try:
        async with asyncio.timeout(within):
            out, err = await process.communicate(stdin)
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        raise errors.DeadlineExceeded(f"{' '.join(command)}: no answer within {within:.0f} s") from None
    if process.returncode != 0:
        said = (err + out if merge else err).decode(errors="replace").strip()
        raise errors.Unavailable(f"{os.path.basename(binary)} {command[-1]}: exit status {process.returncode}: {said}")
    return out
