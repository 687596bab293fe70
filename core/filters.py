"""containerd's filter language: which of many objects are meant.

    selectors := selector ("," selector)*        all of them must hold
    selector  := fieldpath [operator value]      without operator: the field is there
    fieldpath := field ("." field)*
    field     := quoted | [A-Za-z0-9_]+
    operator  := "==" | "!=" | "~="
    value     := quoted | [^\\s,]+
    quoted    := Go string syntax in double quotes; after "~=" also in slashes or bars: ~=/^v[0-9]/

Several filters are joined by "or". `!=` also holds where the field isn't there; `~=` searches, with Go's regular
expressions.
Examples: `name==foo`, `labels."very complex label"!=x,status~=run`, `topic~=|^/tasks/|`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from wherry.core.errors import InvalidArgument

# gives the value at a field path of one object; None where the object has no such field
Adaptor = Callable[[Sequence[str]], "str | None"]
Filter = Callable[[Adaptor], bool]

_TOKEN = re.compile(
    r"""(?P<space>\s+)
    |(?P<quoted>"(?:[^"\\\n]|\\.)*"|/(?:[^/\\\n]|\\.)*/|\|(?:[^|\\\n]|\\.)*\|)
    |(?P<separator>[,.])
    |(?P<operator>[=!~]+)
    |(?P<field>[A-Za-z0-9_]+)""",
    re.VERBOSE,
)
_VALUE = re.compile(r"[^\s,]+")
_ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|([0-7]{3})|(.))", re.DOTALL)
_SIMPLE = {"a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v", "\\": "\\", '"': '"'}


def compile_filters(filters: Iterable[str]) -> Filter:
    """One predicate for a list of filters: true where any of them holds, or where there are none.

    Raises InvalidArgument that shows the place.
    """
    compiled = [compile_filter(text) for text in filters]
    if not compiled:
        return lambda adaptor: True
    if len(compiled) == 1:
        return compiled[0]
    return lambda adaptor: any(holds(adaptor) for holds in compiled)


def compile_filter(text: str) -> Filter:
    """The predicate of one filter; an empty one always holds."""
    if not text:
        return lambda adaptor: True
    selectors = _Parser(text).selectors()
    if len(selectors) == 1:
        return selectors[0]
    return lambda adaptor: all(holds(adaptor) for holds in selectors)


def fields(values: Mapping[str, str | Mapping[str, str] | None]) -> Adaptor:
    """An adaptor over a plain mapping; a nested mapping (`labels`) takes the rest of the path, joined by dots.

    An empty string counts as not there, as for most of containerd's fields.
    """

    def adaptor(path: Sequence[str]) -> str | None:
        value = values.get(path[0])
        if isinstance(value, Mapping):
            return value.get(".".join(path[1:])) if len(path) > 1 else None
        return value or None if len(path) == 1 else None

    return adaptor


class _Parser:
    """A recursive descent over one filter's text."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def fail(self, message: str, at: int | None = None) -> InvalidArgument:
        at = self.at if at is None else at
        shown = self.text
        if at < len(shown):
            shown = f"{shown[:at]} >|{shown[at]}|< {shown[at + 1 :]}"
        return InvalidArgument(f"filters: parse error: [{shown}]: {message}: invalid argument")

    def scan(self) -> tuple[int, str, str]:
        """The next token: its position, its kind ("" at the end, "illegal") and its text; blanks are passed over."""
        while self.at < len(self.text):
            match = _TOKEN.match(self.text, self.at)
            if match is None:
                return self.at, "illegal", self.text[self.at]
            start, self.at = self.at, match.end()
            if match.lastgroup != "space":
                return start, str(match.lastgroup), match[0]
        return self.at, "", ""

    def peek(self) -> str:
        return self.text[self.at : self.at + 1]

    def selectors(self) -> list[Filter]:
        found = [self.selector()]
        while self.peek() == ",":
            self.at += 1
            found.append(self.selector())
        if self.at < len(self.text):
            raise self.fail(f"unexpected input: {self.peek()}")
        return found

    def selector(self) -> Filter:
        path = self.fieldpath()
        if self.peek() in {"", ","}:
            return lambda adaptor: adaptor(path) is not None
        start, kind, operator = self.scan()
        if kind != "operator":
            raise self.fail('expected an operator ("=="|"!="|"~=")', start)
        if operator not in {"==", "!=", "~="}:
            raise self.fail(f'unsupported operator "{operator}"', start)
        return _selector(path, operator, self.value(operator == "~="))

    def fieldpath(self) -> tuple[str, ...]:
        path = [self.field()]
        while self.peek() == ".":
            self.at += 1
            path.append(self.field())
        return tuple(path)

    def field(self) -> str:
        start, kind, text = self.scan()
        if kind == "quoted":
            return self.unquote(start, text, alternatives=False)
        if kind != "field":
            raise self.fail(
                "quoted literal not terminated" if text in {'"', "/", "|"} else "expected field or quoted", start
            )
        return text

    def value(self, is_pattern: bool) -> str | re.Pattern[str]:
        while self.peek().isspace():
            self.at += 1
        start = self.at
        if self.peek() in {'"', "/", "|"}:
            _, kind, text = self.scan()
            if kind != "quoted":
                raise self.fail("quoted literal not terminated", start)
            value = self.unquote(start, text, alternatives=is_pattern)
        else:
            match = _VALUE.match(self.text, self.at)
            # containerd's scanner takes these for separators and operators even here
            if match is None or match[0][0] in ".=!~":
                raise self.fail("expected value or quoted", start)
            value, self.at = match[0], match.end()
        if not is_pattern:
            return value
        try:
            return re.compile(_go_pattern(value))
        except (re.error, OverflowError, RecursionError) as error:
            raise self.fail(f"bad regular expression: {error}", start) from error

    def unquote(self, start: int, text: str, *, alternatives: bool) -> str:
        quote = text[0]
        if quote != '"' and not alternatives:
            raise self.fail("invalid quote encountered", start)

        def replaced(match: re.Match[str]) -> str:
            code = match[1] or match[2] or match[3]
            if code or match[4]:
                value = int(code, 16) if code else int(match[4], 8)
                if value > 0x10FFFF:
                    raise self.fail("unquoting failed: invalid syntax", start)
                return chr(value)
            if match[5] not in _SIMPLE:
                raise self.fail("unquoting failed: invalid syntax", start)
            return _SIMPLE[match[5]]

        if quote == '"':
            return _ESCAPE.sub(replaced, text[1:-1])
        # in a pattern's own quotes only the quote is escaped; everything else is the pattern's
        return text[1:-1].replace(f"\\{quote}", quote)


def _selector(path: tuple[str, ...], operator: str, value: str | re.Pattern[str]) -> Filter:
    if isinstance(value, re.Pattern):
        search = value.search
        return lambda adaptor: search(adaptor(path) or "") is not None
    if operator == "==":
        return lambda adaptor: adaptor(path) == value
    return lambda adaptor: (adaptor(path) or "") != value


# what Go's regular expressions (RE2) spell differently from Python's
_CLASSES = {
    "alnum": "0-9A-Za-z",
    "alpha": "A-Za-z",
    "ascii": r"\x00-\x7f",
    "blank": r"\t ",
    "cntrl": r"\x00-\x1f\x7f",
    "digit": "0-9",
    "graph": "!-~",
    "lower": "a-z",
    "print": " -~",
    "punct": r"!-/:-@\[-`{-~",
    "space": r"\t\n\v\f\r ",
    "upper": "A-Z",
    "word": "0-9A-Za-z_",
    "xdigit": "0-9A-Fa-f",
}
_DIFFERENT = re.compile(r"\\Q(?P<literal>.*?)(?:\\E|\Z)|\[:(?P<posix>[a-z]+):\]|\\(?P<escape>.)|\$(?P<end>)", re.DOTALL)


def _go_pattern(pattern: str) -> str:
    r"""Go's spelling of a pattern as Python's: `\Q…\E`, `[[:alpha:]]`, `\z`, and `$` only at the very end."""

    def replaced(match: re.Match[str]) -> str:
        if match["literal"] is not None:
            return re.escape(match["literal"])
        if match["posix"] is not None:
            return _CLASSES.get(match["posix"], match[0])
        if match["escape"] is not None:
            return r"\Z" if match["escape"] == "z" else match[0]
        return "$" if multiline or _in_class(pattern, match.start()) else r"\Z"

    multiline = re.match(r"\(\?[a-zA-Z]*m", pattern) is not None
    return _DIFFERENT.sub(replaced, pattern)


def _in_class(pattern: str, at: int) -> bool:
    """Whether the position is inside of a bracket expression."""
    inside = False
    index = 0
    while index < at:
        if pattern[index] == "\\":
            index += 1
        elif pattern[index] == "[":
            inside = True
        elif pattern[index] == "]":
            inside = False
        index += 1
    return inside
