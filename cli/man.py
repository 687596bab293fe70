"""`wherry man`: manual pages, made from the same tables as the commands and their help."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING

from wherry.cli.catalog import Entry, entries
from wherry.cli.command import GROUPS
from wherry.cli.table import Command
from wherry.cli.version import VERSION
from wherry.core.errors import NotFound

if TYPE_CHECKING:
    from wherry.cli.session import Session

ENVIRONMENT = (
    ("WHERRY_ADDRESS, CONTAINERD_ADDRESS", "the daemon's socket"),
    ("WHERRY_NAMESPACE, CONTAINERD_NAMESPACE", "the namespace to work in"),
    ("CONTAINERD_SNAPSHOTTER", "the snapshotter for what is made"),
    ("DOCKER_CONFIG", "the folder of config.json, with the passwords of registries"),
)
EXITS = (
    ("0", "done"),
    ("1", "an error, said on standard error"),
    ("2", "wrong use"),
    ("125, 126, 127", "of run: an error of ours, a command that can't be run, no such command"),
    ("other", "of run, exec, attach and start -a: the container's; 128 + N after signal N"),
)


async def man(session: Session, args: argparse.Namespace) -> None:
    """Prints a page, or writes all of them into a folder."""
    if args.write:
        os.makedirs(args.write, exist_ok=True)
        for name, text in pages().items():
            with open(os.path.join(args.write, f"{name}.1"), "w", encoding="utf-8") as file:
                file.write(text)
        return
    name = "-".join(["wherry", *args.words])
    found = pages()
    if name not in found:
        raise NotFound(f"no manual page {name}: 'wherry --help' lists the commands")
    sys.stdout.write(found[name])


def pages() -> dict[str, str]:
    """All pages in roff, by name (`wherry-run`)."""
    found = {"wherry": overview()}
    for entry in entries():
        found["-".join(("wherry", *entry.words))] = page(entry)
    return found


def text_of(text: str) -> str:
    """A text for roff: its own signs escaped."""
    lines = text.replace("\\", "\\e").replace("-", "\\-").splitlines()
    return "\n".join(f"\\&{line}" if line.startswith((".", "'")) else line for line in lines)


def _heading(name: str, about: str) -> list[str]:
    first = about.splitlines()[0]
    return [
        f'.TH "{name.upper()}" 1 "" "wherry {VERSION}" "User commands"',
        ".SH NAME",
        f"{text_of(name)} \\- {text_of(first)}",
    ]


def page(entry: Entry) -> str:
    """The page of one command."""
    parser, command = entry.parser, entry.command
    name = "-".join(("wherry", *entry.words))
    lines = _heading(name, command.help)
    usage = str(parser.usage or parser.prog)
    lines += [".SH SYNOPSIS", f".B {text_of(usage)}"]
    more = command.help.partition("\n")[2].strip()
    if more:
        lines += [".SH DESCRIPTION", text_of(more)]
    if len(command.names) > 1:
        lines += [".SH ALIASES", text_of(", ".join(command.names[1:]))]
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if action.help != argparse.SUPPRESS]
        if not actions:
            continue
        title = {"positional arguments": "ARGUMENTS", "options": "OPTIONS"}.get(
            group.title or "", (group.title or "").upper()
        )
        lines.append(f'.SH "{text_of(title)}"')
        for action in actions:
            lines += [".TP", f".B {text_of(_invocation(action))}", text_of(action.help or "\\&")]
    if command.example:
        lines += [".SH EXAMPLE", ".nf", text_of(command.example), ".fi"]
    return "\n".join([*lines, ".SH SEE ALSO", "\\fBwherry\\fR(1)", ""])


def _invocation(action: argparse.Action) -> str:
    value = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
    if action.choices:
        value = "{" + ",".join(map(str, action.choices)) + "}" if not action.metavar else str(action.metavar)
    if not action.option_strings:
        return str(value)
    names = ", ".join(action.option_strings)
    return names if action.nargs == 0 else f"{names} {value}"


def overview() -> str:
    """The page of the command as a whole."""
    lines = _heading("wherry", "run containers")
    lines += [".SH SYNOPSIS", ".B wherry", text_of("[GLOBAL OPTION]... COMMAND [OPTION]..."), ".SH COMMANDS"]
    for group in GROUPS:
        if not group.hidden:
            lines += [".TP", f".B {text_of(', '.join(group.names))}", text_of(group.help)]
    for title, rows in (("ENVIRONMENT", ENVIRONMENT), ("EXIT STATUS", EXITS)):
        lines.append(f'.SH "{title}"')
        for name, about in rows:
            lines += [".TP", f".B {text_of(name)}", text_of(about)]
    return "\n".join([*lines, ""])


def _configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--write", default="", metavar="DIR", help="write all pages there")
    parser.add_argument("words", nargs="*", metavar="COMMAND", help="the command (wherry itself, when left out)")


COMMANDS = [
    Command(("man",), "print a manual page (roff), or write them all", man, _configure, "wherry man run | man -l -")
]
