"""The command `wherry-snapshotter`: one snapshotter on a socket, for containerd or `wherryd` as a proxy plugin.

[proxy_plugins.wherry]
  type = "snapshot"
  address = "/run/wherry-snapshotter/overlayfs.sock"
"""

from __future__ import annotations

import argparse
import asyncio
import fcntl
import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence

import structlog

from wherry.core.errors import FailedPrecondition, WherryError
from wherry.proto.grpc.server import GrpcServer
from wherry.snapshotter.directories import DirectorySnapshotter
from wherry.snapshotter.native import NativeSnapshotter
from wherry.snapshotter.overlayfs import OverlaySnapshotter
from wherry.snapshotter.service import SnapshotterService

GRACE = 2.0
"""Seconds that calls under way get when it is told to stop."""
_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warn": logging.WARNING, "error": logging.ERROR}
_DESCRIPTION = """\
Serve a snapshotter of Wherry's by containerd's snapshots API on a unix socket, until SIGTERM or SIGINT.
Snapshots stay; whoever serves the same root again goes on with them.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; exit code 0 after an orderly end, 1 for an error (said on stderr), 2 for a wrong use."""
    options = _parser().parse_args(argv)
    options.address = os.path.abspath(options.address.removeprefix("unix://"))
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[options.log_level]),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
    )
    logging.basicConfig(level=_LEVELS[options.log_level], stream=sys.stderr, format="%(levelname)s %(message)s")
    try:
        asyncio.run(_serve(options))
    except (WherryError, OSError) as error:
        print(f"wherry-snapshotter: {error.message if isinstance(error, WherryError) else error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="wherry-snapshotter", description=_DESCRIPTION, allow_abbrev=False)
    commands = parser.add_subparsers(dest="kind", metavar="overlayfs|native", required=True)
    for name, text in (("overlayfs", "what was changed, laid over the parents"), ("native", "full copies")):
        command = commands.add_parser(name, help=text, allow_abbrev=False)
        command.add_argument("--address", "-a", metavar="SOCKET", required=True, help="where to serve")
        command.add_argument("--root", metavar="FOLDER", required=True, help="where the snapshots are kept")
        command.add_argument("--gid", type=int, default=os.getegid(), help="group that may connect (default: nobody)")
        command.add_argument("--async-remove", action="store_true", help="files of removed ones wait for Cleanup")
        command.add_argument("--sync-remove", action="store_true", help="files are gone when a removal is answered")
        command.add_argument("--log-level", "-l", choices=tuple(_LEVELS), default="info")
        if name == "overlayfs":
            command.add_argument(
                "--mount-option", action="append", default=[], metavar="OPTION", help="may be repeated"
            )
            command.add_argument("--upperdir-label", action="store_true", help="show where a snapshot's changes are")
            command.add_argument("--slow-chown", action="store_true", help="don't remap by idmapped mounts")
    return parser


def _open(options: argparse.Namespace) -> DirectorySnapshotter:
    root = os.path.abspath(options.root)
    if options.kind == "native":
        return NativeSnapshotter(root, async_remove=options.async_remove, sync_remove=options.sync_remove)
    return OverlaySnapshotter(
        root,
        upperdir_label=options.upperdir_label,
        mount_options=options.mount_option,
        async_remove=options.async_remove,
        sync_remove=options.sync_remove,
        slow_chown=options.slow_chown,
    )


async def _serve(options: argparse.Namespace) -> None:
    address = options.address
    os.makedirs(os.path.dirname(address), mode=0o711, exist_ok=True)
    lock = _lock(f"{address}.lock", address)
    try:
        service = SnapshotterService(_open(options))
        server = GrpcServer([service])
        try:
            stop = asyncio.Event()
            for number in (signal.SIGTERM, signal.SIGINT):
                asyncio.get_running_loop().add_signal_handler(number, stop.set)
            await server.serve_unix(address, uid=os.geteuid(), gid=options.gid)
            structlog.get_logger().info("serving", snapshotter=options.kind, address=address)
            _ready()
            await stop.wait()
        finally:
            await server.stop(GRACE)
            await service.close()
    finally:
        os.close(lock)


def _lock(path: str, address: str) -> int:
    """Whoever serves the address holds this: its socket would be replaced otherwise. FailedPrecondition."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise FailedPrecondition(f"address {address} is in use: failed precondition") from None
    return fd


def _ready() -> None:
    """Tell the service manager, where there is one (sd_notify(3))."""
    manager = os.environ.get("NOTIFY_SOCKET", "")
    if manager.startswith(("/", "@")):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            sock.connect("\0" + manager[1:] if manager[0] == "@" else manager)
            sock.send(b"READY=1")


if __name__ == "__main__":
    sys.exit(main())
