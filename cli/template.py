"""Go's templates, as far as scripts use them with `--format`.

    {{.ID}} {{.State.Status}} {{json .}} {{.Names | upper}} {{index .Labels "a.b"}} {{join .Args " "}}
    {{range .Mounts}}{{.Source}}{{else}}none{{end}} {{range $k, $v := .Labels}}…{{end}} {{with .X}}…{{end}}
    {{if and .A (eq .B "x")}}…{{else if .C}}…{{else}}…{{end}} {{$x := .ID}}{{- trims -}} {{/* a comment */}}

A template is parsed once (`Template`) and then rendered over dictionaries, lists and plain values. A field that isn't
there is an error that names those that are; below a `map` of people's own keys (labels) it is empty, as in Go.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from wherry.core.errors import InvalidArgument

_TOKEN = re.compile(
    r"""(?P<space>\s+)
    |(?P<string>"(?:[^"\\]|\\.)*"|`[^`]*`)
    |(?P<number>-?\d+(?:\.\d+)?)
    |(?P<field>(?:\.[A-Za-z_][A-Za-z0-9_]*)+)
    |(?P<dot>\.)
    |(?P<variable>\$[A-Za-z0-9_]*(?:\.[A-Za-z_][A-Za-z0-9_]*)*)
    |(?P<define>:=)
    |(?P<assign>=)
    |(?P<mark>[|(),])
    |(?P<word>[A-Za-z_][A-Za-z0-9_]*)""",
    re.VERBOSE,
)
_ACTION = re.compile(r"\{\{(-\s)?(.*?)(\s-)?\}\}", re.DOTALL)
Token = tuple[str, str]


class OpenMap(dict[str, Any]):
    """A dictionary with keys of people's own: a key that isn't there is an empty value, not an error."""


def as_go(value: Any) -> str:
    """A value as Go prints it in a template."""
    if value is None:
        return "<no value>"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Mapping):
        return f"map[{' '.join(f'{key}:{as_go(item)}' for key, item in sorted(value.items()))}]"
    if isinstance(value, (list, tuple)):
        return f"[{' '.join(map(as_go, value))}]"
    return str(value)


def to_json(value: Any) -> str:
    """A value as one line of JSON."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=_plain)


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else str(value)


def _index(value: Any, *keys: Any) -> Any:
    for key in keys:
        try:
            value = value.get(key, "") if isinstance(value, Mapping) else value[key]
        except (IndexError, TypeError, KeyError) as error:
            raise InvalidArgument(f"template: index {key!r} doesn't fit {as_go(value)[:60]!r}") from error
    return value


_VERB = re.compile(r"%(-?\d*(?:\.\d+)?)([a-z%])")


def _printf(text: str, *values: Any) -> str:
    """Go's verbs %s %v %d %q %t %f %x."""
    left = list(values)

    def one(match: re.Match[str]) -> str:
        if match[2] == "%":
            return "%"
        if not left:
            raise InvalidArgument(f"template: printf {text!r} has more verbs than values")
        value = left.pop(0)
        if match[2] in {"s", "v", "t"}:
            return f"%{match[1]}s" % as_go(value)
        if match[2] == "q":
            return json.dumps(as_go(value), ensure_ascii=False)
        try:
            return str(f"%{match[1]}{match[2]}" % value)
        except (TypeError, ValueError) as error:
            raise InvalidArgument(f"template: printf {text!r}: {error}") from error

    return _VERB.sub(one, text)


def _compare(test: Callable[[Any, Any], bool]) -> Callable[..., bool]:
    def compare(first: Any, *others: Any) -> bool:
        try:
            return any(test(first, other) for other in others)
        except TypeError as error:
            raise InvalidArgument(f"template: values that can't be compared: {error}") from error

    return compare


def _and(*values: Any) -> Any:
    return next((value for value in values if not value), values[-1])


def _or(*values: Any) -> Any:
    return next((value for value in values if value), values[-1])


FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "json": to_json,
    "upper": lambda text: as_go(text).upper(),
    "lower": lambda text: as_go(text).lower(),
    "title": lambda text: as_go(text).title(),
    "trim": lambda text: as_go(text).strip(),
    "split": lambda text, separator: as_go(text).split(separator),
    "join": lambda items, separator="": separator.join(map(as_go, items or ())),
    "truncate": lambda text, length: as_go(text)[: int(length)],
    "pad": lambda text, before, after: " " * int(before) + as_go(text) + " " * int(after) if text else "",
    "len": lambda value: len(value or ()),
    "index": _index,
    "print": lambda *values: "".join(map(as_go, values)),
    "println": lambda *values: " ".join(map(as_go, values)) + "\n",
    "printf": _printf,
    "eq": _compare(lambda one, other: bool(one == other)),
    "ne": lambda one, other: one != other,
    "lt": _compare(lambda one, other: bool(one < other)),
    "le": _compare(lambda one, other: bool(one <= other)),
    "gt": _compare(lambda one, other: bool(one > other)),
    "ge": _compare(lambda one, other: bool(one >= other)),
    "and": _and,
    "or": _or,
    "not": lambda value: not value,
    "slice": lambda value, *ends: value[slice(*(map(int, ends))) if len(ends) > 1 else slice(int(ends[0]), None)],
}


class _Scope:
    """What an expression sees: the dot, and variables by name (`$` is the whole)."""

    __slots__ = ("dot", "variables")

    def __init__(self, dot: Any, variables: dict[str, Any]) -> None:
        self.dot = dot
        self.variables = variables

    def inner(self, dot: Any) -> _Scope:
        return _Scope(dot, dict(self.variables))


Node = Callable[[_Scope, list[str]], None]
Expression = Callable[[_Scope], Any]


def _field(value: Any, path: str) -> Any:
    for name in path.split("."):
        if not name:
            continue
        if not isinstance(value, Mapping):
            raise InvalidArgument(f"template: can't look for .{name} in {as_go(value)[:60]!r}")
        if name in value:
            value = value[name]
        elif isinstance(value, OpenMap):
            value = ""
        else:
            raise InvalidArgument(
                f"template: there is no field .{name}; there are {', '.join(map(str, value)) or 'none'}"
            )
    return value


def _tokens(text: str) -> list[Token]:
    found: list[Token] = []
    at = 0
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            raise InvalidArgument(f"template: can't read {text[at:]!r} in {{{{{text}}}}}")
        at = match.end()
        if match.lastgroup and match.lastgroup != "space":
            found.append((match.lastgroup, match.group()))
    return found


class _Expression:
    """A pipeline, parsed from the tokens of one action."""

    def __init__(self, tokens: list[Token], text: str) -> None:
        self._tokens = tokens
        self._text = text

    def parse(self) -> Expression:
        """All of the tokens as one pipeline."""
        if not self._tokens:
            raise InvalidArgument(f"template: an action without anything in it: {{{{{self._text}}}}}")
        value = self._pipeline()
        if self._tokens:
            raise InvalidArgument(f"template: {self._tokens[0][1]!r} isn't expected in {{{{{self._text}}}}}")
        return value

    def _pipeline(self) -> Expression:
        value = self._call(None)
        while self._tokens and self._tokens[0][1] == "|":
            self._tokens.pop(0)
            value = self._call(value)
        return value

    def _call(self, piped: Expression | None) -> Expression:
        if piped is None and [token[0] for token in self._tokens[:2]] == ["field", "string"]:
            # docker's rows have one method: {{.Label "key"}}
            path, label = self._tokens.pop(0)[1], _constant(*self._tokens.pop(0))
            if path != ".Label":
                raise InvalidArgument(f"template: {path} takes no argument in {{{{{self._text}}}}}")
            return lambda scope: getattr(scope.dot, "labels", {}).get(label, "")
        if self._tokens and self._tokens[0][0] == "word" and self._tokens[0][1] not in {"true", "false", "nil"}:
            name = self._tokens.pop(0)[1]
            function = FUNCTIONS.get(name)
            if function is None:
                raise InvalidArgument(f"template: there is no function {name!r}; there are {', '.join(FUNCTIONS)}")
            arguments = []
            while self._tokens and self._tokens[0][1] not in {"|", ")"}:
                arguments.append(self._operand())
            if piped is not None:
                arguments.append(piped)
            return _called(name, function, arguments)
        if piped is not None:
            raise InvalidArgument(f"template: a function must follow '|' in {{{{{self._text}}}}}")
        return self._operand()

    def _operand(self) -> Expression:
        if not self._tokens:
            raise InvalidArgument(f"template: something is missing at the end of {{{{{self._text}}}}}")
        kind, text = self._tokens.pop(0)
        if kind == "dot":
            return lambda scope: scope.dot
        if kind == "field":
            return lambda scope: _field(scope.dot, text)
        if kind == "variable":
            return _variable(text)
        if kind in {"string", "number"} or text in _CONSTANTS:
            constant = _constant(kind, text)
            return lambda scope: constant
        if text == "(":
            inner = self._pipeline()
            if not self._tokens or self._tokens.pop(0)[1] != ")":
                raise InvalidArgument(f"template: a ')' is missing in {{{{{self._text}}}}}")
            if self._tokens and self._tokens[0][0] == "field":
                path = self._tokens.pop(0)[1]
                return lambda scope: _field(inner(scope), path)
            return inner
        raise InvalidArgument(f"template: {text!r} isn't expected in {{{{{self._text}}}}}")


_CONSTANTS = {"true": True, "false": False, "nil": None}


def _constant(kind: str, text: str) -> Any:
    if kind == "string":
        return text[1:-1] if text[0] == "`" else json.loads(text)
    if kind == "number":
        return float(text) if "." in text else int(text)
    return _CONSTANTS[text]


def _called(name: str, function: Callable[..., Any], arguments: Sequence[Expression]) -> Expression:
    def call(scope: _Scope) -> Any:
        try:
            return function(*(argument(scope) for argument in arguments))
        except TypeError as error:
            raise InvalidArgument(f"template: {name}: wrong arguments ({error})") from error

    return call


def _variable(text: str) -> Expression:
    name, _, path = text.partition(".")

    def look(scope: _Scope) -> Any:
        if name not in scope.variables:
            raise InvalidArgument(f"template: undefined variable {name}")
        return _field(scope.variables[name], path)

    return look


class Template:
    """A parsed template."""

    def __init__(self, text: str) -> None:
        """Raises InvalidArgument that shows the place."""
        self._parts = _split(text)
        self._nodes, end = self._block(())
        if end:
            raise InvalidArgument(f"template: {{{{{end}}}}} without a beginning")

    def render(self, value: Any) -> str:
        """The text for one value; raises InvalidArgument."""
        out: list[str] = []
        scope = _Scope(value, {"$": value})
        for node in self._nodes:
            node(scope, out)
        return "".join(out)

    def _block(self, ends: tuple[str, ...]) -> tuple[list[Node], str]:
        """Nodes up to one of the words, which is returned with what follows it."""
        nodes: list[Node] = []
        while self._parts:
            kind, text = self._parts.pop(0)
            if kind == "text":
                nodes.append(_literal(text))
                continue
            word, _, rest = text.strip().partition(" ")
            if word in {"end", "else"}:
                if word not in ends:
                    return nodes, text
                return nodes, text.strip()
            if word in {"if", "range", "with"}:
                nodes.append(self._branch(word, rest.strip()))
            elif not text.startswith("/*"):
                nodes.append(_output(text.strip()))
        if ends:
            raise InvalidArgument("template: {{end}} is missing")
        return nodes, ""

    def _branch(self, word: str, text: str) -> Node:
        names, expression = _defined(text)
        body, end = self._block(("end", "else"))
        other: list[Node] = []
        if end.startswith("else"):
            again = end[4:].strip()
            if again.startswith("if"):
                other = [self._branch("if", again[2:].strip())]
            else:
                other, _ = self._block(("end",))
        make = {"if": _if, "with": _with, "range": _range}[word]
        return make(names, expression, body, other)


def _split(text: str) -> list[tuple[str, str]]:
    """Texts and actions in turn, white space trimmed where `{{-` and `-}}` ask for it."""
    parts: list[tuple[str, str]] = []
    at, trim = 0, False
    for match in _ACTION.finditer(text):
        before = text[at : match.start()]
        before = before.lstrip() if trim else before
        before = before.rstrip() if match[1] else before
        if before:
            parts.append(("text", before))
        parts.append(("action", match[2].strip()))
        at, trim = match.end(), bool(match[3])
    rest = text[at:].lstrip() if trim else text[at:]
    if "{{" in rest:
        raise InvalidArgument(f"template: an action that isn't closed: {rest[rest.index('{{') :]!r}")
    if rest:
        parts.append(("text", rest))
    return parts


def _defined(text: str) -> tuple[list[str], Expression]:
    """`$k, $v := PIPELINE`: names and pipeline."""
    tokens = _tokens(text)
    names: list[str] = []
    places = [at for at, (kind, _) in enumerate(tokens) if kind in {"define", "assign"}]
    if places:
        names = [word for kind, word in tokens[: places[0]] if kind == "variable"]
        tokens = tokens[places[0] + 1 :]
    return names, _Expression(tokens, text).parse()


def _literal(text: str) -> Node:
    return lambda scope, out: out.append(text)


def _output(text: str) -> Node:
    names, expression = _defined(text)

    def show(scope: _Scope, out: list[str]) -> None:
        value = expression(scope)
        if names:
            scope.variables[names[0]] = value
        else:
            out.append(as_go(value))

    return show


def _run(nodes: list[Node], scope: _Scope, out: list[str]) -> None:
    for node in nodes:
        node(scope, out)


def _if(names: list[str], expression: Expression, body: list[Node], other: list[Node]) -> Node:
    def choose(scope: _Scope, out: list[str]) -> None:
        value = expression(scope)
        inner = scope.inner(scope.dot)
        if names:
            inner.variables[names[0]] = value
        _run(body if value else other, inner, out)

    return choose


def _with(names: list[str], expression: Expression, body: list[Node], other: list[Node]) -> Node:
    def enter(scope: _Scope, out: list[str]) -> None:
        value = expression(scope)
        inner = scope.inner(value or scope.dot)
        if names:
            inner.variables[names[0]] = value
        _run(body if value else other, inner, out)

    return enter


def _range(names: list[str], expression: Expression, body: list[Node], other: list[Node]) -> Node:
    def each(scope: _Scope, out: list[str]) -> None:
        value = expression(scope)
        if not value:
            _run(other, scope.inner(scope.dot), out)
            return
        pairs = sorted(value.items()) if isinstance(value, Mapping) else list(enumerate(value))
        for key, item in pairs:
            inner = scope.inner(item)
            inner.variables.update(zip(reversed(names), (item, key), strict=False))
            _run(body, inner, out)

    return each
