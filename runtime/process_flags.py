"""What the flags of `exec` and `update` say, as objects of the specification."""

from __future__ import annotations

import json
import sys

from wherry.linux.capabilities import NUMBERS
from wherry.runtime import spec, state
from wherry.runtime.errors import INVALID, ContainerError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    Flags = dict[str, Any]


def build(root: str, flags: Flags, arguments: list[str]) -> dict[str, Any]:
    """The `process` object for `exec`: a file's, or the container's own with the flags' changes."""
    if flags["process"]:
        try:
            with open(flags["process"], "rb") as file:
                process = json.loads(file.read())
        except OSError as error:
            raise ContainerError(f"open {flags['process']}: {(error.strerror or '').lower()}", INVALID) from None
        except ValueError as error:
            raise ContainerError(f"{flags['process']}: not JSON: {error}", INVALID) from None
        spec.validate_process(process)
        return process  # type: ignore[no-any-return]
    if len(arguments) < 2:
        raise ContainerError("process args cannot be empty", INVALID)
    found = state.load(root, arguments[0])
    try:
        process = dict(found.spec()["process"])
    except OSError:
        raise ContainerError("cannot exec in a stopped container") from None
    process["args"] = arguments[1:]
    process["terminal"] = flags["tty"]
    if not flags["tty"]:
        process.pop("consoleSize", None)
    if flags["cwd"]:
        process["cwd"] = flags["cwd"]
    process["env"] = [*(process.get("env") or ()), *flags["env"]]
    if flags["no-new-privs"]:
        process["noNewPrivileges"] = True
    if flags["apparmor"]:
        process["apparmorProfile"] = flags["apparmor"]
    if flags["process-label"]:
        process["selinuxLabel"] = flags["process-label"]
    _set_user(process, flags)
    _add_capabilities(process, flags["cap"])
    return process


def _set_user(process: dict[str, Any], flags: Flags) -> None:
    user = dict(process.get("user") or {})
    if flags["user"]:
        uid, colon, gid = flags["user"].partition(":")
        for text in (uid, *([gid] if colon else [])):
            if not text.isdigit():
                raise ContainerError(f'strconv.Atoi: parsing "{text}": invalid syntax', INVALID)
        user["uid"] = int(uid)
        if colon:
            user["gid"] = int(gid)
    for text in flags["additional-gids"]:
        if not text.isdigit():
            raise ContainerError(f'strconv.Atoi: parsing "{text}": invalid syntax', INVALID)
        user["additionalGids"] = [*(user.get("additionalGids") or ()), int(text)]
    process["user"] = user


def _add_capabilities(process: dict[str, Any], names: list[str]) -> None:
    if not names:
        return
    for name in names:
        if name not in NUMBERS:
            raise ContainerError(f'unknown capability "{name}"', INVALID)
    sets = {key: list(value or ()) for key, value in (process.get("capabilities") or {}).items()}
    for key in ("bounding", "effective", "permitted"):
        have = sets.setdefault(key, [])
        have += [name for name in names if name not in have]
    # Ambient ones can only be raised for those that are inheritable.
    inheritable = sets.get("inheritable") or []
    sets["ambient"] = [*(sets.get("ambient") or ()), *(n for n in names if n in inheritable)]
    process["capabilities"] = sets


_UPDATES: tuple[tuple[str, str, str], ...] = (
    ("blkio-weight", "blockIO", "weight"),
    ("cpu-period", "cpu", "period"),
    ("cpu-quota", "cpu", "quota"),
    ("cpu-burst", "cpu", "burst"),
    ("cpu-share", "cpu", "shares"),
    ("cpu-rt-period", "cpu", "realtimePeriod"),
    ("cpu-rt-runtime", "cpu", "realtimeRuntime"),
    ("cpu-idle", "cpu", "idle"),
    ("cpuset-cpus", "cpu", "cpus"),
    ("cpuset-mems", "cpu", "mems"),
    ("memory", "memory", "limit"),
    ("memory-reservation", "memory", "reservation"),
    ("memory-swap", "memory", "swap"),
    ("pids-limit", "pids", "limit"),
)
_SIZES = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def resources(flags: Flags) -> dict[str, Any]:
    """The `linux.resources` object for `update`, from a file, stdin or flags."""
    if flags["resources"]:
        try:
            if flags["resources"] == "-":
                raw: str | bytes = sys.stdin.read()
            else:
                with open(flags["resources"], "rb") as file:
                    raw = file.read()
            found = json.loads(raw)
        except OSError as error:
            raise ContainerError(f"open {flags['resources']}: {(error.strerror or '').lower()}", INVALID) from None
        except ValueError as error:
            raise ContainerError(f"resources: not JSON: {error}", INVALID) from None
        if not isinstance(found, dict):
            raise ContainerError("resources: must be an object", INVALID)
        return found
    wanted: dict[str, Any] = {}
    for flag, group, key in _UPDATES:
        value = flags[flag]
        if value is None or value == "":
            continue
        wanted.setdefault(group, {})[key] = _size(flag, value) if group == "memory" else value
    return wanted


def _size(flag: str, text: str) -> int:
    """Bytes: `-1`, `4096`, `32m`, `1GiB`."""
    if text == "-1":
        return -1
    digits = text.lower().rstrip("ib") if not text.isdigit() else text
    unit = digits[-1:] if digits[-1:] in _SIZES and not digits[-1:].isdigit() else ""
    number = digits.removesuffix(unit)
    if not number.isdigit():
        raise ContainerError(f"invalid value for {flag}: invalid size: '{text}'", INVALID)
    return int(number) * _SIZES[unit]
