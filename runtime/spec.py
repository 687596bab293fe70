"""config.json: reading it, and refusing what the specification forbids before anything is made.

Messages name the field: `linux.namespaces[2].type: unknown namespace "foo"`. Numbers of sections are those of the OCI
runtime specification 1.3 (config.md, config-linux.md). A key with the value null is the same as no key, as in Go.
"""

# ruff: noqa: PLC0415 - `spec_rare` is loaded for those configurations that it is about

from __future__ import annotations

import os

from wherry.linux.namespaces import FLAGS as NAMESPACES
from wherry.runtime import hooks, quickjson
from wherry.runtime.errors import INVALID, ContainerError, invalid

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    Spec = dict[str, Any]

SPEC_VERSION = "1.3.0"
"""The newest version of the specification that this runtime implements; every 1.x is accepted."""

RLIMITS = {
    "RLIMIT_CPU": 0,
    "RLIMIT_FSIZE": 1,
    "RLIMIT_DATA": 2,
    "RLIMIT_STACK": 3,
    "RLIMIT_CORE": 4,
    "RLIMIT_RSS": 5,
    "RLIMIT_NPROC": 6,
    "RLIMIT_NOFILE": 7,
    "RLIMIT_MEMLOCK": 8,
    "RLIMIT_AS": 9,
    "RLIMIT_LOCKS": 10,
    "RLIMIT_SIGPENDING": 11,
    "RLIMIT_MSGQUEUE": 12,
    "RLIMIT_NICE": 13,
    "RLIMIT_RTPRIO": 14,
    "RLIMIT_RTTIME": 15,
}
"""getrlimit(2); the numbers are the same on all machines but alpha, mips and sparc."""

PROPAGATIONS = ("", *(r + p for p in ("private", "shared", "slave", "unbindable") for r in ("", "r")))
_IPC_SYSCTLS = frozenset(
    "kernel." + name for name in ("msgmax", "msgmnb", "msgmni", "sem", "shmall", "shmmax", "shmmni", "shm_rmid_forced")
)
_RARE = ("timeOffsets", "memoryPolicy", "netDevices", "personality", "intelRdt")
_COMMON = {"devices"}
_UNSIGNED_32 = 0xFFFFFFFF


def load(bundle: str) -> Spec:
    """The parsed and validated BUNDLE/config.json."""
    path = os.path.join(bundle, "config.json")
    try:
        with open(path, "rb") as file:
            raw = file.read()
    except FileNotFoundError:
        raise ContainerError("JSON specification file config.json not found", INVALID) from None
    try:
        spec = quickjson.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ContainerError(f"{path}: not JSON: {error}", INVALID) from None
    validate(spec)
    return spec  # type: ignore[no-any-return]


def get(value: Any, path: str, kind: type, default: Any = None) -> Any:
    """The value if it has the type; `default` for null; else an error that names the field."""
    if value is None:
        return default
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        names = {dict: "an object", list: "an array", str: "a string", int: "an integer", bool: "true or false"}
        raise invalid(path, f"must be {names[kind]}, not {quickjson.dumps(value)[:60]}")
    return value


def _strings(value: Any, path: str) -> list[str]:
    items: list[str] = get(value, path, list, [])
    for number, item in enumerate(items):
        if "\0" in get(item, f"{path}[{number}]", str, ""):
            raise invalid(f"{path}[{number}]", "holds a null byte")
    return items


def _objects(value: Any, path: str) -> list[tuple[str, Spec]]:
    items = get(value, path, list, [])
    return [(f"{path}[{number}]", get(item, f"{path}[{number}]", dict, {})) for number, item in enumerate(items)]


def _unsigned(value: Any, path: str, limit: int = _UNSIGNED_32) -> int:
    number: int = get(value, path, int, 0)
    if not 0 <= number <= limit:
        raise invalid(path, f"{number} is out of range")
    return number


def validate(spec: Any) -> None:
    """Raise ContainerError (INVALID) for the first thing that is wrong."""
    if not isinstance(spec, dict):
        raise ContainerError("config.json: must hold an object", INVALID)
    version = get(spec.get("ociVersion"), "ociVersion", str, "")
    if not version.startswith("1."):
        raise invalid("ociVersion", f"unsupported version {quickjson.dumps(version)}" if version else "is missing")
    root = get(spec.get("root"), "root", dict)
    if root is None:
        raise ContainerError("root: is missing: Root must be specified", INVALID)
    if not get(root.get("path"), "root.path", str, ""):
        raise invalid("root.path", "is missing")
    get(root.get("readonly"), "root.readonly", bool)
    if spec.get("process") is not None:
        validate_process(spec["process"])
    _validate_mounts(spec)
    _validate_hooks(spec)
    linux = get(spec.get("linux"), "linux", dict, {})
    namespaces = _validate_namespaces(linux)
    _validate_linux(spec, linux, namespaces)


def validate_process(process: Any, path: str = "process") -> None:
    """An OCI `process` object; also what `exec --process FILE` names."""
    get(process, path, dict)
    args = _strings(process.get("args"), f"{path}.args")
    if not args:
        raise invalid(f"{path}.args", "args must not be empty")
    _strings(process.get("env"), f"{path}.env")
    cwd = get(process.get("cwd"), f"{path}.cwd", str, "")
    if not cwd:
        raise invalid(f"{path}.cwd", "Cwd property must not be empty")
    if not cwd.startswith("/"):
        raise invalid(f"{path}.cwd", f"Cwd must be an absolute path, not {quickjson.dumps(cwd)}")
    user = get(process.get("user"), f"{path}.user", dict, {})
    for key in ("uid", "gid", "umask"):
        _unsigned(user.get(key), f"{path}.user.{key}")
    for number, gid in enumerate(get(user.get("additionalGids"), f"{path}.user.additionalGids", list, [])):
        _unsigned(gid, f"{path}.user.additionalGids[{number}]")
    for key in ("terminal", "noNewPrivileges"):
        get(process.get(key), f"{path}.{key}", bool)
    capabilities = get(process.get("capabilities"), f"{path}.capabilities", dict, {})
    for key in capabilities:
        _strings(capabilities[key], f"{path}.capabilities.{key}")
    _validate_rlimits(process, path)
    score = get(process.get("oomScoreAdj"), f"{path}.oomScoreAdj", int, 0)
    if not -1000 <= score <= 1000:
        raise invalid(f"{path}.oomScoreAdj", f"{score} is not between -1000 and 1000")
    size = get(process.get("consoleSize"), f"{path}.consoleSize", dict, {})
    for key in ("height", "width"):
        _unsigned(size.get(key), f"{path}.consoleSize.{key}")
    if "scheduler" in process or "ioPriority" in process or "execCPUAffinity" in process:
        from wherry.runtime import spec_rare

        spec_rare.validate_process(process, path)


def _validate_rlimits(process: Spec, path: str) -> None:
    seen: set[str] = set()
    for where, limit in _objects(process.get("rlimits"), f"{path}.rlimits"):
        name = get(limit.get("type"), f"{where}.type", str, "")
        if name not in RLIMITS:
            raise invalid(f"{where}.type", f"invalid rlimit type: {name}")
        if name in seen:
            raise invalid(f"{where}.type", f"{name} is given twice")
        seen.add(name)
        hard = _unsigned(limit.get("hard"), f"{where}.hard", 2**64 - 1)
        if _unsigned(limit.get("soft"), f"{where}.soft", 2**64 - 1) > hard:
            raise invalid(f"{where}.soft", f"is above the hard limit {hard}")


def _validate_mounts(spec: Spec) -> None:
    for where, mount in _objects(spec.get("mounts"), "mounts"):
        if not get(mount.get("destination"), f"{where}.destination", str, ""):
            raise invalid(f"{where}.destination", "is missing")
        for key in ("type", "source", "destination"):
            if "\0" in get(mount.get(key), f"{where}.{key}", str, ""):
                raise invalid(f"{where}.{key}", "holds a null byte")
        options = _strings(mount.get("options"), f"{where}.options")
        if "idmap" in options or "ridmap" in options or mount.get("uidMappings") or mount.get("gidMappings"):
            from wherry.runtime import spec_rare

            spec_rare.validate_mappings(mount, where, options, get(spec.get("linux"), "linux", dict, {}))
        if ("bind" in options or "rbind" in options or mount.get("type") == "bind") and not mount.get("source"):
            raise invalid(f"{where}.source", "a bind mount needs a source")


def _validate_hooks(spec: Spec) -> None:
    given = get(spec.get("hooks"), "hooks", dict, {})
    for kind in hooks.KINDS:
        for where, hook in _objects(given.get(kind), f"hooks.{kind}"):
            if not get(hook.get("path"), f"{where}.path", str, "").startswith("/"):
                raise invalid(f"{where}.path", "must be an absolute path")
            _strings(hook.get("args"), f"{where}.args")
            _strings(hook.get("env"), f"{where}.env")
            timeout = get(hook.get("timeout"), f"{where}.timeout", int)
            if timeout is not None and timeout <= 0:
                raise invalid(f"{where}.timeout", "must be greater than zero")


def _validate_namespaces(linux: Spec) -> dict[str, str]:
    found: dict[str, str] = {}
    for where, item in _objects(linux.get("namespaces"), "linux.namespaces"):
        kind = get(item.get("type"), f"{where}.type", str, "")
        if kind not in NAMESPACES:
            raise invalid(f"{where}.type", f"unknown namespace {quickjson.dumps(kind)}")
        if kind in found:
            raise invalid(f"{where}.type", f"malformed spec file: duplicated ns {quickjson.dumps(kind)}")
        path = get(item.get("path"), f"{where}.path", str, "")
        if path and not path.startswith("/"):
            raise invalid(f"{where}.path", f"must be absolute, not {quickjson.dumps(path)}")
        if path and not os.path.exists(path):
            raise invalid(f"{where}.path", f"lstat {path}: no such file or directory")
        found[kind] = path
    return found


def _validate_linux(spec: Spec, linux: Spec, namespaces: dict[str, str]) -> None:
    for key in ("maskedPaths", "readonlyPaths"):
        paths = _strings(linux.get(key), f"linux.{key}")
        if paths and "mount" not in namespaces:
            raise invalid(f"linux.{key}", "unable to restrict sys entries without a private MNT namespace")
        for number, path in enumerate(paths):
            if not path.startswith("/"):
                raise invalid(f"linux.{key}[{number}]", f"must be absolute, not {quickjson.dumps(path)}")
    propagation = get(linux.get("rootfsPropagation"), "linux.rootfsPropagation", str, "")
    if propagation not in PROPAGATIONS:
        raise invalid("linux.rootfsPropagation", f"unknown propagation {quickjson.dumps(propagation)}")
    for key in ("hostname", "domainname"):
        if get(spec.get(key), key, str, "") and "uts" not in namespaces:
            raise invalid(key, "unable to set hostname without a private UTS namespace")
    _validate_mappings(linux, namespaces)
    _validate_sysctl(linux, namespaces)
    _validate_devices(linux)
    resources = get(linux.get("resources"), "linux.resources", dict, {})
    get(linux.get("seccomp"), "linux.seccomp", dict)
    get(linux.get("cgroupsPath"), "linux.cgroupsPath", str)
    if any(linux.get(key) is not None for key in _RARE) or _unusual(resources):
        from wherry.runtime import spec_rare

        spec_rare.validate_linux(linux, namespaces)
        spec_rare.validate_resources(resources)


def _unusual(resources: Spec) -> bool:
    """More than the one device rule that denies all (and the keys of it spelled well)."""
    if not resources:
        return False
    return resources.keys() != _COMMON or resources["devices"] != [{"allow": False, "access": "rwm"}]


def _validate_mappings(linux: Spec, namespaces: dict[str, str]) -> None:
    for key in ("uidMappings", "gidMappings"):
        mappings = _objects(linux.get(key), f"linux.{key}")
        for where, item in mappings:
            for part in ("containerID", "hostID", "size"):
                _unsigned(item.get(part), f"{where}.{part}")
            if not item.get("size"):
                raise invalid(f"{where}.size", "must be greater than zero")
        if mappings and "user" not in namespaces:
            raise invalid(f"linux.{key}", "User namespace mappings specified, but USER namespace isn't enabled")
        if not mappings and namespaces.get("user") == "":
            raise invalid(f"linux.{key}", f"a new user namespace needs {key}")


def _validate_sysctl(linux: Spec, namespaces: dict[str, str]) -> None:
    for key, value in get(linux.get("sysctl"), "linux.sysctl", dict, {}).items():
        where = f"linux.sysctl[{quickjson.dumps(key)}]"
        get(value, where, str)
        name = key.replace("/", ".") if "." not in key.split("/")[0] else key
        if ".." in name or name.startswith("."):
            raise invalid(where, "is not a sysctl's name")
        if name in _IPC_SYSCTLS or name.startswith("fs.mqueue."):
            if "ipc" not in namespaces:
                raise invalid(where, f"sysctl {quickjson.dumps(key)} is not allowed in the hosts ipc namespace")
        elif name.startswith("net."):
            if "network" not in namespaces:
                raise invalid(where, f"sysctl {quickjson.dumps(key)} not allowed in host network namespace")
        elif name == "kernel.domainname":
            if "uts" not in namespaces:
                raise invalid(where, f"sysctl {quickjson.dumps(key)} is not allowed in the hosts uts namespace")
        elif name == "kernel.hostname":
            raise invalid(
                where, f"sysctl {quickjson.dumps(key)} is not allowed as it conflicts with the OCI hostname field"
            )
        else:
            raise invalid(where, f"sysctl {quickjson.dumps(key)} is not in a separate kernel namespace")


def _validate_devices(linux: Spec) -> None:
    for where, item in _objects(linux.get("devices"), "linux.devices"):
        path = get(item.get("path"), f"{where}.path", str, "")
        if not path.startswith("/"):
            raise invalid(f"{where}.path", f"must be an absolute path, not {quickjson.dumps(path)}")
        if get(item.get("type"), f"{where}.type", str, "") not in ("c", "b", "u", "p"):
            raise invalid(f"{where}.type", f"invalid device type {quickjson.dumps(item.get('type'))}")
        get(item.get("major"), f"{where}.major", int)
        get(item.get("minor"), f"{where}.minor", int)
        _unsigned(item.get("fileMode"), f"{where}.fileMode")


def namespaces_of(spec: Spec) -> dict[str, str]:
    """kind → path to join, or "" for a new one."""
    items = (spec.get("linux") or {}).get("namespaces") or []
    return {item["type"]: item.get("path") or "" for item in items}
