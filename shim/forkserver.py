"""The fork server's command: `python -I -m wherry.shim.forkserver --control-fd N`, started by the daemon.

What it does is in `wherry.shim.nursery`; this module is what has to happen before anything of that is imported.
"""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Become what nobody can write to, load, freeze, serve the control socket until its end."""
    if len(sys.argv) != 3 or sys.argv[1] != "--control-fd" or not sys.argv[2].isdigit():
        sys.exit("usage: python -I -m wherry.shim.forkserver --control-fd N\n\nStarted by wherryd, not by hand.")
    from wherry.runtime.sealed import ensure_sealed  # noqa: PLC0415 - may execute this process again

    ensure_sealed()
    single_threaded()
    from wherry.shim import nursery  # noqa: PLC0415 - after what was said above

    nursery.serve_control(int(sys.argv[2]))


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
