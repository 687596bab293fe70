"""The command `wherryd`: containerd's flags, the configuration, the locks."""

# ruff: noqa: PLC0415 -- a command pays only for the imports that it needs

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import sys
from collections.abc import Container, Iterator, Sequence

from wherry.core import places
from wherry.core.errors import WherryError
from wherry.daemon import config as configuration
from wherry.daemon.config import Config
from wherry.daemon.version import PACKAGE, REVISION, VERSION

# seconds that a daemon which leaves when nobody calls has for it, where another one means to stay
_DISPLACE = 20.0

_DESCRIPTION = """\
The daemon of Wherry: it keeps images, snapshots and containers, and runs containers through shims that outlive it.
Clients reach it by gRPC on its socket (containerd's API) and by ttrpc on the same path with ".ttrpc" behind it.
"""
_EPILOG = """\
An ordinary user's daemon becomes root of a user namespace of its own; its defaults are below XDG_RUNTIME_DIR,
XDG_DATA_HOME and XDG_CONFIG_HOME. Without a command it serves until SIGTERM or SIGINT; containers go on without it and
are found again at the next start.
SIGHUP reads the log level from the configuration again, SIGUSR1 prints the stacks of all threads and tasks.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; exit code 0 after an orderly end, 1 for an error (said on stderr), 2 for a wrong use."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # the installer has a command line of its own
    if arguments[:2] == ["systemd", "install"]:
        from wherry.systemd.install import install

        return int(install(arguments[2:]) or 0)
    options = _parser().parse_args(arguments)
    try:
        if options.command == "config":
            return _config(options)
        if options.command == "publish":
            return _publish(options)
        return _serve(options)
    except (WherryError, OSError) as error:
        text = error.message if isinstance(error, WherryError) else str(error)
        print(f"wherryd: {text}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="wherryd",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", "-c", metavar="FILE", help=f"configuration (default: {configuration.DEFAULT_PATH})")
    parser.add_argument("--address", "-a", metavar="SOCKET", help=f"where to serve ({configuration.DEFAULT_ADDRESS})")
    parser.add_argument("--root", metavar="FOLDER", help=f"what lasts: images, metadata ({configuration.DEFAULT_ROOT})")
    parser.add_argument("--state", metavar="FOLDER", help=f"what runs: tasks, sockets ({configuration.DEFAULT_STATE})")
    levels = ", ".join(configuration.LEVELS)
    parser.add_argument("--log-level", "-l", metavar="LEVEL", choices=configuration.LEVELS, help=f"one of {levels}")
    parser.add_argument(
        "--exit-idle", metavar="SECONDS", type=float, default=0.0,
        help="leave when nobody has called for so long; containers go on (0: never)",
    )  # fmt: skip
    version = f"wherryd {PACKAGE} {VERSION} {REVISION}".rstrip()
    parser.add_argument("--version", "-v", action="version", version=version)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    config = commands.add_parser("config", help="print a configuration as TOML")
    config.add_argument("what", choices=("default", "dump"), help="the defaults, or what the file and the flags make")
    publish = commands.add_parser("publish", help="publish an event (shims call this), its Any on standard input")
    publish.add_argument("--namespace", required=True)
    publish.add_argument("--topic", required=True)
    commands.add_parser(
        "systemd", help="systemd install: install the units of this environment (--help for more)", add_help=False
    )
    return parser


# -- commands


def _load(options: argparse.Namespace) -> Config:
    """The configuration with the flags over it."""
    config = _users(options.config) if places.is_users() else configuration.load(options.config)
    if options.address:
        config = dataclasses.replace(config, grpc=dataclasses.replace(config.grpc, address=options.address))
    if options.log_level:
        config = dataclasses.replace(config, debug=dataclasses.replace(config.debug, level=options.log_level))
    # paths are absolute from here on: shims and runtimes work in folders of their own
    return dataclasses.replace(
        config,
        root=os.path.abspath(options.root or config.root),
        state=os.path.abspath(options.state or config.state),
        grpc=dataclasses.replace(config.grpc, address=_socket(config.grpc.address)),
        ttrpc=dataclasses.replace(config.ttrpc, address=config.ttrpc.address and _socket(config.ttrpc.address)),
    )


def _users(path: str | None) -> Config:
    """An ordinary user's configuration: where it leaves a place at its default, the user's own is meant."""
    own = os.path.join(places.config_folder(), "wherry", "config.toml")
    path = path or (own if os.path.exists(own) else None)
    config = configuration.load(path) if path else Config()
    grpc = config.grpc
    if grpc.address == configuration.DEFAULT_ADDRESS:
        grpc = dataclasses.replace(grpc, address=places.address())
    root = places.root() if config.root == configuration.DEFAULT_ROOT else config.root
    state = places.state() if config.state == configuration.DEFAULT_STATE else config.state
    network = config.network
    conflists = os.path.join(places.config_folder(), "cni", "net.d")
    if network.cni_conf_dir == Config().network.cni_conf_dir and os.path.isdir(conflists):
        network = dataclasses.replace(network, cni_conf_dir=conflists)
    return dataclasses.replace(config, root=root, state=state, grpc=grpc, network=network)


def _socket(address: str) -> str:
    """The absolute path of a socket; addresses are also written as URLs, as clients take them."""
    return os.path.abspath(address.removeprefix("unix://"))


def _config(options: argparse.Namespace) -> int:
    from wherry.daemon.toml import dumps

    config = Config() if options.what == "default" else _load(options)
    for warning in config.warnings:
        print(f"wherryd: warning: {warning}", file=sys.stderr)
    sys.stdout.write(dumps(config.as_tables()))
    return 0


def _publish(options: argparse.Namespace) -> int:
    """What a stranger's shim calls where it has no ttrpc address (containerd's `publish`)."""
    import time

    from google.protobuf import any_pb2

    from wherry.proto import events_ttrpc_pb2
    from wherry.proto.ttrpc.blocking import BlockingClient

    request = events_ttrpc_pb2.ForwardRequest()
    envelope = request.envelope
    envelope.timestamp.FromNanoseconds(time.time_ns())
    envelope.namespace, envelope.topic = options.namespace, options.topic
    envelope.event.CopyFrom(any_pb2.Any.FromString(sys.stdin.buffer.read()))
    with contextlib.closing(BlockingClient(_load(options).ttrpc_address)) as client:
        client.call("containerd.services.events.ttrpc.v1.Events", "Forward", request, timeout=10)
    return 0


def _serve(options: argparse.Namespace) -> int:
    if not options.exit_idle:
        from wherry.daemon.lock import displace

        displace(os.path.join(_load(options).state, "lock"), _DISPLACE)
    if os.geteuid() != 0:
        from wherry.linux.rootless import enter

        enter(_load(options).state)
        # it isn't enough to go on: what was opened, loaded and cached so far belongs to the user outside
        os.execv(sys.executable, sys.orig_argv)
    from wherry.daemon import logs
    from wherry.daemon.notify import listeners

    sockets = listeners()  # before anything else opens a file
    config = _load(options)
    logs.set_up(config.debug.level, config.debug.format)
    with _locks(config, sockets, options.exit_idle):
        from wherry.daemon.run import run
        from wherry.linux.rootless import leave, settle

        if refused := settle(config.state):
            print(f"wherryd: containers can't be limited: no cgroup is delegated: {refused}", file=sys.stderr)
        code = run(config, sockets, options.exit_idle)
        leave(config.state)
        return code


@contextlib.contextmanager
def _locks(config: Config, handed_over: Container[str], exit_idle: float) -> Iterator[None]:
    """Hold what two daemons must not share; the one that is refused has touched nothing of the other's."""
    from wherry.daemon.lock import Lock, await_leaver, refuse_listener

    holder: dict[str, object] = {
        "pid": os.getpid(),
        "address": config.grpc.address,
        "root": config.root,
        "state": config.state,
    }
    if exit_idle:
        holder["exit_idle"] = exit_idle
    await_leaver(os.path.join(config.state, "lock"), config.ttrpc_address, _DISPLACE)
    address = config.grpc.address
    for folder in (config.root, config.state, os.path.dirname(address)):
        os.makedirs(folder, mode=0o711, exist_ok=True)
    with contextlib.ExitStack() as stack:
        for path, what in (
            (os.path.join(config.root, "lock"), f"root {config.root}"),
            (os.path.join(config.state, "lock"), f"state {config.state}"),
            (f"{address}.lock", f"address {address}"),
        ):
            stack.enter_context(contextlib.closing(Lock(path, what, holder)))
        for path in (address, config.ttrpc_address):
            # whoever knows nothing of our locks (a containerd) may still be listening there
            if path not in handed_over:
                refuse_listener(path)
        yield
