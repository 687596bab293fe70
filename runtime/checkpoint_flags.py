"""What the flags of `checkpoint` and `restore` say."""

from __future__ import annotations

import os

from wherry.linux.syscalls import CLONE_NEWNET
from wherry.runtime.checkpoint import Options
from wherry.runtime.errors import INVALID, ContainerError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    Flags = dict[str, Any]

_DEFAULT_FOLDER = "checkpoint"  # in the current directory, as with runc
_SAME_NAMES = ("tcp-established", "ext-unix-sk", "shell-job", "lazy-pages", "file-locks", "auto-dedup")
_MODES = ("soft", "full", "strict", "ignore")


def for_checkpoint(criu: str, flags: Flags) -> Options:
    options = _options(criu, flags)
    options.leave_running = flags["leave-running"]
    options.pre_dump = flags["pre-dump"]
    options.status_fd = -1 if flags["status-fd"] is None else flags["status-fd"]
    options.parent_path = flags["parent-path"]
    if options.parent_path:
        if os.path.isabs(options.parent_path):
            raise ContainerError("--parent-path must be relative", INVALID)
        parent = os.path.normpath(os.path.join(options.image_path, options.parent_path))  # the images' may not be there
        if not os.path.isdir(parent):
            raise ContainerError(f"--parent-path: {parent} is no directory", INVALID)
    if flags["page-server"]:
        address, colon, port = flags["page-server"].rpartition(":")
        if not colon or not address or not port.isdigit():
            raise ContainerError("Use --page-server ADDRESS:PORT to specify page server", INVALID)
        options.page_server = address.strip("[]"), int(port)
    return options


def for_restore(criu: str, flags: Flags) -> Options:
    options = _options(criu, flags)
    options.lsm_profile = flags["lsm-profile"]
    options.lsm_mount_context = flags["lsm-mount-context"]
    return options


def _options(criu: str, flags: Flags) -> Options:
    options = Options(os.path.abspath(flags["image-path"] or _DEFAULT_FOLDER), criu=criu)
    options.work_path = os.path.abspath(flags["work-path"]) if flags["work-path"] else ""
    for name in _SAME_NAMES:
        setattr(options, name.replace("-", "_"), flags[name])
    mode = flags["manage-cgroups-mode"]
    if mode and mode not in _MODES:
        raise ContainerError("Invalid manage cgroups mode", INVALID)
    options.manage_cgroups_mode = mode
    for name in flags["empty-ns"]:
        if name != "network":
            raise ContainerError(f'namespace "{name}" is not supported', INVALID)
        options.empty_ns |= CLONE_NEWNET
    return options
