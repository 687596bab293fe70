"""`linux.intelRdt`: shares of the processor's last-level cache and of the memory's bandwidth, by the kernel's resctrl
filesystem (Documentation/arch/x86/resctrl.rst; config-linux.md, IntelRdt).

A class of service is a directory of it: `schemata` says the share, `tasks` who is in it, `mon_groups/NAME` counts for
one container. Processes are moved in by pid; their children follow them.
"""

from __future__ import annotations

import os

from wherry.runtime.errors import INVALID, PRECONDITION, ContainerError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from wherry.runtime.plan import Plan

_MONITORS = ("enableMonitoring", "enableCMT", "enableMBM")  # the first replaces the others (specification 1.3)


def mounted(mountinfo: str = "/proc/self/mountinfo") -> str:
    """Where resctrl is mounted; "" where the host has none."""
    with open(mountinfo, encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            before, _, after = line.partition(" - ")
            if after.startswith("resctrl "):
                return before.split()[4]
    return ""


def has_cache(root: str) -> bool:
    return bool(root) and os.path.isdir(f"{root}/info/L3")


def has_bandwidth(root: str) -> bool:
    return bool(root) and os.path.isdir(f"{root}/info/MB")


def wanted(config: dict[str, Any]) -> list[str]:
    """The lines for `schemata`, those of the general field last: they win (specification 1.3)."""
    lines = [config.get("l3CacheSchema") or "", config.get("memBwSchema") or "", *(config.get("schemata") or ())]
    return [part.strip() for line in lines for part in line.split("\n") if part.strip()]


def make(plan: Plan, root: str | None = None) -> None:
    """Make or find the container's class, and its group for counting. What was made is in the state, for `delete`.

    root: where resctrl is, for tests. ContainerError where the host lacks what is asked for, or a class of that name
    has other shares.
    """
    config = plan.linux["intelRdt"]
    root = mounted() if root is None else root
    _check_host(config, root)
    lines = wanted(config)
    name = config.get("closID") or plan.state.id
    path = os.path.join(root, name)
    exists = os.path.isdir(path)
    if config.get("closID") and not lines and not exists:
        raise ContainerError(f"linux.intelRdt.closID: there is no class {name!r}, and nothing to make it with", INVALID)
    if not exists:
        os.mkdir(path, 0o755)
        plan.state.rdt.append(path)
        plan.state.save()
    if exists and config.get("closID"):
        _compare(path, lines)
    elif lines:
        write(path, lines)
    plan.rdt = [path]
    if any(config.get(key) for key in _MONITORS):
        group = os.path.join(path, "mon_groups", plan.state.id)
        os.mkdir(group, 0o755)
        plan.state.rdt.append(group)
        plan.rdt.append(group)
    plan.state.rdt_class = path
    plan.state.save()


def _check_host(config: dict[str, Any], root: str) -> None:
    if config.get("l3CacheSchema") and not has_cache(root):
        text = "intelRdt.l3CacheSchema is specified in config, but Intel RDT/CAT is not enabled"
        raise ContainerError(text, PRECONDITION)
    if config.get("memBwSchema") and not has_bandwidth(root):
        text = "intelRdt.memBwSchema is specified in config, but Intel RDT/MBA is not enabled"
        raise ContainerError(text, PRECONDITION)
    if not has_cache(root) and not has_bandwidth(root):
        text = "intelRdt is specified in config, but Intel RDT is not supported or enabled"
        raise ContainerError(text, PRECONDITION)


def _compare(path: str, lines: list[str]) -> None:
    """A class that others use as well keeps its shares: they must be those that are asked for."""
    have = {_canonical(line) for line in _read(path)}
    for line in lines:
        if _canonical(line) not in have:
            text = f"linux.intelRdt: the class {os.path.basename(path)!r} has other shares than {line!r}"
            raise ContainerError(text, PRECONDITION)


def _canonical(line: str) -> tuple[str, frozenset[tuple[int, int]]]:
    """`L3:0=00ff;1=f` and `L3: 1=f;0=ff` are the same; masks are hexadecimal, percentages compare by their digits."""
    kind, _, shares = line.partition(":")
    try:
        parts = [share.split("=") for share in shares.split(";") if share.strip()]
        return kind.strip(), frozenset((int(domain), int(share.strip(), 16)) for domain, share in parts)
    except ValueError:
        raise ContainerError(f"linux.intelRdt: no schema: {line!r}", INVALID) from None


def _read(path: str) -> list[str]:
    with open(f"{path}/schemata", encoding="utf-8") as file:
        return [line.strip() for line in file if line.strip()]


def write(path: str, lines: list[str]) -> None:
    """Set shares; the kernel says what it didn't like in `info/last_cmd_status`."""
    try:
        with open(f"{path}/schemata", "w", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")
    except OSError as error:
        try:
            with open(f"{os.path.dirname(path)}/info/last_cmd_status", encoding="utf-8") as file:
                said = file.read().strip()
        except OSError:
            said = ""
        raise ContainerError(f"unable to set Intel RDT schemata: {said or (error.strerror or '').lower()}") from None


def join(paths: list[str], pid: int) -> None:
    """Move a process into a class, and into its group."""
    for path in paths:
        with open(f"{path}/tasks", "w", encoding="utf-8") as file:
            file.write(str(pid))


def update(path: str, cache: str, bandwidth: str, root: str | None = None) -> None:
    """What `update --l3-cache-schema --mem-bw-schema` say."""
    root = mounted() if root is None else root
    if cache and not has_cache(root):
        raise ContainerError("Intel RDT/CAT: l3 cache schema is not enabled", PRECONDITION)
    if bandwidth and not has_bandwidth(root):
        raise ContainerError("Intel RDT/MBA: memory bandwidth schema is not enabled", PRECONDITION)
    if not path:
        raise ContainerError("the container was made without linux.intelRdt", PRECONDITION)
    write(path, wanted({"l3CacheSchema": cache, "memBwSchema": bandwidth}))


def remove(paths: list[str]) -> None:
    """Take away what `make` has made, the group before its class. Who was in it falls back to the default class."""
    for path in reversed(paths):
        try:
            os.rmdir(path)
        except FileNotFoundError:
            continue


def statistics(path: str, root: str | None = None) -> dict[str, Any]:
    """As `events` prints them: the shares of the container and of the root class."""
    if not path:
        return {}
    root = mounted() if root is None else root
    found: dict[str, Any] = {}
    for folder, suffix in ((root, "_root"), (path, "")):
        for line in _read(folder):
            kind = line.partition(":")[0]
            if kind in ("L3", "MB"):
                found[("l3_cache_schema" if kind == "L3" else "mem_bw_schema") + suffix] = line
    return found
