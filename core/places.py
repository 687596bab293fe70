"""Where a daemon of root, and a daemon of an ordinary user, keeps its things: known to the daemon and to its clients.

Root's are below /var/lib and /run, a user's where the XDG Base Directory Specification says. Inside of the user
namespace that a user's daemon lives in, it looks like root to itself: the environment says whose it is.
"""

from __future__ import annotations

import os

from wherry.core.errors import PermissionDenied

# set for everything in a user's namespace: the user's id outside
INSIDE = "WHERRY_ROOTLESS_UID"


def is_users() -> bool:
    """Whether this process belongs to an ordinary user (also as root of that user's namespace)."""
    return os.geteuid() != 0 or bool(os.environ.get(INSIDE))


def user_id() -> int:
    """Whose process this is, as the host numbers users."""
    inside = os.environ.get(INSIDE, "")
    return int(inside) if inside.isdigit() else os.geteuid()


def runtime_folder() -> str:
    """What a reboot may take. Without XDG_RUNTIME_DIR a user's lies in /tmp, is made here, and must be the user's own.

    Raises PermissionDenied where somebody else made it first.
    """
    if not is_users():
        return "/run"
    return os.environ.get("XDG_RUNTIME_DIR") or private(f"/tmp/wherry-{user_id()}")


def data_folder() -> str:
    """What lasts."""
    if not is_users():
        return "/var/lib"
    return os.environ.get("XDG_DATA_HOME") or os.path.expanduser("~/.local/share")


def config_folder() -> str:
    """What people write."""
    if not is_users():
        return "/etc"
    return os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")


def log_folder() -> str:
    """What containers write, where it is kept for them."""
    if not is_users():
        return "/var/log/wherry"
    base = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return os.path.join(base, "wherry", "log")


def root(name: str = "wherry") -> str:
    """A daemon's `--root`."""
    return os.path.join(data_folder(), name)


def state(name: str = "wherry") -> str:
    """A daemon's `--state`."""
    return os.path.join(runtime_folder(), name)


def address(name: str = "wherry") -> str:
    """A daemon's socket."""
    return os.path.join(state(name), "wherryd.sock")


def private(folder: str) -> str:
    """Makes a user's folder, 0700, and returns it; raises PermissionDenied where somebody else was there first.

    In /tmp anybody can make a folder of this name: one that isn't ours, or that others may write, is refused.
    """
    os.makedirs(os.path.dirname(folder), exist_ok=True)
    try:
        os.mkdir(folder, 0o700)
    except FileExistsError:
        info = os.lstat(folder)
        if info.st_uid != os.geteuid() or info.st_mode & 0o022:
            raise PermissionDenied(f"{folder} belongs to somebody else, or others may write there") from None
    return folder
