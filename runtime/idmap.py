"""Idmapped mounts: a bind mount whose files show other owners than they have (mount_setattr(2), MOUNT_ATTR_IDMAP).

It takes rights on the filesystem, which the root of a container's user namespace hasn't. So the runtime prepares the
detached tree before it forks, and init only attaches it.
"""

from __future__ import annotations

import os

from wherry.linux import mounts as m
from wherry.linux import namespaces
from wherry.linux import syscalls as sc
from wherry.runtime.errors import ContainerError
from wherry.runtime.root import clone_tree, set_attributes

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from wherry.runtime.plan import Plan


def prepare(plan: Plan, mount: dict[str, Any]) -> int:
    """The tree of one mount of the configuration, mapped and with its attributes set; the caller closes it."""
    source = os.path.normpath(os.path.join(plan.state.bundle, mount["source"]))
    wanted = mount.get("options") or ()
    options = m.Options(option for option in wanted if option not in m.OURS)
    recursive = "ridmap" in wanted
    tree = users = -1
    try:
        users = _user_namespace(plan, mount)
        tree = clone_tree(sc.AT_FDCWD, source, recursive=bool(options.flags & sc.MS_REC))
        flags = sc.AT_EMPTY_PATH | (sc.AT_RECURSIVE if recursive else 0)
        sc.mount_setattr(tree, "", flags, set_=sc.MOUNT_ATTR_IDMAP, userns_fd=users)
        set_attributes(tree, options)
    except OSError as error:
        if tree >= 0:
            os.close(tree)
        what = f'error mounting "{mount["source"]}" to rootfs at "{mount["destination"]}": '
        raise ContainerError(f"{what}can't map its ids: {(error.strerror or str(error)).lower()}") from None
    finally:
        if users >= 0:
            os.close(users)
    return tree


def _user_namespace(plan: Plan, mount: dict[str, Any]) -> int:
    """Descriptor of a user namespace with the mount's mappings, by default those of the container."""
    joined = plan.joined.get("user", -1)
    if not mount.get("uidMappings") and joined >= 0:
        return os.dup(joined)
    holder = mount if mount.get("uidMappings") else plan.linux
    return namespaces.make_user_namespace(_lines(holder["uidMappings"]), _lines(holder["gidMappings"]))


def _lines(mappings: list[dict[str, Any]]) -> str:
    """As /proc/PID/uid_map takes them. A mount's `containerID` is what its files have, `hostID` what they show:
    in user_namespaces(7)'s words the id inside and the one outside, as for a process."""
    return "".join(f"{i.get('containerID') or 0} {i.get('hostID') or 0} {i['size']}\n" for i in mappings)
