"""What is mounted in a container: the kubelet's mounts, the pod's files, and what every container has.

Order and options are those of containerd's CRI plugin. Sources are resolved here, once: where a symbolic link leads
later is of no matter.
"""

from __future__ import annotations

import os
import posixpath
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from wherry.core.errors import FailedPrecondition, InvalidArgument
from wherry.cri.selinux import relabel
from wherry.linux.mounts import mountinfo
from wherry.proto import cri_pb2 as cri

_CGROUP = {
    "destination": "/sys/fs/cgroup",
    "type": "cgroup",
    "source": "cgroup",
    "options": ["nosuid", "noexec", "nodev", "relatime", "ro"],
}
# files of the pod's folder, by their place in a container
_FILES = {"/etc/hostname": "hostname", "/etc/hosts": "hosts", "/etc/resolv.conf": "resolv.conf"}
_SHM = "/dev/shm"


def defaults(spec: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What every container has, from the specification's defaults: /run belongs to the image, cgroups are seen."""
    kept = [dict(mount) for mount in spec["mounts"] if mount["destination"] not in {"/run", _CGROUP["destination"]}]
    return [*kept, {**_CGROUP, "options": list(_CGROUP["options"])}]


def of_pod(
    given: Iterable[cri.Mount], folder: str, context: cri.LinuxContainerSecurityContext, *, relabels: bool
) -> list[cri.Mount]:
    """The pod's files and its /dev/shm, where the kubelet mounts nothing there. `folder` is the pod's."""
    taken = {posixpath.normpath(mount.container_path) for mount in given}
    users = context.namespace_options.userns_options
    mapped = users.mode == cri.POD and context.namespace_options.HasField("userns_options")
    found = []
    for place, name in _FILES.items():
        path = os.path.join(folder, name)
        if place not in taken and os.path.exists(path):
            found.append(
                cri.Mount(
                    container_path=place,
                    host_path=path,
                    readonly=context.readonly_rootfs,
                    selinux_relabel=relabels,
                    uidMappings=users.uids if mapped else (),
                    gidMappings=users.gids if mapped else (),
                )
            )
    if _SHM not in taken:
        path = _SHM if context.namespace_options.ipc == cri.NODE else os.path.join(folder, "shm")
        if os.path.isdir(path):
            found.append(cri.Mount(container_path=_SHM, host_path=path, selinux_relabel=relabels and path != _SHM))
    return found


def put(spec: dict[str, Any], mounts: Sequence[cri.Mount], label: str) -> None:
    """Add mounts to a specification that has `defaults`, those nearest the root first; the kubelet's win.

    A source that isn't there is made, a folder. `label` is for the files where SELinux is on. Raises InvalidArgument,
    FailedPrecondition for a propagation that the host's mount hasn't.
    """
    ordered = sorted(mounts, key=lambda mount: posixpath.normpath(mount.container_path).count("/"))
    places = {posixpath.normpath(mount.container_path) for mount in ordered}
    spec["mounts"] = [
        mount
        for mount in spec["mounts"]
        if mount["destination"] not in places and not ("/dev" in places and mount["destination"].startswith("/dev/"))
    ]
    for mount in ordered:
        spec["mounts"].append(_bind(mount, spec["linux"], label))


def _bind(mount: cri.Mount, linux: dict[str, Any], label: str) -> dict[str, Any]:
    if not mount.container_path or not mount.host_path:
        raise InvalidArgument(
            f"mount of {mount.host_path!r} at {mount.container_path!r}: both paths are needed: invalid argument"
        )
    place = posixpath.join("/", mount.container_path)
    source = _source(mount.host_path)
    options = ["rbind", *_propagation(mount, source, linux)]
    if mount.recursive_read_only:
        if not mount.readonly:
            raise InvalidArgument(f"recursive_read_only of {place} needs readonly: invalid argument")
        if mount.propagation != cri.PROPAGATION_PRIVATE:
            raise InvalidArgument(f"recursive_read_only of {place} needs private propagation: invalid argument")
        options.append("rro")
    else:
        options.append("ro" if mount.readonly else "rw")
    if mount.selinux_relabel and label:
        relabel(source, label)
    entry: dict[str, Any] = {"destination": place, "type": "bind", "source": source, "options": options}
    if mount.uidMappings or mount.gidMappings:
        entry["uidMappings"], entry["gidMappings"] = mappings(mount.uidMappings), mappings(mount.gidMappings)
    return entry


def mappings(items: Iterable[cri.IDMapping]) -> list[dict[str, int]]:
    """As the OCI specification has them."""
    return [{"containerID": item.container_id, "hostID": item.host_id, "size": item.length} for item in items]


def _source(path: str) -> str:
    """The real path; a folder is made where nothing is, as docker and containerd have it."""
    if not path.startswith("/"):
        raise InvalidArgument(f"host path {path!r} of a mount isn't absolute: invalid argument")
    try:
        if not os.path.exists(path):
            os.makedirs(path, mode=0o755, exist_ok=True)
        return os.path.realpath(path, strict=True)
    except OSError as error:
        raise FailedPrecondition(f"failed to mkdir or resolve {path!r}: {error.strerror}") from error


def _propagation(mount: cri.Mount, source: str, linux: dict[str, Any]) -> list[str]:
    if mount.propagation == cri.PROPAGATION_BIDIRECTIONAL:
        _check_propagation(source, ("shared:",), "shared")
        linux["rootfsPropagation"] = "rshared"
        return ["rshared"]
    if mount.propagation == cri.PROPAGATION_HOST_TO_CONTAINER:
        _check_propagation(source, ("shared:", "master:"), "shared or slave")
        if linux.get("rootfsPropagation") not in {"rshared", "rslave"}:
            linux["rootfsPropagation"] = "rslave"
        return ["rslave"]
    if mount.propagation != cri.PROPAGATION_PRIVATE:
        raise InvalidArgument(
            f"unknown mount propagation {mount.propagation} of {mount.container_path}: invalid argument"
        )
    return ["rprivate"]


def _check_propagation(source: str, tags: tuple[str, ...], what: str) -> None:
    """The mount that a path lies on passes mounts on. Raises FailedPrecondition."""
    on = None
    for info in mountinfo():
        below = info.target in {"/", source} or source.startswith(f"{info.target}/")
        if below and (on is None or len(info.target) >= len(on.target)):
            on = info
    if on is None or not any(tag.startswith(tags) for tag in on.propagation):
        target = on.target if on is not None else "/"
        raise FailedPrecondition(
            f"path {source!r} is mounted on {target!r} but it is not a {what} mount: failed precondition"
        )
