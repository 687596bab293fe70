"""`--format`, `--filter` and `-q` as docker's listings have them.

A row is a dictionary whose keys are the names that templates use (`ID`, `Names` …). `--format` is `table` (the
default), `json` (an object a line), a template, or `table TEMPLATE` with tabs between the columns.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from wherry.cli.output import table
from wherry.core.errors import InvalidArgument

Row = Mapping[str, Any]


class Labelled(dict[str, Any]):
    """A row of something that has labels, for `{{.Label "key"}}`."""

    labels: Mapping[str, str] = MappingProxyType({})


# headings by the name of the field, in the order of the default table
Headings = Mapping[str, str]
MORE: Headings = {
    "Labels": "LABELS",
    "CreatedAt": "CREATED AT",
    "State": "STATE",
    "Mounts": "MOUNTS",
    "Networks": "NETWORKS",
    "LocalVolumes": "LOCAL VOLUMES",
    "RunningFor": "CREATED",
    "Size": "SIZE",
}


def format_option(parser: argparse._ActionsContainer, what: str = "table (default), json, or a template") -> None:
    """`--format`."""
    # -f is the filter of listings
    names = ("--format",) if "template" in what and what.startswith("table") else ("-f", "--format")
    parser.add_argument(*names, default="", metavar="FORMAT", help=f"{what}: '{{{{.ID}}}} {{{{.Name}}}}'")


def listing_flags(parser: argparse.ArgumentParser, *, quiet: str = "ids", trunc: bool = True) -> None:
    """`-q`, `--format`, `--filter` and, with `trunc`, `--no-trunc`."""
    parser.add_argument("-q", "--quiet", action="store_true", help=f"print only the {quiet}")
    format_option(parser)
    parser.add_argument("-f", "--filter", action="append", default=[], metavar="KEY=VALUE", help="show only what fits")
    if trunc:
        parser.add_argument("--no-trunc", action="store_true", help="whole ids and texts")


def show(args: argparse.Namespace, rows: Iterable[Row], columns: Headings, *, quiet: str = "ID") -> None:
    """Prints rows as `--format` and `-q` ask; `columns` are those of the default table."""
    form = str(args.format or "table")
    if getattr(args, "quiet", False) and not args.format:
        for row in rows:
            sys.stdout.write(f"{row[quiet]}\n")
    elif form == "table":
        table(list(columns.values()), [[str(row[key]) for key in columns] for row in rows])
    elif form == "json":
        from wherry.cli.template import to_json

        for row in rows:
            sys.stdout.write(to_json(row) + "\n")
    else:
        _templated(form, rows, columns)


def _templated(form: str, rows: Iterable[Row], columns: Headings) -> None:
    from wherry.cli.template import Template

    tabular = form.startswith("table ")
    template = Template(escapes(form.removeprefix("table ") if tabular else form))
    if not tabular:
        for row in rows:
            sys.stdout.write(template.render(row) + "\n")
        return
    items = list(rows)
    names = {**MORE, **columns}
    keys = items[0] if items else names
    heading = template.render({key: names.get(key, key.upper()) for key in keys})
    table(heading.split("\t"), [template.render(row).split("\t") for row in items])


def escapes(text: str) -> str:
    """`\\t` and `\\n` as they come through a shell's single quotes."""
    return text.replace("\\t", "\t").replace("\\n", "\n")


def document(args: argparse.Namespace, value: Any) -> None:
    """Prints one thing: indented JSON, or by a template."""
    if not args.format or args.format == "json":
        from wherry.cli.output import print_json

        print_json(value)
        return
    from wherry.cli.template import Template

    sys.stdout.write(Template(escapes(args.format)).render(value) + "\n")


def filters(items: Sequence[str], known: Iterable[str]) -> dict[str, list[str]]:
    """`--filter` by key; raises InvalidArgument for a key that isn't known, and names those that are."""
    names = list(known)
    found: dict[str, list[str]] = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals:
            raise InvalidArgument(f"invalid filter {item!r}: it is KEY=VALUE, with KEY one of {', '.join(names)}")
        if key not in names:
            raise InvalidArgument(f"unknown filter {key!r}: there are {', '.join(names)}")
        found.setdefault(key, []).append(value)
    return found


def labels_fit(wanted: Sequence[str], labels: Mapping[str, str]) -> bool:
    """Whether labels have all that `label=KEY[=VALUE]` asks for."""
    for item in wanted:
        key, equals, value = item.partition("=")
        if key not in labels or (equals and labels[key] != value):
            return False
    return True


def cut(text: str, length: int, *, whole: bool = False) -> str:
    """A text of at most so many characters, the last one an ellipsis where something was cut."""
    return text if whole or len(text) <= length else text[: length - 1] + "…"


def decimal_size(count: float) -> str:
    """Bytes in powers of 1000 with three digits, as docker shows them: `7.05MB`."""
    number = float(count)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if number < 1000 or unit == "TB":
            break
        number /= 1000
    return f"{number:.3g}{unit}" if number < 1000 else f"{number:.0f}{unit}"


def binary_size(count: float) -> str:
    """Bytes in powers of 1024 with four digits, as docker shows memory: `1.945MiB`."""
    number = float(count)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if number < 1024 or unit == "TiB":
            break
        number /= 1024
    return f"{number:.4g}{unit}"
