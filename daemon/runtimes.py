"""Which shim a container's runtime name means.

- what `[runtimes.NAME]` in the configuration says comes first;
- `io.containerd.runc.v2` (and v1, which is its older name), `io.containerd.wherry.v1` and no name at all: our own shim,
  with the OCI runtime that the options name;
- an absolute path: that shim;
- any other `io.containerd.NAME.vN`: `containerd-shim-NAME-vN`, beside wherryd or on PATH, as containerd looks for it.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Mapping

from google.protobuf.any_pb2 import Any as AnyMessage

from wherry.core.errors import InvalidArgument, NotFound
from wherry.core.names import quote
from wherry.core.typeurl import is_a, pack, unpack_as
from wherry.daemon.bundle import Launch
from wherry.daemon.config import RuntimeHandler
from wherry.proto import runc_options_pb2, runtimeoptions_pb2

DEFAULT = "io.containerd.runc.v2"
_OURS = frozenset({"", DEFAULT, "io.containerd.runc.v1", "io.containerd.wherry.v1"})
_NAME = re.compile(r"[a-z0-9_.-]*\.(?P<name>[a-z0-9_-]+)\.(?P<version>v[0-9]+)", re.IGNORECASE)


def resolve(name: str, handlers: Mapping[str, RuntimeHandler]) -> Launch:
    """The shim for a runtime's name.

    Raises InvalidArgument for a name that can be none, NotFound for a shim that isn't installed, naming what was looked
    for and where.
    """
    handler = handlers.get(name or DEFAULT)
    if handler is not None and handler.shim:
        return Launch(name, _binary(handler.shim, f'runtimes."{name}" in the configuration'))
    if handler is not None or name in _OURS:
        return Launch(name or DEFAULT)
    if name.startswith("/"):
        return Launch(name, _binary(name, "runtime"))
    match = _NAME.fullmatch(name)
    if match is None:
        raise InvalidArgument(
            f"invalid runtime name {quote(name)}: neither a name such as {quote(DEFAULT)}, nor the absolute path of a "
            "shim, nor one of [runtimes] in the configuration: invalid argument"
        )
    return Launch(name, _binary(f"containerd-shim-{match['name']}-{match['version']}", f"runtime {quote(name)}"))


def options(given: AnyMessage, launch: Launch, handlers: Mapping[str, RuntimeHandler]) -> AnyMessage:
    """The runtime's options: what the container has, filled up with what the configuration says for its runtime."""
    handler = handlers.get(launch.runtime)
    if handler is None or handler == RuntimeHandler(shim=handler.shim):
        return given
    if handler.config_path:
        if given.type_url:
            return given
        return pack(runtimeoptions_pb2.Options(config_path=handler.config_path))
    if not given.type_url:
        merged = runc_options_pb2.Options()
    elif is_a(given, runc_options_pb2.Options):
        merged = unpack_as(given, runc_options_pb2.Options)
    else:
        return given
    merged.binary_name = merged.binary_name or handler.binary
    merged.root = merged.root or handler.root
    merged.systemd_cgroup = merged.systemd_cgroup or handler.systemd_cgroup
    return pack(merged)


def checkpoint_path(given: AnyMessage) -> str:
    """The folder that a checkpoint's options name, "" where they name none."""
    if is_a(given, runc_options_pb2.CheckpointOptions):
        return unpack_as(given, runc_options_pb2.CheckpointOptions).image_path
    return ""


def _binary(name: str, what: str) -> str:
    """The absolute path of a shim's binary."""
    if os.path.isabs(name):
        if os.path.isfile(name) and os.access(name, os.X_OK):
            return name
        raise NotFound(f"{what}: no executable file {quote(name)}: not found")
    places = os.pathsep.join((os.path.dirname(os.path.abspath(sys.argv[0])), os.environ.get("PATH", os.defpath)))
    found = shutil.which(name, path=places)
    if found is None:
        raise NotFound(f"{what}: binary {quote(name)} is in none of {places}: not found")
    return os.path.abspath(found)
