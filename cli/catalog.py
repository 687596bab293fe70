"""All commands there are, for what is made from them: completion and manual pages."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module

from wherry.cli.command import GROUPS, Group
from wherry.cli.table import Command, Parser, find, parser_for
from wherry.core.tuples import NamedTuple


class Entry(NamedTuple):
    """A command with the words that lead to it (`images`, `ls`), and the noun that it is under (None for a verb)."""

    words: tuple[str, ...]
    command: Command
    group: Group | None

    @property
    def parser(self) -> Parser:
        """Its parser."""
        return parser_for(self.command, " ".join(("wherry", *self.words)))


def commands_of(group: Group) -> list[Command]:
    """The verbs of a noun, or the one verb that a group stands for."""
    found: list[Command] = import_module(f"wherry.cli.{group.module}").COMMANDS
    if group.single:
        return [find(found, group.names[0]) or found[0]]
    return found


def entries() -> Iterator[Entry]:
    """Every command under its first name."""
    for group in GROUPS:
        if group.hidden:
            continue
        if group.bare:
            yield Entry((group.names[0],), import_module(f"wherry.cli.{group.bare}").COMMANDS[0], None)
        for command in commands_of(group):
            if group.single:
                yield Entry((group.names[0],), command, None)
            else:
                yield Entry((group.names[0], command.names[0]), command, group)
