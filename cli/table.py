"""What a command of the command line is: its names, its options, what it does."""

from __future__ import annotations

import argparse
from collections.abc import Awaitable, Callable, Sequence

from wherry.cli.session import Session
from wherry.core.tuples import NamedTuple

Configure = Callable[[argparse.ArgumentParser], None]
Run = Callable[[Session, argparse.Namespace], Awaitable[int | None]]


def nothing(parser: argparse.ArgumentParser) -> None:
    """For commands without options."""


class Command(NamedTuple):
    """One command. `names` are its name and its aliases, `run` answers with the exit code (None is 0).

    `usage_code` is what a command line that can't be understood ends with.
    """

    names: tuple[str, ...]
    help: str
    run: Run
    configure: Configure = nothing
    example: str = ""
    usage_code: int = 2


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Help as people read it: texts as they were written, options in one column."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=110)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        """`-e, --env NAME=VALUE`: the value is named once."""
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        value = self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{', '.join(action.option_strings)} {value}"


class Parser(argparse.ArgumentParser):
    """Usage errors exit with 2 (125 where scripts read the exit codes of containers), and one line that says where
    the help is."""

    usage_code = 2

    def error(self, message: str) -> None:  # type: ignore[override] # it doesn't return, as the original doesn't
        """Says what was wrong and leaves."""
        self.exit(self.usage_code, f"wherry: {message} (see '{self.prog} --help')\n")


def parser_for(command: Command, prog: str) -> Parser:
    """The parser of one command; `prog` is what was typed before its options."""
    examples = f"\nexample:\n  {command.example}\n" if command.example else ""
    parser = Parser(
        prog=prog,
        description=command.help,
        epilog=examples,
        formatter_class=Formatter,
        allow_abbrev=False,
        add_help=False,
    )
    parser.usage_code = command.usage_code
    command.configure(parser)
    taken = "-h" in parser._option_string_actions
    parser.add_argument(*(["--help"] if taken else ["-h", "--help"]), action="help", help="print this")
    # the options are listed below: in this line they would hide what matters
    words = [word for action in parser._get_positional_actions() for word in _positional(action)]
    parser.usage = " ".join([prog, "[OPTION]...", *words])
    return parser


def _positional(action: argparse.Action) -> list[str]:
    name = str(action.metavar or action.dest)
    if action.nargs == "+":
        return [f"{name}..."]
    if action.nargs in {"?", "*", argparse.REMAINDER}:
        return [f"[{name}...]" if action.nargs == "*" else f"[{name}]"]
    return [name]


def find(commands: Sequence[Command], name: str) -> Command | None:
    """The command of that name or alias."""
    return next((command for command in commands if name in command.names), None)


def overview(prog: str, about: str, commands: Sequence[Command]) -> str:
    """The help of a group: its commands with one line each."""
    rows = [(", ".join(command.names), command.help.split("\n")[0]) for command in commands]
    width = max(len(names) for names, _ in rows)
    lines = [f"usage: {prog} COMMAND [OPTION]...", "", about, "", "commands:"]
    lines += [f"  {names:<{width}}  {text}" for names, text in rows]
    return "\n".join([*lines, "", f"'{prog} COMMAND --help' shows a command's options."])
