"""Logs in Kubernetes' format, as `client/logs.py` reads them: what a kubelet calls their files, and what a record is.

    2016-10-06T00:17:09.669794202Z stdout F a line
    2016-10-06T00:17:09.669794202Z stderr P a part of one

A kubelet renames the current file, `0.log`, to `0.log.20060102-150405`, and compresses all such but the last. What it
has compressed is its own: `kubectl logs` doesn't read that either, and not even the last.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from wherry.client.logs import Entry, nanoseconds, open_file

_PARTIAL = b"P"


def files(path: str) -> Iterator[int]:
    """The files of a log, opened, newest first."""
    if (fd := open_file(path)) >= 0:
        yield fd
    # looked for when the current one is open: what is renamed from then on is there twice
    folder, name = os.path.split(path)
    try:
        found = [each for each in os.listdir(folder) if _is_rotated(each, name)]
    except OSError:
        return
    for each in sorted(found, reverse=True):
        if (fd := open_file(os.path.join(folder, each))) >= 0:
            yield fd


def _is_rotated(name: str, current: str) -> bool:
    return name.startswith(f"{current}.") and name[len(current) + 1 :].replace("-", "").isdigit()


def parse(line: bytes) -> Entry | None:
    """An entry of a record; None for what is none. Tags may follow the first one, with colons between them."""
    time, _, rest = line.partition(b" ")
    stream, _, rest = rest.partition(b" ")
    tags, space, text = rest.partition(b" ")
    if not space:
        return None
    try:
        at = nanoseconds(time.decode())
    except ValueError:
        return None
    end = b"" if tags.partition(b":")[0] == _PARTIAL else b"\n"
    return Entry(at, stream.decode(errors="replace"), text + end)
