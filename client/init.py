"""`--init`: a program that is a container's first process in place of the one that people want to run.

It reaps what is orphaned and passes signals on, for programs that do neither. It has to be static, since an image may
hold no libraries: it is looked for on the host, under the names that packages give to it, and mounted into the
container.
"""

from __future__ import annotations

import os
import shutil
from typing import Literal

from wherry.core.errors import FailedPrecondition

# where docker has it: people know it from `ps`
INSIDE = "/sbin/docker-init"
# all of them take a command after `--`; Debian's `tini` is dynamic, its `tini-static` isn't
_NAMES = ("tini-static", "catatonit", "docker-init", "dumb-init")
_PLACES = ("/usr/libexec/podman", "/usr/lib/podman", "/usr/libexec/docker", "/usr/local/bin")


def program() -> str:
    """The path of a static init on this host; WHERRY_INIT names one. Raises FailedPrecondition without any."""
    named = os.environ.get("WHERRY_INIT")
    if named:
        if not os.path.isfile(named):
            raise FailedPrecondition(f"WHERRY_INIT={named}: there is no such file")
        return named
    path = os.pathsep.join((os.environ.get("PATH", os.defpath), *_PLACES))
    for name in _NAMES:
        found = shutil.which(name, path=path)
        if found and is_static(found):
            return os.path.realpath(found)
    raise FailedPrecondition(
        "--init needs a static init on the host, and there is none: install tini (apt-get install tini) or catatonit, "
        "or name one in WHERRY_INIT"
    )


def is_static(path: str) -> bool:
    """Whether a program runs without libraries: an ELF file without an interpreter (elf(5), PT_INTERP)."""
    try:
        with open(path, "rb") as file:
            header = file.read(64)
            if header[:5] != b"\x7fELF\x02":
                return False
            order: Literal["little", "big"] = "little" if header[5] == 1 else "big"
            start = int.from_bytes(header[32:40], order)
            size, count = int.from_bytes(header[54:56], order), int.from_bytes(header[56:58], order)
            file.seek(start)
            table = file.read(size * count)
    except OSError:
        return False
    return all(int.from_bytes(table[at : at + 4], order) != 3 for at in range(0, len(table), size or 1))


def mount() -> dict[str, object]:
    """The mount of the specification that brings it into a container. Raises FailedPrecondition."""
    options = ["bind", "ro", "nosuid", "nodev", "exec"]
    return {"type": "bind", "source": program(), "destination": INSIDE, "options": options}
