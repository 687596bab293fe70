"""SELinux: the labels of a pod, of a container's processes and of its files, and files of the host that get one.

Nothing of it happens unless the configuration says `enable_selinux` and the kernel has a policy; what a kubelet asks
for by name is checked all the same.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Final

from wherry.core.errors import FailedPrecondition, InvalidArgument, ResourceExhausted
from wherry.core.names import quote
from wherry.proto import cri_pb2 as cri

if TYPE_CHECKING:
    from wherry.cri.settings import Settings

_ENFORCE: Final = "/sys/fs/selinux/enforce"
_LEVEL = re.compile(r"s\d{1,2}(-s\d{1,2})?(:c\d{1,4}(\.c\d{1,4})?(,c\d{1,4}(\.c\d{1,4})?)*)?")
_DEFAULTS: Final = ("system_u", "system_r", "container_t")
# pairs of categories that are drawn before it is said that there are none left
_DRAWS: Final = 10_000
_ATTRIBUTE: Final = "security.selinux"
# folders of the host that no container makes its own (those that runc's and podman's library for SELinux refuses, too)
_THE_HOSTS: Final = frozenset(
    (
        *("/", "/bin", "/boot", "/dev", "/etc", "/etc/passwd", "/etc/pki", "/etc/shadow", "/home", "/lib", "/lib64"),
        *("/media", "/opt", "/proc", "/root", "/run", "/sbin", "/srv", "/sys", "/tmp", "/usr", "/var", "/var/lib"),
        "/var/log",
    )
)


def has_selinux() -> bool:
    """Whether the kernel has SELinux and a policy is loaded."""
    return os.path.exists(_ENFORCE)


def pod_label(options: cri.SELinuxOption, taken: Iterable[str], categories: int) -> str:
    """A pod's, USER:ROLE:TYPE:LEVEL: what its configuration says, the rest by default, with categories that no other
    pod has. `taken` are the labels of the other pods, `categories` how many there are to draw of.

    Raises ResourceExhausted where no pair is left.
    """
    given = (options.user, options.role, options.type)
    level = options.level or _level({":".join(each.split(":")[3:]) for each in taken}, categories)
    return ":".join([*(mine or default for mine, default in zip(given, _DEFAULTS, strict=True)), level])


def _level(taken: set[str], categories: int) -> str:
    """Two categories of the range, which are nobody else's."""
    for _ in range(_DRAWS):
        low, high = sorted((secrets.randbelow(categories), secrets.randbelow(categories)))
        level = f"s0:c{low},c{high}"
        if low != high and level not in taken:
            return level
    raise ResourceExhausted(f"no pair of {categories} SELinux categories is left: resource exhausted")


def container_labels(options: cri.SELinuxOption | None, pod: str, settings: Settings) -> tuple[str, str]:
    """The labels of a container's processes and of its files; "" where SELinux is off. `pod` is the pod's.

    Raises InvalidArgument for a level that is none.
    """
    if options is not None and options.level and _LEVEL.fullmatch(options.level) is None:
        raise InvalidArgument(f"the format of 'level' {options.level!r} is not correct: invalid argument")
    if not settings.enable_selinux or not has_selinux():
        return "", ""
    if options is None or not (options.user or options.role or options.type or options.level):
        return (pod, file_label(pod)) if pod else ("", "")
    given = (options.user, options.role, options.type)
    mine = [each or default for each, default in zip(given, _DEFAULTS, strict=True)]
    level = options.level or (":".join(pod.split(":")[3:]) if pod else "s0")
    label = ":".join([*mine, level])
    return label, file_label(label)


def file_label(process: str) -> str:
    """The label of the files that a process with this label may use."""
    parts = process.split(":")
    return ":".join([parts[0], "object_r", "container_file_t", *parts[3:]])


def relabel(path: str, label: str) -> None:
    """Give a file or a tree of the host a label; a file system without labels is left as it is.

    Raises FailedPrecondition for folders that the host lives in, and where it can't be done.
    """
    if os.path.normpath(path) in _THE_HOSTS:
        raise FailedPrecondition(f"SELinux relabeling of {path} is not allowed: failed precondition")
    encoded = label.encode() + b"\0"
    try:
        for each in _tree(path):
            try:
                os.setxattr(each, _ATTRIBUTE, encoded, follow_symlinks=False)
            except FileNotFoundError:  # it went away meanwhile
                if each == path:
                    raise
    except OSError as error:
        if error.errno != errno.ENOTSUP:
            raise FailedPrecondition(f"relabel {quote(path)} with {quote(label)} failed: {error}") from error


def _tree(path: str) -> Iterator[str]:
    """A path and all that is below it; links are not followed. Raises OSError."""
    yield path
    if os.path.islink(path) or not os.path.isdir(path):
        return

    def fail(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise error

    for folder, folders, files in os.walk(path, onerror=fail):
        for name in (*folders, *files):
            yield os.path.join(folder, name)
