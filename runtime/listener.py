"""SCMP_ACT_NOTIFY: the listener's descriptor goes to the agent at `linux.seccomp.listenerPath`.

OCI runtime specification, config-linux.md ("The Container Process State"): one message, the state as JSON, the
descriptors it names beside it as SCM_RIGHTS.
"""

from __future__ import annotations

import os

from wherry.linux import syscalls as sc
from wherry.runtime import console, quickjson
from wherry.runtime.errors import ContainerError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from wherry.runtime.plan import Plan


def send(plan: Plan, pid: int, number: int) -> None:
    """Take descriptor `number` of the process `pid`, which waits, and send it."""
    profile = plan.linux.get("seccomp") or {}
    state = plan.state.oci("running" if plan.is_exec else "creating")
    if not plan.is_exec:
        state["pid"] = pid
    message = {
        "ociVersion": state["ociVersion"],
        "fds": ["seccompFd"],
        "pid": pid,
        **({"metadata": profile["listenerMetadata"]} if profile.get("listenerMetadata") else {}),
        "state": state,
    }
    fd = sock = -1
    pidfd = os.pidfd_open(pid)
    try:
        fd = sc.pidfd_getfd(pidfd, number)
        sock = console.connect(profile["listenerPath"])
        console.send_master(sock, fd, quickjson.dumps(message))
    except OSError as error:
        raise ContainerError(f"can't hand over the seccomp listener: {error.strerror}") from None
    finally:
        for opened in (pidfd, fd, sock):
            if opened >= 0:
                os.close(opened)
