"""Further processes in a container: the container's own process with what is asked for differently."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from wherry.client.spec import merge_env
from wherry.core.errors import FailedPrecondition, InvalidArgument

if TYPE_CHECKING:
    from wherry.client.api import Client
    from wherry.client.containers import Container


async def process_of(
    client: Client,
    container: Container,
    args: Sequence[str],
    *,
    tty: bool = False,
    env: Sequence[str] = (),
    cwd: str = "",
    user: str = "",
) -> dict[str, Any]:
    """The `process` for `tasks.exec`; `user` is `NAME|UID[:GROUP|GID]` of the container's files.

    Raises FailedPrecondition where the container has no OCI specification, InvalidArgument.
    """
    if container.spec is None:
        raise FailedPrecondition(f"container {container.id} has no OCI specification to take the process from")
    if not args:
        raise InvalidArgument("exec needs a command after the container")
    process = dict(container.spec.get("process") or {})
    base = process.get("env") or []
    shown = merge_env(["TERM=xterm"], base) if tty else base
    process |= {"args": list(args), "terminal": tty, "env": merge_env(shown, env)}
    if cwd:
        process["cwd"] = cwd
    if user:
        from wherry.client import users
        from wherry.client.lifecycle import mounts_of

        process["user"] = users.resolve(user, users.reader(await mounts_of(client, container))).json()
    return process
