"""Arguments that several commands read in the same way."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable

from wherry.core.errors import InvalidArgument

_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_DURATION = r"(\d+(?:\.\d*)?|\.\d+)(ns|us|µs|ms|s|m|h)"
_SIZES = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def duration(text: str) -> float:
    """Seconds from a duration as Go writes them (`1m30s`, `500ms`) or a plain number of seconds."""
    if re.fullmatch(r"\d+(\.\d*)?", text):
        return float(text)
    if not text or re.sub(_DURATION, "", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no duration (1m30s, 500ms)")
    return sum(float(number) * _UNITS[unit] for number, unit in re.findall(_DURATION, text))


def byte_size(text: str) -> int:
    """Bytes from a number with an optional unit of 1024 (`512m`, `2g`)."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([bkmgt]?)(?:i?b)?", text.strip().lower())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size (512m, 2g)")
    return int(float(match[1]) * _SIZES[match[2]])


def switch(text: str) -> bool:
    """A boolean as people write it, for argparse."""
    if text.lower() in {"1", "true", "yes", "on"}:
        return True
    if text.lower() in {"0", "false", "no", "off"}:
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


def pairs(items: Iterable[str]) -> dict[str, str]:
    """A dictionary from `KEY=VALUE`; a key alone has the value "" (which takes a label away)."""
    parsed = {}
    for item in items:
        key, _, value = item.partition("=")
        if not key:
            raise InvalidArgument(f"expected KEY=VALUE, got {item!r}")
        parsed[key] = value
    return parsed


def signal_number(text: str) -> int:
    """A signal's number from its number or name (`9`, `KILL`, `SIGKILL`, `RTMIN+3`)."""
    import signal

    if text.isascii() and text.isdigit():
        return int(text)
    name, plus, offset = text.upper().removeprefix("SIG").partition("+")
    try:
        number = int(signal.Signals[f"SIG{name}"])
        return number + int(offset) if plus else number
    except (KeyError, ValueError):
        raise argparse.ArgumentTypeError(f"{text!r} is no signal") from None


def user_secret(text: str) -> str:
    """`name:password`; asks for the password on the terminal where it wasn't given."""
    if not text or ":" in text:
        return text
    import getpass

    return f"{text}:{getpass.getpass('Password: ')}"
