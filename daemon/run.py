"""From a configuration and the locks to a daemon that serves, and to its end."""

from __future__ import annotations

import asyncio
import faulthandler
import os
import shutil
import signal
import socket
import sys
import traceback
from collections.abc import Mapping
from typing import NoReturn

import structlog

from wherry.core.errors import WherryError
from wherry.daemon import config as configuration
from wherry.daemon import logs
from wherry.daemon.config import Config
from wherry.daemon.idle import IdleWatch
from wherry.daemon.version import VERSION
from wherry.shim.client import ForkServer

log = structlog.get_logger(__name__)


def run(config: Config, listeners: Mapping[str, socket.socket], exit_idle: float = 0.0) -> int:
    """Serve until a signal; the exit code. `listeners`: sockets handed over by the service manager, by path.

    `exit_idle`: leave after so many seconds without a call, 0: never.
    """
    forbid_fork()
    log.info("starting wherryd", version=VERSION, pid=os.getpid(), root=config.root, state=config.state)
    for warning in config.warnings:
        log.warning("configuration", warning=warning)
    return asyncio.run(_run(config, listeners, exit_idle))


async def _run(config: Config, listeners: Mapping[str, socket.socket], exit_idle: float) -> int:
    stop = asyncio.Event()
    _handle_signals(config, stop)
    _set_oom_score(config.oom_score)  # before there is a fork server: it and its shims go by ours
    # its interpreter loads on one processor while ours loads gRPC on the other
    forks = await ForkServer.start(_log_forks)
    from wherry.daemon.server import Daemon  # noqa: PLC0415

    watch = IdleWatch(exit_idle) if exit_idle else None
    daemon = Daemon(config, listeners, forks, publish_binary(), [watch] if watch else [])
    try:
        await daemon.start()
        leaving = asyncio.create_task(_leave(watch, stop)) if watch else None
        await stop.wait()
        if leaving is not None:
            leaving.cancel()
        log.info("stopping", containers="go on")
        return 0
    except (WherryError, OSError) as error:
        log.error("can't start", error=str(error))
        print(f"wherryd: {error}", file=sys.stderr)
        return 1
    finally:
        await daemon.stop()


async def _leave(watch: IdleWatch, stop: asyncio.Event) -> None:
    await watch.wait()
    log.info("nobody has called for a while")
    stop.set()


def _set_oom_score(score: int) -> None:
    if not score:
        return
    try:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write(str(score))
    except OSError as error:  # lower than it was takes CAP_SYS_RESOURCE
        log.error("oom_score can't be set", score=score, error=str(error))


def _log_forks(event: str, fields: Mapping[str, object]) -> None:
    log.info(event, **fields)


def _handle_signals(config: Config, stop: asyncio.Event) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    loop.add_signal_handler(signal.SIGHUP, _reload, config)
    loop.add_signal_handler(signal.SIGUSR1, _dump)


def _reload(config: Config) -> None:
    """Read the log level again; nothing else changes while the daemon runs."""
    if not config.files:
        log.info("reload: there is no configuration file")
        return
    try:
        level = configuration.load(config.files[0]).debug.level
    except WherryError as error:
        log.error("reload: the configuration can't be read, all stays as it was", error=error.message)
        return
    logs.set_level(level)
    log.info("reload: log level", level=level or "info")


def _dump() -> None:
    """The stacks of threads and tasks, on standard error."""
    faulthandler.dump_traceback(all_threads=True)
    for task in asyncio.all_tasks():
        frames = task.get_stack()
        place = "".join(traceback.format_stack(frames[-1], 1)) if frames else "no frame\n"
        sys.stderr.write(f"task {task.get_name()}: {task.get_coro()!r}\n{place}")
    sys.stderr.flush()


def publish_binary() -> str:
    """A program by which a stranger's shim can call `publish`: the installed command, beside us or on PATH."""
    beside = os.path.abspath(sys.argv[0])
    if os.path.basename(beside) in ("wherryd", "containerd") and os.access(beside, os.X_OK):
        return beside
    installed = os.path.join(os.path.dirname(sys.executable), "wherryd")
    return installed if os.access(installed, os.X_OK) else shutil.which("wherryd") or beside


def forbid_fork() -> None:
    """Make this process unable to fork without exec: gRPC's threads would not survive it, their locks would.

    `subprocess` and `posix_spawn` exec, and are not affected; `os.fork`, `pty.fork` and multiprocessing's fork raise,
    and a `preexec_fn`, which forks in C, is logged as the bug that it is.
    """

    def refuse(*_: object) -> NoReturn:
        raise RuntimeError("wherryd doesn't fork without exec: ask the fork server, or start a program")

    os.fork = refuse
    os.forkpty = refuse
    os.register_at_fork(before=_forked)


def _forked() -> None:
    log.critical("fork without exec", stack="".join(traceback.format_stack()))
