"""Where a container's log is and what its files are called: what the shim writes, the client reads, the daemon removes.

    json-file:///var/log/wherry/NAMESPACE/ID?max-size=10m&max-file=5

The path is a folder. In it `json.log` is written to, `json.log.1` is the one before, and so on; `name` holds what
people call the container, for those who look while no daemon runs.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from typing import Final

from wherry.core.errors import InvalidArgument
from wherry.core.places import log_folder

SCHEME: Final = "json-file"
# a folder that doesn't depend on the daemon's, so that logs are found without one
FOLDER: Final = log_folder()
CURRENT: Final = "json.log"
NAME: Final = "name"
# what a shim writes that doesn't know our logs
PLAIN: Final = "plain.log"
# bytes that a file may have, and how many files are kept, the current one included; docker keeps one file without end
MAX_SIZE: Final = 10 << 20
MAX_FILES: Final = 5
# a file must hold the longest record (16 KiB of output, escaped) a few times over
LEAST_SIZE: Final = 4 << 10
MOST_FILES: Final = 1000
_UNITS: Final = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}


def uri_of(namespace: str, container_id: str, options: Mapping[str, str]) -> str:
    """The URI of a container's log. `options` are `max-size`, `max-file` and `name`. Raises InvalidArgument."""
    check(options)
    query = "&".join(f"{key}={value}" for key, value in options.items())
    return f"{SCHEME}://{FOLDER}/{namespace}/{container_id}{'?' if query else ''}{query}"


def check(options: Mapping[str, str]) -> None:
    """Raises InvalidArgument where a log can't have these options."""
    limits(options)
    unknown = set(options) - {"max-size", "max-file", "name"}
    if unknown:
        raise InvalidArgument(f"unknown log option {min(unknown)!r}: there are max-size and max-file")


def folder_of(uri: str) -> str:
    """The folder that a log's URI names, "" where it is no log of ours."""
    scheme, _, rest = uri.partition("://")
    return rest.partition("?")[0] if scheme == SCHEME else ""


def path_of(uri: str) -> str:
    """The file that output goes to, of a log of ours the current one; "" where it is no file."""
    folder = folder_of(uri)
    if folder:
        return f"{folder}/{CURRENT}"
    return uri.partition("?")[0].removeprefix("file://") if uri.startswith("file://") else ""


def plain_of(uri: str) -> str:
    """Where a shim that isn't ours is to write instead: a file of plain text in the same folder; other URIs as they
    are."""
    folder = folder_of(uri)
    return f"file://{folder}/{PLAIN}" if folder else uri


def limits(options: Mapping[str, str]) -> tuple[int, int]:
    """Bytes of a file (0: no limit) and how many files, from the options' texts. Raises InvalidArgument."""
    size = _size(options.get("max-size", ""))
    text = options.get("max-file", "") or str(MAX_FILES)
    if not (text.isascii() and text.isdigit()) or not 1 <= int(text) <= MOST_FILES:
        raise InvalidArgument(f"log option max-file={text}: expected a number from 1 to {MOST_FILES}")
    return size, int(text)


def _size(text: str) -> int:
    if not text:
        return MAX_SIZE
    if text == "-1":
        return 0
    lower = text.lower().removesuffix("ib")
    number = lower.rstrip("bkmg")
    factor = _UNITS.get(lower[len(number) :][:1])
    if not (number.isascii() and number.isdigit()) or factor is None:
        raise InvalidArgument(f"log option max-size={text}: expected a size (512k, 10m), or -1 for no limit")
    size = int(number) * factor
    if size < LEAST_SIZE:
        raise InvalidArgument(f"log option max-size={text}: expected at least {LEAST_SIZE} bytes")
    return size


def remove(uri: str) -> None:
    """Remove a log with its folder; what else somebody put there stays. What can't be removed is left."""
    folder = folder_of(uri)
    if not folder:
        return
    with contextlib.suppress(OSError):
        for name in os.listdir(folder):
            if name in (CURRENT, NAME, PLAIN) or name.startswith(CURRENT + "."):
                os.unlink(os.path.join(folder, name))
        os.rmdir(folder)
