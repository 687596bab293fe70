"""Devices of a container as docker's options name them: paths of the host, names of CDI, GPUs, rules."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any

from wherry.client import cdi
from wherry.client.spec import device, host_devices
from wherry.core.errors import InvalidArgument

_RULE = re.compile(r"([acb]) (\d+|\*):(\d+|\*) ([rwm]{1,3})")
GPU_KIND = "nvidia.com/gpu"


def add(spec: dict[str, Any], devices: Sequence[str], gpus: Sequence[str], rules: Sequence[str]) -> None:
    """Puts devices into a specification; raises InvalidArgument, NotFound."""
    for text in devices:
        if not cdi.is_name(text):
            _add_path(spec, text)
    for text in rules:
        _add_rule(spec, text)
    names = [text for text in devices if cdi.is_name(text)] + [name for text in gpus for name in gpu_names(text)]
    if names:
        cdi.apply(spec, names)


def _add_path(spec: dict[str, Any], text: str) -> None:
    add_path(spec, *parse(text))


def add_path(spec: dict[str, Any], path: str, target: str, access: str) -> None:
    """Puts a device of the host, or all those in a folder, into a specification; raises InvalidArgument."""
    found = host_devices(path) if os.path.isdir(path) else [device(os.path.realpath(path)) | {"path": path}]
    rules = spec["linux"]["resources"].setdefault("devices", [])
    kept = {entry["path"]: entry for entry in spec["linux"].get("devices") or ()}
    for entry in found:
        entry["path"] = target + entry["path"].removeprefix(path)
        kept[entry["path"]] = entry
        rules.append({"allow": True, "access": access, **{key: entry[key] for key in ("type", "major", "minor")}})
    spec["linux"]["devices"] = list(kept.values())


def parse(text: str) -> tuple[str, str, str]:
    """`PATH[:TARGET[:ACCESS]]` or `PATH:ACCESS`: path, target, access. Raises InvalidArgument."""
    parts = text.split(":")
    path, target, access = parts[0], parts[0], "rwm"
    if len(parts) == 2:
        if parts[1].startswith("/"):
            target = parts[1]
        else:
            access = parts[1]
    elif len(parts) == 3:
        target, access = parts[1] or path, parts[2]
    if not path.startswith("/") or not target.startswith("/") or len(parts) > 3:
        raise InvalidArgument(f"invalid device {text!r}: expected PATH[:TARGET[:rwm]], or vendor.com/class=name (CDI)")
    if not access or set(access) - set("rwm"):
        raise InvalidArgument(f"invalid device {text!r}: access {access!r} is made of r, w and m")
    return path, target, access


def _add_rule(spec: dict[str, Any], text: str) -> None:
    match = _RULE.fullmatch(text)
    if match is None:
        raise InvalidArgument(f"invalid device rule {text!r}: expected TYPE MAJOR:MINOR ACCESS, as in 'c 42:* rmw'")
    rule: dict[str, Any] = {"allow": True, "type": match[1], "access": match[4]}
    rule |= {name: int(value) for name, value in (("major", match[2]), ("minor", match[3])) if value != "*"}
    spec["linux"]["resources"].setdefault("devices", []).append(rule)


def gpu_names(text: str) -> list[str]:
    """CDI names for `--gpus all`, `--gpus 2` (the first two), `--gpus device=0,1`; raises InvalidArgument.

    There are no drivers beside CDI: a vendor's tool has to have written a specification (`nvidia-ctk cdi generate`).
    """
    value = text.strip().strip('"')
    if value == "all":
        return [f"{GPU_KIND}=all"]
    if value.isdigit():
        return [f"{GPU_KIND}={number}" for number in range(int(value))]
    fields, rest = {}, value
    for part in re.findall(r"(\w+)=((?:[^,=]|,(?!\w+=))+)", rest):
        fields[part[0]] = part[1].strip('"')
    if fields.get("driver", "nvidia") not in {"nvidia", "cdi"}:
        raise InvalidArgument(f"--gpus {text!r}: driver {fields['driver']!r} is unknown, devices come by CDI")
    if "device" in fields:
        names = fields["device"].split(",")
        return [name if cdi.is_name(name) else f"{GPU_KIND}={name}" for name in names]
    if "count" in fields:
        return gpu_names("all" if fields["count"] == "-1" else fields["count"])
    if any(key in fields for key in ("driver", "capabilities")):
        return [f"{GPU_KIND}=all"]
    raise InvalidArgument(f"--gpus {text!r}: expected all, a number, or device=0,1")
