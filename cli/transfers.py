"""What pull and push have in common: the registry's options, and progress as people see it."""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from wherry.cli.arguments import user_secret
from wherry.cli.output import size
from wherry.cli.terminal import is_terminal, window
from wherry.client.transfer import Progress, Registry
from wherry.core.credentials import from_docker_config
from wherry.core.errors import Unimplemented
from wherry.core.reference import parse_familiar

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

# seconds between two pictures of the progress: fast enough for the eye, slow enough for a terminal
REFRESH = 0.1
FINAL = ("complete", "exists", "extracted", "completed", "saved", "uploaded")


def registry_options(parser: argparse.ArgumentParser) -> None:
    """How the registry is reached."""
    parser.add_argument("--plain-http", action="store_true", help="HTTP without TLS")
    parser.add_argument(
        "-u", "--user", default="", metavar="USER[:PASSWORD]", help="who you are (else as docker login said)"
    )
    parser.add_argument("--hosts-dir", default="", metavar="DIR", help="hosts.toml files (certificates, mirrors)")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress")


def full_name(text: str) -> str:
    """A whole name from what people type (`busybox` is `docker.io/library/busybox:latest`); raises InvalidArgument."""
    return str(parse_familiar(text))


def registry(args: argparse.Namespace, reference: str) -> Registry:
    """The registry's end of a transfer."""
    return Registry(
        reference=reference,
        user=user_secret(args.user),
        scheme="http" if args.plain_http else "",
        hosts_dir=args.hosts_dir,
        credentials=from_docker_config(),
    )


@contextmanager
def explained() -> Iterator[None]:
    """A daemon without the transfer service answers in terms of its services; a person wants to know what to do."""
    try:
        yield
    except Unimplemented as error:
        raise Unimplemented(
            f"this daemon has no transfer service, as wherryd and containerd from 2.0 on have ({error.message})"
        ) from error


async def show(progress: AsyncIterator[Progress], *, quiet: bool) -> None:
    """Follows a transfer to its end: a line for each thing, redrawn on a terminal; else one line when it is done."""
    display = _Display(is_terminal(2) and not quiet)
    async for step in progress:
        if not quiet:
            display.add(step)
    display.draw(last=True)


class _Display:
    def __init__(self, live: bool) -> None:
        self._live = live
        self._steps: dict[str, Progress] = {}
        self._lines = 0
        self._drawn = 0.0

    def add(self, step: Progress) -> None:
        before = self._steps.get(step.name)
        if step.name:
            self._steps[step.name] = step
        if self._live:
            self.draw()
        elif not step.name:
            sys.stderr.write(f"{step.event}\n")
        elif step.event in FINAL and (before is None or before.event != step.event):
            sys.stderr.write(self._line(step) + "\n")

    def draw(self, *, last: bool = False) -> None:
        """All lines anew, over those that were drawn before."""
        now = time.monotonic()
        if not self._live or (not last and now - self._drawn < REFRESH):
            return
        self._drawn = now
        up = f"\x1b[{self._lines}A" if self._lines else ""
        lines = [self._line(step) for step in self._steps.values()]
        sys.stderr.write(up + "".join(f"\x1b[2K{line}\n" for line in lines))
        sys.stderr.flush()
        self._lines = len(lines)

    @staticmethod
    def _line(step: Progress) -> str:
        amount = f"{size(step.progress)}/{size(step.total)}" if step.total > 0 else ""
        # twelve digits of a digest are enough for a person, and a line that wraps spoils the picture
        name = re.sub(r"(sha\d+:[0-9a-f]{12})[0-9a-f]+", r"\1", step.name)
        columns = (window() or (120, 0))[0]
        return f"{name:<40} {step.event:<16} {amount}".rstrip()[: columns - 1]
