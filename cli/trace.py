"""`wherry trace COMMAND…`: what the engine does for one command, call by call."""

from __future__ import annotations

import argparse
import errno
import os
import re
import sys
import time
from typing import IO, TYPE_CHECKING

from wherry.cli.table import Command
from wherry.cli.terminal import is_terminal
from wherry.client.finding import find
from wherry.client.tracing import Call, Tracer, fork_servers, shims_of
from wherry.core.errors import FailedPrecondition, InvalidArgument, WherryError

if TYPE_CHECKING:
    from wherry.cli.session import Session

# seconds for a daemon's fork server to be there
PATIENCE = 3.0
# what waits here is the whole command
pause = time.sleep
VERBS = ("run", "create", "start", "restart", "exec", "stop", "rm", "kill")
KINDS = ("mount", "cgroup", "process", "namespace", "rights", "file", "other")
COLOURS = {"mount": 32, "cgroup": 33, "process": 36, "namespace": 35, "rights": 31, "file": 34, "other": 90}


async def trace(session: Session, args: argparse.Namespace) -> int:
    """Runs a command of ours, and prints on standard error what happens meanwhile."""
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not command or command[0] not in VERBS:
        raise InvalidArgument(f"expected a command to watch after 'trace': {', '.join(VERBS)}")
    if session.embedded:
        raise InvalidArgument("trace needs a daemon that runs: --embedded would be gone before it is found")
    wanted = set(args.kind or (KINDS if args.all else KINDS[:-1]))
    unknown = wanted - set(KINDS)
    if unknown:
        raise InvalidArgument(f"unknown kind {min(unknown)!r}: there are {', '.join(KINDS)}")
    server = await session.client.introspection.server()
    pids = await _shims(session, command[1:])
    deadline = time.monotonic() + PATIENCE
    while not (found := fork_servers(server.pid)) and time.monotonic() < deadline:
        # a daemon that has just started
        pause(0.05)
    pids += found
    if not pids:
        raise FailedPrecondition("nothing to watch: the daemon has no fork server on this host (is it wherryd?)")
    out = open(args.output, "w", encoding="utf-8") if args.output else sys.stderr  # noqa: SIM115 - closed below
    try:
        return _run(session, command, pids, _Printer(out, wanted))
    finally:
        if args.output:
            out.close()


async def _shims(session: Session, words: list[str]) -> list[int]:
    """The shims of containers that the command names: they do what is asked of containers that are there."""
    found: list[int] = []
    for word in words:
        if word.startswith("-"):
            continue
        try:
            found += shims_of((await find(session.client, word)).id)
        except WherryError:
            # no container's name: a value of an option, an image, a word of the command
            continue
    return found


class _Printer:
    """A line for each call."""

    def __init__(self, out: IO[str], wanted: set[str]) -> None:
        self._out = out
        self._wanted = wanted
        self._colour = out is sys.stderr and is_terminal(2) and "NO_COLOR" not in os.environ
        self.counts = dict.fromkeys(KINDS, 0)

    def show(self, call: Call) -> None:
        """One call."""
        self.counts[call.kind] = self.counts.get(call.kind, 0) + 1
        if call.kind not in self._wanted:
            return
        result = ""
        if call.result < 0:
            result = f" = -{errno.errorcode.get(-call.result, str(-call.result))}"
        kind = f"{call.kind:<9}"
        if self._colour:
            kind = f"\x1b[{COLOURS.get(call.kind, 0)}m{kind}\x1b[0m"
        self._out.write(
            f"{call.at * 1000:9.2f} ms {call.who:<16.16} {call.pid:>7} {kind} {_short(call.text)}{result}\n"
        )

    def summary(self) -> None:
        """How many of each kind there were."""
        shown = ", ".join(f"{count} {kind}" for kind, count in self.counts.items() if count)
        self._out.write(f"{shown} (watched processes are slower: the order is exact, the times are not)\n")
        self._out.flush()


_LONG = re.compile(r"[0-9a-f]{52}(?=[^0-9a-f]|$)")


def _short(text: str) -> str:
    """A line without the last digits of long ids."""
    return _LONG.sub("", text)


def _run(session: Session, command: list[str], pids: list[int], printer: _Printer) -> int:
    words = [
        sys.executable,
        "-m",
        "wherry.cli",
        "--address",
        session.address,
        "--namespace",
        session.namespace,
        *command,
    ]
    tracer = Tracer(printer.show)
    tracer.watch(pids)
    child = os.posix_spawn(sys.executable, words, os.environ)
    status = tracer.run(child)
    printer.summary()
    return os.waitstatus_to_exitcode(status) if not os.WIFSIGNALED(status) else 128 + os.WTERMSIG(status)


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-a", "--all", action="store_true", help="every system call, also those that say little")
    parser.add_argument(
        "-k", "--kind", action="append", default=[], metavar="KIND", help=f"only these: {', '.join(KINDS)}"
    )
    parser.add_argument("-o", "--output", default="", metavar="FILE", help="instead of standard error")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND...", help=f"{', '.join(VERBS)} …")


ABOUT = """show what the engine does for a command: calls, mounts, cgroup writes, processes

The daemon's fork server and what it forks are watched by ptrace(2), so nothing is hidden, whichever runtime is used,
until the container's own program begins. Needs root, and a daemon of ours on this host."""

COMMANDS = [Command(("trace",), ABOUT, trace, _configure, "wherry trace -k mount -k cgroup run --rm alpine true")]
