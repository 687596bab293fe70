"""Points in time as people write them."""

from __future__ import annotations

import argparse
import calendar
import re
import time

from wherry.cli.arguments import duration

# RFC 3339 with what may be left out at its end: seconds, the time, the zone
_DATE = re.compile(
    r"(\d{4})-(\d\d)-(\d\d)(?:[Tt ](\d\d):(\d\d)(?::(\d\d)(\.\d{1,9})?)?)?(Z|z|[+-]\d\d:?\d\d)?", re.ASCII
)
_UNIX = re.compile(r"@?(\d+(?:\.\d*)?)", re.ASCII)

EXAMPLES = "10m (ago), 2026-11-22T18:00:00Z, 2026-11-22 or seconds since 1970"


def moment(text: str) -> float:
    """Seconds since the epoch: from a duration (so long ago), a date with or without a time (without a zone: in the
    local one), or such seconds. Raises ArgumentTypeError."""
    if (match := _UNIX.fullmatch(text)) is not None:
        return float(match[1])
    if (match := _DATE.fullmatch(text)) is not None:
        return _date(match, text)
    try:
        return time.time() - duration(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text!r} is no time: {EXAMPLES}") from None


def _date(match: re.Match[str], text: str) -> float:
    year, month, day, hour, minute, second = (int(part or 0) for part in match.groups()[:6])
    fraction, zone = float(match[7] or 0), match[8]
    if not (1 <= month <= 12 and 1 <= day <= 31 and hour < 24 and minute < 60 and second <= 60):
        raise argparse.ArgumentTypeError(f"{text!r} is no time: {EXAMPLES}")
    fields = (year, month, day, hour, minute, second, 0, 0, -1)
    if zone is None:
        return time.mktime(fields) + fraction
    at = calendar.timegm(fields) + fraction
    if zone in "Zz":
        return at
    offset = int(zone[1:3]) * 3600 + int(zone[-2:]) * 60
    return at - offset if zone[0] == "+" else at + offset
