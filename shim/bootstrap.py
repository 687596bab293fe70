"""`containerd-shim-wherry-v1`: the shim from a cold start, as containerd and other strangers call it.

    containerd-shim-wherry-v1 -namespace NS -address SOCK -publish-binary BIN -id ID [-debug] start    in the bundle
    containerd-shim-wherry-v1 … -id ID -bundle DIR delete                                             after it died
    containerd-shim-wherry-v1 -v | -info

`start` prints where the shim listens, in the form that the caller understands: a protobuf `BootstrapResult` where stdin
is `BootstrapParams` for this very id and namespace (containerd 2.3), JSON where the environment has MAX_SHIM_VERSION
(1.7 to 2.2), else the bare address (1.6). Sockets are files with mode 0600, at the place where containerd's shims have
theirs.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import sys
from dataclasses import dataclass, field
from typing import Final

from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import DecodeError

from wherry.core import typeurl
from wherry.core.errors import AlreadyExists, InvalidArgument, WherryError
from wherry.proto import bootstrap_pb2, runc_options_pb2, task_v2_pb2, types_pb2
from wherry.proto.ttrpc import sockets
from wherry.runtime import container as bundled
from wherry.runtime.sealed import ensure_sealed
from wherry.shim.birth import NAME, Parameters
from wherry.shim.cleanup import clean_up
from wherry.shim.log import take_over
from wherry.shim.nursery import detach
from wherry.shim.serving import Life, become_shim, install_signals, raise_oom_score

VERSION: Final = "0.1.0"
# where containerd's shims listen (defaults.DefaultStateDir + "/s")
SOCKET_FOLDER: Final = "/run/containerd/s"
# annotations that name the shim that containers share, the first of them counts (containerd-shim-runc-v2's)
GROUPS: Final = ("io.containerd.runc.v2.group", "io.kubernetes.cri.sandbox-id")
# options are a few hundred bytes; containerd reads at most as much
_STDIN_MAX: Final = 10 << 20
_SWITCHES: Final = frozenset({"debug", "v", "version", "info", "help", "h"})
_VALUES: Final = frozenset({"namespace", "id", "socket", "debug-socket", "bundle", "address", "publish-binary"})


@dataclass(slots=True)
class Flags:
    """The command line: Go's flags (one dash or two, `-name value` or `-name=value`), then the action."""

    values: dict[str, str] = field(default_factory=dict)
    switches: set[str] = field(default_factory=set)
    action: str = ""

    def __getitem__(self, name: str) -> str:
        return self.values.get(name, "")


def parse_flags(arguments: list[str]) -> Flags:
    """Raises InvalidArgument for a flag that isn't one, or has no value."""
    flags = Flags()
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-") or word == "-":
            flags.action = word
            break
        name, equals, value = word.lstrip("-").partition("=")
        if name in _SWITCHES:
            if not equals or value.lower() in {"true", "t", "1"}:
                flags.switches.add(name)
        elif name in _VALUES:
            if not equals:
                if not rest:
                    raise InvalidArgument(f"flag needs an argument: -{name}")
                value = rest.pop(0)
            flags.values[name] = value
        else:
            raise InvalidArgument(f"flag provided but not defined: -{name}")
    return flags


def main() -> None:
    """The command."""
    try:
        flags = parse_flags(sys.argv[1:])
        if flags.switches & {"help", "h"}:
            print((__doc__ or "").strip())
        elif flags.switches & {"v", "version"}:
            print(f"{NAME}:\n  Version:  {VERSION}\n")
        elif "info" in flags.switches:
            _write(info(_stdin()).SerializeToString())
        else:
            _act(flags)
    except (WherryError, OSError) as error:
        text = error.message if isinstance(error, WherryError) else str(error)
        print(f"{NAME}: {text}", file=sys.stderr)
        sys.exit(1)


def _act(flags: Flags) -> None:
    if not flags["namespace"]:
        raise InvalidArgument("shim namespace cannot be empty")
    if not flags["id"] or "/" in flags["id"]:
        raise InvalidArgument(f"-id {flags['id']!r} is no container's id")
    if flags.action == "start":
        ensure_sealed()
        start(flags, _stdin())
    elif flags.action == "delete":
        ensure_sealed()
        delete(flags)
    else:
        raise InvalidArgument(f"action {flags.action!r} is neither start nor delete")


def _stdin() -> bytes:
    if stat.S_ISCHR(os.fstat(0).st_mode):  # a terminal or /dev/null: nobody sends anything
        return b""
    data = b""
    while len(data) < _STDIN_MAX and (chunk := os.read(0, 65536)):
        data += chunk
    return data


def _write(data: bytes) -> None:
    while data:
        data = data[os.write(1, data) :]


# -- start -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Order:
    """What the caller wants, from whichever form it said it in."""

    ttrpc_address: str
    grpc_address: str
    publish_binary: str
    socket_folder: str
    options: runc_options_pb2.Options
    protobuf: bool
    debug: bool


def read_order(flags: Flags, stdin: bytes, environment: dict[str, str]) -> Order:
    """Take stdin as `BootstrapParams` where it is for this shim, else as the options in an `Any`."""
    params = bootstrap_pb2.BootstrapParams()
    with contextlib.suppress(DecodeError):
        params.ParseFromString(stdin)
    # an Any parses as BootstrapParams too: the first two fields have the same numbers and wire types
    if stdin and params.instance_id == flags["id"] and params.namespace == flags["namespace"]:
        extensions = [extension.value for extension in params.extensions]
        return Order(
            ttrpc_address=params.containerd_ttrpc_address,
            grpc_address=params.containerd_grpc_address or flags["address"],
            publish_binary=params.containerd_binary or flags["publish-binary"],
            socket_folder=params.socket_dir or SOCKET_FOLDER,
            options=next((_options(value) for value in extensions if value.value), runc_options_pb2.Options()),
            protobuf=True,
            debug=params.log_level < bootstrap_pb2.LOG_LEVEL_INFO,
        )
    packed = AnyMessage()
    with contextlib.suppress(DecodeError):
        packed.ParseFromString(stdin)
    return Order(
        ttrpc_address=environment.get("TTRPC_ADDRESS", ""),
        grpc_address=flags["address"] or environment.get("GRPC_ADDRESS", ""),
        publish_binary=flags["publish-binary"],
        socket_folder=SOCKET_FOLDER,
        options=_options(packed),
        protobuf=False,
        debug="debug" in flags.switches,
    )


def _options(packed: AnyMessage) -> runc_options_pb2.Options:
    if typeurl.is_a(packed, runc_options_pb2.Options):
        return typeurl.unpack_as(packed, runc_options_pb2.Options)
    return runc_options_pb2.Options()


def socket_path(folder: str, address: str, namespace: str, container_id: str) -> str:
    """One for each daemon, namespace and container, short enough for sun_path (containerd's SocketAddress)."""
    digest = hashlib.sha256(os.path.join(address, namespace, container_id).encode()).hexdigest()
    return f"{folder}/{digest}"


def answer(order: Order, address: str, environment: dict[str, str]) -> bytes:
    """What `start` prints."""
    if order.protobuf:
        return bootstrap_pb2.BootstrapResult(version=3, address=address, protocol="ttrpc").SerializeToString()
    newest = environment.get("MAX_SHIM_VERSION", "")
    if newest.isdigit():
        # containerd up to 2.2 says 2 here and takes 3 only from shims that don't ask; we serve both
        return json.dumps({"version": min(3, max(2, int(newest))), "address": address, "protocol": "ttrpc"}).encode()
    return address.encode()


def start(flags: Flags, stdin: bytes) -> None:
    """Fork the shim, listening; print where."""
    environment = dict(os.environ)
    order = read_order(flags, stdin, environment)
    bundle = os.getcwd()
    group = group_of(bundle) or flags["id"]
    path = socket_path(order.socket_folder, order.grpc_address, flags["namespace"], group)
    os.makedirs(order.socket_folder, 0o711, exist_ok=True)
    address = f"unix://{path}"
    try:
        listener = sockets.bind(path, replace=True)
    except AlreadyExists:  # the shim of this container, or of its group, is there already
        _keep_address(address)
        _write(answer(order, address, environment))
        return
    parameters = Parameters(
        namespace=flags["namespace"],
        id=group,
        bundle=bundle,
        socket=path,
        ttrpc_address=order.ttrpc_address,
        grpc_address=order.grpc_address,
        publish_binary=order.publish_binary,
        shim_cgroup=order.options.shim_cgroup,
    )
    _keep_address(address)
    bundled.preload()
    ready_read, ready_write = os.pipe2(os.O_CLOEXEC)

    def shim() -> None:
        _own_streams("debug" if order.debug else "info")
        install_signals()
        raise_oom_score()
        become_shim(parameters)
        os.close(ready_read)
        os.close(ready_write)
        Life().serve(listener, parameters)

    detach(shim)
    os.close(ready_write)
    os.read(ready_read, 1)  # its end: the shim is what it is to be, or has died
    _write(answer(order, address, environment))


def group_of(bundle: str) -> str:
    """Which containers share this one's shim, by the annotations of its specification; "" for none."""
    try:
        with open(f"{bundle}/config.json", "rb") as file:
            annotations = json.load(file).get("annotations") or {}
    except (OSError, ValueError, AttributeError):
        return ""  # a sandbox has none yet; what is damaged is told by Create
    return next((str(annotations[name]) for name in GROUPS if annotations.get(name)), "")


def _keep_address(address: str) -> None:
    """Where containerd 1.x looks for it after its restart."""
    with open(os.open("address", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "w") as file:
        file.write(address)


def _own_streams(level: str) -> None:
    """The caller waits for the end of our output: nothing of it stays open. The log goes where containerd reads it."""
    null = os.open("/dev/null", os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.close(null)
    with contextlib.suppress(OSError):
        # for reading too: opening never waits for a reader, writing never meets a pipe without one
        fd = os.open("log", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        os.dup2(fd, 2)
        os.close(fd)
    take_over(level)


# -- the other actions -----------------------------------------------------------------------------------------------


def delete(flags: Flags) -> None:
    """Clean up after a shim that died; print how its container ended."""
    bundle = flags["bundle"] or os.getcwd()
    remains = clean_up(flags["namespace"], flags["id"], bundle)
    if not group_of(bundle):  # a group's may serve others
        with contextlib.suppress(OSError):
            os.unlink(socket_path(SOCKET_FOLDER, flags["address"], flags["namespace"], flags["id"]))
    response = task_v2_pb2.DeleteResponse(pid=remains.pid, exit_status=remains.exit_status)
    response.exited_at.FromNanoseconds(remains.exited_at_ns)
    _write(response.SerializeToString())


def info(stdin: bytes) -> types_pb2.RuntimeInfo:
    """What `-info` prints: who we are, and the options that stdin had."""
    result = types_pb2.RuntimeInfo(name="io.containerd.wherry.v1")
    result.version.version = VERSION
    if stdin:
        packed = AnyMessage()
        with contextlib.suppress(DecodeError):
            packed.ParseFromString(stdin)
            result.options.CopyFrom(packed)
    return result


if __name__ == "__main__":
    main()
