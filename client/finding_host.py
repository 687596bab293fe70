"""What the checks of a host are made of (`doctor.py`, `doctor_user.py`)."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence

from wherry.core.tuples import NamedTuple

OK, WARNING, FAILURE = "ok", "warning", "failure"


class Finding(NamedTuple):
    """What a check found: `status` is OK, WARNING (something will be missing) or FAILURE (containers won't run)."""

    name: str
    status: str
    found: str
    advice: str = ""


Check = Callable[[], Finding | None]


def read(path: str) -> str:
    """A file's text, "" where it isn't there."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return ""


def tools(name: str, programs: Sequence[str], use: str, package: str) -> Finding:
    """Which of these programs are there; one is enough."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    found = [program for program in programs if shutil.which(program, path=path)]
    if found:
        return Finding(name, OK, ", ".join(found))
    return Finding(name, WARNING, f"no {' or '.join(programs)}", f"install {package}: {use}")


def in_child(work: Callable[[], None]) -> int:
    """Try something in a process that ends; 0, or the errno with which it failed (1 for what had none)."""
    child = os.fork()
    if not child:
        code = 1
        try:
            work()
            code = 0
        except OSError as error:
            code = error.errno or 1
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return abs(os.waitstatus_to_exitcode(status))
