"""Which shim a container's runtime name means.

- what `[runtimes.NAME]` in the configuration says comes first;
- `io.containerd.runc.v2` (and v1, which is its older name), `io.containerd.wherry.v1` and no name at all: our own shim,
  with the OCI runtime that the options name;
- an absolute path: that shim;
- any other `io.containerd.NAME.vN`: `containerd-shim-NAME-vN`, beside wherryd or on PATH, as containerd looks for it.
"""

from __future__ import annotations

import fnmatch
import os
import re
import shutil
import sys
from collections.abc import Mapping, Sequence

from google.protobuf.any_pb2 import Any as AnyMessage

from wherry.core.errors import InvalidArgument, NotFound
from wherry.core.names import quote
from wherry.core.typeurl import is_a, pack, unpack_as
from wherry.daemon.bundle import Launch
from wherry.daemon.config import RuntimeHandler
from wherry.proto import runc_options_pb2, runtimeoptions_pb2

DEFAULT = "io.containerd.runc.v2"
_OURS = frozenset({"", DEFAULT, "io.containerd.runc.v1", "io.containerd.wherry.v1"})
# options that shims with a configuration file have (gVisor's, Kata's), and runc's hasn't
_FILE_OPTIONS = frozenset({"TypeUrl", "ConfigPath", "ConfigBody"})
_NAME = re.compile(r"[a-z0-9_.-]*\.(?P<name>[a-z0-9_-]+)\.(?P<version>v[0-9]+)", re.IGNORECASE)


def resolve(name: str, handlers: Mapping[str, RuntimeHandler]) -> Launch:
    """The shim for a runtime's name.

    Raises InvalidArgument for a name that can be none, NotFound for a shim that isn't installed, naming what was looked
    for and where.
    """
    handler = handlers.get(name or DEFAULT)
    if handler is not None and handler.shim:
        return Launch(name, _binary(handler.shim, f'runtimes."{name}" in the configuration'))
    if handler is not None and handler.runtime_type:
        # by the rules for names alone: a handler doesn't lead to a handler
        return Launch(name, resolve(handler.runtime_type, {}).binary)
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
    """The runtime's options: what the container has, filled up with what the configuration says for its runtime.

    Raises InvalidArgument for an option of the configuration that there isn't, or of the wrong type.
    """
    handler = handlers.get(launch.runtime)
    if handler is None:
        return given
    configured = _configured(handler, f'runtimes."{launch.runtime}".options')
    if configured is None or (given.type_url and not is_a(given, type(configured))):
        return given
    if given.type_url:
        configured.MergeFrom(unpack_as(given, type(configured)))  # type: ignore[arg-type]  # of the same type
    return pack(configured)


def passed_annotations(annotations: Mapping[str, str], patterns: Sequence[str]) -> dict[str, str]:
    """Those annotations whose names match one of the globs (a handler's `pod_annotations`, `container_annotations`)."""
    return {
        name: value
        for name, value in annotations.items()
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    }


def _configured(handler: RuntimeHandler, at: str) -> runc_options_pb2.Options | runtimeoptions_pb2.Options | None:
    """What a handler sets, as the message that its kind of shim reads: runc's, or the one with a configuration file."""
    set_apart: dict[str, object] = {"config_path": handler.config_path}
    kind: type[runc_options_pb2.Options | runtimeoptions_pb2.Options] = runtimeoptions_pb2.Options
    if not handler.config_path and not handler.options.keys() & _FILE_OPTIONS:
        kind = runc_options_pb2.Options
        set_apart = {"binary_name": handler.binary, "root": handler.root, "systemd_cgroup": handler.systemd_cgroup}
    names = {_camel(field.name): field.name for field in kind.DESCRIPTOR.fields}
    made = kind(**{name: value for name, value in set_apart.items() if value})  # type: ignore[arg-type]  # by name
    for name, value in handler.options.items():
        if name not in names:
            raise InvalidArgument(f"{at}.{name}: no such option, there are {', '.join(sorted(names))}")
        try:
            setattr(made, names[name], value.encode() if name == "ConfigBody" and isinstance(value, str) else value)
        except (TypeError, ValueError) as error:
            raise InvalidArgument(f"{at}.{name}: {error}") from error
    return made if made.ListFields() else None


def _camel(name: str) -> str:
    """`binary_name` as containerd's TOML has it: `BinaryName`."""
    return "".join(word.title() for word in name.split("_"))


def checkpoint_path(given: AnyMessage) -> str:
    """The folder that a checkpoint's options name, "" where they name none."""
    if is_a(given, runc_options_pb2.CheckpointOptions):
        return unpack_as(given, runc_options_pb2.CheckpointOptions).image_path
    return ""


def restored_from(given: AnyMessage) -> str:
    """The folder of criu's images that the runtime's options name for a task that is made from them, "" for none."""
    if is_a(given, runc_options_pb2.Options):
        return unpack_as(given, runc_options_pb2.Options).criu_image_path
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
