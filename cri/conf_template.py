"""A network's configuration made of a template with Go's syntax, once the kubelet has told the pods' addresses.

As much of Go's text/template as such files use, with containerd's values: `PodCIDR` (the first), `PodCIDRRanges` (all),
`Routes` (`0.0.0.0/0`, `::/0`, for the families that there are).

    {{.PodCIDR}}   {{range $i, $cidr := .PodCIDRRanges}}…{{$cidr}}…{{end}}   {{range .Routes}}{{.}}{{end}}
    {{if $i}}…{{else}}…{{end}}   {{index .PodCIDRRanges 0}}   {{- and -}} for the space around
"""

from __future__ import annotations

import ipaddress
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from wherry.core.errors import InvalidArgument

_TOKEN = re.compile(r"(\s*\{\{-|\{\{)\s*(.*?)\s*(-\}\}\s*|\}\})", re.DOTALL)
_RANGE = re.compile(r"(?:\$(\w+)\s*,\s*)?(?:\$(\w+)\s*:=\s*)?(\S+)")
_INDEX = re.compile(r"index\s+(\S+)\s+([0-9]+)")


def write(template: str, path: str, cidrs: Sequence[str]) -> None:
    """Make the file at `path`. Raises InvalidArgument, which names the template and what is wrong."""
    try:
        with open(template, encoding="utf-8") as file:
            text = file.read()
    except OSError as error:
        raise InvalidArgument(f"conf_template {template}: {error.strerror}: invalid argument") from error
    made = render(text, values(cidrs), template)
    try:
        json.loads(made)
    except ValueError as error:
        raise InvalidArgument(f"conf_template {template}: it makes no JSON: {error}: invalid argument") from error
    os.makedirs(os.path.dirname(path), exist_ok=True)
    beside = f"{path}.new"
    with open(beside, "w", encoding="utf-8") as file:
        file.write(made)
    os.rename(beside, path)


def values(cidrs: Sequence[str]) -> dict[str, Any]:
    """What a template may use. Raises InvalidArgument for what is no network."""
    families = set()
    for cidr in cidrs:
        try:
            families.add(ipaddress.ip_network(cidr.strip(), strict=False).version)
        except ValueError as error:
            raise InvalidArgument(f"pod CIDR {cidr!r}: {error}: invalid argument") from error
    routes = [route for family, route in ((4, "0.0.0.0/0"), (6, "::/0")) if family in families]
    return {"PodCIDR": cidrs[0].strip(), "PodCIDRRanges": [cidr.strip() for cidr in cidrs], "Routes": routes}


def render(text: str, known: Mapping[str, Any], where: str = "template") -> str:
    """The text with its actions done. Raises InvalidArgument for an action that isn't one of the above."""
    parts = iter(_split(text))
    made, end = _block(parts, {".": dict(known)}, where, live=True)
    if end:
        raise InvalidArgument(f"{where}: {{{{{end}}}}} without a beginning: invalid argument")
    return made


def _split(text: str) -> list[tuple[bool, str]]:
    """Texts and actions (True), in order; space that an action takes away is gone."""
    found: list[tuple[bool, str]] = []
    at = 0
    for match in _TOKEN.finditer(text):
        found.append((False, text[at : match.start()]))
        found.append((True, match[2]))
        at = match.end()
    found.append((False, text[at:]))
    return found


def _block(parts: Iterator[tuple[bool, str]], scope: dict[str, Any], where: str, *, live: bool) -> tuple[str, str]:
    """Everything up to `end`, `else` or the end of the text: what it makes, and which of these it was."""
    made: list[str] = []
    for is_action, text in parts:
        if not is_action:
            made.append(text)
            continue
        word, _, rest = text.partition(" ")
        if text in ("end", "else"):
            return "".join(made), text
        if text.startswith("/*"):
            continue
        if word == "if":
            made.append(_choice(parts, scope, where, bool(_value(rest, scope, where)) if live else False, live=live))
        elif word == "range":
            made.append(_loop(parts, scope, where, rest, live=live))
        elif live:
            made.append(str(_value(text, scope, where)))
    return "".join(made), ""


def _choice(parts: Iterator[tuple[bool, str]], scope: dict[str, Any], where: str, yes: bool, *, live: bool) -> str:
    made, end = _block(parts, scope, where, live=live and yes)
    other = ""
    if end == "else":
        other, end = _block(parts, scope, where, live=live and not yes)
    if end != "end":
        raise InvalidArgument(f"{where}: {{{{if}}}} without {{{{end}}}}: invalid argument")
    return made if yes else other


def _loop(parts: Iterator[tuple[bool, str]], scope: dict[str, Any], where: str, text: str, *, live: bool) -> str:
    match = _RANGE.fullmatch(text)
    if match is None:
        raise InvalidArgument(f"{where}: {{{{range {text}}}}} isn't understood: invalid argument")
    body: list[tuple[bool, str]] = []
    depth = 1
    for part in parts:
        if part[0]:
            depth += part[1].split(" ")[0] in ("if", "range")
            depth -= part[1] == "end"
        body.append(part)
        if not depth:
            break
    else:
        raise InvalidArgument(f"{where}: {{{{range}}}} without {{{{end}}}}: invalid argument")
    if not live:
        return ""
    made = []
    for at, item in enumerate(_value(match[3], scope, where)):
        inner = {**scope, ".": item}
        if match[1]:
            inner[f"${match[1]}"] = at
        if match[2]:
            inner[f"${match[2]}"] = item
        made.append(_block(iter(body), inner, where, live=True)[0])
    return "".join(made)


def _value(text: str, scope: Mapping[str, Any], where: str) -> Any:
    if (match := _INDEX.fullmatch(text)) is not None:
        try:
            return _value(match[1], scope, where)[int(match[2])]
        except IndexError:
            raise InvalidArgument(f"{where}: {{{{{text}}}}}: there are not so many: invalid argument") from None
    if text in scope:
        return scope[text]
    inside = scope["."]
    if text.startswith(".") and isinstance(inside, dict) and text[1:] in inside:
        return inside[text[1:]]
    raise InvalidArgument(f"{where}: {{{{{text}}}}} isn't understood: invalid argument")
