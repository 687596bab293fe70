"""What few configurations have, validated: loaded only for one that has it (see `spec.validate`).

OCI runtime specification 1.2 and 1.3: scheduler, ioPriority, execCPUAffinity, personality, time offsets, memory policy,
network devices, idmapped mounts, resources.
"""

from __future__ import annotations

from wherry.runtime import quickjson, settings
from wherry.runtime.errors import invalid
from wherry.runtime.spec import get

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    Spec = dict[str, Any]

_SIGNED, _UNSIGNED = -(2**63), 2**64
_INTEGERS = {
    "memory": ("limit", "reservation", "swap", "kernel", "kernelTCP", "swappiness"),
    "cpu": ("shares", "quota", "burst", "period", "realtimeRuntime", "realtimePeriod", "idle"),
    "pids": ("limit",),
    "blockIO": ("weight", "leafWeight"),
    "network": ("classID",),
}
_STRINGS = {"cpu": ("cpus", "mems")}
_NAME_LIMIT = 15  # IFNAMSIZ without the end


def _known(value: Any, path: str, names: Any) -> str:
    if get(value, path, str, "") not in names:
        raise invalid(path, f"unknown value {quickjson.dumps(value)}, not one of {', '.join(sorted(names))}")
    return str(value)


def validate_process(process: Spec, path: str) -> None:
    scheduler = get(process.get("scheduler"), f"{path}.scheduler", dict)
    if scheduler is not None:
        _validate_scheduler(scheduler, f"{path}.scheduler")
    priority = get(process.get("ioPriority"), f"{path}.ioPriority", dict)
    if priority is not None:
        _known(priority.get("class"), f"{path}.ioPriority.class", settings.IO_CLASSES)
        level = get(priority.get("priority"), f"{path}.ioPriority.priority", int, 0)
        if not 0 <= level <= 7:
            raise invalid(f"{path}.ioPriority.priority", f"{level} is not between 0 and 7")
    affinity = get(process.get("execCPUAffinity"), f"{path}.execCPUAffinity", dict, {})
    for key in ("initial", "final"):
        numbers(affinity.get(key), f"{path}.execCPUAffinity.{key}")


def _validate_scheduler(scheduler: Spec, path: str) -> None:
    policy = _known(scheduler.get("policy"), f"{path}.policy", settings.POLICIES)
    nice = get(scheduler.get("nice"), f"{path}.nice", int, 0)
    if not -20 <= nice <= 19:
        raise invalid(f"{path}.nice", f"{nice} is not between -20 and 19")
    priority = get(scheduler.get("priority"), f"{path}.priority", int, 0)
    if priority and policy not in ("SCHED_FIFO", "SCHED_RR"):
        raise invalid(f"{path}.priority", "only SCHED_FIFO and SCHED_RR have a priority")
    for key in ("runtime", "deadline", "period"):
        value = get(scheduler.get(key), f"{path}.{key}", int, 0)
        if value and policy != "SCHED_DEADLINE":
            raise invalid(f"{path}.{key}", "only SCHED_DEADLINE has one")
        if not 0 <= value < _UNSIGNED:
            raise invalid(f"{path}.{key}", f"{value} is out of range")
    for number, flag in enumerate(get(scheduler.get("flags"), f"{path}.flags", list, [])):
        _known(flag, f"{path}.flags[{number}]", settings.POLICY_FLAGS)


def numbers(value: Any, path: str) -> set[int]:
    """A list like `0-2,8`; empty for none."""
    text = get(value, path, str, "")
    try:
        return settings.numbers(text)
    except ValueError:
        raise invalid(path, f"{quickjson.dumps(text)} is no list of numbers like 0-2,8") from None


def validate_linux(linux: Spec, namespaces: dict[str, str]) -> None:
    offsets = get(linux.get("timeOffsets"), "linux.timeOffsets", dict, {})
    if offsets and "time" not in namespaces:
        raise invalid("linux.timeOffsets", "time namespace offsets need a time namespace")
    if offsets and namespaces["time"]:
        raise invalid("linux.timeOffsets", "a time namespace that is joined has its offsets already")
    for clock, item in offsets.items():
        _known(clock, f"linux.timeOffsets[{quickjson.dumps(clock)}]", ("monotonic", "boottime"))
        for key in ("secs", "nanosecs"):
            get(get(item, f"linux.timeOffsets.{clock}", dict, {}).get(key), f"linux.timeOffsets.{clock}.{key}", int)
    personality = get(linux.get("personality"), "linux.personality", dict)
    if personality is not None:
        _known(personality.get("domain"), "linux.personality.domain", ("LINUX", "LINUX32"))
        if get(personality.get("flags"), "linux.personality.flags", list, []):
            raise invalid("linux.personality.flags", "no flags are supported")  # the specification names none
    _validate_rdt(linux)
    _validate_memory_policy(linux)
    _validate_net_devices(linux, namespaces)


def _validate_memory_policy(linux: Spec) -> None:
    policy = get(linux.get("memoryPolicy"), "linux.memoryPolicy", dict)
    if policy is None:
        return
    mode = _known(policy.get("mode"), "linux.memoryPolicy.mode", settings.MEMORY_MODES)
    nodes = numbers(policy.get("nodes"), "linux.memoryPolicy.nodes")
    if nodes and mode in ("MPOL_DEFAULT", "MPOL_LOCAL"):
        raise invalid("linux.memoryPolicy.nodes", f"{mode} takes no nodes")
    if not nodes and mode not in ("MPOL_DEFAULT", "MPOL_LOCAL", "MPOL_PREFERRED"):
        raise invalid("linux.memoryPolicy.nodes", f"{mode} needs nodes")
    for number, flag in enumerate(get(policy.get("flags"), "linux.memoryPolicy.flags", list, [])):
        _known(flag, f"linux.memoryPolicy.flags[{number}]", settings.MEMORY_FLAGS)


def _validate_rdt(linux: Spec) -> None:
    config = get(linux.get("intelRdt"), "linux.intelRdt", dict)
    if config is None:
        return
    name = get(config.get("closID"), "linux.intelRdt.closID", str, "")
    if name in (".", "..", "info", "mon_groups", "mon_data") or "/" in name or "\n" in name:
        raise invalid("linux.intelRdt.closID", f"invalid intelRdt.ClosID {quickjson.dumps(name)}")
    for key in ("l3CacheSchema", "memBwSchema"):
        get(config.get(key), f"linux.intelRdt.{key}", str, "")
    for number, line in enumerate(get(config.get("schemata"), "linux.intelRdt.schemata", list, [])):
        get(line, f"linux.intelRdt.schemata[{number}]", str, "")
    for key in ("enableCMT", "enableMBM", "enableMonitoring"):
        get(config.get(key), f"linux.intelRdt.{key}", bool, False)


def _validate_net_devices(linux: Spec, namespaces: dict[str, str]) -> None:
    devices = get(linux.get("netDevices"), "linux.netDevices", dict, {})
    if devices and "network" not in namespaces:
        raise invalid("linux.netDevices", "unable to move network devices without a private NET namespace")
    taken: set[str] = set()
    for name, item in devices.items():
        where = f"linux.netDevices[{quickjson.dumps(name)}]"
        new = get(get(item, where, dict, {}).get("name"), f"{where}.name", str, "") or name
        for text in (name, new):
            if not 0 < len(text) <= _NAME_LIMIT or text in (".", "..") or any(c in text for c in "/: \t\n"):
                raise invalid(where, f"invalid network device name {quickjson.dumps(text)}")
        if new in taken:
            raise invalid(f"{where}.name", f"two network devices would be named {quickjson.dumps(new)}")
        taken.add(new)


def validate_mappings(mount: Spec, path: str, options: list[str], linux: Spec) -> None:
    """`uidMappings` and `gidMappings` of a mount, `idmap`, `ridmap`."""
    given = {key: get(mount.get(key), f"{path}.{key}", list, []) for key in ("uidMappings", "gidMappings")}
    wanted = "idmap" in options or "ridmap" in options
    if not wanted and not any(given.values()):
        return
    if not ({"bind", "rbind"} & set(options) or mount.get("type") == "bind"):
        raise invalid(path, "id-mapped mounts are only supported for bind mounts")
    if bool(given["uidMappings"]) != bool(given["gidMappings"]):
        raise invalid(path, "uidMappings and gidMappings are given together or not at all")
    if not given["uidMappings"] and not any(n.get("type") == "user" for n in linux.get("namespaces") or ()):
        raise invalid(path, "idmap without mappings takes those of the user namespace, and there is none")
    for key, items in given.items():
        for number, item in enumerate(items):
            where = f"{path}.{key}[{number}]"
            for part in ("containerID", "hostID", "size"):
                value = get(get(item, where, dict, {}).get(part), f"{where}.{part}", int, 0)
                if not 0 <= value < 2**32:
                    raise invalid(f"{where}.{part}", f"{value} is out of range")
            if not item.get("size"):
                raise invalid(f"{where}.size", "must be greater than zero")


def validate_resources(resources: Spec) -> None:
    """Types and ranges; what the kernel alone knows it says itself when the limit is written."""
    for group, keys in _INTEGERS.items():
        values = get(resources.get(group), f"linux.resources.{group}", dict, {})
        for key in keys:
            number = get(values.get(key), f"linux.resources.{group}.{key}", int, 0)
            if not _SIGNED <= number < _UNSIGNED:
                raise invalid(f"linux.resources.{group}.{key}", f"{number} is out of range")
        for key in _STRINGS.get(group, ()):
            numbers(values.get(key), f"linux.resources.{group}.{key}")
    swappiness = (resources.get("memory") or {}).get("swappiness")
    if swappiness is not None and not 0 <= swappiness <= 100:
        raise invalid("linux.resources.memory.swappiness", f"{swappiness} is not between 0 and 100")
    for number, item in enumerate(get(resources.get("hugepageLimits"), "linux.resources.hugepageLimits", list, [])):
        where = f"linux.resources.hugepageLimits[{number}]"
        get(get(item, where, dict, {}).get("pageSize"), f"{where}.pageSize", str)
        get(item.get("limit"), f"{where}.limit", int)
    unified = get(resources.get("unified"), "linux.resources.unified", dict, {})
    for key, value in unified.items():
        where = f"linux.resources.unified[{quickjson.dumps(key)}]"
        if "/" in key or key in ("", ".", ".."):
            raise invalid(where, "must be a file name without a path")
        get(value, where, str)
    _validate_device_rules(resources)


def _validate_device_rules(resources: Spec) -> None:
    for number, item in enumerate(get(resources.get("devices"), "linux.resources.devices", list, [])):
        where = f"linux.resources.devices[{number}]"
        get(get(item, where, dict, {}).get("allow"), f"{where}.allow", bool)
        if get(item.get("type"), f"{where}.type", str, "") not in ("", "a", "b", "c"):
            raise invalid(f"{where}.type", f"invalid device type {quickjson.dumps(item['type'])}")
        if set(get(item.get("access"), f"{where}.access", str, "")) - set("rwm"):
            raise invalid(f"{where}.access", f"invalid access {quickjson.dumps(item['access'])}")
        for key in ("major", "minor"):
            get(item.get(key), f"{where}.{key}", int)
