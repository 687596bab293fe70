"""A process in a container, followed from here: its streams, its signals, its exit code."""

from __future__ import annotations

import argparse
import contextlib
import os
import time
from collections.abc import Awaitable, Callable, Collection, Iterator
from typing import TYPE_CHECKING

from wherry.cli.arguments import switch
from wherry.client.fifos import Fifos
from wherry.client.tasks import Stdio
from wherry.core.errors import DeadlineExceeded, NotFound, Unavailable, WherryError
from wherry.core.signals import signal

if TYPE_CHECKING:
    from wherry.cli.attach import Waiter
    from wherry.cli.session import Session
    from wherry.client.api import Client
    from wherry.client.launch import Launched
    from wherry.client.tasks import PendingTask

# the exit codes of docker's command line, that scripts know: an error of ours, a command that can't be run, none there
OURS, NOT_RUNNABLE, NO_COMMAND = 125, 126, 127
# how long a daemon may be away while its containers run on, and between two tries to reach it, in seconds
AWAY = 120.0
RETRY = 0.1
# what waits here is the whole command: there is no event loop that it could hold up
pause = time.sleep


def stream_options(parser: argparse._ActionsContainer) -> None:
    """Where the streams of a process go."""
    parser.add_argument("-d", "--detach", action="store_true", help="leave it running in the background")
    parser.add_argument("-i", "--interactive", action="store_true", help="pass our input on (always done, without -d)")
    parser.add_argument("--log-uri", default="", metavar="URI", help="output to file:///path or binary:///program")
    parser.add_argument("--fifo-dir", default="", metavar="DIR", help="folder for the FIFOs")
    parser.add_argument("--sig-proxy", default=True, type=switch, metavar="BOOL", help="pass signals on (true)")


def exit_code_of(error: WherryError) -> int:
    """The exit code for an error before a process runs: by what runtimes say of a command."""
    text = error.message.lower()
    about_command = "exec" in text or "command" in text
    if about_command and ("not found" in text or "no such file" in text):
        return NO_COMMAND
    if about_command and ("permission denied" in text or "is a directory" in text):
        return NOT_RUNNABLE
    return OURS


def interruptible() -> None:
    """Until signals go to a container they end this command as Ctrl-C does, and it cleans up behind itself."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)


@contextlib.contextmanager
def coded(error_code: int | None = None) -> Iterator[None]:
    """Errors inside leave with docker's exit codes, or with the one given."""
    try:
        yield
    except WherryError as error:
        error.exit_code = exit_code_of(error) if error_code is None else error_code  # type: ignore[attr-defined]
        raise


async def patiently(call: Callable[[], Awaitable[object]]) -> None:
    """Removes something that has ended, also when the daemon is away for a moment; gone already is as good."""
    deadline = time.monotonic() + AWAY
    while True:
        try:
            await call()
        except NotFound:
            return
        except Unavailable:
            if time.monotonic() > deadline:
                raise
            pause(RETRY)
        else:
            return


async def run_task(session: Session, launched: Launched, args: argparse.Namespace) -> int:
    """Starts a task for a container and follows it; the answer is its exit code (0 when detached)."""
    client, container = session.client, launched.container
    process = (container.spec or {}).get("process") or {}
    tty = bool(process.get("terminal"))
    fifos, stdio = streams(container.id, args, tty=tty)
    detached = False
    try:
        with coded():
            creating = client.tasks.creating(container.id, launched.mounts, stdio)
            # loaded while the daemon is at work
            from wherry.cli.attach import Waiter

            pid = await _created(client, container.id, creating)
        try:
            if args.pid_file:
                _write_pid(args.pid_file, pid)
            waiter = None if args.detach else Waiter(client, container.id)
            with coded():
                await client.tasks.start(container.id)
            if waiter is None:
                detached = True
                return 0
            status = follow(session, fifos, waiter, container.id, tty=tty, signals=args.sig_proxy) or 0
        except BaseException:
            await kill_task(client, container.id)
            raise
        await patiently(lambda: client.tidying().tasks.delete(container.id))
        return status
    finally:
        if fifos is not None:
            fifos.release() if detached else fifos.close()


async def _created(client: Client, container: str, creating: PendingTask) -> int:
    """The new task's pid; when somebody loses patience meanwhile, the task goes as soon as it is there."""
    try:
        return await creating.pid()
    except DeadlineExceeded:
        # it may have come to be in the last moment
        await kill_task(client, container)
        raise
    except WherryError:
        raise
    except BaseException:
        with contextlib.suppress(WherryError):
            await creating.pid()
        await kill_task(client, container)
        raise


def streams(process: str, args: argparse.Namespace, *, tty: bool) -> tuple[Fifos | None, Stdio]:
    """The streams that the options ask for: FIFOs, a log, or none."""
    if getattr(args, "null_io", False):
        return None, Stdio(terminal=tty)
    if args.log_uri:
        uri = args.log_uri if "://" in args.log_uri else f"file://{os.path.abspath(args.log_uri)}"
        return None, Stdio("", uri, uri, tty)
    fifos = Fifos(process, stdin=True, terminal=tty, parent=args.fifo_dir)
    return fifos, fifos.stdio


def follow(
    session: Session,
    fifos: Fifos | None,
    waiter: Waiter,
    container: str,
    exec_id: str = "",
    *,
    tty: bool,
    signals: bool = True,
    keys: bytes = b"",
    stdin: bool = True,
    hidden: Collection[int] = (),
) -> int | None:
    """Copies streams and passes signals on until a process has ended; its exit code, None where `keys` were typed.

    What would go to a descriptor in `hidden` is read and dropped.
    """
    from wherry.cli.attach import Attachment, forwarding, terminal

    with (
        forwarding(session, container, exec_id, active=signals),
        terminal(session, container, exec_id, active=tty and fifos is not None),
    ):
        attachment = Attachment(
            fifos, waiter, session.client, container, exec_id, keys=keys, stdin=stdin, hidden=hidden
        )
        exit_ = attachment.run()
    return None if exit_ is None else exit_.status


async def kill_task(client: Client, container: str, exec_id: str = "") -> None:
    """Ends and removes a process whatever state it is in; what goes wrong hides nothing that went wrong before.

    Also where the command's time is over: this has time of its own.
    """
    tasks = client.tidying().tasks
    with contextlib.suppress(WherryError):
        try:
            await tasks.delete(container, exec_id)
        except NotFound:
            return
        except WherryError:
            # it runs: daemons and shims have several kinds and texts for that
            waiting = tasks.waiting(container, exec_id)
            with contextlib.suppress(NotFound):
                await tasks.kill(container, 9, exec_id, every=not exec_id)
            await waiting.result()
            await tasks.delete(container, exec_id)


def _write_pid(path: str, pid: int) -> None:
    """Written beside and moved, so that nobody reads half a number."""
    beside = f"{path}.{os.getpid()}"
    with open(beside, "w", encoding="ascii") as file:
        file.write(str(pid))
    os.rename(beside, path)
