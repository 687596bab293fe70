"""Things with parents, put in order for a drawing."""

from __future__ import annotations

from collections.abc import Mapping


def depths(parents: Mapping[str, str]) -> list[tuple[int, str]]:
    """Names with their depth, each after its parent.

    `parents` maps a name to its parent's; "" and a name that isn't there are none.
    Children are in the order of their names.
    """
    children: dict[str, list[str]] = {}
    for name, parent in sorted(parents.items()):
        children.setdefault(parent if parent in parents else "", []).append(name)
    found: list[tuple[int, str]] = []
    stack = [(0, name) for name in reversed(children.get("", []))]
    while stack:
        depth, name = stack.pop()
        found.append((depth, name))
        stack += [(depth + 1, child) for child in reversed(children.get(name, []))]
    return found
