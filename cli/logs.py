"""`wherry logs`: what a container wrote."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from typing import TYPE_CHECKING

from wherry.cli.moments import moment
from wherry.cli.table import Command
from wherry.core.errors import InvalidArgument, NotFound, WherryError
from wherry.core.labels import LOG_URI

if TYPE_CHECKING:
    from wherry.cli.session import Session
    from wherry.client.logs import Entry


async def logs(session: Session, args: argparse.Namespace) -> int:
    """Prints a container's log; its stderr goes to ours."""
    from wherry.client.logs import read

    path = await _folder(session, args.id)
    printer = _Printer(timestamps=args.timestamps)
    try:
        for entry in read(path, since=args.since, until=args.until, tail=args.tail, follow=args.follow):
            printer.show(entry)
    except NotFound:
        return 0  # it wrote nothing yet, and nobody opened its log
    except KeyboardInterrupt:
        if not args.follow:
            raise
        return 130
    return 0


async def _folder(session: Session, name: str) -> str:
    """Where the log is. The daemon knows names best, and what isn't a log of ours; without one the files say enough."""
    from wherry.client.logs import find, folder

    session.connect_timeout = min(session.connect_timeout or 1.0, 1.0)
    with contextlib.suppress(NotFound, InvalidArgument):
        if name == os.path.basename(found := find(name, session.namespace)):
            return found  # a whole id: nobody has to be asked
    try:
        from wherry.client.finding import find as container_of

        container = await container_of(session.client, name)
    except NotFound as error:
        with contextlib.suppress(NotFound):
            return find(name, session.namespace)
        raise error from None
    except WherryError:
        return find(name, session.namespace)
    return folder(container.labels.get(LOG_URI, ""))


class _Printer:
    """Writes entries as they were written; a time stands before a line, not before each of its parts."""

    def __init__(self, *, timestamps: bool) -> None:
        self._timestamps = timestamps
        self._at_start = {"stdout": True, "stderr": True}

    def show(self, entry: Entry) -> None:
        """One entry, at once: who follows wants it now."""
        out = sys.stderr.buffer if entry.stream == "stderr" else sys.stdout.buffer
        if self._timestamps and self._at_start.get(entry.stream, True):
            out.write(_time(entry.at).encode() + b" ")
        self._at_start[entry.stream] = entry.data.endswith(b"\n")
        out.write(entry.data)
        out.flush()


def _time(at: int) -> str:
    import time

    second, nanosecond = divmod(at, 10**9)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(second))}.{nanosecond:09d}Z"


def _lines(text: str) -> int | None:
    if text == "all":
        return None
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of lines nor 'all'")
    return int(text)


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("id", metavar="CONTAINER", help="its name, its id or the beginning of that")
    parser.add_argument("-f", "--follow", action="store_true", help="go on until the container has ended")
    parser.add_argument("-n", "--tail", type=_lines, default=None, metavar="N", help="only the last lines (all)")
    parser.add_argument("--details", action="store_true", help="for docker's scripts: there are none")
    parser.add_argument("-t", "--timestamps", action="store_true", help="begin each line with its time")
    parser.add_argument("--since", type=moment, metavar="TIME", help="what is not older (10m, 2026-11-22T18:00:00Z)")
    parser.add_argument("--until", type=moment, metavar="TIME", help="what is not younger; -f ends then")


ABOUT = """show what a container wrote

Reads the files that the container's shim writes, so it works while the daemon is down (by the container's id, the
beginning of it, or the name that it was started under). Only logs of the driver json-file can be shown, and those of
Kubernetes' containers (-n k8s.io), with what a kubelet has rotated away and not yet compressed."""

COMMANDS = [Command(("logs",), ABOUT, logs, _configure, "wherry logs -f --tail 20 web")]
