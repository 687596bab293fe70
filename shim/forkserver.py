"""The fork server's command: `python -I -m wherry.shim.forkserver --control-fd N`, started by the daemon.

What it does is in `wherry.shim.nursery`; this module is what has to happen before anything of that is imported.
"""

from __future__ import annotations

import os
import sys

_COMPILE = "from wherry.runtime import container; container.preload(); import wherry.shim.nursery"


def main() -> None:
    """Become what nobody can write to, load, freeze, serve the control socket until its end."""
    if len(sys.argv) != 3 or sys.argv[1] != "--control-fd" or not sys.argv[2].isdigit():
        sys.exit("usage: python -I -m wherry.shim.forkserver --control-fd N\n\nStarted by wherryd, not by hand.")
    compile_elsewhere(int(sys.argv[2]))
    from wherry.runtime.sealed import ensure_sealed  # noqa: PLC0415 - may execute this process again

    ensure_sealed()
    single_threaded()
    from wherry.shim import nursery  # noqa: PLC0415 - after what was said above

    nursery.serve_control(int(sys.argv[2]))


def compile_elsewhere(control: int) -> None:
    """Have another process compile the modules where they aren't yet: after an installation, for the first start.

    What the compiler leaves in the heap lies among the objects that shims share: 220 kB more for each of them.
    """
    if sys.flags.optimize and not compiled() and keeps_compiled():
        command = [sys.executable, "-I", "-OO", "-c", _COMPILE]
        closed = [(os.POSIX_SPAWN_CLOSE, control)]
        os.waitpid(os.posix_spawn(sys.executable, command, os.environ, file_actions=closed), 0)


def keeps_compiled() -> bool:
    """Whether modules that are compiled now can be kept for the next time: not in somebody else's installation."""
    folder = os.path.dirname(__file__)
    kept = f"{folder}/__pycache__"
    return os.access(kept if os.path.isdir(kept) else folder, os.W_OK)


def compiled() -> bool:
    """Whether the optimised modules of this installation are there (by one of them, the last that is compiled)."""
    folder = os.path.dirname(__file__)
    try:
        with open(f"{folder}/__pycache__/nursery.{sys.implementation.cache_tag}.opt-2.pyc", "rb") as file:
            header = file.read(16)
        source = os.stat(f"{folder}/nursery.py")
    except OSError:
        return False
    # PEP 552: 0, and the source's time and size; or its hash, which need not be compared
    words = [int.from_bytes(header[at : at + 4], "little") for at in (4, 8, 12)]
    return words[0] != 0 or words[1:] == [int(source.st_mtime) & 0xFFFFFFFF, source.st_size & 0xFFFFFFFF]


def single_threaded() -> None:
    """Let nobody register what is to run after a fork; before the modules that would are imported.

    This process and its forks have one thread for life, so there is nothing to repair. What `threading` does after each
    fork (protobuf imports it) writes to 120 pages, a quarter of all that an idle shim doesn't share with the others.
    """

    def nothing(**hooks: object) -> None:
        """Forget the hooks."""

    os.register_at_fork = nothing


if __name__ == "__main__":
    main()
