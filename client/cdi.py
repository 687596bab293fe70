"""Devices by name: the Container Device Interface (https://github.com/cncf-tags/container-device-interface).

A vendor's tool writes specifications into /etc/cdi or /var/run/cdi; `vendor.com/class=name` means one device in them,
and what a container needs for it: device nodes, mounts, variables, hooks.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from wherry.core.errors import InvalidArgument, NotFound

# the later folder wins, as the specification has it
FOLDERS = ("/etc/cdi", "/var/run/cdi")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]*/[A-Za-z0-9][A-Za-z0-9_.-]*=[A-Za-z0-9][A-Za-z0-9_.:-]*")
# minor versions that differ only in what they add
_VERSION = re.compile(r"[01]\.\d+\.\d+")


def is_name(text: str) -> bool:
    """Whether a device is one of CDI's (`vendor.com/class=name`) and no path."""
    return _NAME.fullmatch(text) is not None


def folders() -> tuple[str, ...]:
    """Where specifications are looked for: WHERRY_CDI_DIRS (between colons), else the standard's places."""
    named = os.environ.get("WHERRY_CDI_DIRS")
    return tuple(named.split(":")) if named else FOLDERS


def apply(spec: dict[str, Any], names: Iterable[str], places: Sequence[str] = ()) -> None:
    """Gives a container's specification the devices; raises NotFound that says what there is, InvalidArgument.

    `places` are folders of specifications, in place of `folders()`.
    """
    wanted = list(dict.fromkeys(names))
    looked = tuple(places) or folders()
    found = load(looked)
    edited: list[str] = []
    for name in wanted:
        if name not in found:
            there = ", ".join(sorted(found)) or "none"
            raise NotFound(f"no device {name} in the CDI specifications of {', '.join(looked)}: there are {there}")
        kind = name.partition("=")[0]
        device, common = found[name]
        if kind not in edited:
            # what all devices of a kind need, once
            edited.append(kind)
            _edit(spec, common)
        _edit(spec, device)


def load(places: Sequence[str] = ()) -> dict[str, tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Devices by their full name: their own edits, and those that all of their specification need."""
    found: dict[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {}
    for folder in places or folders():
        try:
            names = sorted(os.listdir(folder))
        except OSError:
            continue
        for name in names:
            document = _read(os.path.join(folder, name))
            kind, common = str(document.get("kind") or ""), document.get("containerEdits") or {}
            for device in document.get("devices") or ():
                found[f"{kind}={device.get('name')}"] = (device.get("containerEdits") or {}, common)
    return found


def _read(path: str) -> Mapping[str, Any]:
    """A specification; {} for files that are none. YAML is read where PyYAML is installed."""
    kind = os.path.splitext(path)[1]
    if kind not in {".json", ".yaml", ".yml"}:
        return {}
    with open(path, encoding="utf-8") as file:
        text = file.read()
    try:
        document = json.loads(text) if kind == ".json" or text.lstrip().startswith("{") else _yaml(text, path)
    except ValueError as error:
        raise InvalidArgument(f"the CDI specification {path} can't be read: {error}") from error
    if not isinstance(document, dict):
        raise InvalidArgument(f"the CDI specification {path} is no object")
    if not _VERSION.fullmatch(str(document.get("cdiVersion") or "")):
        raise InvalidArgument(f"the CDI specification {path} has the version {document.get('cdiVersion')!r}")
    return document


def _yaml(text: str, path: str) -> Any:
    try:
        import yaml  # type: ignore[import-untyped] # an option: vendors' tools write JSON too
    except ImportError:
        raise InvalidArgument(
            f"the CDI specification {path} is YAML, and PyYAML isn't installed: 'pip install pyyaml', or have it "
            "written as JSON (nvidia-ctk cdi generate --format=json)"
        ) from None
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def _edit(spec: dict[str, Any], edits: Mapping[str, Any]) -> None:
    from wherry.client.spec import device as of_host
    from wherry.client.spec import merge_env

    process, linux = spec["process"], spec["linux"]
    if edits.get("env"):
        process["env"] = merge_env(process["env"], [str(item) for item in edits["env"]])
    for node in edits.get("deviceNodes") or ():
        entry = of_host(str(node.get("hostPath") or node["path"])) | {"path": str(node["path"])}
        for theirs, ours in (("type", "type"), ("major", "major"), ("minor", "minor"), ("fileMode", "fileMode"),
                             ("uid", "uid"), ("gid", "gid")):  # fmt: skip
            if node.get(theirs) is not None:
                entry[ours] = node[theirs]
        linux.setdefault("devices", []).append(entry)
        rule = {key: entry[key] for key in ("type", "major", "minor")}
        access = str(node.get("permissions") or "rwm")
        linux["resources"].setdefault("devices", []).append({"allow": True, **rule, "access": access})
    for mount in edits.get("mounts") or ():
        options = [str(item) for item in mount.get("options") or ("ro", "nosuid", "nodev", "rbind", "rprivate")]
        if not {"bind", "rbind"} & set(options) and str(mount.get("type") or "bind") == "bind":
            options.append("rbind")
        spec["mounts"].append(
            {
                "destination": str(mount["containerPath"]),
                "source": str(mount["hostPath"]),
                "type": str(mount.get("type") or "bind"),
                "options": options,
            }
        )
    for hook in edits.get("hooks") or ():
        entry = {key: hook[key] for key in ("path", "args", "env", "timeout") if hook.get(key) is not None}
        spec.setdefault("hooks", {}).setdefault(str(hook["hookName"]), []).append(entry)
    if edits.get("additionalGids"):
        user = process["user"]
        user["additionalGids"] = [*(user.get("additionalGids") or ()), *(int(gid) for gid in edits["additionalGids"])]
