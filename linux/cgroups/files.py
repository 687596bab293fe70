"""Reading and writing the small files of a cgroup filesystem, with as few system calls as they need."""

from __future__ import annotations

import os

TYPE_CHECKING = False  # typing alone would cost as much as a container's cgroups; type checkers know the name
if TYPE_CHECKING:
    from collections.abc import Iterator

#: "max" in a v2 file, and what containerd's metrics call unlimited.
UNLIMITED = 2**64 - 1
_CHUNK = 65536


def read(path: str) -> str:
    """The text of a file (kernfs files give all that fits into one read; larger ones are read on)."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        data = os.read(fd, _CHUNK)
        if len(data) >= 4096:  # a page is the least that seq_file hands out at once; there may be more
            while chunk := os.read(fd, _CHUNK):
                data += chunk
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from None
    finally:
        os.close(fd)
    return data.decode()


def read_or_empty(path: str) -> str:
    """The text of a file, or "" where the kernel doesn't have the file or the feature behind it."""
    try:
        return read(path)
    except OSError:
        # ENOENT: not configured; EOPNOTSUPP, EINVAL: PSI or a policy is switched off; ENODEV: the cgroup just went
        return ""


def write(path: str, value: str) -> None:
    """Write a value in one call. OSError names the file and the value ("… write '9' …")."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, value.encode())
    except OSError as error:
        msg = f"write {value!r}: {error.strerror}"
        raise OSError(error.errno, msg, path) from None
    finally:
        os.close(fd)


def write_lines(path: str, lines: list[str]) -> None:
    """Write each line in a call of its own to a file that takes one entry a call."""
    if not lines:
        return
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    line = ""
    try:
        for line in lines:
            os.pwrite(fd, line.encode(), 0)
    except OSError as error:
        msg = f"write {line!r}: {error.strerror}"
        raise OSError(error.errno, msg, path) from None
    finally:
        os.close(fd)


def try_write(path: str, value: str) -> bool:
    """Write a value; False where the kernel refuses or has no such file."""
    try:
        write(path, value)
    except OSError:
        return False
    return True


def signal_all(pids: list[int], signal: int) -> None:
    """Send a signal to each; those that are gone by now don't matter."""
    for pid in pids:
        try:
            os.kill(pid, signal)
        except ProcessLookupError:
            continue


def number(text: str, default: int = 0) -> int:
    """A number of a cgroup file; "max" is UNLIMITED, nothing is `default`."""
    text = text.strip()
    if not text:
        return default
    return UNLIMITED if text == "max" else int(text)


def key_values(text: str) -> Iterator[tuple[str, int]]:
    """The lines `KEY NUMBER` of a flat keyed file."""
    for line in text.splitlines():
        key, _, value = line.partition(" ")
        if value.isdecimal():
            yield key, int(value)


def subdirectories(path: str) -> list[str]:
    """The cgroups directly below a cgroup; empty if it is gone."""
    try:
        with os.scandir(path) as entries:
            return [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
    except (FileNotFoundError, NotADirectoryError):
        return []


def list_pids(path: str, recursive: bool) -> list[int]:
    """The pids in a cgroup's `cgroup.procs` (and in those below); empty if it is gone."""
    try:
        found = [int(line) for line in read(os.path.join(path, "cgroup.procs")).split()]
    except OSError:
        # gone (ENOENT, ENODEV), or a threaded cgroup, which doesn't list processes (EOPNOTSUPP)
        found = []
    if recursive:
        for child in subdirectories(path):
            found += list_pids(child, recursive=True)
    return found
