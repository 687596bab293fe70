"""Who a container runs as and what it may do: the CRI's security context, in an OCI specification.

The meaning of each field is what containerd's CRI plugin makes of it; Kubernetes was written against that. What a host
can't do (AppArmor, SELinux) is refused where it is asked for by name, and left out where it is a default.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from wherry.client import users
from wherry.client.capabilities import NAMES
from wherry.client.security import is_dockers, of_docker
from wherry.client.spec import ALL_DEVICES, capability, host_devices, own_capabilities, seccomp_of
from wherry.core import apparmor
from wherry.core.errors import FailedPrecondition, InvalidArgument, NotFound
from wherry.proto import cri_pb2 as cri

if TYPE_CHECKING:
    from wherry.cri.settings import Handler, Settings

_LOCALHOST = "localhost/"
_MAX_ID = (1 << 32) - 1


# -- who


def user_name(context: cri.LinuxContainerSecurityContext, settings: Mapping[str, Any]) -> str:
    """`NAME|UID[:GROUP|GID]` of a container, "" for root: the kubelet's where it says one, else the image's.

    Raises InvalidArgument for a group without a user.
    """
    name, group = context.run_as_username, ""
    if not name and context.HasField("run_as_user"):
        name = str(_identity(context.run_as_user.value, "run_as_user"))
    if context.HasField("run_as_group"):
        group = str(_identity(context.run_as_group.value, "run_as_group"))
    if not name:
        if group:
            raise InvalidArgument(f'user group "{group}" is specified without user: invalid argument')
        return str(settings.get("User") or "")
    return f"{name}:{group}" if group else name


def _identity(value: int, field: str) -> int:
    if not 0 <= value <= _MAX_ID:
        raise InvalidArgument(f"{field}: {value} is no id of a user or group: invalid argument")
    return value


def user(context: cri.LinuxContainerSecurityContext, settings: Mapping[str, Any], read: users.Reader) -> users.User:
    """The numbers; `read` gives the image's files.

    By the policy Merge the image's groups of the user come to those that the kubelet names, by Strict they don't.
    Raises InvalidArgument for a name that the image doesn't know.
    """
    name = user_name(context, settings)
    found = users.resolve(name, read)
    groups = [found.gid]
    if context.supplemental_groups_policy == cri.Merge:
        groups += users.resolve(name.partition(":")[0], read).groups[1:]
    elif context.supplemental_groups_policy != cri.Strict:
        raise InvalidArgument(
            f"supplemental groups policy {context.supplemental_groups_policy} is unknown: invalid argument"
        )
    groups += [_identity(group, "supplemental_groups") for group in context.supplemental_groups]
    return found._replace(groups=tuple(dict.fromkeys(groups)))


# -- what it may do


def apply(
    spec: dict[str, Any],
    context: cri.LinuxContainerSecurityContext,
    *,
    pod_privileged: bool,
    handler: Handler,
    settings: Settings,
) -> None:
    """Capabilities, profiles, masks and labels of a specification that has the defaults.

    Raises InvalidArgument, FailedPrecondition for what the host hasn't, NotFound for a profile.
    """
    if context.privileged and not pod_privileged:
        raise FailedPrecondition("no privileged container allowed in sandbox: failed precondition")
    process, linux = spec["process"], spec["linux"]
    process["noNewPrivileges"] = context.no_new_privs
    process["capabilities"] = capability_sets(
        context.capabilities if context.HasField("capabilities") else None,
        list(process["capabilities"]["bounding"]),
        privileged=context.privileged,
    )
    if not settings.disable_proc_mount:
        # the kubelet sends the lists that it wants; none is none
        linux["maskedPaths"], linux["readonlyPaths"] = list(context.masked_paths), list(context.readonly_paths)
    if context.privileged:
        _privileged(spec, handler)
    _seccomp(spec, context, settings)
    _apparmor(process, context, settings)


def _privileged(spec: dict[str, Any], handler: Handler) -> None:
    linux = spec["linux"]
    linux["maskedPaths"], linux["readonlyPaths"] = [], []
    for mount in spec["mounts"]:
        if mount["type"] in {"sysfs", "cgroup"}:
            mount["options"] = ["rw" if option == "ro" else option for option in mount["options"]]
    if not handler.privileged_without_host_devices:
        linux["devices"] = host_devices("/dev")
    elif not handler.privileged_without_host_devices_all_devices_allowed:
        return
    linux["resources"]["devices"] = [dict(rule) for rule in ALL_DEVICES]


def capability_sets(wanted: cri.Capability | None, names: list[str], *, privileged: bool) -> dict[str, list[str]]:
    """`process.capabilities`: ALL is added or dropped first, then what is named; who drops wins over who adds.

    Ambient ones are in all five sets, else the kernel takes them away. Raises InvalidArgument for an unknown name.
    """
    if privileged:
        names = own_capabilities()
    ambient: list[str] = []
    if wanted is not None:
        added, dropped, ambient = (
            [_capability(name) for name in group]
            for group in (wanted.add_capabilities, wanted.drop_capabilities, wanted.add_ambient_capabilities)
        )
        if "CAP_ALL" in added:
            names = own_capabilities()
        if "CAP_ALL" in dropped:
            names = []
        if "CAP_ALL" in ambient:
            ambient = own_capabilities()
        names = [name for name in dict.fromkeys([*names, *added, *ambient]) if name not in (*dropped, "CAP_ALL")]
        ambient = [name for name in ambient if name in names]
    sets = {"bounding": names, "effective": list(names), "permitted": list(names)}
    return {**sets, "inheritable": list(ambient), "ambient": ambient} if ambient else sets


def _capability(name: str) -> str:
    full = capability(name)
    if full != "CAP_ALL" and full not in NAMES:
        raise InvalidArgument(f"unknown capability {name!r}: invalid argument")
    return full


def profile(given: cri.SecurityProfile | None, deprecated: str, what: str) -> tuple[str, str]:
    """Kind and name of a seccomp or AppArmor profile; the kinds are `default`, `unconfined`, `localhost`, "" for none.

    `deprecated` is the string that came before the message: `runtime/default`, `docker/default`, `unconfined`,
    `localhost/NAME`. Raises InvalidArgument.
    """
    if given is not None:
        if given.profile_type != cri.SecurityProfile.Localhost and given.localhost_ref:
            raise InvalidArgument(
                f"{what} config invalid LocalhostRef must only be set if ProfileType is Localhost: invalid argument"
            )
        kinds: Mapping[int, str] = {
            cri.SecurityProfile.RuntimeDefault: "default",
            cri.SecurityProfile.Unconfined: "unconfined",
            cri.SecurityProfile.Localhost: "localhost",
        }
        if given.profile_type not in kinds:
            raise InvalidArgument(f"{what} unknown ProfileType {given.profile_type}: invalid argument")
        kind, name = kinds[given.profile_type], given.localhost_ref.removeprefix(_LOCALHOST)
        if kind == "localhost" and not name:
            raise InvalidArgument(f"{what}: a profile of the type Localhost needs a localhost_ref: invalid argument")
        return kind, name
    if not deprecated:
        return "", ""
    if deprecated in {"runtime/default", "docker/default"}:
        return "default", ""
    if deprecated == "unconfined":
        return "unconfined", ""
    if not deprecated.startswith(_LOCALHOST):
        raise InvalidArgument(f'invalid {what} profile "{deprecated}": invalid argument')
    return "localhost", deprecated.removeprefix(_LOCALHOST)


def _seccomp(spec: dict[str, Any], context: cri.LinuxContainerSecurityContext, settings: Settings) -> None:
    given = context.seccomp if context.HasField("seccomp") else None
    kind, name = profile(given, context.seccomp_profile_path or settings.unset_seccomp_profile, "seccomp")
    if context.privileged or kind in {"", "unconfined"}:
        return
    names = spec["process"]["capabilities"]["bounding"]
    if kind == "default":
        spec["linux"]["seccomp"] = seccomp_of("", names)
        return
    found = seccomp_of(name, names)
    spec["linux"]["seccomp"] = of_docker(found, names) if is_dockers(found) else found


def _apparmor(process: dict[str, Any], context: cri.LinuxContainerSecurityContext, settings: Settings) -> None:
    given = context.apparmor if context.HasField("apparmor") else None
    kind, name = profile(given, context.apparmor_profile, "apparmor")
    if settings.disable_apparmor or not apparmor.enabled():
        if kind not in {"", "unconfined"}:
            raise FailedPrecondition("apparmor is not supported: failed precondition")
        return
    if kind == "unconfined" or (kind != "localhost" and context.privileged):
        return
    wanted = name if kind == "localhost" else apparmor.NAME
    if apparmor.loaded(wanted):
        process["apparmorProfile"] = wanted
    elif kind:  # where nothing was asked for, a profile that nobody loaded is none
        raise NotFound(f"apparmor profile not found {wanted}: not found")
