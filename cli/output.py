"""What commands print: tables for people, JSON for scripts, sizes and times."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from wherry.core.hints import Generic, TypeVar
from wherry.core.tuples import NamedTuple

T = TypeVar("T")


class Column(NamedTuple, Generic[T]):
    """A column: its heading, its name in JSON, the value; `show` turns the value into text where `str` won't do."""

    heading: str
    key: str
    value: Callable[[T], Any]
    show: Callable[[Any], str] = str


def listing_options(parser: argparse.ArgumentParser, *, quiet: str = "ids") -> None:
    """The options that every listing has."""
    parser.add_argument("-q", "--quiet", action="store_true", help=f"print only the {quiet}")
    parser.add_argument("--format", choices=("table", "json"), default="table", help="a table (default), or JSON")


def listing(args: argparse.Namespace, columns: Sequence[Column[T]], items: Iterable[T]) -> None:
    """Prints items as the options of `listing_options` say; the first column is what `-q` prints."""
    rows = list(items)
    if args.format == "json":
        keep = columns[:1] if args.quiet else columns
        print_json([{column.key: column.value(item) for column in keep} for item in rows])
    elif args.quiet:
        for item in rows:
            print(columns[0].show(columns[0].value(item)))
    else:
        table([column.heading for column in columns], [[c.show(c.value(item)) for c in columns] for item in rows])


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Columns as wide as their widest cell; the last one isn't padded."""
    cells = [list(headings), *(list(row) for row in rows)]
    widths = [max(len(row[at]) for row in cells) for at in range(len(headings))]
    for row in cells:
        line = "".join(cell.ljust(width + 4) for cell, width in zip(row[:-1], widths[:-1], strict=True)) + row[-1]
        print(line.rstrip())


def print_json(value: Any) -> None:
    """JSON for people and programs: indented, keys in the order they were given."""
    import json

    json.dump(value, sys.stdout, indent=4, ensure_ascii=False, default=_fallback)
    sys.stdout.write("\n")


def _fallback(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else str(value)


def size(count: int) -> str:
    """Bytes in powers of 1024: `1013.0 KiB`."""
    number = float(count)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if number < 1024 or unit == "TiB":
            break
        number /= 1024
    return f"{int(number)} {unit}" if unit == "B" else f"{number:.1f} {unit}"


def labels(values: Mapping[str, str]) -> str:
    """Labels in one cell: `a=b,c=d`, `-` without any."""
    return ",".join(f"{key}={value}" for key, value in sorted(values.items())) or "-"


def when(at: float) -> str:
    """A time as RFC 3339 in UTC; "" where there is none."""
    if not at:
        return ""
    fraction = f"{at % 1:.6f}"[1:]
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(at)) + fraction + "Z"


def age(at: float) -> str:
    """How long ago: `3 seconds`, `2 hours`; "-" where there is no time."""
    if not at:
        return "-"
    left = max(0.0, time.time() - at)
    for name, length in (("second", 60), ("minute", 60), ("hour", 24), ("day", 365), ("year", 10**6)):
        if left < length or name == "year":
            break
        left /= length
    whole = int(left)
    return f"{whole} {name}" if whole == 1 else f"{whole} {name}s"


def now() -> str:
    """The time now, as the label of a root of the garbage collector has it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
