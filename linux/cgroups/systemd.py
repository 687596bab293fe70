"""Cgroups that systemd makes: a scope (or slice) for a container, asked for over D-Bus.

systemd wants to be the only writer of its part of the tree (systemd.io/CGROUP_DELEGATION). So the scope is made by it,
`Delegate=yes`, with the limits also as the unit's properties, because it writes those anew whenever it feels like it;
the rest (device filter, what has no property) is written into the directory that it made, which is ours by then.

A scope can't be empty: it is made around a placeholder, a fork that only waits; once the container's init was born into
the cgroup (or failed to), the placeholder ends.
"""

from __future__ import annotations

import os

from wherry.core import places
from wherry.linux.cgroups import convert
from wherry.linux.cgroups.layout import Mode, host
from wherry.linux.dbus import Connection, DBusError

TYPE_CHECKING = False  # typing alone would cost as much as a container's cgroups; type checkers know the name
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    Properties = list[tuple[str, tuple[str, Any]]]

_NAME = "org.freedesktop.systemd1"
_PATH = "/org/freedesktop/systemd1"
_MANAGER = "org.freedesktop.systemd1.Manager"
_GONE = ("org.freedesktop.systemd1.NoSuchUnit", "org.freedesktop.systemd1.UnitNotLoaded")
_SYSTEM_BUS = "/run/dbus/system_bus_socket"
_INFINITY = 2**64 - 1
_SECOND = 1_000_000  # µs
_QUOTA_STEP = 10_000  # systemd keeps quotas in hundredths of a CPU
_PROPERTY_PREFIX = "org.systemd.property."


def running() -> bool:
    """sd_booted(3): whether systemd is this host's init."""
    return os.path.isdir("/run/systemd/system")


def split_path(path: str, container_id: str, *, user: bool = False) -> tuple[str, str]:
    """(slice, unit) of `linux.cgroupsPath` in systemd's form `slice:prefix:name`; ValueError for another form."""
    parts = path.split(":") if path else ["user.slice" if user else "system.slice", "wherry", container_id]
    if len(parts) != 3:
        msg = f'expected cgroupsPath to be of format "slice:prefix:name" for systemd cgroups, got "{path}" instead'
        raise ValueError(msg)
    slice_name, prefix, name = parts
    slice_name = slice_name or ("user.slice" if user else "system.slice")
    if name.endswith(".slice"):
        return slice_name, name
    return slice_name, f"{prefix}-{name}.scope" if prefix else f"{name}.scope"


def slice_path(name: str) -> str:
    """`a-b.slice` lies in `a.slice`: each dash is a level (systemd.slice(5)). ValueError for what is no slice."""
    if name == "-.slice":
        return ""
    stem = name.removesuffix(".slice")
    levels = stem.split("-")
    if stem == name or "/" in stem or not all(levels):
        msg = f"invalid slice name: {name}"
        raise ValueError(msg)
    return "".join(f"/{'-'.join(levels[: n + 1])}.slice" for n in range(len(levels)))


def connect(*, user: bool = False, timeout: float = 30.0) -> Connection:
    """The bus of the system or of the user; without one, systemd itself behind its private socket.

    `timeout`: seconds for each answer.
    """
    runtime = os.environ.get("XDG_RUNTIME_DIR", f"/run/user/{places.user_id()}")
    address = os.environ.get("DBUS_SESSION_BUS_ADDRESS" if user else "DBUS_SYSTEM_BUS_ADDRESS", "")
    default = f"{runtime}/bus" if user else _SYSTEM_BUS
    path = address.partition("unix:path=")[2].partition(",")[0].partition(";")[0] or default
    try:
        return Connection(path, timeout=timeout)
    except (FileNotFoundError, ConnectionRefusedError):
        private = f"{runtime}/systemd/private" if user else "/run/systemd/private"
        return Connection(private, bus=False, timeout=timeout)


def manager_cgroup(*, user: bool) -> str:
    """Where the user's manager has its part of the tree (`/user.slice/…/user@1000.service`); "" for the system's."""
    if not user:
        return ""
    bus = connect(user=True)
    try:
        found = bus.call(_NAME, _PATH, "org.freedesktop.DBus.Properties", "Get", "ss", _MANAGER, "ControlGroup")
        return str(found[0][1])
    finally:
        bus.close()


class Unit:
    """One transient unit. `start` makes it, `settle` ends the placeholder, `stop` takes it away."""

    def __init__(self, name: str, *, user: bool = False) -> None:
        self.name = name
        self.user = user
        self._placeholder = 0
        self._leash = -1

    def start(
        self, slice_name: str, description: str, resources: Mapping[str, Any], annotations: Mapping[str, str]
    ) -> None:
        """Make the unit and wait until it is there. DBusError, OSError (TimeoutError), ValueError."""
        properties: Properties = [
            ("Description", ("s", description)),
            ("DefaultDependencies", ("b", False)),
            ("MemoryAccounting", ("b", True)),
            ("CPUAccounting", ("b", True)),
            ("IOAccounting" if host().mode == Mode.V2 else "BlockIOAccounting", ("b", True)),
            ("TasksAccounting", ("b", True)),
            *limits(resources),
            *from_annotations(annotations),
        ]
        if self.name.endswith(".slice"):
            properties.append(("Wants", ("as", [slice_name])))
        else:
            self._hold()
            properties += [
                ("Slice", ("s", slice_name)),
                ("Delegate", ("b", True)),
                ("PIDs", ("au", [self._placeholder])),
            ]
        try:
            self._job("StartTransientUnit", "ssa(sv)a(sa(sv))", self.name, "replace", properties, [])
        except BaseException:
            self.settle()
            raise

    def _hold(self) -> None:
        """Fork the placeholder: it waits for the end of file on a pipe whose other end only this process has."""
        reader, self._leash = os.pipe()
        self._placeholder = os.fork()
        if not self._placeholder:
            try:
                os.close(self._leash)
                os.read(reader, 1)
            finally:
                os._exit(0)
        os.close(reader)

    def settle(self) -> None:
        """The container's own process is in the unit (or never will be): the placeholder may go."""
        if self._placeholder:
            os.close(self._leash)
            os.waitpid(self._placeholder, 0)
            self._placeholder, self._leash = 0, -1

    def adopt(self, pid: int, description: str, timeout: float) -> None:
        """Make the unit, a scope, around a process that runs, and wait until it is there. DBusError, OSError."""
        properties: Properties = [
            ("Description", ("s", description)),
            ("PIDs", ("au", [pid])),
            # one process that is killed for lack of memory must not end the others: delegated units' default OOMPolicy
            ("Delegate", ("b", True)),
            # an init without a handler doesn't hear SIGTERM: a logout must not wait for it any longer than `stop` does
            ("TimeoutStopUSec", ("t", 10 * _SECOND)),
        ]
        self._job("StartTransientUnit", "ssa(sv)a(sa(sv))", self.name, "fail", properties, [], timeout=timeout)

    def attach(self, pid: int) -> None:
        """Have systemd move a process into the unit's cgroup. DBusError, TimeoutError."""
        bus = connect(user=self.user)
        try:
            bus.call(_NAME, _PATH, _MANAGER, "AttachProcessesToUnit", "ssau", self.name, "", [pid])
        finally:
            bus.close()

    def stop(self) -> None:
        """Stop the unit and forget that it failed; one that is gone is fine."""
        try:
            self._job("StopUnit", "ss", self.name, "replace")
            bus = connect(user=self.user)
            try:
                bus.call(_NAME, _PATH, _MANAGER, "ResetFailedUnit", "s", self.name)
            finally:
                bus.close()
        except DBusError as error:
            if error.name not in _GONE:
                raise

    def update(self, resources: Mapping[str, Any]) -> None:
        """Give the unit the limits, until it ends."""
        wanted = limits(resources)
        if not wanted:
            return
        bus = connect(user=self.user)
        try:
            bus.call(_NAME, _PATH, _MANAGER, "SetUnitProperties", "sba(sv)", self.name, True, wanted)
        finally:
            bus.close()

    def _job(self, method: str, signature: str, *values: Any, timeout: float = 30.0) -> None:
        """Call a method that queues a job, and wait for the job's end."""
        bus = connect(user=self.user, timeout=timeout)
        try:
            bus.subscribe(f"type='signal',interface='{_MANAGER}',member='JobRemoved'")
            bus.call(_NAME, _PATH, _MANAGER, "Subscribe")
            job = bus.call(_NAME, _PATH, _MANAGER, method, signature, *values)[0]
            while True:
                signal = bus.next_signal()
                if signal.member == "JobRemoved" and len(signal.body) == 4 and signal.body[1] == job:
                    break
        finally:
            bus.close()
        result = signal.body[3]
        if result != "done":
            raise DBusError("org.freedesktop.systemd1.JobFailed", f"{method} of {self.name}: job result {result!r}")


# -- properties -------------------------------------------------------------------------------------------------------


def limits(resources: Mapping[str, Any]) -> Properties:
    """Those of `linux.resources` that systemd has a property for, in its units."""
    unified = host().mode == Mode.V2
    memory, cpu, pids = ((resources.get(key) or {}) for key in ("memory", "cpu", "pids"))
    found: Properties = []
    limit = memory.get("limit") or 0
    if limit:
        found.append(("MemoryMax" if unified else "MemoryLimit", ("t", _bytes(limit))))
    if unified:
        if memory.get("reservation"):
            found.append(("MemoryLow", ("t", _bytes(memory["reservation"]))))
        swap = convert.swap_max(memory.get("swap") or 0, limit)
        if swap is not None:
            found.append(("MemorySwapMax", ("t", _bytes(swap))))
    if cpu.get("shares"):
        weight = convert.cpu_weight(cpu["shares"]) if unified else cpu["shares"]
        found.append(("CPUWeight" if unified else "CPUShares", ("t", weight)))
    found += _quota(cpu)
    if unified:
        for key, name in (("cpus", "AllowedCPUs"), ("mems", "AllowedMemoryNodes")):
            if cpu.get(key):
                found.append((name, ("ay", bitmask(cpu[key]))))
    if pids.get("limit"):
        found.append(("TasksMax", ("t", _bytes(pids["limit"]))))
    return found


def _bytes(value: int) -> int:
    return _INFINITY if value < 0 else value


def _quota(cpu: Mapping[str, Any]) -> Properties:
    quota, period = cpu.get("quota"), cpu.get("period") or 0
    found: Properties = [("CPUQuotaPeriodUSec", ("t", period))] if period else []
    if quota:
        per_second = -(-quota * _SECOND // (period or 100_000)) if quota > 0 else _INFINITY
        if quota > 0:
            per_second += -per_second % _QUOTA_STEP
        found.append(("CPUQuotaPerSecUSec", ("t", per_second)))
    return found


def bitmask(text: str) -> bytes:
    """`0-2,8` → the bytes of a CPU mask, the lowest first. ValueError for another form."""
    mask = 0
    for part in text.replace(" ", "").split(","):
        first, dash, last = part.partition("-")
        for number in range(int(first), int(last if dash else first) + 1):
            mask |= 1 << number
    return mask.to_bytes((mask.bit_length() + 7) // 8 or 1, "little")


def from_annotations(annotations: Mapping[str, str]) -> Properties:
    """`org.systemd.property.NAME`: VALUE, as runc has it (docs/systemd.md there). A name that ends with Sec is given in
    seconds and becomes USec. ValueError for a value that can't be read."""
    found: Properties = []
    for key, text in annotations.items():
        name = key.removeprefix(_PROPERTY_PREFIX)
        if name == key:
            continue
        try:
            kind, value = variant(text)
        except ValueError:
            msg = f"annotation {key}={text} value parse error"
            raise ValueError(msg) from None
        if name.endswith("Sec") and not name.endswith("USec"):
            name, kind, value = name[:-3] + "USec", "t", int(float(value) * _SECOND)
        found.append((name, (kind, value)))
    return found


def variant(text: str) -> tuple[str, Any]:
    """GVariant's text form, as far as properties need it: true, 5, uint64 5, 'text', ['a', 'b']."""
    text = text.strip()
    if text in ("true", "false"):
        return "b", text == "true"
    word, space, rest = text.partition(" ")
    kinds = {"byte": "y", "int16": "n", "uint16": "q", "int32": "i", "uint32": "u", "int64": "x", "uint64": "t"}
    if space and word in kinds:
        return kinds[word], int(rest, 0)
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        return "s", text[1:-1]
    if text.startswith("[") and text.endswith("]"):
        items = [variant(item) for item in text[1:-1].split(",")]
        if len({kind for kind, _ in items}) == 1:
            return "a" + items[0][0], [value for _, value in items]
        raise ValueError(text)
    try:
        return "i", int(text, 0)
    except ValueError:
        return "d", float(text)
