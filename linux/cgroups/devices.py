"""Device rules of `linux.resources.devices`: checked, completed with what every container gets, and merged.

Rules are evaluated in order; for each kind of access (mknod, read, write) the last one that matches decides, and
without a match access is denied (runc's behaviour, which starts from an empty list of allowed devices).
"""

from __future__ import annotations

import os

from wherry.linux.cgroups.files import read, write, write_lines

TYPE_CHECKING = False  # typing alone would cost as much as a container's cgroups; type checkers know the name
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from typing import Any

#: Major or minor number that matches all.
ANY = -1
_TYPES = {"a": "a", "": "a", "c": "c", "u": "c", "b": "b"}


class Rule:
    """`kind` is "a" (all), "c" or "b"; `access` is made of "r", "w" and "m"; ANY stands for all numbers."""

    __slots__ = ("access", "allow", "kind", "major", "minor")

    def __init__(self, allow: bool, kind: str, major: int, minor: int, access: str) -> None:
        self.allow = allow
        self.kind = kind
        self.major = major
        self.minor = minor
        self.access = access

    def __str__(self) -> str:
        """As devices.allow and devices.deny of v1 want it."""
        numbers = (f"{'*' if number == ANY else number}" for number in (self.major, self.minor))
        return f"{self.kind} {':'.join(numbers)} {self.access}"


def _allowed(kind: str, major: int, minor: int, access: str = "rwm") -> Rule:
    return Rule(allow=True, kind=kind, major=major, minor=minor, access=access)


#: What every container may use, whatever its spec says: the devices of the OCI runtime specification ("Default
#: Devices"), terminals, and mknod of anything (the node alone gives no access).
DEFAULT_RULES = (
    _allowed("c", ANY, ANY, "m"),
    _allowed("b", ANY, ANY, "m"),
    _allowed("c", 1, 3),  # null
    _allowed("c", 1, 5),  # zero
    _allowed("c", 1, 7),  # full
    _allowed("c", 1, 8),  # random
    _allowed("c", 1, 9),  # urandom
    _allowed("c", 5, 0),  # tty
    _allowed("c", 5, 1),  # console
    _allowed("c", 5, 2),  # ptmx
    _allowed("c", 136, ANY),  # /dev/pts
)


def parse(rules: Iterable[Mapping[str, Any]]) -> list[Rule]:
    """The spec's rules. Raises ValueError for a type, an access or a number that isn't one."""
    return [_parse(index, rule) for index, rule in enumerate(rules)]


def effective_rules(rules: Iterable[Mapping[str, Any]]) -> list[Rule]:
    """The spec's rules with the default ones after them; what an "all" rule overrides is dropped."""
    found: list[Rule] = []
    for rule in [*parse(rules), *DEFAULT_RULES]:
        if rule.kind == "a" and set(rule.access) == set("rwm"):
            found.clear()
        found.append(rule)
    return found


def allows_all(rules: list[Rule]) -> bool:
    """True if nothing is denied, so that no filter is needed."""
    return bool(rules) and rules[0].kind == "a" and all(rule.allow for rule in rules) and len(rules[0].access) == 3


def _parse(index: int, rule: Mapping[str, Any]) -> Rule:
    kind = _TYPES.get(str(rule.get("type", "a") or "a"))
    access = str(rule.get("access") or "rwm")
    major, minor = (ANY if rule.get(key) is None else rule[key] for key in ("major", "minor"))
    where = f"linux.resources.devices[{index}]"
    if kind is None:
        msg = f"{where}: invalid device type {rule.get('type')!r}"
        raise ValueError(msg)
    if not set(access) <= set("rwm"):
        msg = f"{where}: invalid device access {access!r}"
        raise ValueError(msg)
    if not all(isinstance(value, int) and -1 <= value < 2**31 for value in (major, minor)):
        msg = f"{where}: invalid device number {major!r}:{minor!r}"
        raise ValueError(msg)
    if kind == "a":
        major = minor = ANY
    access = "".join(letter for letter in "rwm" if letter in access)
    return Rule(bool(rule.get("allow", False)), kind, major, minor, access)


def write_v1(directory: str, rules: list[Rule], fresh: bool) -> None:
    """Bring the devices cgroup of v1 to `rules`.

    A running container (not `fresh`) keeps what old and new rules both allow at every moment: new rules are allowed
    first, and what isn't allowed any more is denied after.
    """
    allow, deny = (os.path.join(directory, name) for name in ("devices.allow", "devices.deny"))
    everything, exceptions = _merge(rules)
    lines = [f"{kind} {major}:{minor} {access}" for (kind, major, minor), access in exceptions.items()]
    if everything:
        write(allow, "a")
        write_lines(deny, lines)
        return
    current = [] if fresh else read(os.path.join(directory, "devices.list")).splitlines()
    if fresh or any(line.startswith("a ") for line in current):
        # the kernel knows no step from "all" to a list without denying all for an instant
        write(deny, "a")
        current = []
    write_lines(allow, lines)
    for line in current:
        kind, numbers, access = line.split(" ")
        major, _, minor = numbers.partition(":")
        rest = "".join(letter for letter in access if letter not in exceptions.get((kind, major, minor), ""))
        if rest:
            write(deny, f"{kind} {numbers} {rest}")


def _merge(rules: list[Rule]) -> tuple[bool, dict[tuple[str, str, str], str]]:
    """The kernel's own form of v1: the default, and the exceptions from it with their access."""
    everything = False
    exceptions: dict[tuple[str, str, str], str] = {}
    for rule in rules:
        if rule.kind == "a" and len(rule.access) == 3:
            everything = rule.allow
            exceptions.clear()
            continue
        for kind in "bc" if rule.kind == "a" else rule.kind:
            key = (kind, "*" if rule.major == ANY else str(rule.major), "*" if rule.minor == ANY else str(rule.minor))
            before = set(exceptions.get(key, ""))
            after = before | set(rule.access) if rule.allow != everything else before - set(rule.access)
            exceptions[key] = "".join(letter for letter in "rwm" if letter in after)
            if not after:
                del exceptions[key]
    return everything, exceptions
