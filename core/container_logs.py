"""Where a container's log is and what its files are called: what the shim writes, the client reads, the daemon removes.

    json-file:///var/log/wherry/NAMESPACE/ID?max-size=10m&max-file=5

    json-file-fifo:///var/log/wherry/NAMESPACE/ID?max-size=10m&fifo=/run/wherry/fifo/0123/ID-stdout

    cri-log:///var/log/pods/NAMESPACE_POD_UID/CONTAINER/0.log?max-line=16384

The last one is a file in Kubernetes' format, which its kubelet names, reads, rotates and removes; without a path
nothing is kept. The second one is for a container that somebody follows: its output goes to the log, and to them by a
FIFO. (A scheme of its own, so that a shim that doesn't know it says so.)

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
CRI: Final = "cri-log"
FOLLOWED: Final = "json-file-fifo"
_FIFO: Final = "fifo="
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
# bytes of a line in Kubernetes' format, above which it is written in parts (containerd's max_container_log_line_size)
MAX_LINE: Final = 16 << 10
_UNITS: Final = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}


def uri_of(namespace: str, container_id: str, options: Mapping[str, str]) -> str:
    """The URI of a container's log. `options` are `max-size`, `max-file` and `name`. Raises InvalidArgument."""
    check(options)
    query = "&".join(f"{key}={value}" for key, value in options.items())
    return f"{SCHEME}://{FOLDER}/{namespace}/{container_id}{'?' if query else ''}{query}"


def cri_uri(path: str, max_line: int = MAX_LINE) -> str:
    """The URI of a container's log in Kubernetes' format; both streams go there. `max_line` 0 or less: no limit."""
    quoted = path.replace("%", "%25").replace("?", "%3F")
    return f"{CRI}://{quoted}?max-line={max_line}"


def check(options: Mapping[str, str]) -> None:
    """Raises InvalidArgument where a log can't have these options."""
    limits(options)
    unknown = set(options) - {"max-size", "max-file", "name"}
    if unknown:
        raise InvalidArgument(f"unknown log option {min(unknown)!r}: there are max-size and max-file")


def folder_of(uri: str) -> str:
    """The folder that a log's URI names, "" where it is no log of ours."""
    scheme, _, rest = uri.partition("://")
    return rest.partition("?")[0] if scheme in {SCHEME, FOLLOWED} else ""


def followed(uri: str, fifo: str) -> str:
    """The URI of a log of ours whose output goes to a FIFO, too; "" for a stream that nobody follows (`fifo` "")."""
    if not fifo:
        return ""
    rest = uri.removeprefix(SCHEME)
    return f"{FOLLOWED}{rest}{'&' if '?' in rest else '?'}{_FIFO}{fifo}"


def fifo_of(stream: str) -> str:
    """The FIFO of a stream: its path, that which a log of ours names beside it, or "" for other URIs."""
    if stream.startswith(FOLLOWED + "://"):
        return next(
            (item.removeprefix(_FIFO) for item in stream.partition("?")[2].split("&") if item.startswith(_FIFO)), ""
        )
    return "" if "://" in stream and not stream.startswith("fifo://") else stream.removeprefix("fifo://")


def cri_path_of(uri: str) -> str:
    """The file that the URI of a log in Kubernetes' format names, "" where it is another or names none."""
    scheme, _, rest = uri.partition("://")
    return rest.partition("?")[0].replace("%3F", "?").replace("%25", "%") if scheme == CRI else ""


def path_of(uri: str) -> str:
    """The file that output goes to, of a log of ours the current one; "" where it is no file."""
    folder = folder_of(uri)
    if folder:
        return f"{folder}/{CURRENT}"
    if path := cri_path_of(uri):
        return path
    return uri.partition("?")[0].removeprefix("file://") if uri.startswith("file://") else ""


def plain_of(uri: str) -> str:
    """Where a shim that isn't ours is to write instead: a file of plain text in the same folder, or the FIFO of who
    follows; other URIs as they are."""
    if uri.startswith(FOLLOWED + "://"):
        return fifo_of(uri)
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
