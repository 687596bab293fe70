"""A container's cgroup: found from `cgroupsPath`, made and limited, taken away when the container could not be made.

What a cgroup is on v1, v2 and hybrid hosts is `wherry.linux.cgroups`' business; here it is decided which one, who makes
it (we, or systemd), and what happens where none may be made.
"""

# ruff: noqa: PLC0415 - each command pays only for the modules that it needs; `container.preload` loads them all

from __future__ import annotations

from wherry.core import places
from wherry.core.errors import WherryError
from wherry.runtime.errors import INVALID, PRECONDITION, ContainerError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from wherry.runtime.plan import Plan


def find(plan: Plan, *, systemd: bool) -> None:
    """Set `plan.cgroup` to the cgroup of `cgroupsPath`, and `plan.unit` where systemd is to make it.

    Nothing is made yet. systemd's form SLICE:PREFIX:NAME without the flag means the same directories, made without
    asking anybody.
    """
    from wherry.linux import cgroups

    path = plan.linux.get("cgroupsPath") or ""
    if systemd or path.count(":") == 2:
        path = _unit_path(plan, path, systemd=systemd)
    plan.cgroup = cgroups.plan(path, plan.state.id, exact=plan.unit is not None)
    plan.state.cgroup_paths = plan.cgroup.paths


def _unit_path(plan: Plan, path: str, *, systemd: bool) -> str:
    from wherry.linux.cgroups import systemd as units

    user = places.is_users()
    if systemd and not units.running():
        raise ContainerError("systemd not running on this host, cannot use systemd cgroups manager", PRECONDITION)
    try:
        slice_name, unit = units.split_path(path, plan.state.id, user=user)
        directory = f"{units.slice_path(slice_name)}/{unit}"
    except ValueError as error:
        raise ContainerError(f"linux.cgroupsPath: {error}", INVALID) from None
    if not systemd:
        return directory
    plan.unit = units.Unit(unit, user=user)
    plan.slice = slice_name
    plan.state.unit = unit
    return units.manager_cgroup(user=user) + directory


def make(plan: Plan) -> None:
    """Make what `find` has found, with its limits. An ordinary user may have to do without (`rootless.py`)."""
    plan.fresh_cgroup = not plan.cgroup.exists()
    if plan.unit is not None:
        _start_unit(plan)
    try:
        plan.cgroup.create()
    except OSError as error:
        if not plan.rootless:
            raise
        from wherry.runtime import rootless

        if not rootless.forgo_cgroup(plan, error):
            raise
        plan.cgroup = None
        plan.state.cgroup_paths = {}
        return
    resources = dict(plan.linux.get("resources") or {})
    resources["devices"] = resources.get("devices") or []
    try:
        plan.cgroup.apply(resources)
    except FileNotFoundError as error:
        # a limit whose controller is missing: the note says which, and what is there
        notes = getattr(error, "__notes__", None)
        if not notes:
            raise
        raise ContainerError(f"a limit can't be set: {notes[0]}", PRECONDITION) from error
    plan.cgroup_fd = plan.cgroup.clone_fd()


def _start_unit(plan: Plan) -> None:
    from wherry.linux.dbus import DBusError

    about = f"wherry container {plan.state.id}"
    try:
        plan.unit.start(plan.slice, about, plan.linux.get("resources") or {}, plan.state.annotations)
    except DBusError as error:
        raise ContainerError(f"unable to start unit {plan.unit.name!r}: {error}") from None


def undo(plan: Plan, error: BaseException) -> None:
    """Take away a cgroup that `make` made; what can't be undone becomes a note on the error that led here."""
    if not plan.fresh_cgroup or plan.cgroup is None:
        return
    try:
        if plan.unit is not None:
            plan.unit.settle()
        plan.cgroup.kill()
        if plan.unit is not None:
            from wherry.runtime import lifecycle

            lifecycle.stop_unit(plan.state)
        plan.cgroup.delete()
    except (OSError, WherryError, ContainerError) as problem:
        error.add_note(f"the cgroup could not be removed: {problem}")
