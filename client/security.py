"""`--security-opt` and capabilities as docker's options name them, in the specification."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from wherry.client.spec import ALL_DEVICES, capability, host_devices, own_capabilities, seccomp_of
from wherry.client.spec_defaults import capabilities
from wherry.core.errors import InvalidArgument
from wherry.core.tuples import NamedTuple


class Security(NamedTuple):
    """`seccomp`: "" is the default profile, `unconfined` none, else a file; `apparmor` likewise, else a name.

    `label` is SELinux' context.
    """

    seccomp: str = ""
    no_new_privileges: bool = False
    apparmor: str = ""
    label: str = ""
    unmasked: bool = False
    writable_cgroups: bool = False


def parse_options(items: Iterable[str]) -> Security:
    """From `KEY=VALUE` or `KEY:VALUE` items; raises InvalidArgument."""
    security = Security()
    for item in items:
        separator = "=" if "=" in item else ":"
        key, given, value = item.partition(separator)
        security = _option(security, item, key, value if given else None)
    return security


def _option(security: Security, item: str, key: str, value: str | None) -> Security:
    if key in {"no-new-privileges", "writable-cgroups"}:
        if value not in {None, "true", "false"}:
            raise InvalidArgument(f"--security-opt {item!r}: {key} is true or false")
        on = value != "false"
        return security._replace(no_new_privileges=on) if key[0] == "n" else security._replace(writable_cgroups=on)
    if not value:
        raise InvalidArgument(
            f"--security-opt {item!r}: expected seccomp=FILE, apparmor=PROFILE, label=VALUE, no-new-privileges, "
            "systempaths=unconfined or writable-cgroups"
        )
    if key == "seccomp":
        return security._replace(seccomp="" if value in {"default", "builtin"} else value)
    if key == "apparmor":
        return security._replace(apparmor=value)
    if key == "systempaths":
        if value != "unconfined":
            raise InvalidArgument(f"--security-opt {item!r}: systempaths can only be unconfined")
        return security._replace(unmasked=True)
    if key == "label":
        # `disable` is what we do unless a whole context is given: there is no SELinux policy of ours
        return security._replace(label="" if value == "disable" else value)
    raise InvalidArgument(f"--security-opt {item!r}: unknown option {key!r}")


def apply(
    spec: dict[str, Any], security: Security, *, privileged: bool, add: Sequence[str], drop: Sequence[str]
) -> None:
    """Capabilities, seccomp, masks and profiles of a specification that has the defaults; raises InvalidArgument."""
    process, linux = spec["process"], spec["linux"]
    names = _capabilities(list(process["capabilities"]["bounding"]), privileged=privileged, add=add, drop=drop)
    process["capabilities"] = capabilities(names)
    process["noNewPrivileges"] = security.no_new_privileges
    apparmor = security.apparmor or ("" if privileged else default_profile())
    if apparmor and apparmor != "unconfined":
        process["apparmorProfile"] = apparmor
    if security.label:
        process["selinuxLabel"] = security.label
        linux["mountLabel"] = security.label
    if privileged or security.unmasked:
        linux["maskedPaths"], linux["readonlyPaths"] = [], []
    writable = {"sysfs", "cgroup"} if privileged else {"cgroup"} if security.writable_cgroups else set()
    for mount in spec["mounts"]:
        if mount.get("type") in writable:
            mount["options"] = ["rw" if option == "ro" else option for option in mount["options"]]
    if privileged:
        linux["devices"] = host_devices("/dev")
        linux["resources"]["devices"] = [dict(rule) for rule in ALL_DEVICES]
    wanted = security.seccomp or ("unconfined" if privileged else "")
    if wanted != "unconfined":
        profile = seccomp_of(wanted, names)
        linux["seccomp"] = of_docker(profile, names) if is_dockers(profile) else profile


def default_profile() -> str:
    """AppArmor's profile of a container for which none is named; "" where the host hasn't got it."""
    from wherry.core import apparmor

    return apparmor.NAME if apparmor.loaded() else ""


def _capabilities(names: list[str], *, privileged: bool, add: Sequence[str], drop: Sequence[str]) -> list[str]:
    """docker's rule: ALL is added or dropped first, then what is named."""
    added, dropped = [capability(name) for name in add], [capability(name) for name in drop]
    if privileged or "CAP_ALL" in added:
        names = own_capabilities()
    if "CAP_ALL" in dropped:
        names = []
    names += [name for name in added if name not in names and name != "CAP_ALL"]
    _known([*added, *dropped])
    return [name for name in names if name not in dropped or name in added]


def _known(names: Iterable[str]) -> None:
    from wherry.client.capabilities import NAMES

    for name in names:
        if name != "CAP_ALL" and name not in NAMES:
            raise InvalidArgument(f"unknown capability {name.removeprefix('CAP_')}: capabilities(7) lists them")


# what uname(2) calls a machine, by the names of the specification
_ARCHITECTURES = {"x86_64": "SCMP_ARCH_X86_64", "aarch64": "SCMP_ARCH_AARCH64", "riscv64": "SCMP_ARCH_RISCV64"}
_GO_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64", "riscv64": "riscv64"}


def is_dockers(profile: Mapping[str, Any]) -> bool:
    """Whether a seccomp profile is in docker's form, with conditions, and not the specification's."""
    return "archMap" in profile or any(
        "includes" in rule or "excludes" in rule or "name" in rule for rule in profile.get("syscalls") or ()
    )


def of_docker(profile: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The specification's form of a profile in docker's, for this host and these capabilities.

    A rule holds where the container has all capabilities of its `includes` and none of its `excludes`, and likewise for
    architectures (Go's names) and the oldest kernel.
    """
    machine = os.uname().machine
    known = _ARCHITECTURES.get(machine, "")
    architectures = [str(item) for item in profile.get("architectures") or ()]
    for entry in profile.get("archMap") or ():
        if entry.get("architecture") == known:
            architectures = [known, *(str(item) for item in entry.get("subArchitectures") or ())]
    rules = []
    for rule in profile.get("syscalls") or ():
        if not _holds(rule, names, _GO_ARCHITECTURES.get(machine, machine)):
            continue
        kept = {key: rule[key] for key in ("action", "errnoRet") if rule.get(key) is not None}
        args = rule.get("args")
        called = list(rule.get("names") or ([rule["name"]] if rule.get("name") else []))
        rules.append({"names": called, **kept, **({"args": args} if args else {})})
    found: dict[str, Any] = {"defaultAction": profile.get("defaultAction"), "syscalls": rules}
    if profile.get("defaultErrnoRet") is not None:
        found["defaultErrnoRet"] = profile["defaultErrnoRet"]
    return {**found, "architectures": architectures} if architectures else found


def _holds(rule: Mapping[str, Any], names: Sequence[str], architecture: str) -> bool:
    includes, excludes = rule.get("includes") or {}, rule.get("excludes") or {}
    if includes.get("arches") and architecture not in includes["arches"]:
        return False
    if architecture in (excludes.get("arches") or ()):
        return False
    if any(name not in names for name in includes.get("caps") or ()):
        return False
    if any(name in names for name in excludes.get("caps") or ()):
        return False
    return _kernel() >= _version(str(includes.get("minKernel") or "0"))


def _kernel() -> tuple[int, ...]:
    return _version(os.uname().release)


def _version(text: str) -> tuple[int, ...]:
    numbers = []
    for part in text.split(".")[:2]:
        digits = "".join(char for char in part if char.isdigit()) if part[:1].isdigit() else ""
        numbers.append(int(digits or 0))
    return tuple(numbers)
