"""Unit files as systemd reads them (systemd.syntax(7)): sections, keys that come again, lines that go on."""

from __future__ import annotations

import shlex
from collections.abc import Iterator


class UnitError(Exception):
    """A unit file that can't be understood, with the line."""


class UnitFile:
    """Sections in their order, each with its keys and values in theirs; a value may come under a key many times."""

    def __init__(self) -> None:
        self.sections: dict[str, list[tuple[str, str]]] = {}

    @classmethod
    def parse(cls, text: str) -> UnitFile:
        """Raises UnitError."""
        unit, section = cls(), None
        for number, line in _lines(text):
            if line.startswith("[") and line.endswith("]"):
                section = unit.sections.setdefault(line[1:-1], [])
                continue
            key, equals, value = line.partition("=")
            if not equals or section is None:
                raise UnitError(
                    f"line {number}: {'no section before' if section is None else 'expected KEY=VALUE:'} {line!r}"
                )
            section.append((key.strip(), value.strip()))
        return unit

    def all(self, section: str, key: str) -> list[str]:
        """The values of a key; an empty one takes those before it away, as everywhere in systemd."""
        found: list[str] = []
        for name, value in self.sections.get(section, ()):
            if name == key:
                found = [*found, value] if value else []
        return found

    def last(self, section: str, key: str, default: str = "") -> str:
        """The last value of a key."""
        return (self.all(section, key) or [default])[-1]

    def flag(self, section: str, key: str, *, default: bool = False) -> bool:
        """A truth value; raises UnitError for what is none."""
        text = self.last(section, key).lower()
        if not text:
            return default
        if text in {"1", "yes", "true", "on", "y", "t"}:
            return True
        if text in {"0", "no", "false", "off", "n", "f"}:
            return False
        raise UnitError(f"{key}={text}: expected yes or no")

    def words(self, section: str, key: str) -> list[str]:
        """The words of all values of a key, with quotes as systemd has them."""
        try:
            return [word for value in self.all(section, key) for word in shlex.split(value)]
        except ValueError as error:
            raise UnitError(f"{key}: {error}") from None

    def keys(self, section: str) -> list[str]:
        """The keys of a section, each once."""
        return list(dict.fromkeys(key for key, _ in self.sections.get(section, ())))

    def rename(self, old: str, new: str) -> None:
        """Give a section another name; it keeps its place."""
        self.sections = {new if name == old else name: values for name, values in self.sections.items()}

    def add(self, section: str, key: str, value: str) -> None:
        """Add a value at the end of a section."""
        self.sections.setdefault(section, []).append((key, value))

    def put_first(self, section: str, key: str, value: str) -> None:
        """Add a value at the beginning of a section: what the file says itself comes after it, and wins."""
        self.sections.setdefault(section, []).insert(0, (key, value))

    def text(self) -> str:
        """The file."""
        parts = []
        for name, values in self.sections.items():
            parts.append("\n".join([f"[{name}]", *(f"{key}={value}" for key, value in values)]))
        return "\n\n".join(parts) + "\n"


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Lines without comments and with their continuations, and the number of the first one."""
    pending, start = "", 0
    for number, line in enumerate(text.splitlines(), 1):
        stripped = line.strip()
        if stripped[:1] in {"#", ";"} or (not stripped and not pending):
            continue
        start = start or number
        if stripped.endswith("\\"):
            pending += stripped[:-1] + " "
            continue
        yield start, (pending + stripped).strip()
        pending, start = "", 0
    if pending.strip():
        yield start, pending.strip()


def quote(word: str) -> str:
    """A word of a command line of a unit (systemd.service(5)). `%` stays: specifiers are the user's."""
    escaped = word.replace("\\", "\\\\").replace('"', '\\"').replace("$", "$$").replace("\n", "\\n")
    return f'"{escaped}"' if not escaped or any(character in escaped for character in " \t;'\"\\") else escaped
