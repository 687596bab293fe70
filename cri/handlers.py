"""Runtime handlers: what Kubernetes' RuntimeClass names, as a container's record wants it."""

from __future__ import annotations

from typing import NamedTuple

from google.protobuf.any_pb2 import Any as Packed

from wherry.core import typeurl
from wherry.core.errors import FailedPrecondition, InvalidArgument
from wherry.core.names import quote
from wherry.cri.settings import Handler, Settings
from wherry.proto import runc_options_pb2, runtimeoptions_pb2

# options that shims with a configuration file have (gVisor's, Kata's), and runc's hasn't
_FILE_OPTIONS = frozenset({"TypeUrl", "ConfigPath", "ConfigBody"})
# runtimes that are the daemon's own shim, in which a pod needs no process
OURS = frozenset({"", "io.containerd.runc.v2", "io.containerd.runc.v1", "io.containerd.wherry.v1"})


class Chosen(NamedTuple):
    """A handler by name, with the runtime that it leads to."""

    name: str
    handler: Handler
    runtime: str
    options: Packed | None
    ours: bool


def choose(settings: Settings, name: str) -> Chosen:
    """The handler of that name, "" for the default one.

    Raises InvalidArgument for one that isn't configured, FailedPrecondition for another's shim without a pause image.
    """
    name = name or settings.default_handler
    handler = settings.handlers.get(name)
    if handler is None:
        there = ", ".join(sorted(settings.handlers))
        raise InvalidArgument(
            f"failed to get sandbox runtime: no runtime for {quote(name)} is configured, there are {there}: "
            "invalid argument"
        )
    runtime = handler.runtime_path or handler.runtime_type
    ours = runtime in OURS
    if not ours and not settings.pause_image:
        raise FailedPrecondition(
            f"runtime handler {quote(name)}: {quote(runtime)} is another shim, whose pods need a pause container: set "
            "sandbox_image in the configuration: failed precondition"
        )
    return Chosen(name, handler, runtime, _options(settings, name, handler), ours)


def _options(settings: Settings, name: str, handler: Handler) -> Packed | None:
    kind: type[runc_options_pb2.Options | runtimeoptions_pb2.Options] = runc_options_pb2.Options
    if handler.options.keys() & _FILE_OPTIONS:
        kind = runtimeoptions_pb2.Options
    made = kind()
    names = {"".join(word.title() for word in field.name.split("_")): field.name for field in kind.DESCRIPTOR.fields}
    for key, value in handler.options.items():
        if key not in names:
            raise InvalidArgument(f"containerd.runtimes.{name}.options.{key}: no such option: invalid argument")
        try:
            setattr(made, names[key], value.encode() if key == "ConfigBody" and isinstance(value, str) else value)
        except (TypeError, ValueError) as error:
            raise InvalidArgument(f"containerd.runtimes.{name}.options.{key}: {error}: invalid argument") from error
    if isinstance(made, runc_options_pb2.Options) and handler.runtime_type in OURS:
        if handler.runtime_root and not made.root:
            made.root = handler.runtime_root
        made.systemd_cgroup = made.systemd_cgroup or settings.systemd_cgroup
        made.no_pivot_root = made.no_pivot_root or settings.containerd.no_pivot
    return typeurl.pack(made) if made.ListFields() else None


def systemd_cgroups(settings: Settings) -> bool:
    """Whether the containers of the default handler are put into cgroups by systemd."""
    handler = settings.handlers.get(settings.default_handler)
    return settings.systemd_cgroup or bool(handler is not None and handler.options.get("SystemdCgroup"))
