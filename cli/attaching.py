"""A container with a person in front of it: started and followed, or attached to while it runs; detach keys."""

from __future__ import annotations

from typing import TYPE_CHECKING

from wherry.cli.following import coded, follow, kill_task
from wherry.client import lifecycle
from wherry.client.fifos import Fifos
from wherry.client.finding import name_of
from wherry.client.states import inspect_state
from wherry.client.tasks import Stdio
from wherry.core.container_logs import folder_of, followed
from wherry.core.errors import FailedPrecondition, InvalidArgument, NotFound, WherryError
from wherry.core.labels import LOG_URI

if TYPE_CHECKING:
    import argparse
    from collections.abc import Collection, Sequence

    from wherry.cli.session import Session
    from wherry.client.containers import Container
    from wherry.client.tasks import Process
    from wherry.client.values import Mount

# docker's: Ctrl-P Ctrl-Q
DETACH_KEYS = "ctrl-p,ctrl-q"
# seconds without anything new after which a log is over, when its container has ended
LOG_REST = 5.0
# what a followed container's exit code is when it was left running
DETACHED = None


def detach_keys(text: str) -> bytes:
    """The bytes that `ctrl-p,ctrl-q` or `a,ctrl-[` stand for; raises InvalidArgument."""
    keys = bytearray()
    for word in (text or DETACH_KEYS).split(","):
        control = word.removeprefix("ctrl-")
        if len(word) == 1 and word.isascii():
            keys += word.encode()
        elif word != control and len(control) == 1 and (control.isalpha() or control in "@[\\]^_"):
            keys.append(ord(control.upper()) & 0x1F)
        else:
            raise InvalidArgument(f"--detach-keys {text!r}: {word!r} is neither a character nor ctrl-LETTER")
    return bytes(keys)


async def start_followed(
    session: Session,
    container: Container,
    mounts: Sequence[Mount],
    *,
    interactive: bool,
    signals: bool,
    keys: bytes,
    streams: Collection[str] = (),
) -> int | None:
    """Starts a container and follows it to its end: its exit code, or DETACHED where the keys were typed.

    `streams` (`stdout`, `stderr`) are those that are shown, none for all.

    The ended task stays, for `ps` and the next start. Raises the runtime's error; then no task is left.
    """
    client = session.client
    tty = bool(((container.spec or {}).get("process") or {}).get("terminal"))
    fifos = Fifos(container.id, stdin=interactive or lifecycle.keeps_stdin(container), terminal=tty)
    status: int | None = DETACHED
    try:
        with coded():
            stdio = _kept(session, container, fifos.stdio)
            creating = client.tasks.creating(container.id, mounts, stdio)
            # loaded while the daemon is at work
            from wherry.cli.attach import Waiter

            try:
                await creating.pid()
            except WherryError as error:
                # a shim that isn't ours, or an older one
                if stdio is fifos.stdio or "STDIO scheme" not in error.message:
                    raise
                await client.tasks.create(container.id, mounts, fifos.stdio)
        try:
            waiter = Waiter(client, container.id)
            with coded():
                await client.tasks.start(container.id)
        except BaseException:
            await kill_task(client, container.id)
            raise
        hidden = [number for number, name in ((1, "stdout"), (2, "stderr")) if streams and name not in streams]
        status = follow(
            session, fifos, waiter, container.id, tty=tty, signals=signals, keys=keys if tty else b"",
            stdin=interactive, hidden=hidden,
        )  # fmt: skip
        return status
    finally:
        if status is DETACHED:
            fifos.release()
        else:
            fifos.close()


def _kept(session: Session, container: Container, stdio: Stdio) -> Stdio:
    """The streams of who follows, with the container's log beside them where it has one and the daemon is ours."""
    uri = container.labels.get(LOG_URI, "")
    if not folder_of(uri) or not getattr(session.client.calls.transport, "ours", False):
        return stdio
    return Stdio(stdio.stdin, followed(uri, stdio.stdout), followed(uri, stdio.stderr), stdio.terminal)


async def start_attached(session: Session, container: Container, args: argparse.Namespace) -> int:
    """`start -a`: as `run`, for a container that is there."""
    client = session.client
    state = await inspect_state(client, container)
    if state.running:
        return await attach(
            session, container, keys=detach_keys(args.detach_keys), stdin=args.interactive, signals=True
        )
    await lifecycle.clear_task(client, container)
    await lifecycle.meant_to(client, container, "running")
    container = await lifecycle.joined(client, container)
    mounts = await lifecycle.mounts_of(client, container)
    status = await start_followed(
        session, container, mounts, interactive=args.interactive, signals=True, keys=detach_keys(args.detach_keys)
    )
    return status or 0


async def attach(session: Session, container: Container, *, keys: bytes, stdin: bool, signals: bool) -> int:
    """Follows a container that runs: its output from now on, its exit code."""
    from wherry.cli.attach import Waiter

    client = session.client
    await lifecycle.require(client, container, {"running"}, "can't be attached to: it is {status}")
    task = await client.tasks.get(container.id)
    if folder_of(task.stdio.stdout):
        status = follow_log(session, container, task, keys=keys, stdin=stdin, signals=signals)
        return status or 0
    try:
        fifos = Fifos.existing(task.stdio)
    except FailedPrecondition:
        raise FailedPrecondition(
            f"container {name_of(container)} has no streams to attach to: 'wherry logs -f "
            f"{name_of(container)}' follows its output"
        ) from None
    try:
        waiter = Waiter(client, container.id)
        status = follow(
            session, fifos, waiter, container.id, tty=task.stdio.terminal, signals=signals,
            keys=keys if task.stdio.terminal else b"", stdin=stdin,
        )  # fmt: skip
    finally:
        fifos.release()
    return status or 0


def follow_log(
    session: Session,
    container: Container,
    task: Process,
    *,
    keys: bytes,
    stdin: bool,
    signals: bool,
) -> int | None:
    """Follows a container whose output goes to a log: what is written from now on, and our input.

    A thread copies the log; this one copies input, passes signals on and waits for the end.
    """
    import threading
    import time

    from wherry.cli.attach import Waiter
    from wherry.client.logs import folder

    path = folder(task.stdio.stdout)
    shown = [0]
    printer = threading.Thread(target=_print_log, args=(path, time.time(), shown), daemon=True)
    try:
        fifos: Fifos | None = Fifos.existing(task.stdio)
    except FailedPrecondition:
        # neither input nor output is a FIFO
        fifos = None
    printer.start()
    try:
        waiter = Waiter(session.client, container.id)
        status = follow(
            session, fifos, waiter, container.id, tty=task.stdio.terminal, signals=signals, keys=keys, stdin=stdin
        )
    finally:
        if fifos is not None:
            fifos.release()
    if status is not DETACHED:
        # the rest of what it wrote, as long as there is more of it
        before = -1
        while printer.is_alive() and before != shown[0]:
            before = shown[0]
            printer.join(LOG_REST)
    return status


def _print_log(path: str, since: float, shown: list[int]) -> None:
    """`shown` counts what was printed, for who waits."""
    import os

    from wherry.client.logs import read

    try:
        for entry in read(path, since=since, follow=True):
            view = memoryview(entry.data)
            while view:
                view = view[os.write(2 if entry.stream == "stderr" else 1, view) :]
            shown[0] += 1
    except (NotFound, BrokenPipeError):
        # it wrote nothing and was removed, or whoever reads our output has enough: the wait for its end goes on
        return
