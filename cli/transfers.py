"""What pull and push have in common: the registry's options, and progress as people see it."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from wherry.cli.arguments import user_secret
from wherry.cli.progress import Display, JsonLines, Silence
from wherry.cli.terminal import is_terminal
from wherry.client.transfer import Progress, Registry
from wherry.core.credentials import from_docker_config
from wherry.core.errors import Unimplemented
from wherry.core.reference import parse_familiar

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


def registry_options(parser: argparse.ArgumentParser) -> None:
    """How the registry is reached."""
    parser.add_argument("--plain-http", action="store_true", help="HTTP without TLS")
    parser.add_argument(
        "-u", "--user", default="", metavar="USER[:PASSWORD]", help="who you are (else as docker login said)"
    )
    parser.add_argument("--hosts-dir", default="", metavar="DIR", help="hosts.toml files (certificates, mirrors)")


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


def progress_options(parser: argparse.ArgumentParser) -> None:
    """How the progress is shown."""
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress")
    parser.add_argument(
        "--format", choices=("auto", "plain", "json"), default="auto",
        help="a picture on a terminal and else lines (auto), lines, JSON on stdout",
    )  # fmt: skip


async def show(progress: AsyncIterator[Progress], *, quiet: bool = False, style: str = "auto") -> None:
    """Follows a transfer to its end; `style` is `auto`, `plain` or `json`, as in `progress_options`."""
    display: Display | JsonLines | Silence
    if style == "json":
        display = JsonLines()
    elif quiet:
        display = Silence()
    else:
        display = Display(live=style == "auto" and is_terminal(2))
    try:
        async for step in progress:
            display.add(step)
    finally:
        display.draw(last=True)


def result(args: argparse.Namespace, name: str) -> None:
    """Says what came of it: the name alone, or as the last JSON object."""
    if args.format == "json":
        sys.stdout.write(json.dumps({"event": "finished", "name": name}) + "\n")
    else:
        print(name)
