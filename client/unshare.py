"""Into the namespaces that a user's containers live in."""

from __future__ import annotations

import os

from wherry.linux import rootless


def enter(state: str) -> None:
    """Makes this process root of the user's namespaces; they are made where no daemon made them yet.

    `state` is the daemon's state folder. For processes with one thread, which then start a program. Raises
    FailedPrecondition where the host doesn't allow it.
    """
    if os.geteuid() != 0:
        rootless.enter(state)
